"""Reads checkpoints safely, one tensor at a time; never executes what is in them."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adamerge.encoders import Clip
from adamerge.errors import AdamergeError

_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise AdamergeError(
                f"{path} is not a readable safetensors file ({error}): it may be truncated or of "
                "another format; download or save it again"
            ) from error
        self._keys = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Renamed(Mapping[str, Tensor]):
    """A view of a state dict under other names, still read one tensor at a time."""

    def __init__(self, source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def resolve(source: str | Path) -> Path:
    """The weight file a source names: the file itself, or the one in an open_clip folder."""
    path = Path(source)
    if path.is_dir():
        for name in _WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise AdamergeError(
            f"folder {path} holds no weights: expected {' or '.join(_WEIGHT_FILES)}"
        )
    if not path.is_file():
        raise AdamergeError(f"checkpoint {path} does not exist: check the path in the suite")
    return path


def read(source: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a checkpoint: `.safetensors`, or a `.pt`/`.pth`/`.bin`/`.ckpt` of tensors.

    `.pt` files are read with torch's restricted unpickler and memory-mapped; a `state_dict` entry
    (Lightning) is followed, and a `module.` prefix (DDP) is taken off.

    Raises:
        AdamergeError: missing, truncated, of another format, or holding more than tensors.
    """
    path = resolve(source)
    state: Any = SafetensorsFile(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not state or not all(isinstance(name, str) for name in state):
        raise AdamergeError(f"{path} holds no tensors by name: expected a state dict")
    return Renamed(state, {name.removeprefix("module."): name for name in state})


def _read_torch(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        start = file.read(64)
    try:
        with (
            warnings.catch_warnings()
        ):  # of an odd pickle protocol: read or refused, either is said
            warnings.simplefilter("ignore")
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK")
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as e:
        reason = str(e).split("\n")[0][:120]
        raise AdamergeError(
            f"{path} cannot be read as a state dict ({reason}): it is truncated, of another "
            "format, or holds Python objects, which are never executed; save it as a state dict "
            "in .safetensors"
        ) from e
    if not isinstance(loaded, Mapping):
        raise AdamergeError(
            f"{path} holds a {type(loaded).__name__}: expected a state dict (names -> tensors)"
        )
    return loaded


def tower_state(state: Mapping[str, Tensor], backbone: nn.Module) -> Mapping[str, Tensor]:
    """The image tower's part of a state dict, in the backbone's order of layers.

    A full CLIP keeps its tower under `visual.`; a state dict without that prefix is taken to be a
    tower. Unknown names stay, at the end, for `TaskVectors` to report.
    """
    if any(name.startswith("visual.") for name in state):
        prefix = "visual."
        state = Renamed(state, {n.removeprefix(prefix): n for n in state if n.startswith(prefix)})
    known = [name for name in backbone.state_dict() if name in state]
    rest = [name for name in state if name not in set(known)]
    return Renamed(state, {name: name for name in [*known, *rest]})


def load_pretrained(clip: Clip, source: str | Path) -> None:
    """Fills a CLIP, image and text tower, from a checkpoint.

    Raises:
        AdamergeError: names or shapes that do not fit the architecture; an image tower alone is
            not enough, because the heads come from the text tower.
    """
    path = resolve(source)
    state = read(path)
    own = clip.model.state_dict()
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    if missing and not any(name.startswith("visual.") for name in state):
        raise AdamergeError(
            f"pretrained ({path}) lacks tensor {missing[0]!r}: expected a whole CLIP, because the "
            "heads are made by its text tower"
        )
    for names, verb in ((missing, "lacks"), (extra, "has the unknown")):
        if names:
            raise AdamergeError(
                f"pretrained ({path}) {verb} tensor {names[0]!r} ({len(names)} such): it is not of "
                "this architecture; set suite.architecture to the one it was trained with"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            loaded = state[name]
            scalar = loaded.numel() == tensor.numel() == 1  # logit_scale is [] or [1]
            if loaded.shape != tensor.shape and not scalar:
                raise AdamergeError(
                    f"pretrained ({path}) has tensor {name!r} of shape {list(loaded.shape)}, the "
                    f"architecture has {list(tensor.shape)}: set suite.architecture to the one it "
                    "was trained with"
                )
            tensor.copy_(loaded.reshape(tensor.shape))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
