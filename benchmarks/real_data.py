"""The images of the real suite, 32 x 32 pixels, out of public sets that are fetched on first use.

Of each set: colours; 28 x 28 pixels get a black border, larger images are made smaller; equal
pictures are dropped; test splits hold equally many images of every class, of the set's own test
split where it has one. Crops of a test image are in neither split.

A set that has moved is taken from a folder of yours by `--from hands=FOLDER`: that holds, at any
depth, a folder of images per class, named as in `SOURCES`.
"""

import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DownloadManager, Features, Image, load_dataset
from PIL import Image as Pictures
from real_words import COMMON

Picture = Pictures.Image
Pair = tuple[Picture, int]
SIZE = 32
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Source:
    """Where the images of a domain come from.

    Attributes:
        path: a name on the Hugging Face hub, the address of an archive, or a folder of yours.
        labels: of each class, in the order of `COMMON`: its number there, or its folder's name.
        each: test images per class.
        most: train images per class, at most.
        test: whether there is a test split (`test`, or a folder of that name); else one is drawn.
        image: the column of images on the hub.
        crops: whether four crops, a corner each, are added to every train image.
    """

    path: str
    labels: tuple[int | str, ...]
    each: int
    most: int = 2000
    test: bool = True
    image: str = "image"
    crops: bool = False


GITHUB = "https://github.com/{}/archive/{}.zip"
TEN = tuple(range(10))
SIGNS = (
    1,
    2,
    4,
    5,
    7,
    9,
    10,
    11,
    12,
    13,
    14,
    17,
    18,
    23,
    25,
    26,
    31,
    33,
    35,
    38,
)  # official numbers
FIELDS = ("aGrass", "bField", "cIndustry", "dRiverLake", "eForest", "fResident", "gParking")
SOURCES = {
    "digits": Source("ylecun/mnist", TEN, 60, most=1000),
    "letters": Source("anubhavmaity/notMNIST", TEN, 60, most=1000),
    "signs": Source("tanganke/gtsrb", SIGNS, 30, most=400),
    "hands": Source(
        GITHUB.format("ardamavi/Sign-Language-Digits-Dataset", "master"),
        tuple("0123456789"), 45, test=False,
    ),
    "aerial": Source(
        GITHUB.format("palewithout/RSSCN7", "6d77849df87d242b323184ab096e44dd63730c7e"),
        FIELDS, 80, test=False, crops=True,
    ),
    "objects": Source("uoft-cs/cifar10", TEN, 60, most=1600, image="img"),
    "scenes": Source(
        GITHUB.format("afroozsheikh/Intel-Image-Classifier", "master"),
        ("buildings", "forest", "glacier", "mountain", "sea", "street"), 90,
    ),
    "flowers": Source("xiaopch/flower_photos", tuple(range(5)), 90, test=False),
}  # fmt: skip


def small(picture: Picture) -> Picture:
    """The picture in colours at 32 x 32: smaller ones get a black border."""
    picture = picture.convert("RGB")
    width, height = picture.size
    if max(width, height) > SIZE:
        return picture.resize((SIZE, SIZE), Pictures.Resampling.BICUBIC, reducing_gap=3.0)
    framed = Pictures.new("RGB", (SIZE, SIZE))
    framed.paste(picture, ((SIZE - width) // 2, (SIZE - height) // 2))
    return framed


def corners(picture: Picture) -> Iterator[Picture]:
    """Four crops of 60 % of each side, one in each corner."""
    width, height = picture.size
    right, low = int(0.6 * width), int(0.6 * height)
    for x in (0, width - right):
        for y in (0, height - low):
            yield picture.crop((x, y, x + right, y + low))


def hub_pairs(source: Source, split: str, seed: int) -> Iterator[Pair]:
    """The pictures of a set on the hub, shuffled, with our labels."""
    ours = {label: index for index, label in enumerate(source.labels)}
    rows = load_dataset(source.path, split=split)
    for row in rows.shuffle(seed=seed):
        if row["label"] in ours:
            yield row[source.image], ours[row["label"]]


def folder_pairs(source: Source, folder: Path, split: str, seed: int) -> Iterator[Pair]:
    """The pictures below a folder, shuffled, with our labels, but for damaged files."""
    ours = {label: index for index, label in enumerate(source.labels)}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    parts = [set(path.relative_to(folder).parts[:-2]) for path in paths]
    kept = [
        path
        for path, above in zip(paths, parts, strict=True)
        if path.parent.name in ours
        and (not source.test or any(split in part.lower() for part in above))
    ]
    for index in np.random.default_rng(seed).permutation(len(kept)):
        try:
            picture = Pictures.open(kept[index])
            picture.load()
        except OSError:
            continue
        yield picture, ours[kept[index].parent.name]


def pairs(source: Source, split: str, seed: int) -> Iterator[Pair]:
    """The pictures of a source's split, wherever it is."""
    if "://" in source.path:
        folder = Path(DownloadManager().download_and_extract(source.path))
    elif os.path.isdir(source.path):
        folder = Path(source.path)
    else:
        return hub_pairs(source, split, seed)
    return folder_pairs(source, folder, split, seed)


def chosen(found: Iterable[Pair], classes: int, each: int, seen: set[int]) -> list[Pair]:
    """The first so many pictures of every class whose pixels, made small, are not `seen` yet."""
    kept: list[Pair] = []
    counts = [0] * classes
    for picture, label in found:
        key = zlib.crc32(small(picture).tobytes())
        if counts[label] < each and key not in seen:
            seen.add(key)
            counts[label] += 1
            kept.append((picture, label))
    return kept


def splits(source: Source, seed: int) -> dict[str, list[Pair]]:
    """Small pictures of `test` and `train`, none in both."""
    seen: set[int] = set()
    classes = len(source.labels)
    test = chosen(
        pairs(source, "test" if source.test else "train", seed), classes, source.each, seen
    )
    # Where both come from one split, what the test split holds is seen by now.
    train = chosen(pairs(source, "train", seed), classes, source.most, seen)
    if source.crops:
        train += [(crop, label) for picture, label in train for crop in corners(picture)]
    return {
        "test": [(small(picture), label) for picture, label in test],
        "train": [(small(picture), label) for picture, label in train],
    }


def write(rows: Sequence[Pair], names: Sequence[str], path: Path) -> None:
    """A parquet file with the columns `image` and `label`, in one move."""
    images: list[dict[str, Any]] = []
    for picture, _ in rows:
        data = io.BytesIO()
        picture.save(data, "PNG")
        images.append({"bytes": data.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    columns = {"image": images, "label": [label for _, label in rows]}
    temporary = path.with_suffix(".part")
    Dataset.from_dict(columns, features=features).to_parquet(temporary)
    temporary.replace(path)


def make_data(folder: Path, domains: Sequence[str], own: dict[str, str], seed: int) -> None:
    """Write the two files of every domain; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        paths = {split: folder / f"{domain}-{split}.parquet" for split in ("test", "train")}
        if all(path.exists() for path in paths.values()):
            continue
        source = SOURCES[domain]
        made = splits(replace(source, path=own.get(domain, source.path)), seed)
        for split, path in paths.items():
            write(made[split], COMMON[domain], path)
        print(f"{domain}: {len(made['train'])} train, {len(made['test'])} test", flush=True)
