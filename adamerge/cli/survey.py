"""What checkpoints a folder holds: opened one by one, shapes looked at, nothing executed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json
from adamerge.encoders.architectures import Tower
from adamerge.weights.formats import hub
from adamerge.weights.formats.layouts import renamed, tower_from_transformers, transformers_prefix
from adamerge.weights.formats.matching import unwrapped
from adamerge.weights.formats.read import Checkpoint, read

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)")
_TOKENS = ("token_embedding.weight", "word_embeddings.weight")
_OTHER = (".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".zip", ".gz", ".tar", ".xz")
_CONFIGS = ("open_clip_config.json", "config.json")


@dataclass(frozen=True)
class Found:
    """One checkpoint of a folder.

    Attributes:
        path: the file or folder.
        kind: `clip` (both towers), `tower` (an image tower), `lora` or `head`.
        tower: the image tower's shape; None of an adapter, a head or another kind of tower.
        features: what the tower is projected to; None where nothing says.
        head: `[classes, features]` of a head.
        tells: whether it is a folder whose config tells the architecture of a whole CLIP.
        quick_gelu: the activation its own config states.
        base: the model it says it was fine-tuned from.
        text_rest: an image tower with parts of a text tower, as the papers' scripts leave it.
    """

    path: Path
    kind: str
    tower: Tower | None = None
    features: int | None = None
    head: tuple[int, int] | None = None
    tells: bool = False
    quick_gelu: bool | None = None
    base: str | None = None
    text_rest: bool = False


def survey(folder: Path) -> tuple[list[Found], list[str]]:
    """The checkpoints in a folder and one level below, and a line for each file that is none.

    Raises:
        AdamergeError: no such folder.
    """
    if not folder.is_dir():
        raise AdamergeError(f"{folder} is not a folder: name the one that holds the checkpoints")
    found: list[Found] = []
    skipped: list[str] = []
    for path in _candidates(folder):
        name = path.relative_to(folder) if path != folder else path
        try:
            one = look(path)
        except (AdamergeError, OSError) as error:
            skipped.append(str(error) if str(path) in str(error) else f"{name}: {error}")
            continue
        if one is None:
            skipped.append(f"{name} holds neither an image tower nor a head")
        else:
            found.append(one)
    return found, skipped


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders that are one checkpoint, and weight files that belong to none."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    for place in (folder, *below):
        files = [path for path in sorted(place.iterdir()) if path.is_file()]
        whole = any(path.name in hub.WEIGHTS for path in files)
        if whole:
            yield place
        for path in files:
            part = path.name in hub.WEIGHTS or _SHARD.search(path.name)
            if path.suffix in (*hub.SUFFIXES, *_OTHER) and not (whole and part):
                yield path


def look(path: Path) -> Found | None:
    """What a file or folder is, from its names and a few shapes; None if no tower and no head.

    Raises:
        AdamergeError: damaged, or of no format that is read.
    """
    if path.suffix in _OTHER and path.is_file():
        raise AdamergeError("not a kind of checkpoint that is read, left out")
    checkpoint = read(path)
    config = _config(path) if path.is_dir() else {}
    if checkpoint.lora is not None:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return Found(path, "lora", base=str(base) if base else None)
    names = list(checkpoint.tensors)
    head = _head(checkpoint)
    if head is not None:
        return Found(path, "head", head=head)
    tower, features = _tower(checkpoint)
    if tower is None and not any(f".{part}." in f".{n}" for n in names for part in _TOWERS):
        return None
    tokens = any(name.endswith(_TOKENS) for name in names)
    whole = tokens and any(map(_of_text_block, names))
    vision = config.get("vision_config")
    stated = (vision if isinstance(vision, dict) else config).get("hidden_act", "quick_gelu")
    quick = stated == "quick_gelu" if str(config.get("model_type")).startswith("clip") else None
    if isinstance(config.get("model_cfg"), dict):
        quick = bool(config["model_cfg"].get("quick_gelu"))
    tells = whole and ("model_cfg" in config or config.get("model_type") == "clip")
    base = config.get("_name_or_path")
    kind = "clip" if whole else "tower"
    return Found(
        path, kind, tower, features, None, tells, quick, base or None, tokens and not whole
    )


_TOWERS = ("visual", "trunk", "vision_model")


def _of_text_block(name: str) -> bool:
    ours = "resblocks." in name and ".visual." not in f".{name}"
    return ours or "text_model.encoder." in name or ".text.transformer." in f".{name}"


def _config(folder: Path) -> dict[str, Any]:
    return next((read_json(folder / name) for name in _CONFIGS if (folder / name).is_file()), {})


def _head(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """`[classes, features]` of a file that holds one matrix and at most a bias."""
    tensors = [checkpoint.tensors[name] for name in checkpoint.tensors] if _few(checkpoint) else []
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    if len(matrices) != 1 or any(tensor.ndim > 2 for tensor in tensors):
        return None
    return (matrices[0].shape[0], matrices[0].shape[1])


def _few(checkpoint: Checkpoint) -> bool:
    return len(checkpoint.tensors) <= 3


def _tower(checkpoint: Checkpoint) -> tuple[Tower | None, int | None]:
    """Shape and features of the image tower, from three tensors and the names."""
    state = _under_our_names(checkpoint.tensors)
    blocks = {n.split(".")[2] for n in state if n.startswith("transformer.resblocks.")}
    if not blocks or "positional_embedding" not in state or "conv1.weight" not in state:
        return None, None
    patches, places = state["conv1.weight"], state["positional_embedding"]
    if patches.ndim != 4 or places.ndim != 2:
        return None, None
    shape = Tower(patches.shape[0], len(blocks), patches.shape[-1], places.shape[0])
    return shape, state["proj"].shape[-1] if "proj" in state else None


def _under_our_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    tensors = unwrapped(tensors)
    prefix = transformers_prefix(tensors)
    if prefix is not None:
        return tower_from_transformers(tensors, prefix)
    found = [n.removesuffix("conv1.weight") for n in tensors if f".{n}".endswith(".conv1.weight")]
    visual = [prefix for prefix in found if prefix.endswith("visual.")] or found
    if len(visual) != 1:
        return {}
    start = len(visual[0])
    return renamed(tensors, {n[start:]: n for n in tensors if n.startswith(visual[0])})
