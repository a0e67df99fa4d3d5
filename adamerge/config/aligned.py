"""Experts of different starts in a suite (`align:`), brought into one order."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge import align
from adamerge._base.errors import AdamergeError
from adamerge._base.kept import Kept
from adamerge.align.symmetry import Permutations, Spec, State
from adamerge.config.settings import Config
from adamerge.config.targets import KINDS, Supplied, build, target_of, target_problems
from adamerge.encoders.clip import Clip, Normalizer
from adamerge.encoders.heads import Prompts, zero_shot_heads
from adamerge.encoders.pretrained import load_pretrained
from adamerge.learn.data import TaskData
from adamerge.learn.features import content_key
from adamerge.weights.formats.fitting import lacks_text
from adamerge.weights.formats.matching import match
from adamerge.weights.formats.read import Checkpoint, tower_state

log = logging.getLogger("adamerge")

_TO = ("first", "mean")
_KEY = "suite.align"
_AT_ONCE = 64  # images


def align_problems(suite: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a suite's `align:`, and with what stands beside it."""
    part = suite.get("align")
    if part is None:
        return
    if not isinstance(part, Mapping):
        yield f"{_KEY} is {part!r}: expected a _target_ such as adamerge.align.weight_matching"
        return
    if part.get("to", "first") not in _TO:
        yield f"{_KEY}.to is {part['to']!r}: expected first or mean"
    if suite.get("pretrained") is not None:
        yield (
            f"{_KEY} is for experts without a common start, and suite.pretrained names one: set "
            "one of them to null"
        )
    tasks = suite.get("tasks")
    for where, entry in [("suite", suite), *(tasks.items() if isinstance(tasks, Mapping) else ())]:
        if isinstance(entry, Mapping) and entry.get("missing") is not None:
            yield f"{where}.missing: with {_KEY} there is no pretrained model to take tensors from"
    yield from target_problems(_KEY, _matching(part), KINDS["align"])


def _matching(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "to"}


def asks_images(suite: Mapping[str, Any]) -> bool:
    """Whether a suite's experts are aligned by their outputs on unlabeled images."""
    part = suite.get("align")
    if part is None:
        return False
    target, _ = target_of(_KEY, _matching(part), KINDS["align"])
    return "batches" in inspect.signature(target).parameters


def aligned(
    config: Config,
    clip: Clip,
    opened: Mapping[str, Checkpoint],
    data: TaskData | None,
    folder: Path,
    files: dict[str, dict[str, str]],
) -> tuple[dict[str, Mapping[str, Tensor]], str | None]:
    """Aligns the image towers of experts, and makes the reference the CLIP's.

    Args:
        clip: the first expert's; its tower becomes the reference.
        opened: the experts by task.
        data: unlabeled images, where they are asked for: `statistics.images` of each task.
        folder: where permutations are kept.
        files: records of all files; that of `pretrained` becomes the reference's, whose hash is of
            all that it depends on.

    Returns:
        State dicts of image towers by task, in one order; and the task whose expert the reference
        is, None where it is the mean.

    Raises:
        AdamergeError: a tower of which no symmetries are known, an expert that is no whole tower,
            or whatever the matching says.
    """
    part, to = config["suite"]["align"], config["suite"]["align"].get("to", "first")
    try:
        spec = align.spec(clip.backbone)
    except AdamergeError as error:
        raise AdamergeError(
            f"{_KEY}: which units of this architecture's image tower may be permuted is not known "
            f"({error}): merge experts of one pretrained model, and name it as suite.pretrained"
        ) from error
    known = [json.dumps(clip.config["model_cfg"], sort_keys=True)]
    known += [json.dumps(part, sort_keys=True), *(files[task]["sha256"] for task in opened)]
    if data is not None:
        known += [config["statistics"]["images"], config["seed"], config["protocol"]]
        known += [found.key for found in data.tasks.values()]
    key = content_key({}, *known)
    kept, calls = Kept(folder / f"{key}.json"), itertools.count()

    @functools.cache
    def images() -> list[Tensor]:
        normalizer = Normalizer(clip.preprocess_cfg.mean, clip.preprocess_cfg.std)
        assert data is not None
        count = config["statistics"]["images"]
        return [normalizer(pixels) for pixels, _ in data.some("align", count, _AT_ONCE)]

    def matched(spec: Spec, reference: State, state: State, seed: int) -> Permutations:
        supplied: Supplied = {
            "spec": lambda: spec,
            "reference": lambda: reference,
            "state": lambda: state,
            "reference_module": lambda: _filled(clip.backbone, reference),
            "module": lambda: _filled(clip.backbone, state),
            "batches": images,
        }

        def found() -> dict[str, list[int]]:
            log.info("aligning experts: %s", part["_target_"])
            orders = build(_KEY, _matching(part), KINDS["align"], supplied)
            return {name: order.tolist() for name, order in orders.items()}

        orders = kept(str(next(calls)), found)  # one call after the other, always the same
        return {name: torch.tensor(order) for name, order in orders.items()}

    states = align.many(spec, list(_towers(clip, opened)), to, int(part.get("seed", 0)), matched)
    files["pretrained"] |= {"sha256": key, "reference": f"{to} of the experts, aligned"}
    if to == "mean":
        clip.backbone.load_state_dict(align.average(states))
    reference = next(iter(opened)) if to == "first" else None
    return dict(zip(opened, states, strict=True)), reference


def _towers(clip: Clip, opened: Mapping[str, Checkpoint]) -> Iterator[dict[str, Tensor]]:
    """The image tower of every expert, of which nothing may be lacking."""
    blank = copy.deepcopy(clip.backbone)
    for tensor in blank.parameters():
        tensor.data.fill_(float("nan"))
    for index, (task, expert) in enumerate(opened.items()):
        if expert.lora is not None:
            raise AdamergeError(
                f"expert of task {task!r} ({expert.source}) is a LoRA adapter: {_KEY} needs whole "
                "image towers; add it to its model and save that"
            )
        state = clip.backbone.state_dict() if index == 0 else tower_state(expert, blank)
        found = {name: tensor.detach().clone() for name, tensor in state.items()}
        for name, value in found.items():
            if value.is_floating_point() and bool(value.isnan().any()):
                raise AdamergeError(
                    f"expert of task {task!r} ({expert.source}) lacks tensor {name!r}, or has NaN "
                    f"in it: {_KEY} needs whole image towers, as there is no pretrained one to "
                    "take it from"
                )
        yield found


def _filled(module: nn.Module, state: State) -> nn.Module:
    found = copy.deepcopy(module)
    found.load_state_dict(dict(state))
    return found


def own_heads(
    clip: Clip, opened: Mapping[str, Checkpoint], prompts: Mapping[str, Prompts], folder: Path
) -> dict[str, Tensor]:
    """The heads `[C, D]` made by experts' own text towers; the first's is the CLIP's."""
    heads = {}
    for task in list(opened)[1:]:
        checkpoint = opened[task]
        names = match(checkpoint.source, checkpoint.tensors, clip.model.state_dict())
        if task in prompts and not lacks_text(names):
            own = copy.copy(clip)
            own.model = copy.deepcopy(clip.model)
            load_pretrained(own, checkpoint)
            heads[task] = zero_shot_heads(own, {task: prompts[task]}, folder).weight(task)
    return heads
