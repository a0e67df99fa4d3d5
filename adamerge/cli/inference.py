"""What the checkpoints of a folder tell of a suite: its pretrained model and architecture."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adamerge._base.errors import AdamergeError
from adamerge.cli.survey import Found
from adamerge.cli.task_names import says_nothing, says_pretrained, task_name
from adamerge.encoders.architectures import Tower, activation_fits, has_tag, names_of
from adamerge.weights.formats import hub

_OWNED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_OPENAI = "openai"


@dataclass
class Answer:
    """A value of the suite, or None, and why, as a comment."""

    value: str | None
    why: str


def pretrained_of(found: Sequence[Found], folder: Path) -> Found | None:
    """The checkpoint that is named as the pretrained model, or is by its kind or place.

    In this order: named `zeroshot`, `pretrained`, `base` …; the only whole CLIP among towers and
    adapters; the folder itself; the one whose name all others begin with.
    """
    models = [one for one in found if one.kind in ("clip", "tower")]
    named = [one for one in models if is_pretrained(one.path)]
    if named:
        return min(named, key=lambda one: (one.kind != "clip", len(one.path.parts)))
    whole = [one for one in models if one.kind == "clip"]
    if len(whole) == 1 and len([one for one in found if one.kind != "head"]) > 1:
        return whole[0]
    place = [one for one in whole if one.path == folder]
    names = [file_name(one.path) for one in found if one.kind != "head"]
    start = [
        one
        for one in whole
        if len(names) > 1 and all(name.startswith(file_name(one.path)) for name in names)
    ]
    return next(iter([*place, *start]), None)


def file_name(path: Path) -> str:
    """A file's name without the ending of a weight file, or a folder's."""
    return path.stem if path.suffix in hub.SUFFIXES else path.name


def is_pretrained(path: Path) -> bool:
    """Whether a checkpoint is named as the pretrained model: its file, or its folder."""
    own = says_pretrained(file_name(path)) or says_pretrained(task_name(file_name(path)))
    return own or (says_nothing(file_name(path)) and says_pretrained(path.parent.name))


def one_shape(models: Sequence[Found], folder: Path) -> Tower | None:
    """The shape that all image towers share; None where none is known.

    Raises:
        AdamergeError: several shapes.
    """
    by_shape: dict[Tower, list[str]] = {}
    for one in models:
        if one.tower is not None:
            by_shape.setdefault(one.tower, []).append(os.path.relpath(one.path, folder))
    if len(by_shape) > 1:
        said = "; ".join(
            f"{describe(shape)}: {', '.join(names[:4])}{' …' if names[4:] else ''}"
            for shape, names in by_shape.items()
        )
        raise AdamergeError(
            f"{folder} holds checkpoints of {len(by_shape)} architectures ({said}): a suite merges "
            "experts of one; name it with --architecture, or give a folder that holds one"
        )
    return next(iter(by_shape), None)


def describe(shape: Tower) -> str:
    """An architecture in words, by open_clip's name if it has one."""
    names = names_of(shape, None)
    if names:
        return names[0]
    side = round((shape.positions - 1) ** 0.5) * shape.patch
    return (
        f"a vision transformer of width {shape.width}, {shape.layers} layers, patches of "
        f"{shape.patch} pixels, images of {side}"
    )


def pretrained_answer(
    given: str | None, chosen: Found | None, experts: Sequence[Found], shape: Tower | None, at: str
) -> Answer:
    """What `pretrained:` is.

    Args:
        given: by the user.
        chosen: of the folder.
        shape: of the towers.
        at: the chosen one's path as the suite names it.
    """
    if given is not None:
        return Answer(given, "")
    if chosen is not None and chosen.kind == "clip":
        return Answer(at, "")
    tagged = shape is not None and any(has_tag(name, _OPENAI) for name in names_of(shape, None))
    if chosen is not None:
        said = f"{at} is an image tower alone, and the heads are made by a text tower"
        if tagged:
            return Answer(_OPENAI, f"{said}: the same model from open_clip, if that is OpenAI's")
        return Answer(None, f"{said}: the whole CLIP it is from")
    bases = {one.base for one in experts if one.base}
    if len(bases) == 1:
        base = bases.pop()
        if _OWNED.fullmatch(base) and not Path(base).exists():
            return Answer(f"{hub.SCHEME}{base}", "by what the experts say they are made from")
        if Path(base).exists():
            return Answer(str(Path(base).resolve()), "by what the experts say they are made from")
    if tagged and any(one.text_rest for one in experts):
        return Answer(_OPENAI, "the experts are saved as task arithmetic's are: a guess")
    return Answer(None, "the whole CLIP that every expert was fine-tuned from")


def architecture_answer(
    pretrained: str | None, chosen: Found | None, experts: Sequence[Found], shape: Tower | None
) -> Answer:
    """What `architecture:` is; no value and a comment without `FILL IN` where none is needed."""
    if chosen is not None and chosen.tells:
        return Answer("", "the pretrained folder's own config tells the architecture")
    models = [one for one in (chosen, *experts) if one is not None]
    features = next((one.features for one in models if one.features is not None), None)
    names = names_of(shape, features) if shape is not None else []
    if not names:
        if pretrained is not None and (hub.is_hub(pretrained) or _tells(Path(pretrained))):
            return Answer("", "the pretrained model's own config tells the architecture")
        return Answer(None, "an open_clip name, or a folder with open_clip_config.json")
    plain = names[0].removesuffix("-quickgelu")
    quick = f"{plain}-quickgelu"
    for name in (plain, quick):
        if activation_fits(name, pretrained):
            return Answer(name, "by the shapes of the image towers and the tag's activation")
    stated = next((one.quick_gelu for one in models if one.quick_gelu is not None), None)
    if stated is None and _OPENAI in str(pretrained).casefold():
        stated = True
    name = quick if stated and quick in names else plain
    if stated is not None or quick not in names:
        return Answer(name, "by the shapes of the image towers, and the activation as stated")
    return Answer(
        name,
        f"by the shapes of the image towers, which do not tell the activation: a guess; {quick} "
        "for weights of OpenAI's",
    )


def _tells(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("open_clip_config.json", "config.json"))
