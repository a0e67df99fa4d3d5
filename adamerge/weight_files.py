"""One weight file as names -> tensors, whatever wrote it; damaged files named as what they are."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.errors import AdamergeError
from adamerge.layouts import Computed
from adamerge.pickled import Standin, TensorRef
from adamerge.torch_files import LEGACY_START, TorchFile, module_tensors

# Where training scripts keep the weights among other things, the outermost first.
_INNER = ("state_dict", "model_state_dict", "model", "module", "net", "image_encoder")
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: run `git lfs pull` there"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x89HDF", "an HDF5 file (TensorFlow, Keras): save the weights from PyTorch"),
    (b"GGUF", "a GGUF file: give the original weights"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_HEAD = 512
_AT_HAND = 2**24  # bytes of a mapped file that are left in memory once they were read


def open_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors by name of a `.safetensors` or `torch.save` file, recognised by its content.

    Tensors are read, or mapped, one at a time when asked for; nothing in the file is executed. A
    pickled module gives its parameters and persistent buffers; of a training checkpoint the state
    dict inside is given (`state_dict`, `model` …).

    Raises:
        AdamergeError: missing, truncated, damaged, of another format, or holding no tensors.
    """
    if not path.is_file():
        raise AdamergeError(f"checkpoint {path} does not exist: check the path")
    if _is_safetensors(path):
        return SafetensorsFile(path)
    file = TorchFile(path)
    references = _references(path, file.root)
    found = {name: functools.partial(file.tensor, ref) for name, ref in references.items()}
    return Computed(found)


def _is_safetensors(path: Path) -> bool:
    """Tells the two formats apart; anything else is an error that says what it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 100_000_000:
        if 8 + header > size:
            raise _damaged(path, f"truncated: its header says {header} bytes, it has {size} in all")
        return True
    if head.startswith((b"PK\x03\x04", LEGACY_START)):
        return False
    raise _damaged(path, _what(head, size))


def _what(head: bytes, size: int) -> str:
    if size == 0:
        return "empty (0 bytes): download or save it again"
    for start, what in _SIGNATURES:
        if head.startswith(start):
            return what
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "a web page saved under that name: the download failed (a login? a limit?)"
    if not head.strip(b"\0"):
        return "zeros where its header should be: an interrupted download; download it again"
    if head[257:262] == b"ustar":
        return "a tar archive (also of torch before 0.4): unpack it, or save it again"
    if head[:1] == b"\x80":
        return "a pickle, but not one of torch.save, and is not executed: save a state dict"
    text = head.decode("utf-8", "replace").rstrip("\ufffd").strip()
    if "\ufffd" not in text and text.replace("\n", "").replace("\r", "").isprintable():
        return f"a text that begins {text[:40]!r}, not weights: the download failed?"
    return "of no known weight format, or damaged: expected .safetensors or a file of torch.save"


def _damaged(path: Path, what: str) -> AdamergeError:
    return AdamergeError(f"{path} is {what}")


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, each read when it is asked for.

    They are views of the mapped file. It is mapped anew now and then, so that a process that reads
    tensor by tensor through many files does not hold all that it has read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._open()
        self._keys = list(self._file.keys())
        if not self._keys:
            raise AdamergeError(f"{path} holds no tensors by name: expected a state dict")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            raise KeyError(name)
        if self._read > _AT_HAND:
            self._open()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except Exception as error:  # the library raises many types for one thing
            raise self._unreadable(error) from error
        self._read += tensor.nbytes
        return tensor

    def _open(self) -> None:
        self._read = 0
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if self._seen not in (None, seen):
                raise OSError("another file has taken its place while it was read")
            self._seen = seen
            self._file = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> AdamergeError:
        return AdamergeError(
            f"{self._path} is not a readable safetensors file ({error}): it is truncated or "
            "damaged; download or save it again"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _references(path: Path, root: Any) -> dict[str, TensorRef]:
    """The state dict within what a file holds."""
    for _ in range(len(_INNER)):
        if isinstance(root, Standin):
            return _some(path, module_tensors(root))
        if not isinstance(root, Mapping):
            kind = "bare tensor" if isinstance(root, TensorRef) else type(root).__name__
            raise AdamergeError(
                f"{path} holds a {kind}: expected a state dict (names -> tensors) "
                "or a pickled module; save a state dict"
            )
        inner = next((k for k in _INNER if isinstance(root.get(k), Mapping | Standin)), None)
        if inner is None:
            break
        root = root[inner]
    named = {k: v for k, v in root.items() if isinstance(k, str) and isinstance(v, TensorRef)}
    return _some(path, named)


def _some(path: Path, found: dict[str, TensorRef]) -> dict[str, TensorRef]:
    if not found:
        raise AdamergeError(f"{path} holds no tensors by name: expected a state dict")
    return found
