"""Images in NumPy files: `.npy` and `.npz`, read without unpickling anything."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from adamerge._base.errors import AdamergeError
from adamerge.images.local_files import split_names
from adamerge.images.source import file_stats

_SKIP = 1 << 20  # bytes that are unpacked at once on the way to a row
_IMAGES = "uint8 images [N, H, W], [N, H, W, 3] or [N, 3, H, W]"
_MEND = (
    "save floats from 0 to 1 as (255 * x).round().astype('uint8'), 16 bits as "
    "(x >> 8).astype('uint8')"
)
_WIDEST = 1 << 28  # bytes of one image
_BOMB, _RATIO = 1 << 28, 500  # unpacked bytes, and how many times the packed ones, that are refused


class ArraySource:
    """The arrays of one `.npy` (its images, as `image`) or `.npz` file.

    Only the headers are read at first. The images of an `.npz` are unpacked in their order, no more
    of them at once than are asked for, which a finished cache never does.

    Args:
        where: the configuration's key, for messages.
        split: `{split}_images` and `x_{split}` (or with another name of that split) come first
            among the usual names.

    Raises:
        AdamergeError: no NumPy file, or an array of Python objects, which would have to be
            unpickled; nothing of the kind is ever loaded.
    """

    def __init__(self, where: str, path: Path, split: str) -> None:
        self.where, self.path, self.split = where, path, split
        self._opened: dict[str, _Rows] = {}
        try:
            self.shapes = _npz(path) if path.suffix.lower() == ".npz" else _npy(path)
        except AdamergeError as error:
            raise AdamergeError(f"{where}.path: {error}") from error
        except Exception as error:  # a header may fail in a dozen ways
            reason = " ".join(str(error).split())[:200]
            raise AdamergeError(
                f"{where}.path: cannot read {str(path)!r} as a NumPy file ({reason}): expected "
                f"{_IMAGES}"
            ) from error

    @property
    def columns(self) -> list[str]:
        return list(self.shapes)

    def rows(self, column: str) -> int:
        shape = self.shapes[column][0]
        return shape[0] if shape else 1

    def images(self, column: str, start: int, stop: int) -> Sequence[Any]:
        return list(self._rows(column, start, min(stop, self.rows(column))))

    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]:
        shape, _ = self.shapes[column]
        if len(shape) != 1 and shape[1:] != (1,):
            raise AdamergeError(
                f"{self.where}.label: array {column!r} of {self.path} has shape {list(shape)}: "
                "expected one label for each image, [N] or [N, 1]"
            )
        array = self._rows(column, 0, shape[0]).reshape(-1)
        if array.dtype.kind == "S":
            array = array.astype(str)
        return array.tolist(), None

    def key(self, column: str) -> str:
        return hashlib.sha256(repr((column, file_stats([self.path]))).encode()).hexdigest()

    def usual(self, kind: str) -> list[str]:
        first, letter = ("labels", "y") if kind == "label" else ("images", "x")
        pairs = [(f"{one}_{first}", f"{letter}_{one}") for one in split_names(self.split)]
        splits = [name for pair in pairs for name in pair]
        names = (*splits, first, letter, "targets" if kind == "label" else "data")
        if kind == "label":
            return [name for name in names if name in self.shapes][:1]
        usual = [name for name in names if self.holds_images(name)]
        usual = usual[:1] or [name for name in self.shapes if self.holds_images(name)]
        other = [name for name in names if len(self.shapes.get(name, ((), 0))[0]) in (3, 4)]
        if other and not usual:
            shape, dtype = self.shapes[other[0]]
            raise AdamergeError(
                f"{self.where}.image: array {other[0]!r} of {self.path} holds {dtype} of shape "
                f"{list(shape)}: expected {_IMAGES}; {_MEND}"
            )
        return usual

    def holds_images(self, column: str) -> bool:
        shape, dtype = self.shapes.get(column, ((), np.dtype(bool)))
        if dtype != np.uint8 or len(shape) not in (3, 4) or math.prod(shape[1:]) > _WIDEST:
            return False
        return len(shape) == 3 or shape[-1] in (1, 3, 4) or shape[1] in (1, 3)

    def _rows(self, column: str, start: int, stop: int) -> np.ndarray:
        try:
            if self.path.suffix.lower() != ".npz":
                mapped: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
                return mapped[start:stop]
            if column not in self._opened:
                self._opened[column] = _Rows(self.path, column)
            return self._opened[column].read(start, stop)
        except AdamergeError as error:
            raise AdamergeError(f"{self.where}.path: {error}") from error
        except Exception as error:  # and so may what follows it
            self._opened.pop(column, None)
            reason = " ".join(str(error).split())[:200]
            raise AdamergeError(
                f"{self.where}.path: cannot read array {column!r} of {self.path} ({reason}): "
                "the file is damaged; get it again"
            ) from error


class _Rows:
    """The rows of one array of an `.npz`: unpacked as they are asked for, never all at once.

    Rows are cheap to ask for in their order; going back starts anew. The checksum, which is of the
    whole array, is held against it once the last row is read.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._at = 0  # the row that comes next
        self._open()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, `[stop - start, …]`; EOFError or a zip error if damaged."""
        if self._file.closed or start < self._at:
            self._file.close()
            self._at = 0
            self._open()
        left = (start - self._at) * self._width
        while left:  # not `seek`, which may lose the checksum
            left -= len(self._take(min(left, _SKIP)))
        content = self._take((stop - start) * self._width)
        self._at = stop
        if stop == self.shape[0]:
            self._file.read(1)  # to the very end, where the checksum is looked at
            self._file.close()
        return np.ndarray((stop - start, *self.shape[1:]), self.dtype, content)

    def _take(self, size: int) -> bytes:
        found = self._file.read(size)
        if len(found) < size:
            raise EOFError(f"it ends {size - len(found)} bytes too early")
        return found

    def _open(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            names = (f"{self.column}.npy", self.column)
            member = next(m for m in archive.infolist() if m.filename in names)
            self._file = archive.open(member)  # stays open without the archive
        what = f"array {self.column!r} of {self.path}"
        self.shape, self.dtype, by_column = _header(self._file, what, member.file_size)
        if by_column:
            self._file.close()
            raise AdamergeError(
                f"{what} is stored in Fortran order, of which no single image can be unpacked: "
                "save np.ascontiguousarray of it, or a .npy file"
            )
        self._width = math.prod(self.shape[1:]) * self.dtype.itemsize


Shapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def _npy(path: Path) -> Shapes:
    with path.open("rb") as file:
        shape, dtype, _ = _header(file, str(path), os.path.getsize(path))
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise AdamergeError(
            f"{path} holds {dtype} of shape {list(shape)}: expected {_IMAGES}; {_MEND}"
        )
    return {"image": (shape, dtype)}


def _npz(path: Path) -> Shapes:
    found: Shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            claimed, packed = member.file_size, min(member.compress_size, path.stat().st_size)
            if claimed > max(_BOMB, _RATIO * packed):
                raise AdamergeError(
                    f"array {name!r} of {path} claims {claimed / 1e6:.0f} MB in {packed / 1e6:.1f} "
                    f"MB, as no pictures do: expected at most {_RATIO} times; save it as .npy"
                )
            with archive.open(member) as file:
                what = f"array {name!r} of {path}"
                found[name] = _header(file, what, member.file_size)[:2]
    return found


def _header(file: IO[bytes], what: str, size: int) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, type and whether it is in Fortran order, if the file is as long as they say."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, by_column, dtype = read(file)
    if dtype.hasobject:
        raise AdamergeError(
            f"{what} holds Python objects, which are never unpickled: save plain arrays of numbers "
            "or texts instead"
        )
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {list(shape)}")
    if file.tell() + math.prod(shape) * dtype.itemsize > size:
        raise AdamergeError(
            f"{what} is cut short: {size} bytes are fewer than its shape {list(shape)} needs; get "
            "it again"
        )
    return shape, dtype, by_column
