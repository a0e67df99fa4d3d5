"""Images in NumPy files: `.npy` and `.npz`, read without unpickling anything."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from adamerge._base.errors import AdamergeError, one_line
from adamerge.images.local_files import split_names
from adamerge.images.source import file_stats

_IMAGES = "uint8 images [N, H, W], [N, H, W, 3] or [N, 3, H, W]"
_MEND = (
    "save floats from 0 to 1 as (255 * x).round().astype('uint8'), 16 bits as "
    "(x >> 8).astype('uint8')"
)
_WIDEST = 1 << 28  # bytes of one image
_BOMB, _RATIO = 1 << 28, 500  # unpacked bytes, and how many times the packed ones, that are refused

Kind = tuple[tuple[int, ...], np.dtype[Any]]  # shape and type


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
        self._packed = path.suffix.lower() == ".npz"
        self._opened: dict[str, _PackedRows] = {}
        with self._reading(f"{str(path)!r} as a NumPy file", f"expected {_IMAGES}"):
            self.kinds = _packed_kinds(path) if self._packed else {"image": _image_kind(path)}

    @property
    def columns(self) -> list[str]:
        return list(self.kinds)

    def rows(self, column: str) -> int:
        shape, _ = self.kinds[column]
        return shape[0] if shape else 1

    def images(self, column: str, start: int, stop: int) -> Sequence[Any]:
        return list(self._rows(column, start, min(stop, self.rows(column))))

    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]:
        shape, _ = self.kinds[column]
        if len(shape) != 1 and shape[1:] != (1,):
            raise AdamergeError(
                f"{self.where}.label: array {column!r} of {self.path} has shape {list(shape)}: "
                "expected one label for each image, [N] or [N, 1]"
            )
        array = self._rows(column, 0, shape[0]).reshape(-1)
        return (array.astype(str) if array.dtype.kind == "S" else array).tolist(), None

    def key(self, column: str) -> str:
        return hashlib.sha256(repr((column, file_stats([self.path]))).encode()).hexdigest()

    def usual(self, kind: str) -> list[str]:
        first, letter = ("labels", "y") if kind == "label" else ("images", "x")
        pairs = [(f"{one}_{first}", f"{letter}_{one}") for one in split_names(self.split)]
        names = [name for pair in pairs for name in pair]
        names += [first, letter, "targets" if kind == "label" else "data"]
        if kind == "label":
            return [name for name in names if name in self.kinds][:1]
        usual = [name for name in names if self.holds_images(name)][:1]
        usual = usual or [name for name in self.kinds if self.holds_images(name)]
        for name in names:
            if not usual and name in self.kinds and len(self.kinds[name][0]) in (3, 4):
                what = f"{self.where}.image: array {name!r} of {self.path}"
                raise _no_images(what, self.kinds[name])
        return usual

    def holds_images(self, column: str) -> bool:
        shape, dtype = self.kinds.get(column, ((), np.dtype(bool)))
        if dtype != np.uint8 or len(shape) not in (3, 4) or math.prod(shape[1:]) > _WIDEST:
            return False
        return len(shape) == 3 or shape[-1] in (1, 3, 4) or shape[1] in (1, 3)

    def _rows(self, column: str, start: int, stop: int) -> np.ndarray:
        what = f"array {column!r} of {self.path}"
        with self._reading(what, "the file is damaged; get it again"):
            if not self._packed:
                return np.load(self.path, mmap_mode="r", allow_pickle=False)[start:stop]
            rows = self._opened.pop(column, None)  # gone where reading fails
            if rows is None or start < rows.next:
                rows = _PackedRows(self.path, column, what)
            array = rows.read(start, stop)
            self._opened[column] = rows
            return array

    @contextlib.contextmanager
    def _reading(self, what: str, mend: str) -> Iterator[None]:
        try:
            yield
        except AdamergeError as error:
            raise AdamergeError(f"{self.where}.path: {error}") from error
        except Exception as error:  # a damaged file fails in a dozen ways
            raise AdamergeError(
                f"{self.where}.path: cannot read {what} ({one_line(error)}): {mend}"
            ) from error


class _PackedRows:
    """The rows of one array of an `.npz` in their order, unpacked as they are asked for.

    The checksum, which is of the whole array, is held against it once the last row is read.
    """

    def __init__(self, path: Path, column: str, what: str) -> None:
        with zipfile.ZipFile(path) as archive:
            names = (f"{column}.npy", column)
            member = next(m for m in archive.infolist() if m.filename in names)
            self._file = archive.open(member)  # stays open without the archive
        (self._shape, self._dtype), by_column = _header(self._file, what, member.file_size)
        if by_column:
            raise AdamergeError(
                f"{what} is stored in Fortran order, of which no single image can be unpacked: "
                "save np.ascontiguousarray of it, or a .npy file"
            )
        self.next = 0  # the row that comes next

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, `[stop - start, …]`; EOFError or a zip error if damaged."""
        width = math.prod(self._shape[1:]) * self._dtype.itemsize
        for _ in range(self.next, start):  # not `seek`, which may lose the checksum
            self._file.read(width)
        content = self._file.read((stop - start) * width)
        self.next = stop
        if len(content) < (stop - start) * width:
            raise EOFError("it ends too early")
        if stop == self._shape[0]:
            self._file.read(1)  # to the very end, where the checksum is looked at
        return np.ndarray((stop - start, *self._shape[1:]), self._dtype, content)


def _image_kind(path: Path) -> Kind:
    with path.open("rb") as file:
        kind, _ = _header(file, str(path), path.stat().st_size)
    if kind[1] != np.uint8 or len(kind[0]) not in (3, 4):
        raise _no_images(str(path), kind)
    return kind


def _no_images(what: str, kind: Kind) -> AdamergeError:
    shape, dtype = kind
    return AdamergeError(
        f"{what} holds {dtype} of shape {list(shape)}: expected {_IMAGES}; {_MEND}"
    )


def _packed_kinds(path: Path) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            what = f"array {name!r} of {path}"
            claimed, packed = member.file_size, min(member.compress_size, path.stat().st_size)
            if claimed > max(_BOMB, _RATIO * packed):
                raise AdamergeError(
                    f"{what} claims {claimed / 1e6:.0f} MB in {packed / 1e6:.1f} MB, as no "
                    f"pictures do: expected at most {_RATIO} times; save it as .npy"
                )
            with archive.open(member) as file:
                kinds[name], _ = _header(file, what, claimed)
    return kinds


def _header(file: IO[bytes], what: str, size: int) -> tuple[Kind, bool]:
    """Shape and type, and whether it is in Fortran order, if the file is as long as they say."""
    old = np.lib.format.read_magic(file) == (1, 0)
    formats = np.lib.format
    read = formats.read_array_header_1_0 if old else formats.read_array_header_2_0
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
    return (shape, dtype), by_column
