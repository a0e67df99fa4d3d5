"""Task vectors in a file that is mapped into memory, never loaded whole; the writing of it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge._base.files import checksum, parse_json, replacing
from adamerge.weights.storage import Layer, Storage

log = logging.getLogger("adamerge")

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNED = 64  # bytes: where every layer begins, as in memory, so that sums round alike
_AT_HAND = 2**28  # bytes of the file left in the process's memory before they are given back
_PIECE = 2**28  # bytes of pinned memory taken at a time
_SCALES = "::scales"


class MappedLayers(Mapping[str, Layer]):
    """The layers of a file of `storing`, mapped.

    A layer's tensors are views of the file: the system reads them when they are used and may drop
    them again. Once 256 MB of them have been handed out, what was mapped is given back, so that
    the process's memory does not grow with the file; a tensor that is still in use is read again.

    Args:
        path: of the file; of one that is written under another name first, the last.
        file: open, where the path does not lead to it (yet).

    Attributes:
        metadata: the texts kept with the tensors.

    Raises:
        AdamergeError: the file is missing or not one of these.
    """

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        self.path = path
        try:
            with contextlib.nullcontext(file) if file is not None else path.open("rb") as opened:
                # A private map: torch wants tensors it may write to, and no write reaches the file.
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            room = int.from_bytes(self._map[:8], "little")
            entries = parse_json(self._map[8 : 8 + room])
            self.metadata: dict[str, str] = entries.pop("__metadata__")
            self._start = 8 + room
            self._entries: dict[str, dict[str, Any]] = entries
            if self._start + sum(map(_size, entries.values())) != len(self._map):
                raise ValueError("its length is not what its header says")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, str(error)) from error
        self._names = [name for name in entries if not name.endswith(_SCALES)]
        self._handed = 0

    def __getitem__(self, name: str) -> Layer:
        if name not in self._entries or name.endswith(_SCALES):
            raise KeyError(name)
        scales = self._tensor(name + _SCALES) if name + _SCALES in self._entries else None
        return Layer(self._tensor(name), scales)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedLayers:
        return self  # frozen

    def __reduce__(self) -> tuple[type[MappedLayers], tuple[Path]]:
        return MappedLayers, (self.path,)  # another process maps the file for itself

    def verified(self) -> MappedLayers:
        """Itself, after reading all of the file once and holding it against its checksums.

        Raises:
            AdamergeError: it is damaged.
        """
        notes = {key: text for key, text in self.metadata.items() if key != "checksums"}
        sums = {"": _of_header(notes, self._entries)}
        sums |= {key: checksum(self._raw(key)) for key in self._entries}
        if json.dumps(sums) != self.metadata.get("checksums"):
            raise _unreadable(self.path, "a checksum of it is wrong")
        return self

    def expect(self, names: list[str]) -> None:
        """Has the system read these layers ahead, while something else is computed."""
        for name in names:
            begin, end = (self._start + offset for offset in self._entries[name]["data_offsets"])
            start = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, end - start)

    def release(self) -> None:
        """Gives back the memory of all that was read; what is used again is read again."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._handed = 0

    def _raw(self, key: str) -> memoryview:
        begin, end = (self._start + offset for offset in self._entries[key]["data_offsets"])
        if self._handed and self._handed + end - begin > _AT_HAND:
            self.release()
        self._handed += end - begin
        return memoryview(self._map)[begin:end]

    def _tensor(self, key: str) -> Tensor:
        raw, shape = self._raw(key), self._entries[key]["shape"]
        dtype = _TYPES[self._entries[key]["dtype"]]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.view(shape)


def _of_header(notes: Mapping[str, str], entries: Mapping[str, Any]) -> str:
    return checksum(json.dumps([notes, entries], sort_keys=True).encode())


def _size(entry: dict[str, Any]) -> int:
    """Bytes of a tensor by its header."""
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(entry["shape"]) * _TYPES[entry["dtype"]].itemsize:
        raise ValueError("its header contradicts itself")
    return int(end - begin)


def _unreadable(path: Path, why: str) -> AdamergeError:
    return AdamergeError(
        f"{path} is not a whole file of stored task vectors ({why}): delete it, and it is made "
        "again"
    )


class _Memory:
    """Keeps layers in memory; pinned, if a GPU is to read them there.

    Pinned memory is taken in large pieces that layers share: torch rounds each up to a power of 2.
    """

    def __init__(self, pinned: bool) -> None:
        self._layers: dict[str, Layer] = {}
        self._pinned, self._piece = pinned, torch.empty(0, dtype=torch.uint8)

    def add(self, name: str, layer: Layer) -> None:
        self._layers[name] = layer.map(self._pin) if self._pinned else layer

    def close(self, metadata: Mapping[str, str]) -> Mapping[str, Layer]:
        return self._layers

    def _pin(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes > len(self._piece):
            size = max(_PIECE, tensor.nbytes)
            try:
                self._piece = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                log.warning("task vectors stay in memory that is not pinned: %s", error)
                self._pinned = False
                return tensor
        room, self._piece = self._piece[: tensor.nbytes], self._piece[_up_to(tensor.nbytes) :]
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _File:
    """Writes layers into a .safetensors file one after the other, with none kept in memory.

    The header comes first in that format and is known last: room is left for it. Layers whose size
    is no multiple of 64 bytes go to the end, so that all others begin at such a multiple.
    """

    def __init__(self, file: BinaryIO, path: Path, names: list[str]) -> None:
        # With its length, 8 bytes, the header ends at a multiple of `_ALIGNED`.
        self._room = _up_to(2**13 + sum(6 * len(name) + 400 for name in names)) - 8
        self._file, self._path = file, path
        self._file.write(bytes(8 + self._room))
        self._entries: dict[str, dict[str, object]] = {}
        self._sums: dict[str, str] = {}
        self._late: list[tuple[str, Tensor]] = []
        self._end = 0

    def add(self, name: str, layer: Layer) -> None:
        scales = [] if layer.scales is None else [(name + _SCALES, layer.scales)]
        for key, tensor in ((name, layer.values), *scales):
            if tensor.nbytes % _ALIGNED:
                self._late.append((key, tensor.clone()))
            else:
                self._write(key, tensor)

    def close(self, metadata: Mapping[str, str]) -> MappedLayers:
        """Writes what is left and the header, with `metadata` in it; maps the file."""
        for key, tensor in self._late:
            self._write(key, tensor)
        sums = {"": _of_header(metadata, self._entries), **self._sums}
        notes = {**metadata, "checksums": json.dumps(sums)}
        header = json.dumps({"__metadata__": notes, **self._entries}).encode()
        if len(header) > self._room:
            raise AdamergeError(
                f"a file of task vectors has no room for the names in it ({len(header)} bytes): "
                "shorten the task names"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())  # a name that is there stands for numbers that are there
        return MappedLayers(self._path, self._file)

    def _write(self, key: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        self._file.write(data)
        self._sums[key] = checksum(data)
        self._entries[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + tensor.nbytes],
        }
        self._end += tensor.nbytes


Shelf = _Memory | _File  # takes layers one after the other, and gives them all back


@contextlib.contextmanager
def storing(storage: Storage, names: list[str], named: bool = True) -> Iterator[Shelf]:
    """A shelf of the storage's place; a file is there in the end, whole, or not at all.

    Args:
        names: of all layers that may come.
        named: whether a file gets the storage's name, or none: then it is gone with the last that
            maps it, however that ends.
    """
    if storage.file is None or storage.device != "disk":
        yield _Memory(storage.device == "host" and storage.pinned and torch.cuda.is_available())
        return
    storage.file.parent.mkdir(parents=True, exist_ok=True)
    if not named:
        with tempfile.TemporaryFile(dir=storage.file.parent) as nameless:
            yield _File(nameless, storage.file.with_suffix(".nameless"), names)
        return
    with replacing(storage.file) as temporary, temporary.open("w+b") as file:
        yield _File(file, storage.file, names)


def _up_to(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
