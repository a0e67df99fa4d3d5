"""One weight file as names -> tensors, whatever wrote it; damaged files named as what they are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge._base.downloads import failed_download
from adamerge._base.errors import AdamergeError
from adamerge._base.files import stamp
from adamerge.weights.formats.layouts import Computed
from adamerge.weights.formats.matching import several
from adamerge.weights.formats.pickled import Standin, TensorRef
from adamerge.weights.formats.pickled_modules import is_module, module_settings, module_tensors
from adamerge.weights.formats.torch_files import TorchFile

log = logging.getLogger("adamerge")

# Where training scripts keep the weights among other things, the likeliest first.
_INNER = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "image_encoder"),
    *("clip", "visual", "backbone", "encoder", "weights", "student", "params", "ema"),
)
_NO_WEIGHTS = ("optim", "sched", "scaler", "callbacks", "loops", "hyper", "rng", "config", "args")
_LEVELS = 6  # of dictionaries within each other
_SIGNATURES = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x89HDF", "an HDF5 file (TensorFlow, Keras): save the weights from PyTorch"),
    (b"GGUF", "a GGUF file: give the original weights"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x80", "a pickle of an unknown protocol, and is not executed: save a state dict"),
)
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
    return SafetensorsFile(path) if _is_safetensors(path) else TorchWeights(path)


class TorchWeights(Computed):
    """The tensors of a file of torch, each mapped when it is asked for.

    Attributes:
        stated: what a pickled module says it was made with (see `module_settings`).
    """

    def __init__(self, path: Path) -> None:
        file = TorchFile(path)
        holder = _state_dict(path, file.root)
        self.stated = module_settings(holder) if isinstance(holder, Standin) else {}
        root = module_tensors(holder) if isinstance(holder, Standin) else holder
        tensors: dict[str, TensorRef] = {}
        for name, value in root.items():
            if isinstance(name, str) and isinstance(value, TensorRef):
                tensors[name] = value
            elif isinstance(value, Standin) and (value.called or "Tensor" in value.path):
                raise _damaged(
                    path,
                    f"not readable safely: {name!r} in its state dict is made by {value.path}, "
                    "which is not executed (a sharded or quantised tensor?); save plain tensors",
                )
        if not tensors:
            keys = f" (its keys: {several([*map(str, root)], 8)})" if root else ""
            raise AdamergeError(
                f"{path} holds no tensors by name{keys}: expected a state dict, itself or under a "
                f"key such as {', '.join(_INNER[:3])}"
            )
        super().__init__({n: functools.partial(file.tensor, ref) for n, ref in tensors.items()})


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
    raw = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if raw or head.startswith(b"PK\x03\x04"):
        return False
    raise _damaged(path, _what(head))


def _what(head: bytes) -> str:
    for start, what in _SIGNATURES:
        if head.startswith(start):
            return what
    failed = failed_download(head, "weights")
    if failed is not None:
        return failed
    if head[257:262] == b"ustar":
        return "a tar archive (also of torch before 0.4): unpack it, or save it again"
    return "of no known weight format, or damaged: expected .safetensors or a file of torch.save"


def _damaged(path: Path, what: str) -> AdamergeError:
    return AdamergeError(f"{path} is {what}")


class SafetensorsFile(Computed):
    """The tensors of a .safetensors file, each read when it is asked for.

    They are views of the mapped file. It is mapped anew now and then, so that a process that reads
    tensor by tensor through many files does not hold all that it has read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stamp = path, stamp(path)
        names = self._open().keys()
        if not names:
            raise AdamergeError(f"{path} holds no tensors by name: expected a state dict")
        super().__init__({name: functools.partial(self._tensor, name) for name in names})

    def _tensor(self, name: str) -> Tensor:
        file = self._file if self._read <= _AT_HAND else self._open()
        try:
            tensor: Tensor = file.get_tensor(name)
        except Exception as error:  # the library raises many types for one thing
            raise self._unreadable(error) from error
        self._read += tensor.nbytes
        return tensor

    def _open(self) -> Any:
        try:
            if stamp(self._path) != self._stamp:
                raise OSError("another file has taken its place while it was read")
            self._file, self._read = safe_open(self._path, framework="pt"), 0
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from error
        return self._file

    def _unreadable(self, error: Exception) -> AdamergeError:
        return AdamergeError(
            f"{self._path} is not a readable safetensors file ({error}): it is truncated or "
            "damaged; download or save it again"
        )


def _state_dict(path: Path, root: Any) -> Mapping[Any, Any] | Standin:
    """The state dict or module within what a file holds."""
    for _ in range(_LEVELS):
        if isinstance(root, Standin) and not root.items:
            return root
        root = root.items if isinstance(root, Standin) else root
        if not isinstance(root, Mapping):
            kind = "bare tensor" if isinstance(root, TensorRef) else type(root).__name__
            raise AdamergeError(
                f"{path} holds a {kind}: expected a state dict (names -> tensors) "
                "or a pickled module; save a state dict"
            )
        known: dict[int, bool] = {}
        inside = [key for key in root if _may_hold(key) and _holds(root[key], known)]
        if not inside or any(isinstance(root[key], TensorRef) for key in root if "." in str(key)):
            return root
        root = root[_chosen(path, root, inside)]
    return cast(Mapping[Any, Any], root)


def _may_hold(key: Any) -> bool:
    return isinstance(key, str) and not any(word in key.lower() for word in _NO_WEIGHTS)


def _holds(value: Any, known: dict[int, bool], levels: int = _LEVELS) -> bool:
    """Whether there is a state dict or a module in a value; `known` tells by id."""
    value = value.items if isinstance(value, Standin) and value.items else value
    if not isinstance(value, Mapping) or levels == 0:
        return is_module(value)
    if id(value) not in known:
        known[id(value)] = False  # meanwhile, of one that holds itself
        names = [key for key in value if isinstance(key, str)]
        known[id(value)] = any(isinstance(value[n], TensorRef) for n in names) or any(
            _may_hold(name) and _holds(value[name], known, levels - 1) for name in names
        )
    return known[id(value)]


def _chosen(path: Path, root: Mapping[Any, Any], inside: Sequence[str]) -> str:
    """The key of the state dict that is meant, which a log line tells where there are several."""
    known = [key for key in _INNER if key in inside]
    if len(inside) > 1 and not known:
        raise AdamergeError(
            f"{path} holds several state dicts ({', '.join(inside)}), none under a known key "
            f"({', '.join(_INNER[:4])} …): save the one that is meant alone"
        )
    taken = known[0] if known else inside[0]
    if len(inside) > 1:
        log.warning("%s holds %s: %s is taken", path, " and ".join(inside), taken)
    return taken
