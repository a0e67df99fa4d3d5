"""Images of every depth and mode become 8 bits, or are refused by name; none can take it all."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
from PIL import Image

from adamerge import AdamergeError
from adamerge.images import decoding
from adamerge.images.cache import TaskImages, cache_images
from adamerge.images.decoding import decode, is_image

CFG = open_clip.transform.PreprocessCfg(size=16)
DEEP = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
GREY = (DEEP >> 8).astype(np.uint8)


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("kind", "order"),
    [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2"), ("JPEG2000", "<u2")],
)
def test_sixteen_bits_are_scaled(kind: str, order: str) -> None:
    content = written(Image.fromarray(DEEP.astype(order)), kind)
    np.testing.assert_array_equal(np.asarray(decode(content)), GREY)


def test_integers_are_scaled_where_their_white_is_known() -> None:
    content = written(Image.fromarray(DEEP.astype(np.int32)), "TIFF")
    np.testing.assert_array_equal(np.asarray(decode(content)), GREY)


def test_twelve_bits_of_a_tiff() -> None:
    values = (DEEP >> 4).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8,
                       values[:, 1] & 255], axis=1).astype(np.uint8).tobytes()  # fmt: skip
    tags = {256: 20, 257: 20, 258: 12, 259: 1, 262: 1, 277: 1, 278: 20, 279: len(packed)}
    entries = [(tag, value) for tag, value in tags.items()] + [(273, 8 + 2 + 12 * 9 + 4)]
    head = b"II*\0" + (8).to_bytes(4, "little") + (9).to_bytes(2, "little")
    for tag, value in sorted(entries):
        head += tag.to_bytes(2, "little") + (4).to_bytes(2, "little")
        head += (1).to_bytes(4, "little") + value.to_bytes(4, "little")
    found = np.asarray(decode(head + bytes(4) + packed))
    np.testing.assert_array_equal(found, GREY)


def deep_rgb() -> bytes:
    """A PNG of 16 bits per colour, which Pillow reads but does not write."""
    colours = np.stack([DEEP, DEEP.T, DEEP[::-1]], axis=-1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)

    def part(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = part(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def test_sixteen_bits_of_colours() -> None:
    expected = np.stack([GREY, GREY.T, GREY[::-1]], axis=-1)
    np.testing.assert_array_equal(rgb(decode(deep_rgb())), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_eight_bits_stay_what_they_are(mode: str) -> None:
    image = Image.fromarray(np.stack([GREY, GREY.T, GREY[::-1]], axis=-1)).convert(mode)
    found = decode(written(image, "TIFF"))
    assert found.mode == mode
    np.testing.assert_array_equal(rgb(found), rgb(image))


def test_a_palette_with_transparency() -> None:
    image = Image.fromarray(np.stack([GREY, GREY.T, GREY[::-1]], axis=-1)).convert("P")
    content = written(image, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(rgb(decode(content)), rgb(image))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (DEEP.astype(np.float32), r"mode F \(floats\), of which white is not known: save"),
        ((DEEP / 65535).astype(np.float32), r"mode F \(floats\)"),
        (DEEP.astype(np.int32) * 4, r"mode I with values from 0 to 262140, of which white is not"),
        (DEEP.astype(np.int32) - 9, r"mode I with values from -9 to 65526"),
        (GREY.astype(np.int32), r"mode I with values from 0 to 255, .*: expected 8 bits, or 16"),
    ],
)  # fmt: skip
def test_depths_whose_white_is_not_known(tmp_path: Path, values: np.ndarray, message: str) -> None:
    content = written(Image.fromarray(values), "TIFF")
    with pytest.raises(ValueError, match=message):
        decode(content)
    with pytest.raises(AdamergeError, match=rf"image 1 of task 't' cannot .*{message}"):
        cached(tmp_path, written(Image.fromarray(GREY), "PNG"), content)


def cached(tmp_path: Path, *contents: bytes, on_bad_image: str = "error") -> TaskImages:
    features = datasets.Features(image=datasets.Image())
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    data = datasets.Dataset.from_dict(rows, features=features)
    return cache_images("t", data, ("a", "b"), CFG, tmp_path / "cache", on_bad_image)


def test_a_deep_image_keeps_its_picture_in_the_cache(tmp_path: Path) -> None:
    deep, plain = written(Image.fromarray(DEEP), "PNG"), written(Image.fromarray(GREY), "PNG")
    found = cached(tmp_path, deep, plain).images
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].min() < 20 and found[0].max() > 235


@pytest.mark.parametrize("values", [DEEP, GREY])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_of_every_depth_are_turned_upright(kind: str, values: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(written(Image.fromarray(values), kind, exif=exif))
    np.testing.assert_array_equal(np.asarray(found), np.rot90(GREY, -1))


@pytest.mark.parametrize("low", [0, 1, 255])
def test_pictures_of_one_value_are_warned_of(
    tmp_path: Path, low: int, caplog: pytest.LogCaptureFixture
) -> None:
    flat = written(Image.new("L", (20, 20), low), "PNG")
    for _ in range(2):  # when they are prepared, and when they are found
        caplog.clear()
        cached(tmp_path, flat, flat)
        assert (
            f"task t: the pixels of all 2 images lie between {low} and {low} of 255" in caplog.text
        )
    cached(tmp_path, flat, written(Image.fromarray(GREY), "PNG"))
    assert caplog.text.count("lie between") == 1


@pytest.mark.parametrize("size", [(2_000_000, 1), (1, 2_000_000), (9000, 30)])
def test_an_image_too_narrow_to_be_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    narrow, plain = written(Image.new("L", size), "PNG"), written(Image.fromarray(GREY), "PNG")
    message = rf"{size[0]} × {size[1]} pixels, expected no side over 200 times the other"
    with pytest.raises(AdamergeError, match=rf"image 1 of task 't' cannot be decoded .*{message}"):
        cached(tmp_path, plain, narrow)
    found = cached(tmp_path, plain, narrow, on_bad_image="skip")
    assert len(found.images) == 1 and found.skipped == 1
    with pytest.raises(ValueError, match=message):
        decode(np.zeros(size[::-1], np.uint8))


def test_a_slim_image_is_read() -> None:
    assert decode(written(Image.new("L", (2000, 10)), "PNG")).size == (2000, 10)


@pytest.mark.timeout(20)
def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c.png").mkdir()
    for name in ("a", "b", "c"):
        with pytest.raises(ValueError, match="not a regular file"):
            decode(str(tmp_path / f"{name}.png"))


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    class Lock:
        def __enter__(self) -> None:
            taken.append(True)

        def __exit__(self, *_: object) -> None:
            taken.append(False)

    monkeypatch.setattr(decoding, "_LARGE", 1000)
    monkeypatch.setattr(decoding, "_one_large", Lock())
    decode(written(Image.new("L", (30, 30)), "PNG"))
    assert not taken
    made = decode(written(Image.new("L", (40, 40)), "PNG"), lambda image: (image.size, list(taken)))
    assert made == ((40, 40), [True]) and taken == [True, False]


def test_every_ending_of_a_format_that_is_read_is_an_image() -> None:
    """The rare ones of Pillow's list that other programs use for other things stay out."""
    Image.init()
    known = {e for e, kind in Image.registered_extensions().items() if kind in decoding._FORMATS}
    assert {e for e in known if not is_image(f"a{e}")} == {
        ".pfm", ".bw", ".rgb", ".rgba", ".icb", ".vda", ".vst",
    }  # fmt: skip
    assert all(map(is_image, ("a/B.AVIF", "a.jp2", "a.Jpeg"))) and not is_image("a.txt")


def test_there_is_one_list_of_endings() -> None:
    folder = Path(decoding.__file__).parents[1]
    assert [path.name for path in folder.rglob("*.py") if '".webp"' in path.read_text()] == [
        "decoding.py"
    ]
