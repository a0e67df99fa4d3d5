"""Every kind of `data:`, written by the libraries people use, gives the same images and labels."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from adamerge import AdamergeError
from adamerge._base import files
from adamerge.cli import main
from adamerge.config import settings as config
from adamerge.images import arrays
from adamerge.images.arrays import ArraySource
from adamerge.images.cache import TaskImages, cache_images
from adamerge.images.sources import open_dataset
from tests import tiny

CFG = open_clip.transform.PreprocessCfg(size=16)
CLASSES = ("red", "green", "blue", "grey")
LABELS = np.repeat([2, 1, 3, 0], 3)  # blue, green, grey, red: folders come in this order
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3)).astype(np.uint8)
Data = dict[str, Any]
Writer = Callable[[Path], Data]


def cached(tmp_path: Path, data: Data, classes: tuple[str, ...] = CLASSES) -> TaskImages:
    """As a run does it (`inputs.load_data`)."""
    return cache_images(
        "t", open_dataset("t", data), classes, CFG, tmp_path / "cache", "error",
        str(data.get("image", "image")), data.get("label", "label"), data.get("label") is not None,
    )  # fmt: skip


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[row]).save(buffer, "png")
    return buffer.getvalue()


def dataset(rows: slice = slice(None)) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
    )
    pictures = [{"bytes": png(row), "path": None} for row in range(12)[rows]]
    columns = {"image": pictures, "label": LABELS[rows]}
    return datasets.Dataset.from_dict(columns, features=features)


def saved(folder: Path) -> Data:
    dataset().save_to_disk(str(folder / "saved"))
    return {"path": str(folder / "saved")}


def saved_dictionary(folder: Path) -> Data:
    both = datasets.DatasetDict(train=dataset(slice(3)), test=dataset())
    both.save_to_disk(str(folder / "both"))
    return {"path": str(folder / "both"), "split": "test"}


def parquet_file(folder: Path) -> Data:
    dataset().to_parquet(folder / "some.parquet")
    return {"path": str(folder / "some.parquet")}


def parquet_snapshot(folder: Path) -> Data:
    """A copy of a repository of the hub."""
    (folder / "data").mkdir()
    dataset(slice(3)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    dataset(slice(0, 7)).to_parquet(folder / "data" / "test-00000-of-00002.parquet")
    dataset(slice(7, 12)).to_parquet(folder / "data" / "test-00001-of-00002.parquet")
    (folder / "README.md").write_text("# images")
    return {"path": str(folder), "split": "test"}


def parquet_glob(folder: Path) -> Data:
    for part, rows in (("a", slice(0, 5)), ("b", slice(5, 12))):
        (folder / "deep [1]" / part).mkdir(parents=True)
        dataset(rows).to_parquet(folder / "deep [1]" / part / "x.parquet")
    return {"path": str(folder / "**" / "*.parquet")}


def parquet_of_others(folder: Path) -> Data:
    """Written without `datasets`: plain bytes, class names, other column names."""
    columns = {"png": [png(row) for row in range(12)], "kind": [CLASSES[i] for i in LABELS]}
    pq.write_table(pa.table(columns), folder / "plain.parquet")
    return {"path": str(folder / "plain.parquet"), "label": "kind"}


def arrow_stream(folder: Path) -> Data:
    dataset().save_to_disk(str(folder / "saved"))
    return {"path": str(folder / "saved" / "*.arrow")}


def arrow_file(folder: Path) -> Data:
    table = dataset().with_format("arrow")[:]
    with pa.ipc.new_file(str(folder / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    return {"path": str(folder / "x.arrow")}


def web_shards(folder: Path) -> Data:
    with webdataset.ShardWriter(str(folder / "s-%03d.tar"), maxcount=5, verbose=0) as writer:
        for row in range(12):
            sample = {"__key__": f"{row:03}", "png": png(row), "cls": int(LABELS[row])}
            writer.write(sample)
    return {"path": str(folder / "s-*.tar"), "image": "png", "label": "cls"}


def web_defaults(folder: Path) -> Data:
    return {"path": web_shards(folder)["path"].replace("s-*.tar", "")}


def web_json(folder: Path) -> Data:
    with tarfile.open(folder / "x.tar", "w") as archive:
        for row in range(12):
            about = json.dumps({"label": CLASSES[LABELS[row]], "width": 24}).encode()
            for ending, content in (("png", png(row)), ("json", about)):
                info = tarfile.TarInfo(f"{row:03}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return {"path": str(folder / "x.tar"), "label": "json.label"}


def class_folders(folder: Path) -> Data:
    for row, label in enumerate(LABELS):
        path = folder / "pictures" / CLASSES[label] / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(row))
    return {"path": str(folder / "pictures")}


def described_folder(folder: Path) -> Data:
    rows = [{"file_name": f"{row:03}.png", "label": CLASSES[LABELS[row]]} for row in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in range(12):
        (folder / f"{row:03}.png").write_bytes(png(row))
    return {"path": str(folder)}


def npz_channels_first(folder: Path) -> Data:
    np.savez(folder / "x.npz", pictures=PIXELS.transpose(0, 3, 1, 2), numbers=LABELS)
    return {"path": str(folder / "x.npz"), "image": "pictures", "label": "numbers"}


def npz_splits(folder: Path) -> Data:
    """Named as MedMNIST does, labels in a column."""
    arrays = {"test_images": PIXELS, "test_labels": LABELS[:, None], "train_images": PIXELS[:3]}
    np.savez_compressed(folder / "x.npz", **arrays)
    return {"path": str(folder / "x.npz"), "split": "test"}


def npz_names(folder: Path) -> Data:
    np.savez(folder / "x.npz", x=PIXELS, y=np.array(CLASSES)[LABELS])
    return {"path": str(folder / "x.npz")}


def npy(folder: Path) -> Data:
    np.save(folder / "x.npy", PIXELS)
    return {"path": str(folder / "x.npy")}


def flat_folder(folder: Path) -> Data:
    for row in range(12):
        (folder / f"{row:03}.png").write_bytes(png(row))
    return {"path": str(folder)}


LABELLED: list[Writer] = [
    *(saved, saved_dictionary, parquet_file, parquet_snapshot, parquet_glob, parquet_of_others),
    *(arrow_stream, arrow_file, web_shards, web_defaults, web_json, class_folders),
    *(described_folder, npz_channels_first, npz_splits, npz_names),
]


@pytest.mark.parametrize("write", [*LABELLED, npy, flat_folder], ids=lambda write: write.__name__)
def test_every_kind_gives_the_same_images_key_and_labels(tmp_path: Path, write: Writer) -> None:
    (tmp_path / "data").mkdir()
    data = write(tmp_path / "data")
    found = cached(tmp_path, data)
    transform = open_clip.transform.image_transform_v2(CFG, is_train=False)
    steps = transform.transforms[:-2]  # all but the conversion to floats
    for row in range(12):
        image = Image.fromarray(PIXELS[row])
        for step in steps:
            image = step(image)
        np.testing.assert_array_equal(found.images[row], np.asarray(image).transpose(2, 0, 1))
    (tmp_path / "reference").mkdir()
    assert found.key == cached(tmp_path, npy(tmp_path / "reference")).key
    if write in LABELLED:
        np.testing.assert_array_equal(found.labels, LABELS)
    else:
        assert found.labels is None
    before = sorted((tmp_path / "cache" / "images").rglob("*"))
    assert cached(tmp_path, data).key == found.key
    assert sorted((tmp_path / "cache" / "images").rglob("*")) == before


def folder_of(root: Path, *places: str) -> Data:
    for row, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(png(row))
    return {"path": str(root)}


def test_class_folders_named_by_number(tmp_path: Path) -> None:
    classes = tuple(f"kind {letter}" for letter in "lkjihgfedcba")
    data = folder_of(tmp_path / "x", *(f"{number}/a.png" for number in range(12)))
    assert cached(tmp_path, data, classes).labels.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_saved_folder_of_numbers_is_not_in_the_order_of_texts(tmp_path: Path) -> None:
    """What `load_dataset("imagefolder")` makes of the same folders."""
    classes = tuple(f"kind {letter}" for letter in "lkjihgfedcba")
    names = sorted(map(str, range(12)))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    columns = {
        "image": [{"bytes": png(row), "path": None} for row in range(12)],
        "label": range(12),
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    found = cached(tmp_path, {"path": str(tmp_path / "saved")}, classes)
    assert found.labels.tolist() == [int(name) for name in names]


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "x", "2020/01/a.png", "2020/02/b.png", "2021/01/c.png")
    with pytest.raises(AdamergeError, match=r"'01', '02'; its classes are red, .* set label: null"):
        cached(tmp_path, data)
    assert cached(tmp_path, {**data, "label": None}).labels is None


@pytest.mark.parametrize("stray", ["stray.png", "red/more/stray.png"])
def test_images_at_several_depths(tmp_path: Path, stray: str) -> None:
    data = folder_of(tmp_path / "x", "red/a.png", "red/b.png", "blue/c.png", stray)
    message = rf"has 3 images 1 folders deep and 1 at another depth, such as {stray}, .*label: null"
    with pytest.raises(AdamergeError, match=message):
        cached(tmp_path, data)
    found = cached(tmp_path, {**data, "label": None})
    assert len(found.images) == 4 and found.labels is None
    (tmp_path / "x" / stray).unlink()
    assert cached(tmp_path, data).labels.tolist() == [2, 0, 0]


def test_links_in_circles_repeat_no_image(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", "a.png")
    data = folder_of(tmp_path / "x", "red/a.png", "red/b.png")
    for link, target in (("red/up", ".."), ("red/out", "../.."), ("again", "red"),
                         ("blue", "../elsewhere"), ("blue2", "../elsewhere")):  # fmt: skip
        (tmp_path / "x" / link).symlink_to(target)
    assert cached(tmp_path, data).labels.tolist() == [2, 0, 0]


def test_grey_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", PIXELS[..., 0])
    np.savez(tmp_path / "rgb.npz", images=PIXELS[..., :1].repeat(3, axis=-1))
    grey = cached(tmp_path, {"path": str(tmp_path / "grey.npy")})
    assert grey.key == cached(tmp_path, {"path": str(tmp_path / "rgb.npz")}).key


def test_array_columns_and_out_of_range_arrays(tmp_path: Path) -> None:
    features = datasets.Features(image=datasets.Array3D((20, 24, 3), "uint8"))
    exact = datasets.Dataset.from_dict({"image": list(PIXELS)}, features=features)
    found = cache_images("t", exact, CLASSES, CFG, tmp_path)
    assert found.key == cached(tmp_path, npy(tmp_path)).key
    features = datasets.Features(image=datasets.Array3D((20, 24, 3), "float32"))
    floats = datasets.Dataset.from_dict({"image": list(PIXELS / 255)}, features=features)
    with pytest.raises(AdamergeError, match=r"can be decoded \(ValueError: an array of float32"):
        cache_images("t", floats, CLASSES, CFG, tmp_path)


def test_a_shard_written_again_is_read_again(tmp_path: Path) -> None:
    before = cached(tmp_path, parquet_file(tmp_path))
    dataset(slice(0, 5)).to_parquet(tmp_path / "some.parquet")
    assert len(cached(tmp_path, {"path": str(tmp_path / "some.parquet")}).images) == 5
    assert len(before.images) == 12


def test_columns_are_found_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    cached(tmp_path, web_defaults(tmp_path))
    assert "images from column 'png'" in caplog.text and "labels from column 'cls'" in caplog.text
    assert "task t: 12 images, 0 MB in " in caplog.text


def test_orientation_of_the_camera_is_respected(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    tall = Image.fromarray(PIXELS[0])
    tall.save(tmp_path / "a.png", exif=exif)
    dataset = open_dataset("t", {"path": str(tmp_path)})
    found = cache_images("t", dataset, CLASSES, CFG, tmp_path / "cache")
    upright = {"path": str(tmp_path / "up.npz")}
    np.savez(tmp_path / "up.npz", x=np.rot90(PIXELS[0], -1)[None])
    assert found.key == cached(tmp_path, upright).key


def test_relative_globs_of_a_suite(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    dataset().to_parquet(tmp_path / "shards" / "x.parquet")
    tree = yaml.safe_load(suite.read_text())
    (task,) = list(tree["tasks"])[:1]
    for path in ("shards/*.parquet", "**/x.parquet"):
        tree["tasks"][task]["data"] = {"path": path}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
        loaded = config.load([f"suite={tmp_path / 'mine.yaml'}"])
        data = loaded["suite"]["tasks"][task]["data"]
        assert Path(data["path"]).is_absolute() and len(cached(tmp_path, data).images) == 12


def test_a_run_learns_the_same_from_other_files(suite: Path, tmp_path: Path) -> None:
    """Parquet shards and an unlabeled folder, against the same images saved by `datasets`."""
    tree = yaml.safe_load(suite.read_text())
    tree["architecture"] = tree["pretrained"] = str(suite.parent / "model")
    (tmp_path / "folder").mkdir()
    for task, entry in tree["tasks"].items():
        entry["expert"] = str(suite.parent / entry["expert"])
        tiny.images(task).to_parquet(tmp_path / f"{task}-0.parquet")
    for row, image in enumerate(tiny.images("dots")["image"]):
        image.save(tmp_path / "folder" / f"{row:03}.png")
    tree["tasks"]["stripes"]["data"] = {"path": "stripes-*.parquet"}
    tree["tasks"]["dots"]["data"] = {"path": "folder"}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    found = []
    for source in (suite, tmp_path / "mixed.yaml"):
        run = tmp_path / f"run-{source.stem}"
        words = [f"suite={source}", f"cache_dir={tmp_path / 'cache'}", "wandb=off", "batch_size=4"]
        words += ["trainer.max_steps=3", "trainer.accelerator=cpu", "evaluate.baselines=false"]
        assert main(["train", *words, f"run_dir={run}"]) == 0
        found.append((run / "coefficients.csv").read_text())
    assert found[0] == found[1]


class Trap:
    """An object that leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickled_arrays_are_refused_and_never_run(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.save(tmp_path / "objects.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "objects.npz", images=PIXELS, labels=trap)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name, message in (
        ("objects.npy", r"objects\.npy holds Python objects, which are never unpickled"),
        ("objects.npz", r"array 'labels' of .* holds Python objects, which are never unpickled"),
        ("pickle.npy", r"data\.path: cannot read .*pickle\.npy' as a NumPy file"),
    ):
        with pytest.raises(AdamergeError, match=message):
            open_dataset("t", {"path": str(tmp_path / name)})
    assert not (tmp_path / "sprung").exists()


def test_numpy_files_that_do_not_fit(tmp_path: Path) -> None:
    def refused(message: str, **data: Any) -> None:
        with pytest.raises(AdamergeError, match=message):
            cached(tmp_path, {"path": str(tmp_path / "x.npz"), **data})

    np.savez(tmp_path / "x.npz", images=PIXELS, labels=LABELS[:5])
    refused(r"has 12 images in 'images' but 5 labels in 'labels'")
    refused(r"no image column 'pics': its columns are images, labels", image="pics")
    refused(r"column 'labels' of task 't' holds no images", image="labels")
    np.savez(tmp_path / "x.npz", images=PIXELS.astype(np.float32))
    refused(r"image: array 'images' of .* holds float32 of shape .* as \(255 \* x\)\.round\(\)")
    np.savez(tmp_path / "x.npz", x_test=PIXELS.astype(np.uint16) * 257)
    refused(r"image: array 'x_test' .* uint16 .*: expected uint8 images .* as \(x >> 8\)")
    np.save(tmp_path / "x.npy", PIXELS.astype(np.float32))
    with pytest.raises(AdamergeError, match=r"holds float32 of shape .* expected uint8 images"):
        open_dataset("t", {"path": str(tmp_path / "x.npy")})
    np.save(tmp_path / "x.npy", PIXELS)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(AdamergeError, match=r"is cut short: .* get it again"):
        open_dataset("t", {"path": str(tmp_path / "x.npy")})
    np.savez(tmp_path / "x.npz", images=PIXELS)
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[5000] ^= 1
    (tmp_path / "x.npz").write_bytes(whole)
    refused(r"cannot read array 'images' of .* the file is damaged; get it again")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    refused(r"cannot read .*x\.npz' as a NumPy file")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_of_an_npz_in_any_order(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "x.npz", images=PIXELS)
    source = ArraySource("data", tmp_path / "x.npz", "test")
    for start, stop in ((0, 3), (3, 4), (7, 9), (2, 3), (10, 20), (0, 12), (11, 12)):
        np.testing.assert_array_equal(source.images("images", start, stop), PIXELS[start:stop])


def test_an_npz_is_never_unpacked_whole(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((400, 256, 256, 3), np.uint8))
    source = ArraySource("data", tmp_path / "x.npz", "test")
    tracemalloc.start()
    try:
        for start in range(0, 400, 10):
            assert len(source.images("images", start, start + 10)) == 10
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6 < 400 * 256 * 256 * 3  # of 79 MB


def test_damage_in_an_npz_is_found_after_going_on_from_half_way(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS)
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[5000] ^= 1
    (tmp_path / "x.npz").write_bytes(whole)
    source = ArraySource("data", tmp_path / "x.npz", "test")
    with pytest.raises(AdamergeError, match=r"cannot read array 'images' .*Bad CRC-32"):
        source.images("images", 10, 12)


def test_arrays_of_an_npz_that_cannot_be_read_row_by_row(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.asfortranarray(PIXELS), labels=np.zeros((12, 2), int))
    source = ArraySource("data", tmp_path / "x.npz", "test")
    with pytest.raises(
        AdamergeError, match=r"data\.path: array 'images' .* is stored in Fortran or"
    ):
        source.images("images", 0, 1)
    with pytest.raises(AdamergeError, match=r"data\.label: array 'labels' .* shape \[12, 2\]: exp"):
        source.labels("labels")
    with zipfile.ZipFile(tmp_path / "y.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        claimed = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 999, 999)}
        np.lib.format.write_array_header_1_0(header, claimed)
        archive.writestr("images.npy", header.getvalue() + bytes(1000))
    with pytest.raises(AdamergeError, match=r"is cut short: \d+ bytes are fewer than its shape"):
        ArraySource("data", tmp_path / "y.npz", "test")


def claim(folder: Path, shape: tuple[int, ...], content: int) -> Path:
    """An .npz that claims images of a shape and has so many bytes of zeros."""
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with archive.open("images.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(content))
    return folder / "x.npz"


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        ((40_000, 10, 10), 4_000_000, r"claims 4 MB in 0\.0 MB, as no pictures do: expected at"),
        ((-1, 5, 5), 100, r"as a NumPy file \(shape \[-1, 5, 5\]\)"),
        ((1, 10**5, 10**5), 100, r"is cut short"),
    ],
)  # fmt: skip
def test_an_npz_that_claims_more_than_it_has(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    content: int,
    message: str,
) -> None:
    monkeypatch.setattr(arrays, "_BOMB", 1 << 20)
    path = claim(tmp_path, shape, content)
    with pytest.raises(AdamergeError, match=message):
        ArraySource("data", path, "test")


@pytest.mark.parametrize(
    ("asked", "there"),
    [("validation", "val"), ("val", "validation"), ("validation", "Valid"), ("dev", "val"),
     ("test", "eval"), ("val", "dev")],
)  # fmt: skip
def test_a_split_is_found_by_its_other_names(tmp_path: Path, asked: str, there: str) -> None:
    folder_of(tmp_path / "folder", "train/red/a.png", f"{there}/red/b.png", f"{there}/blue/c.png")
    found = cached(tmp_path, {"path": str(tmp_path / "folder"), "split": asked})
    assert len(found.images) == 2 and sorted(found.labels) == [0, 2]
    (tmp_path / "shards").mkdir()
    dataset(slice(4)).to_parquet(tmp_path / "shards" / f"{there}-0.parquet")
    dataset(slice(5)).to_parquet(tmp_path / "shards" / "train-0.parquet")
    assert len(open_dataset("t", {"path": str(tmp_path / "shards"), "split": asked})) == 4
    np.savez(tmp_path / "x.npz", **{f"{there.lower()}_images": PIXELS, "train_images": PIXELS})
    assert len(cached(tmp_path, {"path": str(tmp_path / "x.npz"), "split": asked}).images) == 12
    both = datasets.DatasetDict({"train": dataset(), there.lower(): dataset(slice(3))})
    both.save_to_disk(str(tmp_path / "saved"))
    assert len(open_dataset("t", {"path": str(tmp_path / "saved"), "split": asked})) == 3


def test_a_split_of_two_names_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "x", "val/a.png", "valid/b.png", "valid/c.png")
    for split, count in (("val", 1), ("valid", 2), ("validation", 2)):
        assert len(open_dataset("t", {**data, "split": split})) == count


def failing(kind: str) -> datasets.Dataset:
    """A data set of the user's, whose own code is at fault."""
    if kind == "disk":
        raise OSError(28, "No space left on device")
    if kind == "value":
        raise ValueError("two\nlines")
    return {} if kind == "type" else datasets.load_from_disk("/no/where")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("disk", r"raised OSError: \[Errno 28\] No space left on device \(.*test_sources\.py, line"),
     ("value", r"raised ValueError: two lines \(.*test_sources\.py, line \d+\): mend the function"),
     ("library", r"raised FileNotFoundError: Directory /no/where .*test_sources\.py, line \d+\)"),
     ("type", r"returned dict: expected one datasets\.Dataset")],
)  # fmt: skip
def test_a_function_of_the_users_that_fails(kind: str, message: str) -> None:
    target = {"_target_": "tests.test_sources.failing", "kind": kind}
    with pytest.raises(AdamergeError, match=rf"^suite\.tasks\.t\.data: tests.*{message}"):
        open_dataset("t", target)


@pytest.mark.parametrize("code", ["raise OSError(28, 'No space')", "1 / 0", "x ="])
def test_a_module_of_the_users_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (tmp_path / "failing_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    message = r"cannot import 'failing_module\.f' \((OSError|ZeroDivisionError|SyntaxError): "
    with pytest.raises(AdamergeError, match=message):
        open_dataset("t", {"_target_": "failing_module.f"})


@pytest.mark.parametrize("place", range(0, 2000, 7))
def test_a_flipped_byte_of_an_npz_is_a_sentence_or_harmless(tmp_path: Path, place: int) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=PIXELS[:3], labels=LABELS[:3])
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[-1 - place] ^= 1 << place % 8
    (tmp_path / "x.npz").write_bytes(whole)
    try:
        source = ArraySource("data", tmp_path / "x.npz", "test")
        for column in source.columns:
            source.images(column, 0, source.rows(column))
    except AdamergeError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", '{"features": 5}', None])
def test_damage_to_what_is_said_of_a_saved_data_set(
    tmp_path: Path, name: str, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    path = tmp_path / "saved" / name
    monkeypatch.setattr(files, "_MOST_BYTES", 200_000)
    path.write_text(" " * 200_001 if content is None else content)
    with pytest.raises(AdamergeError, match=r"^suite\.tasks\.t\.data\.path: ") as told:
        open_dataset("t", {"path": str(tmp_path / "saved")})
    assert "\n" not in str(told.value) and len(str(told.value)) < 1000


@pytest.mark.parametrize("name", ["x.parquet", "x.npz", "x.csv", "in/x.tar", "in/metadata.csv"])
@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / name)
    path = (tmp_path / name).parent if name.startswith("in/") else tmp_path / name
    with pytest.raises(AdamergeError, match=r"data\.path: .* (not a regular|neither a) file"):
        open_dataset("t", {"path": str(path)})


def test_places_without_images_are_named(tmp_path: Path) -> None:
    def refused(message: str, path: str, **data: Any) -> None:
        with pytest.raises(AdamergeError, match=message):
            open_dataset("t", {"path": str(tmp_path / path), **data})

    (tmp_path / "empty").mkdir()
    refused(r"data\.path: .*empty holds no images: expected files such as \.jpg", "empty")
    refused(r"data\.path: .* matches 0 files: expected files of one kind", "*.parquet")
    (tmp_path / "a.tar").write_bytes(b"")
    dataset().to_parquet(tmp_path / "a.parquet")
    refused(r"matches 2 files of several kinds: expected files of one kind", "a.*")
    refused(r"holds parquet and webdataset files: expected one kind", "")
    refused(r"data\.path: .*a\.tar is empty \(0 bytes\): get it again", "a.tar")
    (tmp_path / "x.json").write_text("[]")
    refused(r"x\.json is of no kind that is read: expected a hub name", "x.json")
    for split in ("train", "val"):
        (tmp_path / "splits" / split).mkdir(parents=True)
    refused(r"data\.split: no folder .* for split 'test': .* has train, val", "splits")
    (tmp_path / "only").mkdir()
    dataset().to_parquet(tmp_path / "only" / "train-0.parquet")
    refused(r"data\.split: no files of 'test' in .*: it has train", "only")
    refused(r"data\.split: no files of 'dev' in .*: it has train", "only", split="dev")
    (tmp_path / "only" / "train-0.parquet").write_bytes(b"PAR1 not really")
    refused(r"data\.path: cannot read .*only'", "only", split="train")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.tar", "x.npy", "x.npz"])
def test_what_is_no_data_at_all_is_named(tmp_path: Path, name: str) -> None:
    for content, message in (
        (b"", r"is empty \(0 bytes\): get it again"),
        (b"\n<!DOCTYPE html>\n<html>", "is a web page saved under that name: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, .* `git lfs pull`"),
        (b'{"error": "no such\n file"}', "a text that begins .*error.* the download failed"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AdamergeError, match=rf"suite\.tasks\.t\.data\.path: .*{message}"):
            open_dataset("t", {"path": str(tmp_path / name)})


def test_zeros_of_an_interrupted_download(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(bytes(1000))
    with pytest.raises(AdamergeError, match="zeros where its header should be: an interrupted dow"):
        open_dataset("t", {"path": str(tmp_path / "x.npy")})


def test_bytes_that_are_no_text_are_not_called_one(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(b"\xff" * 600)
    with pytest.raises(AdamergeError, match=r"path: cannot read .*x\.arrow'"):
        open_dataset("t", {"path": str(tmp_path / "x.arrow")})


def test_a_damaged_shard_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "some.parquet").write_bytes(b"PAR1" + bytes(1000))
    logger = logging.getLogger("datasets")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(AdamergeError, match=r"cannot read .*some\.parquet' \(Arrow"):
            open_dataset("t", {"path": str(tmp_path / "some.parquet")})
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.text


def test_a_pointer_in_a_saved_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AdamergeError, match=r"\.arrow is a Git LFS pointer"):
        open_dataset("t", {"path": str(tmp_path / "saved")})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": ["a", "b"]}, r"path is \['a', 'b'\]: expected str$"),
        ({"path": 5}, r"path is 5: expected str$"),
        ({"path": ""}, r"path is '': expected a path or a hub name$"),
        ({"path": "x", "split": 5}, r"split is 5: expected str or none$"),
        ({"path": "x", "label": False}, r"label is False: expected str or none$"),
        ({"path": "x", "image": None}, r"image is None: expected str$"),
        ({"path": "x", "name": 3}, r"name is 3: expected str or none$"),
        ({"path": "x", "revision": 1.5}, r"revision is 1\.5: expected str or none$"),
        ({"_target_": "adamerge.images.demo.dataset", "task": "digits", "split": "test",
          "label": 3}, r"label is 3: expected str or none$"),
    ],
)  # fmt: skip
def test_mistyped_keys(data: Data, message: str) -> None:
    with pytest.raises(AdamergeError, match=rf"^suite\.tasks\.t\.data\.{message}"):
        open_dataset("t", data)


@pytest.mark.parametrize(
    "path",
    ["test.parquet", "./x", "/no/where", "~/nowhere-at-all", "a/b/c", "here/eurosta", "x.csv"],
)
def test_a_mistyped_path_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / "here" / "eurosat").mkdir(parents=True)
    with pytest.raises(AdamergeError, match=r"data\.path: no such file or folder .* mend the path"):
        open_dataset("t", {"path": path})
    with pytest.raises(AdamergeError, match=r"eurosta' \(did you mean 'eurosat'\?\)"):
        open_dataset("t", {"path": "here/eurosta"})


def test_the_home_folder_and_a_glob_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    flat_folder(tmp_path)
    found = cached(tmp_path, {"path": "~/0*.png"})
    assert len(found.images) == 12 and found.labels is None
    assert found.key == cached(tmp_path, npy(tmp_path)).key


def test_a_split_of_the_hub_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, files = datasets.load_dataset, {}
    for name, rows in (("train", 4), ("valid", 3)):
        files[name] = str(tmp_path / f"{name}.parquet")
        tiny.images("dots").select(range(rows)).to_parquet(files[name])

    def from_files(path: str, name: None, split: str, revision: None) -> datasets.Dataset:
        return load("parquet", data_files=files, split=split)

    monkeypatch.setattr(datasets, "load_dataset", from_files)
    for split, rows in (("validation", 3), ("val", 3), ("train", 4), ("valid[:2]", 2)):
        opened = open_dataset("t", {"path": "owner/name", "split": split})
        assert isinstance(opened, datasets.Dataset) and len(opened) == rows
    message = r"data\.split: no 'test' in owner/name: it has 'train', 'valid'$"
    with pytest.raises(AdamergeError, match=message):
        open_dataset("t", {"path": "owner/name"})


def test_a_hub_out_of_reach_is_one_sentence() -> None:
    message = (
        r"data\.path: cannot read 'owner/name' from the hub .*reach.* no file or folder of that"
    )
    with pytest.raises(AdamergeError, match=message) as e:
        open_dataset("t", {"path": "owner/name", "split": "test"})
    assert "\n" not in str(e.value)
