"""Images in NumPy files: `.npy` and `.npz`, read without unpickling anything."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from adamerge.errors import AdamergeError
from adamerge.image_source import file_stats

_IMAGES = "uint8 images [N, H, W], [N, H, W, 3] or [N, 3, H, W]"


class ArraySource:
    """The arrays of one `.npy` (its images, as `image`) or `.npz` file.

    Only the headers are read at first: an `.npz` is unpacked when its images are asked for, which
    a finished cache never does.

    Args:
        where: the configuration's key, for messages.
        split: `{split}_images` and `x_{split}` come first among the usual names.

    Raises:
        AdamergeError: no NumPy file, or an array of Python objects, which would have to be
            unpickled; nothing of the kind is ever loaded.
    """

    def __init__(self, where: str, path: Path, split: str) -> None:
        self.where, self.path, self.split = where, path, split
        self._loaded: dict[str, np.ndarray] = {}
        try:
            self.shapes = _npz(path) if path.suffix.lower() == ".npz" else _npy(path)
        except AdamergeError as error:
            raise AdamergeError(f"{where}.path: {error}") from error
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise AdamergeError(
                f"{where}.path: cannot read {str(path)!r} as a NumPy file ({reason}): expected "
                f"{_IMAGES}"
            ) from error

    @property
    def columns(self) -> list[str]:
        return list(self.shapes)

    def rows(self, column: str) -> int:
        return self.shapes[column][0][0]

    def images(self, column: str, start: int, stop: int) -> Sequence[Any]:
        return list(self._array(column)[start:stop])

    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]:
        array = self._array(column)
        if array.ndim == 2 and array.shape[1] == 1:  # a column vector
            array = array[:, 0]
        if array.dtype.kind == "S":
            array = array.astype(str)
        return array.tolist(), None

    def key(self, column: str) -> str:
        return hashlib.sha256(repr((column, file_stats([self.path]))).encode()).hexdigest()

    def usual(self, kind: str) -> list[str]:
        if kind == "label":
            names = (f"{self.split}_labels", f"y_{self.split}", "labels", "y", "targets")
            return [name for name in names if name in self.shapes][:1]
        named = (f"{self.split}_images", f"x_{self.split}", "images", "x", "data")
        usual = [name for name in named if name in self.shapes and self.holds_images(name)]
        return usual[:1] or [name for name in self.shapes if self.holds_images(name)]

    def holds_images(self, column: str) -> bool:
        shape, dtype = self.shapes.get(column, ((), np.dtype(bool)))
        if dtype != np.uint8 or len(shape) not in (3, 4):
            return False
        return len(shape) == 3 or shape[-1] in (1, 3, 4) or shape[1] in (1, 3)

    def _array(self, column: str) -> np.ndarray:
        if column not in self._loaded:
            try:
                self._loaded[column] = self._load(column)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                reason = " ".join(str(error).split())[:200]
                raise AdamergeError(
                    f"{self.where}.path: cannot read array {column!r} of {self.path} ({reason}): "
                    "the file is damaged; get it again"
                ) from error
        return self._loaded[column]

    def _load(self, column: str) -> np.ndarray:
        if self.path.suffix.lower() == ".npz":
            with np.load(self.path, allow_pickle=False) as archive:
                unpacked: np.ndarray = archive[column]
                return unpacked
        mapped: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped


Shapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def _npy(path: Path) -> Shapes:
    with path.open("rb") as file:
        shape, dtype = _header(file, str(path), os.path.getsize(path))
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise AdamergeError(f"{path} holds {dtype} of shape {list(shape)}: expected {_IMAGES}")
    return {"image": (shape, dtype)}


def _npz(path: Path) -> Shapes:
    found: Shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                found[name] = _header(file, f"array {name!r} of {path}", member.file_size)
    return found


def _header(file: IO[bytes], what: str, size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type, after checking that the file is as long as they say."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise AdamergeError(
            f"{what} holds Python objects, which are never unpickled: save plain arrays of numbers "
            "or texts instead"
        )
    if file.tell() + math.prod(shape) * dtype.itemsize > size:
        raise AdamergeError(
            f"{what} is cut short: {size} bytes are fewer than its shape {list(shape)} needs; get "
            "it again"
        )
    return shape, dtype
