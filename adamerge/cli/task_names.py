"""Which task a file or folder is of, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

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
