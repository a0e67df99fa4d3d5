"""Files of `torch.save`, zip and legacy, and raw pickles of modules and tensors: read without
executing them, numbers memory-mapped."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.pickled import Blob, Refused, Standin, StorageRef, TensorRef, Unsafe
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
            if os.fstat(file.fileno()).st_size == 0:
                raise AdamergeError(f"{path} is empty: download or save it again")
            # A private mapping: nothing is read before it is used, nothing is ever written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._checked: set[str] = set()
            # Of files without checksums: what holds a storage's numbers, where, and how many.
            self._places: dict[str, tuple[mmap.mmap | bytearray, int, int]] = {}
            self._nested: dict[Blob | int, tuple[Blob | str, StorageRef]] = {}
            with _blaming(path):
                is_zip = self._map[:4] == b"PK\x03\x04"
                self._strict = not is_zip  # only what a whole file must look like
                if is_zip:
                    self.root = self._open_zip(file)
                elif self._map[: len(LEGACY_START)] == LEGACY_START:
                    self.root, places = _open_legacy(cast(BinaryIO, self._map), len(self._map))
                    self._places = {key: (self._map, *place) for key, place in places.items()}
                else:
                    self.root = load(cast(BinaryIO, self._map), self._storage)

    def _open_zip(self, file: BinaryIO) -> Any:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise Refused(f"its end is missing or damaged: {error}") from error
        found = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise Refused("a zip archive, but not one of torch.save: it has no data.pkl")
        self._entries, self._prefix = entries, found[0].removesuffix("data.pkl")
        order = entries.get(f"{self._prefix}byteorder")
        if order is not None and self._content(order) != b"little":
            raise Refused("saved on a big-endian machine, or its byte order is damaged")
        return load(self._content(entries[found[0]]))

    def _content(self, info: zipfile.ZipInfo) -> bytes:
        start, size = self._entry(info)
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
        """The storage that a raw pickle holds as a legacy file of its own.

        Args:
            content: where it is, or, before pickle's protocol 3, its bytes as a text.
        """
        known = self._nested.get(content if isinstance(content, Blob) else id(content))
        if known is not None:
            return known[1]
        if isinstance(content, Blob):
            buffer: mmap.mmap | bytearray = self._map
            back, end = self._map.tell(), content.start + content.size
            self._map.seek(content.start)
            root, places = _open_legacy(cast(BinaryIO, self._map), end)
            self._map.seek(back)
        else:
            buffer = bytearray(content, "latin1")
            root, places = _open_legacy(io.BytesIO(buffer), len(buffer))
        if not isinstance(root, StorageRef) or root.key not in places:
            raise Refused("a file within a pickle that holds no tensor")
        found = StorageRef(str(len(self._places)), root.kind, root.numel)
        self._places[found.key] = (buffer, *places[root.key])
        key = content if isinstance(content, Blob) else id(content)
        self._nested[key] = (content, found)
        return found

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor a reference stands for, mapped from the file (never write into it).

        Raises:
            AdamergeError: sizes that do not fit the file, an unknown type, a wrong checksum.
        """
        with _blaming(self.path):
            kind = _dtype(ref)
            buffer, start, count = self._block(ref, kind)
            _check_view(ref, count, self._strict)
            if count == 0:
                return torch.empty(ref.size, dtype=kind)
            flat = torch.frombuffer(buffer, dtype=kind, count=count, offset=start)
            return flat.as_strided(ref.size, ref.stride, ref.offset)

    def _block(self, ref: TensorRef, kind: torch.dtype) -> tuple[mmap.mmap | bytearray, int, int]:
        """What holds a storage's numbers, where they begin, and how many of `kind` there are."""
        storage = ref.storage
        claimed = storage.numel * _item_size(storage)
        if self._strict:
            if storage.key not in self._places:
                raise Refused("its list of tensors is damaged")
            buffer, start, numel = self._places[storage.key]
            size = numel * _item_size(storage)
        else:
            info = self._entries.get(f"{self._prefix}data/{storage.key}")
            if info is None:
                raise Refused(f"it lacks the tensor data {storage.key!r}")
            buffer, (start, size) = self._map, self._entry(info)
        if claimed != size or size % kind.itemsize:
            raise Refused(f"a tensor claims {claimed} bytes where the file has {size}")
        return buffer, start, size // kind.itemsize


def _open_legacy(file: BinaryIO, end: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What a legacy file holds, and where the numbers of each storage begin and how many.

    Args:
        file: read from where it is. Unlike an open file, a mapping makes no room for more bytes
            than there are.
        end: of the file.
    """
    if load(file) != _MAGIC or load(file) != 1001:
        raise Refused("not a file of torch.save")
    system = load(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("saved on a big-endian machine")
    root, keys = load(file), load(file)
    if not isinstance(keys, list) or len({*map(str, keys)}) != len(keys):
        raise Refused("its list of tensors is damaged")
    places: dict[str, tuple[int, int]] = {}
    sizes = {ref.key: _item_size(ref) for ref in _storages(root)}
    place = file.tell()
    for key in map(str, keys):
        file.seek(min(place, end))
        numel = int.from_bytes(file.read(8), "little")
        if key not in sizes:
            raise Refused("its list of tensors is damaged")
        places[key] = (place + 8, numel)
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
    except Unsafe as error:
        raise AdamergeError(
            f"{path} cannot be read safely ({error}): it holds more than weights, and nothing in "
            "it is ever executed; get the weights elsewhere, best as a state dict in .safetensors"
        ) from error
    except Refused as error:
        raise AdamergeError(
            f"{path} cannot be read safely ({error}): it is truncated, damaged, or holds objects "
            "other than weights, which are never executed; download or save it again, best as a "
            "state dict in .safetensors"
        ) from error


def _item_size(storage: StorageRef) -> int:
    name = storage.kind.rpartition(".")[2]
    if name not in _KINDS:
        raise Refused(f"tensors of the unknown type {storage.kind}")
    return _KINDS[name].itemsize


def _dtype(ref: TensorRef) -> torch.dtype:
    if ref.dtype is None:
        _item_size(ref.storage)
        return _KINDS[ref.storage.kind.rpartition(".")[2]]
    if ref.dtype not in _DTYPES:
        raise Refused(f"tensors of the unknown type {ref.dtype}")
    return _DTYPES[ref.dtype]


def _check_view(ref: TensorRef, count: int, strict: bool) -> None:
    elements = math.prod(ref.size)
    if elements == 0:
        return
    last = ref.offset + sum((n - 1) * step for n, step in zip(ref.size, ref.stride, strict=True))
    if last >= count or elements > count:
        raise Refused(f"a tensor of shape {list(ref.size)} over {count} numbers")
    if strict:
        dense = 1
        for step, n in sorted(zip(ref.stride, ref.size, strict=True)):
            if n > 1 and step != dense:
                raise Refused(f"a tensor of shape {list(ref.size)} with strides {ref.stride}")
            dense *= n


def _storages(root: Any) -> Iterator[StorageRef]:
    """Every storage mentioned in an object, each object looked at once, without recursion."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, TensorRef):
            yield item.storage
        elif isinstance(item, StorageRef):
            yield item
        elif isinstance(item, Mapping | list | tuple | Standin) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Standin):
                waiting += [item.arguments, item.state, item.items]
            else:
                waiting += list(item.values() if isinstance(item, Mapping) else item)
