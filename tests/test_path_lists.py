"""Images named in lists and described beside folders: the files, and their labels."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from adamerge import AdamergeError
from adamerge.images import path_lists
from adamerge.images.cache import TaskImages, cache_images
from adamerge.images.sources import open_dataset

CFG = open_clip.transform.PreprocessCfg(size=16)
CLASSES = ("red", "green", "blue")
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
LABELS = ["blue", "red", "green", "red"]
NAMES = [f"pictures/{row}.png" for row in range(4)]
Writer = Callable[[Path], Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    for name, label in zip(NAMES, LABELS, strict=True):
        Image.new("RGB", (16, 16), label).save(tmp_path / "in" / name)
    return tmp_path / "in"


def cached(path: Path, **data: Any) -> TaskImages:
    """As a run does it (`inputs.load_data`)."""
    return cache_images(
        "t", open_dataset("t", {"path": str(path), **data}), CLASSES, CFG, path.parent / "cache",
        "error", data.get("image", "image"), data.get("label", "label"), "label" in data,
    )  # fmt: skip


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def lines(separator: str, *header: str, labels: list[str] = LABELS) -> str:
    rows = [list(header)] * bool(header) + [list(row) for row in zip(NAMES, labels, strict=True)]
    return "".join(separator.join(row) + "\n" for row in rows)


def records(root: Path, **more: Any) -> str:
    rows = zip(NAMES, LABELS, strict=True)
    return "\n".join(json.dumps({"image": name, "label": label, **more}) for name, label in rows)


def saved(root: Path) -> Path:
    columns = {"image": NAMES, "label": LABELS, "text": ["a.b"] * 4}
    datasets.Dataset.from_dict(columns).save_to_disk(str(root / "saved"))
    return root / "saved"


def parquet(root: Path) -> Path:
    table = pa.table({"path": [str(root / name) for name in NAMES], "label": LABELS})
    pq.write_table(table, root / "x.parquet")
    return root / "x.parquet"


LISTS: dict[str, Writer] = {
    "csv": lambda root: written(root / "x.csv", lines(",", "image", "label")),
    "semicolons": lambda root: written(root / "x.csv", "\ufeff" + lines(";", "file", "label")),
    "tsv": lambda root: written(root / "x.tsv", lines("\t", "path", "label")),
    "no header": lambda root: written(root / "x.csv", lines(",")),
    "jsonl": lambda root: written(root / "x.jsonl", records(root)),
    "nested": lambda root: written(root / "x.jsonl", records(root, box=[1], more={"a": 1}) + "\n"),
    "saved": saved,
    "parquet": parquet,
    "absolute": lambda root: written(
        root / "x.csv", lines(",", "image", "label").replace("pictures", str(root / "pictures"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_images_and_labels_of_a_list(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir("/")
    found = cached(LISTS[name](root))
    assert [tuple(image[:, 0, 0]) for image in found.images] == [COLOURS[x] for x in LABELS]
    assert found.labels is not None
    assert found.labels.tolist() == [CLASSES.index(label) for label in LABELS]


def test_a_list_keeps_its_cache_until_a_picture_changes(root: Path) -> None:
    path = LISTS["csv"](root)
    first = cached(path)
    assert cached(path).key == first.key
    assert len([*(root / "cache" / "images").iterdir()]) == 1
    Image.new("RGB", (16, 16), "green").save(root / NAMES[0])
    assert cached(path).images[0, :, 0, 0].tolist() == [0, 128, 0]


def test_paths_may_start_from_the_working_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = written(tmp_path / "elsewhere" / "x.csv", lines(",", "image", "label"))
    monkeypatch.chdir(root)
    assert len(cached(path).images) == 4
    monkeypatch.chdir(tmp_path)
    message = (
        r"data\.image: column 'image' of .*x\.csv holds texts such as 'pictures/0\.png', to which "
        r"no image file leads from .*elsewhere or .*: expected paths relative to the list"
    )
    with pytest.raises(AdamergeError, match=message):
        cached(path)


def test_class_numbers_and_empty_cells_of_a_list(root: Path) -> None:
    numbers = lines(",", "image", "label", labels=["2", "0", "1", "0"])
    found = cached(written(root / "x.csv", numbers))
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1, 0]
    empty = cached(written(root / "x.csv", lines(",", "image", "label", labels=[""] * 4)))
    assert empty.labels is None


def test_a_column_is_named_where_several_hold_paths(root: Path) -> None:
    rows = [{"photo": name, "mask": NAMES[0], "label": "red"} for name in NAMES]
    path = written(root / "x.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(AdamergeError, match=r"no image column 'image': its columns are photo"):
        cached(path)
    assert [tuple(i[:, 0, 0]) for i in cached(path, image="mask").images] == [COLOURS["blue"]] * 4


def test_a_missing_file_is_a_broken_image(root: Path) -> None:
    (root / NAMES[2]).unlink()
    with pytest.raises(AdamergeError, match=r"image 2 of task 't' cannot .*2\.png.*No such file"):
        cached(LISTS["csv"](root))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", r"x\.csv is empty \(0 bytes\)"),
        ("x.csv", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("x.csv", b"\n\n", r"cannot be read as csv in UTF-8 \(it has no lines\)"),
        ("x.csv", b"image,label\na.png\n", r"columns \['image', 'label'\] and a line \['a\.png'\]"),
        ("x.csv", b"image,image\na.png,b\n", r"columns \['image', 'image'\]"),
        ("x.csv", b"image\n" + b"a" * 2000, r"a line of more than 1000 characters"),
        ("x.csv", b'image\n"a.png', r"no image file leads from|unexpected end"),
        ("x.csv", b"image\n\xff\xfe.png\n", r"in UTF-8 \('utf-8' codec can't decode"),
        ("x.jsonl", b'{"image": ' + b"[" * 900, r"cannot be read as jsonl in UTF-8"),
        ("x.jsonl", b"5\n", r"'5' in place of an object"),
        ("x.jsonl", b'{"image": "a.png"\n', r"cannot be read as jsonl .*: expected one image file"),
        ("x.csv", b"image\n" + b"a.png\n" * 20_000, r"has 0 MB: expected a list of at most 0 MB"),
        ("x.csv", b"image\nhttps://a/b.png\n", r"texts such as 'https://a/b\.png', to which no im"),
    ],
)  # fmt: skip
def test_damaged_lists(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.setattr(path_lists, "_LINE", 1000)
    monkeypatch.setattr(path_lists, "_LARGEST", 100_000)
    (root / name).write_bytes(content)
    with pytest.raises(AdamergeError, match=rf"^suite\.tasks\.t\.data\..*{message}") as told:
        open_dataset("t", {"path": str(root / name)})
    assert "\n" not in str(told.value)


def test_json_a_hundred_thousand_levels_deep(root: Path) -> None:
    path = written(root / "x.jsonl", '{"image": ' + "[" * 100_000)
    with pytest.raises(AdamergeError, match=r"x\.jsonl cannot be read as jsonl"):
        open_dataset("t", {"path": str(path)})


def class_folders(root: Path) -> list[str]:
    names = [f"{label}/{row}.png" for row, label in enumerate(LABELS)]
    for old, new in zip(NAMES, names, strict=True):
        (root / new).parent.mkdir(exist_ok=True)
        (root / old).rename(root / new)
    (root / "pictures").rmdir()
    return names


def test_class_folders_beside_captions_alone(root: Path) -> None:
    names = class_folders(root)
    written(root / "metadata.csv", "file_name,text\n" + "".join(f"{n},a bird\n" for n in names))
    found = cached(root)
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1, 0]
    assert cached(root, label=None).labels is None


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_of_a_description_come_before_folders(root: Path, kind: str) -> None:
    names = class_folders(root)
    columns = {"file_name": names, "label": ["green"] * 4, "kind": LABELS}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if kind == "csv":
        text = [list(columns), *(list(row.values()) for row in rows)]
        written(root / "metadata.csv", "".join(",".join(line) + "\n" for line in text))
    elif kind == "jsonl":
        written(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.table(columns), root / "metadata.parquet")
    assert cached(root).labels.tolist() == [1] * 4  # type: ignore[union-attr]
    assert cached(root, label="kind").labels.tolist() == [2, 0, 1, 0]  # type: ignore[union-attr]


def test_descriptions_in_every_folder(root: Path) -> None:
    for row, label in enumerate(LABELS[:2]):
        folder = root / f"shard{row}"
        folder.mkdir()
        (root / NAMES[row]).rename(folder / "a.png")
        written(folder / "metadata.csv", f"file_name,label\na.png,{label}\n")
    found = cached(root)
    assert found.labels is not None and found.labels.tolist() == [2, 0]


def test_a_table_that_describes_no_images_is_no_description(root: Path) -> None:
    class_folders(root)
    written(root / "metadata.csv", "city,year\nParis,2020\n")
    found = cached(root)
    assert len(found.images) == 4 and found.labels is not None


def png(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def columns_of(**labels: Any) -> datasets.Dataset:
    names = datasets.ClassLabel(names=list(CLASSES))
    features = {name: names if kind == "class" else kind for name, kind in labels.items()}
    columns = {name: [2, 0, 1, 0] for name in labels}
    return datasets.Dataset.from_dict(
        {"image": [png(x) for x in LABELS], **columns},
        features=datasets.Features(image=datasets.Image(), **features),
    )


@pytest.mark.parametrize("name", ["labels", "fine_label", "species"])
def test_the_only_column_of_class_labels(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    data = columns_of(**{name: "class", "coarse": datasets.Value("int64")})
    found = cache_images("t", data, CLASSES, CFG, tmp_path)
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1, 0]
    assert f"labels from column {name!r}" in caplog.text


@pytest.mark.parametrize(
    "kinds", [{"a": "class", "b": "class"}, {"a": datasets.Value("int64")}, {}]
)
def test_no_labels_are_told(
    tmp_path: Path, kinds: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    assert cache_images("t", columns_of(**kinds), CLASSES, CFG, tmp_path).labels is None
    assert f"task t: no labels (columns: {', '.join(['image', *kinds])})" in caplog.text
    caplog.clear()
    cache_images("t", columns_of(**kinds), CLASSES, CFG, tmp_path, label=None)
    assert "no labels" not in caplog.text


def test_no_labels_of_numpy_files_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), kinds=[0, 1])
    assert cached(tmp_path / "x.npz").labels is None
    assert "no labels (columns: images, kinds)" in caplog.text


def test_paths_of_a_hub_are_told_as_texts(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"image": ["https://a/b.png"]})
    with pytest.raises(
        AdamergeError, match=r"holds no images but texts such as 'https://a/b\.png'"
    ):
        cache_images("t", data, CLASSES, CFG, tmp_path)
