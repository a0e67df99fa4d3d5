"""Which task a name is of, and what a folder of data sets has for a task."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json
from adamerge.images.decoding import is_image
from adamerge.images.local_files import split_names, subfolder

# Other names of the shipped tasks, in letters and digits alone. EMNIST is none of them: some
# published experts of that name are of its digits, the shipped task is of its letters.
_ALIASES = {
    "stanford-cars": "cars stanfordcar",
    "sun397": "sun",
    "resisc45": "resisc nwpuresisc45",
    "dtd": "describabletextures",
    "oxford_flowers102": "flowers flowers102 oxfordflowers",
    "oxford-iiit-pet": "pets oxfordpets oxfordpet oxfordiiitpets",
    "pcam": "patchcamelyon",
    "fer2013": "fer",
    "food101": "food",
    "rendered-sst2": "sst2",
    "kmnist": "kuzushijimnist",
}
_BY_ALIAS = {word: task for task, words in _ALIASES.items() for word in words.split()}
# Too common to be taken for a task once something was cut off before them: `race-cars`.
_COMMON = ("cars", "sun", "flowers", "pets", "fer", "food")
_MODEL = re.compile(
    r"^(openai[-_.])?((open)?[-_]?clip[-_.])?vit[-_.]?(base|large|huge|giant|[blhg])"
    r"([-_.]?(patch)?(14|16|32))([-_.]?(224|256|336))?([-_.]?quickgelu)?[-_.]",
    re.IGNORECASE,
)
_STATE = (
    r"(non-?linear|fine-?_?tuned?|ft|expert|lora|adapter|peft|image_?encoder|tower|weights|model"
    r"|final|best|last|merged)"
)
_AFTER = re.compile(rf"[-_.]{_STATE}$", re.IGNORECASE)
_BEFORE = re.compile(rf"^(head|{_STATE})[-_.]", re.IGNORECASE)
_NOTHING = re.compile(
    rf"({_STATE}[-_.]?)+|(checkpoint|ckpt|epoch|step|state_dict|pytorch_model|head|zero-?_?shot)"
    r"([-_.=]?\d+)*",
    re.IGNORECASE,
)
_PRETRAINED = ("zeroshot", "pretrained", "pretrain", "base", "basemodel", "original", "openai")
_FILES = (".parquet", ".arrow", ".tar", ".npz", ".npy")


def normal(name: str) -> str:
    """A name in lower-case letters and digits alone."""
    return re.sub(r"[^0-9a-z]", "", name.casefold())


def says_nothing(stem: str) -> bool:
    """Whether a file's name fits any task's file (`finetuned`, `checkpoint-100`)."""
    return _NOTHING.fullmatch(stem) is not None


def says_pretrained(stem: str) -> bool:
    """Whether a file or folder is named as what everything was fine-tuned from."""
    return normal(stem) in _PRETRAINED


def shipped_task(name: str, shipped: Collection[str], cut: bool = False) -> str | None:
    """The shipped task of a name, whatever its case and separators, or None.

    Args:
        cut: something was taken off before it, so the commonest words are not believed.
    """
    word = normal(name)
    if cut and word in _COMMON:
        return None
    known = {**_BY_ALIAS, **{normal(task): task for task in shipped}}
    # Task arithmetic's scripts call a task whose training images were split `SUN397Val`.
    task = known.get(word) or known.get(word.removesuffix("val"))
    return task if task in shipped else None


def task_name(name: str) -> str:
    """A file's or folder's name without the model's name and words like `finetuned`."""
    shorter = _MODEL.sub("", name)
    while (rest := _BEFORE.sub("", _AFTER.sub("", shorter))) != shorter and rest:
        shorter = rest
    return shorter or name


def without_common_start(names: Sequence[str]) -> list[str]:
    """The names without the whole words that all of them begin with."""
    words = [re.split("(?<=[-_. ])", name) for name in names]
    same = 0
    while (
        len({*names}) > 1 and len({w[same] for w in words}) == 1 and min(map(len, words)) > same + 1
    ):
        same += 1
    return ["".join(w[same:]) for w in words]


def key(name: str) -> str:
    """A name as a key of a suite, one that `suite.tasks.NAME.…` on the command line can reach."""
    return re.sub(r"[^\w-]+", "_", name).strip("_") or "task"


@dataclass
class LocalData:
    """One data set on this disk: a file, or a folder."""

    path: Path
    keys: dict[str, Any] = field(default_factory=dict)  # split, image, label: all that are known
    classes: list[str] | None = None  # in the order of the labels, where they are told
    ordered: bool = True  # that order is the data set's own, and not that of folders' names


def local_data(folder: Path, same: Callable[[str], bool]) -> LocalData | None:
    """The first entry of a folder whose name is the task's, looked at but not read.

    Args:
        same: whether a name is the task's.

    Raises:
        AdamergeError: no such folder.
    """
    if not folder.is_dir():
        raise AdamergeError(f"{folder} is not a folder: name the one that holds the tasks' images")
    for path in sorted(folder.iterdir()):
        if path.is_dir() and same(path.name):
            return _folder(path)
        if path.is_file() and path.suffix.lower() in _FILES and same(path.stem):
            return LocalData(path, {"split": None})
    return None


def agree(data: LocalData, classes: Collection[str]) -> bool:
    """Whether a data set's classes can be a suite's: the same names; in an order of its own, or as
    numbers, also as many."""
    names = data.classes or []
    numbered = data.ordered or all(name.isdigit() for name in names)
    same = {*map(normal, names)} <= {*map(normal, classes)}
    return same or (numbered and len(names) == len(classes))


def _folder(path: Path) -> LocalData:
    if (path / "dataset_dict.json").is_file():
        given = _json(path / "dataset_dict.json").get("splits")
        splits = [str(name) for name in given] if isinstance(given, list) else []
        usual = [*split_names("test"), *split_names("validation"), *splits]
        saved = next((name for name in usual if name in splits), "test")
        return _saved(path, path / saved, saved)
    if (path / "state.json").is_file():
        return _saved(path, path, None)
    split, inner = None, path
    for name in ("validation", None):  # that of `test` is found unnamed
        with contextlib.suppress(AdamergeError):  # folders of other splits
            if (place := subfolder(path, name)) != path:
                split, inner = name, place
    entries = sorted(entry for entry in inner.iterdir() if entry.name[0] != ".")
    keys = {"split": split, "image": "image", "label": None}
    if any(map(is_image, entries)):
        return LocalData(path, keys)
    folders = [entry for entry in entries if entry.is_dir()]
    classes = [entry.name for entry in folders if any(map(is_image, entry.iterdir()))]
    if len(classes) > 1:
        return LocalData(path, {**keys, "label": "label"}, classes, ordered=False)
    # Else shards, perhaps of several splits, or nothing that is known here.
    return LocalData(path, keys if classes else {})


def _saved(path: Path, inner: Path, split: str | None) -> LocalData:
    """A folder of `datasets`: its columns and class names, from the JSON beside the tables."""
    features = _json(inner / "dataset_info.json").get("features")
    named = features.items() if isinstance(features, dict) else ()
    kinds = {name: kind for name, kind in named if isinstance(kind, dict)}
    image = [name for name, kind in kinds.items() if kind.get("_type") == "Image"]
    label = [name for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"]
    keys: dict[str, Any] = {"split": split}
    if len(image) == 1:
        keys["image"] = image[0]
    if "label" in kinds or len(label) == 1:
        keys["label"] = "label" if "label" in kinds else label[0]
    names = kinds.get(keys.get("label", ""), {}).get("names")
    told = [str(name) for name in names] if isinstance(names, list) else None
    return LocalData(path, keys, told or None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except AdamergeError:  # reading the data says more than could be said here
        return {}
