"""What constructors of methods and objectives get by name, each made when it is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints import read, tower_state
from adamerge.encoders import Clip, Experts, FoldedEncoder, Tower, merged_encoder
from adamerge.errors import AdamergeError
from adamerge.heads import Heads
from adamerge.task_vectors import TaskVectors

Supplies = Mapping[str, Callable[[], Any]]
SUPPLIED = ("backbone", "task_vectors", "heads", "teacher", "encoder", "tasks", "dim", "base")
INIT = 0.3  # task arithmetic's coefficient, where a method wraps a merge and names none


def split_base(
    target: Callable[..., Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's settings without, and with only, what the builder makes an encoder of.

    `base` (a checkpoint, or a run's folder) for methods that take `base` or `encoder`; and `init`
    (the coefficient of task arithmetic in its place) for those that take `encoder`.
    """
    asked = inspect.signature(target).parameters
    names = {"base"} if {"base", "encoder"} & set(asked) else set()
    names |= {"init"} if "encoder" in asked and "init" not in asked else set()
    own = {name: value for name, value in arguments.items() if name in names}
    return {name: value for name, value in arguments.items() if name not in names}, own


def base_problems(own: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings that `split_base` split off."""
    found, base, init = [], own.get("base"), own.get("init", INIT)
    if base is not None and not isinstance(base, str):
        found.append(f"method.base is {base!r}: expected a checkpoint, a run's folder, or null")
    number = isinstance(init, int | float) and not isinstance(init, bool) and math.isfinite(init)
    if not number:
        found.append(f"method.init is {init!r}: expected a finite number")
    return found


def supplies(
    clip: Clip,
    task_vectors: TaskVectors,
    transformed: TaskVectors,
    heads: Heads,
    own: Mapping[str, Any],
    files: dict[str, dict[str, str]],
) -> Supplies:
    """The values of `SUPPLIED`.

    Args:
        task_vectors: as loaded: the teacher is made of them.
        transformed: what is merged.
        own: from `split_base`.
        files: gets the record of the base's file.
    """
    backbone = clip.backbone

    def base() -> FoldedEncoder | None:
        return None if own.get("base") is None else _base_encoder(clip, own["base"], files)

    def encoder() -> FoldedEncoder:
        given = base()
        if given is not None:
            return given
        return merged_encoder(Tower(backbone), transformed, float(own.get("init", INIT)))

    return {
        "backbone": lambda: backbone,
        "task_vectors": lambda: transformed,
        "heads": lambda: heads,
        "teacher": lambda: Experts(backbone, task_vectors),
        "encoder": encoder,
        "tasks": lambda: heads.tasks,
        "dim": lambda: heads.weight(heads.tasks[0]).shape[1],
        "base": base,
    }


def _base_encoder(clip: Clip, source: str, files: dict[str, dict[str, str]]) -> FoldedEncoder:
    """A static encoder read from a checkpoint, an exported folder, or the one in a run's folder."""
    folder = Path(source) / "merged"
    checkpoint = read(folder if (Path(source) / "config.yaml").is_file() else source)
    state, own = tower_state(checkpoint, clip.backbone), clip.backbone.state_dict()
    for name in {**own, **state}:
        found = list(state[name].shape) if name in state else "nothing"
        wanted = list(own[name].shape) if name in own else "nothing"
        if found != wanted:
            raise AdamergeError(
                f"method.base ({checkpoint.path}) does not fit the suite's architecture: tensor "
                f"{name!r} is {found}, expected {wanted}; give a static merge of the same "
                "architecture"
            )
    files["base"] = checkpoint.record()
    weights = {name: state[name].detach().to(tensor) for name, tensor in own.items()}
    return FoldedEncoder(Tower(clip.backbone), weights)
