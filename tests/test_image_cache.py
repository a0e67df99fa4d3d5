"""The image cache: killed and gone on with, shared by processes, damaged, full, and safe."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pyarrow as pa
import pytest
from PIL import Image

from adamerge import AdamergeError, image_files, staging
from adamerge.arrays import ArraySource
from adamerge.image_cache import TaskImages, cache_images
from tests.cache_child import build, count_decodes

CFG = open_clip.transform.PreprocessCfg(size=16)
COUNT = 150


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3)).astype(np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    made = np.stack([picture(index) for index in range(COUNT)])
    np.save(tmp_path / "x.npy", made)
    return made


def child(folder: Path, kill_at: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cache_child", str(folder), str(kill_at)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images between two records; what `count_decodes` replaces comes back."""
    monkeypatch.setattr(image_files, "_CHUNK", 16)
    monkeypatch.setattr(image_files, "decode", image_files.decode)


def test_a_killed_build_goes_on_where_its_record_ends(tmp_path: Path, pictures: np.ndarray) -> None:
    with child(tmp_path, 100) as process:
        start(process)
        assert process.wait() == -signal.SIGKILL
    cache = tmp_path / "cache"
    assert sorted(path.name for path in cache.iterdir()) == ["k.lock", "k.part"]
    done = json.loads((cache / "k.part" / "progress.json").read_text())["done"]
    assert 48 <= done < 100
    decoded = count_decodes()
    meta = build(tmp_path)
    assert len(decoded) == COUNT - done  # nothing that was done is done again
    assert [path.name for path in cache.iterdir()] == ["k"]
    np.testing.assert_array_equal(
        np.load(cache / "k" / "images.npy"), pictures.transpose(0, 3, 1, 2)
    )
    (cache / "k").rename(tmp_path / "resumed")
    assert build(tmp_path)["sha256"] == meta["sha256"]


def test_a_record_that_cannot_be_relied_on_starts_anew(
    tmp_path: Path, pictures: np.ndarray
) -> None:
    part = tmp_path / "cache" / "k.part"
    part.mkdir(parents=True)
    np.save(part / "images.npy", np.zeros((COUNT - 1, 3, 8, 8), np.uint8))  # another length
    for record in ('{"done": 64, "bad": {}}', '{"done": 64, "b', "[]", '{"done": 1e9, "bad": {}}'):
        part.mkdir(exist_ok=True)
        (part / "progress.json").write_text(record)
        build(tmp_path)
        found = np.load(tmp_path / "cache" / "k" / "images.npy")
        np.testing.assert_array_equal(found, pictures.transpose(0, 3, 1, 2))
        (tmp_path / "cache" / "k").rename(part)


def test_two_processes_build_once(tmp_path: Path, pictures: np.ndarray) -> None:
    with child(tmp_path, 0) as other:
        start(other)
        decoded = count_decodes()
        meta = build(tmp_path)
        key, count = other.communicate()[0].split()
    assert key == meta["sha256"]
    assert sorted([int(count), len(decoded)]) == [0, COUNT]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["k"]


def test_a_held_lock_is_waited_for(
    tmp_path: Path, pictures: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    (tmp_path / "cache").mkdir()
    decoded = count_decodes()
    with ThreadPoolExecutor(1) as pool, (tmp_path / "cache" / "k.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(build, tmp_path)
        while "waiting for another process" not in caplog.text:
            assert not waiting.done()
        assert not decoded
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result()["bad"] == {} and len(decoded) == COUNT


def cached(tmp_path: Path, **options: Any) -> TaskImages:
    source = ArraySource("data", tmp_path / "x.npy", "test")
    return cache_images("t", source, ("a", "b"), CFG, tmp_path / "c", **options)


@pytest.mark.parametrize("damage", ["images cut", "images gone", "meta cut", "meta gone"])
def test_a_damaged_folder_is_made_again(
    tmp_path: Path, pictures: np.ndarray, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = cached(tmp_path)
    (folder,) = (tmp_path / "c" / "images").iterdir()
    what, how = damage.split()
    path = folder / {"images": "images.npy", "meta": "meta.json"}[what]
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-1])
    after = cached(tmp_path)
    assert after.key == before.key and "is damaged and made again" in caplog.text
    np.testing.assert_array_equal(after.images, before.images)


def pictures_on_disk(tmp_path: Path, **files: bytes) -> datasets.Dataset:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    columns = {"image": [str(folder / f"{name}.png") for name in files], "label": range(len(files))}
    return datasets.Dataset.from_dict(columns, features=features)


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(index)).save(buffer, "png")
    return buffer.getvalue()


def test_after_an_error_only_the_broken_image_is_tried_again(
    tmp_path: Path,
) -> None:
    dataset = pictures_on_disk(tmp_path, a=png(0), b=b"broken", c=png(2))
    classes = ("x", "y", "z")

    def run(on_bad_image: str) -> TaskImages:
        return cache_images("t", dataset, classes, CFG, tmp_path / "c", on_bad_image)

    with pytest.raises(
        AdamergeError, match=r"image 1 of task 't' .*b\.png: not in an image format"
    ):
        run("error")
    decoded = count_decodes()
    found = run("skip")
    assert len(decoded) == 1 and found.skipped == 1
    assert found.labels is not None and found.labels.tolist() == [0, 2]
    with pytest.raises(AdamergeError, match=r"image 1 of task 't' cannot be decoded"):
        run("error")  # the finished folder remembers


def bomb() -> bytes:
    """A PNG of a few dozen bytes that says it has 10^10 pixels."""

    def part(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header)
    return start + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def test_a_decompression_bomb_is_one_sentence(tmp_path: Path) -> None:
    dataset = pictures_on_disk(tmp_path, a=png(0), b=bomb())
    with pytest.raises(AdamergeError, match=r"image 1 of task 't' .*DecompressionBombError: Image"):
        cache_images("t", dataset, ("x", "y"), CFG, tmp_path / "c")


def test_postscript_is_not_opened(tmp_path: Path) -> None:
    """Pillow hands it to Ghostscript, which is a program that runs programs."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    dataset = pictures_on_disk(tmp_path, a=png(0), b=script)
    with pytest.raises(AdamergeError, match=r"image 1 of task 't' .*not in an image format that"):
        cache_images("t", dataset, ("x", "y"), CFG, tmp_path / "c")


def test_no_space_leaves_nothing_behind(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: .*images\.npy"):
        cached(tmp_path)
    assert not list((tmp_path / "c" / "images").iterdir())


def test_long_builds_say_how_far_they_are(
    tmp_path: Path,
    pictures: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "adamerge")
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(image_files.time, "monotonic", lambda: float(next(clock)))
    build(tmp_path)
    assert "of 150 images prepared, 4/s, " in caplog.text and " s left" in caplog.text


def test_forgotten_leftovers_are_removed(tmp_path: Path, pictures: np.ndarray) -> None:
    weeks, days = tmp_path / "cache" / "weeks.part", tmp_path / "cache" / "days.part"
    for part, age in ((weeks, 8), (days, 6)):
        part.mkdir(parents=True)
        os.utime(part, (time.time() - age * 24 * 3600,) * 2)
    build(tmp_path)
    assert not weeks.exists() and days.exists()


def test_images_of_a_data_set_on_disk_that_are_files_elsewhere(tmp_path: Path) -> None:
    """The Arrow file holds paths; a picture overwritten in place is seen all the same."""
    table = pictures_on_disk(tmp_path, a=png(0), b=png(1)).with_format("arrow")[:]
    with pa.ipc.new_stream(str(tmp_path / "paths.arrow"), table.schema) as writer:
        writer.write_table(table)
    keys = []
    for index in (0, 5):
        (tmp_path / "pictures" / "a.png").write_bytes(png(index))
        dataset = datasets.Dataset.from_file(str(tmp_path / "paths.arrow"))
        keys.append(cache_images("t", dataset, ("x", "y"), CFG, tmp_path / "c").key)
    assert keys[0] != keys[1]
