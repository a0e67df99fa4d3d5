"""What checkpoints a folder holds, and what they tell of a suite: its pretrained model and
architecture. They are opened one by one for their names and shapes; nothing is executed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json
from adamerge.cli.task_hints import says_nothing, says_pretrained, task_name
from adamerge.encoders.architectures import Tower, activation_fits, has_tag, names_of
from adamerge.weights.formats import hub
from adamerge.weights.formats.layouts import renamed, tower_from_transformers, transformers_prefix
from adamerge.weights.formats.matching import unwrapped
from adamerge.weights.formats.read import read

_CONFIGS = ("open_clip_config.json", "config.json")
# A value of the suite and where it is from, as a comment; without a value, what is to fill in.
Answer = tuple[str | None, str]

_OWNED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # a model on the hub
_OPENAI = "openai"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)")
_OTHER = (".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".zip", ".gz", ".tar", ".xz")
_TOKENS = ("token_embedding.weight", "word_embeddings.weight")
_TOWER = re.compile(r"(^|\.)(visual|trunk|vision_model)\.")
_TEXT_BLOCK = re.compile(
    r"text_model\.encoder\.|(^|\.)text\.transformer\.|^(?!(.*\.)?visual\.).*resblocks\."
)


@dataclass(frozen=True)
class Candidate:
    """One checkpoint of a folder: a file, or a folder."""

    path: Path
    kind: str  # clip (both towers), tower (an image tower), lora or head
    tower: Tower | None = None  # the image tower's shape, where it is a plain vision transformer
    features: int | None = None  # what the tower is projected to, or a head takes, where known
    classes: int = 0  # of a head
    tells: bool = False  # a folder whose config tells the architecture of a whole CLIP
    quick_gelu: bool | None = None  # the activation, where it is stated
    base: str | None = None  # the model it says it was fine-tuned from

    @property
    def name(self) -> str:
        """Of the file, without the ending of a weight file, or of the folder."""
        return self.path.stem if self.path.suffix in hub.SUFFIXES else self.path.name


def survey(folder: Path) -> tuple[list[Candidate], list[str]]:
    """The checkpoints in a folder and one level below, and a line for each file that is none.

    Raises:
        AdamergeError: no such folder.
    """
    if not folder.is_dir():
        raise AdamergeError(f"{folder} is not a folder: name the one that holds the checkpoints")
    candidates: list[Candidate] = []
    skipped: list[str] = []
    for path in _paths(folder):
        name = path.relative_to(folder) if path != folder else path
        try:
            if (candidate := inspect(path)) is not None:
                candidates.append(candidate)
            else:
                skipped.append(f"{name} holds neither an image tower nor a head")
        except (AdamergeError, OSError) as error:
            skipped.append(str(error) if str(path) in str(error) else f"{name}: {error}")
    return candidates, skipped


def _paths(folder: Path) -> Iterator[Path]:
    """Folders that are one checkpoint, and weight files that belong to none."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    for place in (folder, *below):
        files = [path for path in sorted(place.iterdir()) if path.is_file()]
        whole = any(path.name in hub.WEIGHTS for path in files)
        if whole:
            yield place
            files = [f for f in files if f.name not in hub.WEIGHTS and not _SHARD.search(f.name)]
        yield from (path for path in files if path.suffix in (*hub.SUFFIXES, *_OTHER))


def inspect(path: Path) -> Candidate | None:
    """What a file or folder is, from its names and a few shapes; None if no tower and no head.

    Raises:
        AdamergeError: damaged, or of no format that is read.
    """
    if path.suffix in _OTHER and path.is_file():
        raise AdamergeError("not a kind of checkpoint that is read, left out")
    checkpoint = read(path)
    if checkpoint.lora is not None:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return Candidate(path, "lora", base=str(base) if base else None)
    names = list(checkpoint.tensors)
    small = list(checkpoint.tensors.values()) if len(names) <= 3 else []
    matrices = [tensor for tensor in small if tensor.ndim == 2]
    if len(matrices) == 1 and all(tensor.ndim <= 2 for tensor in small):  # and at most a bias
        classes, features = matrices[0].shape
        return Candidate(path, "head", features=features, classes=classes)
    tower, width = _tower(checkpoint.tensors)
    if tower is None and not any(map(_TOWER.search, names)):
        return None
    whole = any(name.endswith(_TOKENS) for name in names) and any(map(_TEXT_BLOCK.search, names))
    files = [path / name for name in _CONFIGS if (path / name).is_file()]
    config = read_json(files[0]) if files else {}
    model, quick = config.get("model_cfg"), checkpoint.stated().get("quick_gelu")
    return Candidate(
        path,
        "clip" if whole else "tower",
        tower,
        width,
        tells=whole and (model is not None or config.get("model_type") == "clip"),
        quick_gelu=bool(model.get("quick_gelu")) if isinstance(model, dict) else quick,
        base=config.get("_name_or_path") or None,
    )


def _tower(tensors: Mapping[str, Tensor]) -> tuple[Tower | None, int | None]:
    """Shape and features of the image tower, from three tensors and the names."""
    state = _under_our_names(unwrapped(tensors))
    blocks = {n.split(".")[2] for n in state if n.startswith("transformer.resblocks.")}
    patches, places = state.get("conv1.weight"), state.get("positional_embedding")
    if patches is None or patches.ndim != 4 or places is None or places.ndim != 2 or not blocks:
        return None, None
    shape = Tower(patches.shape[0], len(blocks), patches.shape[-1], places.shape[0])
    return shape, state["proj"].shape[-1] if "proj" in state else None


def _under_our_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    prefix = transformers_prefix(tensors)
    if prefix is not None:
        return tower_from_transformers(tensors, prefix)
    starts = [n.removesuffix("conv1.weight") for n in tensors if f".{n}".endswith(".conv1.weight")]
    starts = [start for start in starts if start.endswith("visual.")] or starts
    inside = [name for name in tensors if len(starts) == 1 and name.startswith(starts[0])]
    return renamed(tensors, {name.removeprefix(starts[0]): name for name in inside})


def is_pretrained(one: Candidate) -> bool:
    """Whether a checkpoint is named as the pretrained model: its file, or its folder."""
    named = says_pretrained(one.name) or says_pretrained(task_name(one.name))
    return named or (says_nothing(one.name) and says_pretrained(one.path.parent.name))


def pretrained_among(candidates: Sequence[Candidate], folder: Path) -> Candidate | None:
    """The checkpoint that is named as the pretrained model, or is by its kind or place.

    In this order: named `zeroshot`, `pretrained`, `base` …; the only whole CLIP among towers and
    adapters; the folder itself; the one whose name all others begin with.
    """
    models = [one for one in candidates if one.kind != "head"]
    named = [one for one in models if is_pretrained(one) and one.kind != "lora"]
    if named:
        return min(named, key=lambda one: (one.kind != "clip", len(one.path.parts)))
    whole = [one for one in models if one.kind == "clip"]
    if len(models) == 1:
        return next((one for one in whole if one.path == folder), None)
    if len(whole) == 1:
        return whole[0]
    start = [one for one in whole if all(other.name.startswith(one.name) for other in models)]
    return next((one for one in whole if one.path == folder), start[0] if start else None)


def one_shape(models: Sequence[Candidate], folder: Path) -> Tower | None:
    """The shape that all image towers share; None where none is known.

    Raises:
        AdamergeError: several shapes.
    """
    by_shape: dict[Tower, list[str]] = {}
    for one in models:
        if one.tower is not None:
            by_shape.setdefault(one.tower, []).append(os.path.relpath(one.path, folder))
    if len(by_shape) > 1:
        said = [f"{[*names_of(t, None), t][0]}: {', '.join(n[:4])}" for t, n in by_shape.items()]
        raise AdamergeError(
            f"{folder} holds checkpoints of {len(by_shape)} architectures ({'; '.join(said)}): a "
            "suite merges experts of one; name it with --architecture, or give a folder that holds "
            "one"
        )
    return next(iter(by_shape), None)


def pretrained_answer(
    chosen: Candidate | None, experts: Sequence[Candidate], shape: Tower | None, at: str
) -> Answer:
    """What `pretrained:` is, where it is not given.

    Args:
        chosen: of the folder.
        at: the chosen one's path as the suite names it.
    """
    if chosen is not None and chosen.kind == "clip":
        return at, ""
    tagged = shape is not None and any(has_tag(name, _OPENAI) for name in names_of(shape, None))
    if chosen is not None:
        said = f"{at} is an image tower alone, and the heads are made by a text tower"
        if tagged:
            return _OPENAI, f"{said}: the same model from open_clip, if that is OpenAI's"
        return None, f"{said}: the whole CLIP it is from"
    bases = {one.base for one in experts if one.base}
    base = bases.pop() if len(bases) == 1 else ""
    if Path(base or "\0").exists():
        return str(Path(base).resolve()), "by what the experts say they are made from"
    if _OWNED.fullmatch(base):
        return f"{hub.SCHEME}{base}", "by what the experts say they are made from"
    return None, "the whole CLIP that every expert was fine-tuned from"


def architecture_answer(
    pretrained: str | None,
    chosen: Candidate | None,
    experts: Sequence[Candidate],
    shape: Tower | None,
) -> Answer:
    """What `architecture:` is; an empty value and a comment where none is needed."""
    if chosen is not None and chosen.tells:
        return "", "the pretrained folder's own config tells the architecture"
    models = [one for one in (chosen, *experts) if one is not None]
    features = next((one.features for one in models if one.features is not None), None)
    names = names_of(shape, features) if shape is not None else []
    if not names:
        told = [Path(pretrained or "", name).is_file() for name in _CONFIGS]
        if pretrained is not None and (hub.is_hub(pretrained) or any(told)):
            return "", "the pretrained model's own config tells the architecture"
        return None, "an open_clip name, or a folder with open_clip_config.json"
    plain = names[0].removesuffix("-quickgelu")
    quick = f"{plain}-quickgelu"
    for name in (plain, quick):
        if activation_fits(name, pretrained):
            return name, "by the shapes of the image towers and the tag's activation"
    stated = next((one.quick_gelu for one in models if one.quick_gelu is not None), None)
    if stated is None and _OPENAI in str(pretrained).casefold():
        stated = True
    name = quick if stated and quick in names else plain
    if stated is not None or quick not in names:
        return name, "by the shapes of the image towers, and the activation as stated"
    return name, (
        f"by the shapes of the image towers, which do not tell the activation: a guess; {quick} "
        "for weights of OpenAI's"
    )
