"""Files of `torch.save`, zip and legacy, and raw pickles of modules and tensors: read without
executing them, numbers memory-mapped."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.pickled import Blob, Refused, StorageRef, TensorRef
from adamerge.weights.formats.safe_pickle import load

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a legacy file
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_KINDS: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (*_KINDS.values(), torch.uint16, torch.uint32, torch.uint64)
} | {name: getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}
_Place = tuple[mmap.mmap | bytearray, int, int]  # what holds a storage, where, how many bytes


class TorchFile:
    """What a `.pt`, `.pth`, `.bin` or `.ckpt` file holds.

    Attributes:
        root: the saved object; tensors are `TensorRef`, objects `Standin` (see `safe_pickle`).

    Raises:
        AdamergeError: truncated, damaged, or asking for anything but tensors and containers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            # A private mapping: nothing is read before it is used, nothing is ever written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._places: dict[str, _Place] = {}  # of files without checksums
            with _blaming(path):
                self._is_zip = self._map[:4] == b"PK\x03\x04"
                if self._is_zip:
                    self.root = self._open_zip(file)
                elif self._map[: len(LEGACY_START)] == LEGACY_START:
                    self.root, self._places = _open_legacy(self._map, self._map, len(self._map))
                else:
                    self._nested: dict[Blob | str, StorageRef] = {}
                    self.root = load(cast(BinaryIO, self._map), self._storage)

    def _open_zip(self, file: BinaryIO) -> Any:
        try:
            with zipfile.ZipFile(file) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise Refused(f"its end is missing or damaged: {error}") from error
        roots = [name for name in self._entries if name.rpartition("/")[2] == "data.pkl"]
        if len(roots) != 1:
            raise Refused("a zip archive, but not one of torch.save: it has no data.pkl")
        self._checked: set[str] = set()
        self._prefix = roots[0].removesuffix("data.pkl")
        order = f"{self._prefix}byteorder"
        if order in self._entries and self._content(order) != b"little":
            raise Refused("saved on a big-endian machine, or its byte order is damaged")
        return load(self._content(roots[0]))

    def _content(self, name: str) -> bytes:
        start, size = self._entry(self._entries[name])
        return self._map[start : start + size]

    def _entry(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        """Where a zip entry begins and its size, held against its checksum once."""
        start, size = info.header_offset, info.file_size
        header = self._map[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Refused(f"the entry {info.filename} is damaged")
        start += 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        if info.compress_type or info.flag_bits & 1 or size != info.compress_size:
            raise Refused(f"the entry {info.filename} is compressed, which torch.save never does")
        if start + size > len(self._map):
            raise Refused(f"it ends inside the entry {info.filename}")
        if info.filename not in self._checked:
            with memoryview(self._map) as whole, whole[start : start + size] as content:
                if zlib.crc32(content) != info.CRC:
                    raise Refused(f"the checksum of {info.filename} is wrong: bits were flipped")
            self._checked.add(info.filename)
        return start, size

    def _storage(self, content: Blob | str) -> StorageRef:
        """The storage that a raw pickle holds as a legacy file of its own: a place in the file or,
        before pickle's protocol 3, its bytes as a text."""
        if content in self._nested:
            return self._nested[content]
        if isinstance(content, Blob):
            back = self._map.tell()
            self._map.seek(content.start)
            root, places = _open_legacy(self._map, self._map, content.start + content.size)
            self._map.seek(back)
        else:
            buffer = bytearray(content, "latin1")
            root, places = _open_legacy(io.BytesIO(buffer), buffer, len(buffer))
        if not isinstance(root, StorageRef) or root.key not in places:
            raise Refused("a file within a pickle that holds no tensor")
        storage = StorageRef(str(len(self._places)), root.kind, root.numel)
        self._places[storage.key] = places[root.key]
        self._nested[content] = storage
        return storage

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor a reference stands for, mapped from the file (never write into it).

        Raises:
            AdamergeError: sizes that do not fit the file, an unknown type, a wrong checksum.
        """
        with _blaming(self.path):
            dtype = stored = _dtype(ref.storage)
            if ref.dtype is not None:
                if ref.dtype not in _DTYPES:
                    raise Refused(f"tensors of the unknown type {ref.dtype}")
                dtype = _DTYPES[ref.dtype]
            buffer, start, size = self._place(ref.storage.key)
            claimed = ref.storage.numel * stored.itemsize
            if claimed != size or size % dtype.itemsize:
                raise Refused(f"a tensor claims {claimed} bytes where the file has {size}")
            count = size // dtype.itemsize
            _check_view(ref, count, dense=not self._is_zip)
            if count == 0:
                return torch.empty(ref.size, dtype=dtype)
            flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)
            view = flat.as_strided(ref.size, ref.stride, ref.offset)
            return view.neg() if ref.negative else view

    def _place(self, key: str) -> _Place:
        if self._is_zip:
            info = self._entries.get(f"{self._prefix}data/{key}")
            if info is None:
                raise Refused(f"it lacks the tensor data {key!r}")
            return self._map, *self._entry(info)
        if key not in self._places:
            raise Refused("its list of tensors is damaged")
        return self._places[key]


def _open_legacy(
    file: mmap.mmap | io.BytesIO, buffer: mmap.mmap | bytearray, end: int
) -> tuple[Any, dict[str, _Place]]:
    """What a legacy file holds that begins where `file` is, and where in `buffer`, the bytes of
    `file`, each storage is. (A mapping, unlike an open file, makes no room for more bytes than
    there are.)"""
    storages: list[StorageRef] = []
    stream = cast(BinaryIO, file)
    if load(stream) != _MAGIC or load(stream) != 1001:
        raise Refused("not a file of torch.save")
    system = load(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("saved on a big-endian machine")
    root, keys = load(stream, storages=storages), load(stream)
    sizes = {storage.key: _dtype(storage).itemsize for storage in storages}
    if not isinstance(keys, list) or len({*map(str, keys)}) != len(keys):
        raise Refused("its list of tensors is damaged")
    places: dict[str, _Place] = {}
    place = file.tell()
    for key in map(str, keys):
        file.seek(min(place, end))
        numel = int.from_bytes(file.read(8), "little")
        if key not in sizes:
            raise Refused("its list of tensors is damaged")
        places[key] = (buffer, place + 8, numel * sizes[key])
        place += 8 + numel * sizes[key]
        if place > end:
            raise Refused("it ends inside its tensors")
    if place != end:
        raise Refused("it goes on behind its last tensor")
    return root, places


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise AdamergeError(f"{path} cannot be read safely ({error}): {error.mend}") from error


def _dtype(storage: StorageRef) -> torch.dtype:
    name = storage.kind.rpartition(".")[2]
    if name not in _KINDS:
        raise Refused(f"tensors of the unknown type {storage.kind}")
    return _KINDS[name]


def _check_view(ref: TensorRef, count: int, dense: bool) -> None:
    """Refuses a view that is not within its storage, or, to find damage, one that is not dense."""
    elements = math.prod(ref.size)
    if elements == 0:
        return
    steps = sorted(zip(ref.stride, ref.size, strict=True))
    last = ref.offset + sum((n - 1) * step for step, n in steps)
    if last >= count or elements > count:
        raise Refused(f"a tensor of shape {list(ref.size)} over {count} numbers")
    following = 1
    for step, n in steps if dense else ():
        if n > 1 and step != following:
            raise Refused(f"a tensor of shape {list(ref.size)} with strides {ref.stride}")
        following *= n
