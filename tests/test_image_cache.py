"""The image cache: killed and gone on with, shared by processes, damaged, full, and safe."""

from __future__ import annotations

import fcntl
import io
import logging
import multiprocessing
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pyarrow as pa
import pytest
from PIL import Image

from adamerge import AdamergeError
from adamerge.images import cache, decoding
from adamerge.images.arrays import ArraySource
from adamerge.images.cache import TaskImages, cache_images
from tests.processes import METHOD, started

CFG = open_clip.transform.PreprocessCfg(size=16)
COUNT = 150


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3)).astype(np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    made = np.stack([picture(index) for index in range(COUNT)])
    np.save(tmp_path / "x.npy", made)
    return made


def channels_first(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def build(folder: Path) -> dict[str, Any]:
    """Writes a cache folder from `x.npy`."""
    source = ArraySource("data", folder / "x.npy", "test")
    return cache.write_folder(folder / "cache" / "k", "t", source, "image", channels_first)


def count_decodes(kill_at: int = 0) -> list[Any]:
    """What is decoded from now on, as it goes; at that count the process kills itself."""
    decoded: list[Any] = []
    decode = decoding.decode

    def counting(value: Any, *then: Any) -> Any:
        decoded.append(value)
        if len(decoded) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(value, *then)

    decoding.decode = counting
    return decoded


def elsewhere(folder: Path, begin: Barrier, kill_at: int) -> int:
    """Builds in a process of its own, and leaves there what it has made and decoded."""
    decoding._CHUNK = 16
    decoded = count_decodes(kill_at)
    begin.wait(60)
    key = build(folder)["sha256"]
    (folder / "other").write_text(f"{key} {len(decoded)}")
    return 0


def another(folder: Path, kill_at: int = 0) -> BaseProcess:
    """A process that begins to build now."""
    begin = multiprocessing.get_context(METHOD).Barrier(2)
    process = started(partial(elsewhere, folder, begin, kill_at), folder / "errors")
    begin.wait(60)
    return process


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images between two records; what `count_decodes` replaces comes back."""
    monkeypatch.setattr(decoding, "_CHUNK", 16)
    monkeypatch.setattr(decoding, "decode", decoding.decode)


def test_a_killed_build_is_made_again(tmp_path: Path, pictures: np.ndarray) -> None:
    process = another(tmp_path, kill_at=100)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors").read_text()
    cache = tmp_path / "cache"
    assert sorted(path.name for path in cache.iterdir()) == ["k.lock", "k.part"]
    build(tmp_path)
    assert [path.name for path in cache.iterdir()] == ["k"]
    np.testing.assert_array_equal(
        np.load(cache / "k" / "images.npy"), pictures.transpose(0, 3, 1, 2)
    )


def test_two_processes_build_once(tmp_path: Path, pictures: np.ndarray) -> None:
    other = another(tmp_path)
    decoded = count_decodes()
    meta = build(tmp_path)
    other.join(60)
    assert other.exitcode == 0, (tmp_path / "errors").read_text()
    key, count = (tmp_path / "other").read_text().split()
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


def flipped(content: bytes, place: int) -> bytes:
    whole = bytearray(content)
    whole[place] ^= 4
    return bytes(whole)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda content: None,
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"x",
    "first bit": lambda content: flipped(content, 0),
    "middle bit": lambda content: flipped(content, len(content) // 2),
    "last bit": lambda content: flipped(content, len(content) - 1),
    "another list": lambda content: b"[]",
    "deep": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("file", ["images.npy", "meta.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_again(
    tmp_path: Path, pictures: np.ndarray, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = cached(tmp_path)
    expected = np.array(before.images)
    (folder,) = (tmp_path / "c" / "images").iterdir()
    content = DAMAGES[damage]((folder / file).read_bytes())
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    after = cached(tmp_path)
    assert after.key == before.key and "is damaged and made again" in caplog.text
    np.testing.assert_array_equal(after.images, expected)
    caplog.clear()
    assert cached(tmp_path).key == before.key and "is damaged" not in caplog.text


def test_a_changed_row_of_a_broken_image_is_seen(tmp_path: Path) -> None:
    """The labels of all images after it would move."""
    dataset = pictures_on_disk(tmp_path, a=png(0), b=b"broken", c=png(2))
    first = cache_images("t", dataset, ("x", "y", "z"), CFG, tmp_path / "c", "skip")
    (folder,) = (tmp_path / "c" / "images").iterdir()
    told = (folder / "meta.json").read_text()
    assert '"bad": {"1"' in told
    (folder / "meta.json").write_text(told.replace('"bad": {"1"', '"bad": {"2"'))
    again = cache_images("t", dataset, ("x", "y", "z"), CFG, tmp_path / "c", "skip")
    assert again.labels is not None and again.labels.tolist() == [0, 2] and again.key == first.key


def test_a_large_cache_is_checked_in_every_block(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 5000)
    build(tmp_path)
    path = tmp_path / "cache" / "k" / "images.npy"
    content = path.read_bytes()
    assert cache.complete(path.parent) is not None
    for place in range(0, len(content), 4999):
        path.write_bytes(flipped(content, place))
        assert cache.complete(path.parent) is None
    path.write_bytes(content)
    assert cache.complete(path.parent) is not None


def test_a_complete_cache_is_used_where_nothing_can_be_written(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(tmp_path)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
            patch.setattr(os, name, refused)
        patch.setattr(cache, "locked", refused)
        assert cached(tmp_path).key == first.key


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


def test_after_an_error_nothing_is_decoded_again(tmp_path: Path) -> None:
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
    assert not decoded and found.skipped == 1
    assert found.labels is not None and found.labels.tolist() == [0, 2]
    with pytest.raises(AdamergeError, match=r"image 1 of task 't' cannot be decoded"):
        run("error")  # the finished folder remembers
    assert len(decoded) == 1  # tried again


def test_a_broken_image_that_can_be_read_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same size and time, as when a disk was out of reach."""
    dataset = pictures_on_disk(tmp_path, a=png(0), b=png(1), c=png(2))
    decode, failing = decoding.decode, [True]

    def sometimes(value: Any, *then: Any) -> Any:
        if failing[0] and value["path"].endswith("b.png"):
            raise OSError(5, "Input/output error")
        return decode(value, *then)

    monkeypatch.setattr(decoding, "decode", sometimes)
    with pytest.raises(AdamergeError, match=r"image 1 of task 't' .*Input/output error"):
        cache_images("t", dataset, ("x", "y", "z"), CFG, tmp_path / "c")
    failing[0] = False
    found = cache_images("t", dataset, ("x", "y", "z"), CFG, tmp_path / "c")
    assert len(found.images) == 3 and found.skipped == 0


def test_rows_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: Any) -> None:
        raise pa.ArrowInvalid("Buffer 3 is\ntoo short")

    monkeypatch.setattr(ArraySource, "images", damaged)
    message = r"rows 0 to 1 of column 'image' of task 't' cannot .*\(ArrowInvalid: Buffer 3 is too"
    with pytest.raises(AdamergeError, match=message):
        cached(tmp_path)
    assert not list((tmp_path / "c" / "images").iterdir())


def test_large_images_are_read_a_few_at_a_time(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    images = ArraySource.images

    def counting(self: ArraySource, column: str, start: int, stop: int) -> Any:
        read.append(stop - start)
        return images(self, column, start, stop)

    monkeypatch.setattr(ArraySource, "images", counting)
    monkeypatch.setattr(decoding, "_BYTES", 5 * pictures[0].nbytes)
    build(tmp_path)
    assert max(read) == 5 and len(read) == 1 + COUNT // 5


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

    monkeypatch.setattr(cache.os, "posix_fallocate", full, raising=False)
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
    monkeypatch.setattr(decoding.time, "monotonic", lambda: float(next(clock)))
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
