"""What constructors of methods and objectives get by name, each made when it is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import joined
from adamerge.config.inputs import Suite
from adamerge.config.targets import Supplied
from adamerge.encoders.clip import Clip
from adamerge.encoders.experts import Experts
from adamerge.encoders.tower import FoldedEncoder, Tower, merged_encoder
from adamerge.export.load import for_tasks
from adamerge.export.read import read_encoder, read_layout
from adamerge.weights.formats.read import Checkpoint, read, tower_state
from adamerge.weights.task_vectors import TaskVectors

INIT = 0.3  # task arithmetic's coefficient, where a method wraps a merge and names none


def base_settings(target: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method's settings that the builder makes an encoder of.

    `base` (a checkpoint, or a run's folder) for methods that take `base` or `encoder`; and `init`
    (the coefficient of task arithmetic in its place; null: 1 / T) for those that take `encoder`.
    """
    asked = set(inspect.signature(target).parameters)
    names = {"base"} if {"base", "encoder"} & asked else set()
    names |= {"init"} if "encoder" in asked and "init" not in asked else set()
    return {name: value for name, value in arguments.items() if name in names}


def base_problems(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with `base_settings`."""
    found, base, init = [], given.get("base"), given.get("init", INIT)
    if not isinstance(base, str | None):
        found.append(f"method.base is {base!r}: expected a checkpoint, a run's folder, or null")
    number = isinstance(init, int | float) and not isinstance(init, bool) and math.isfinite(init)
    if init is not None and not number:
        found.append(
            f"method.init is {init!r}: expected a finite number, or null (the mean of the experts)"
        )
    return found


def supplied(
    suite: Suite, task_vectors: TaskVectors, given: Mapping[str, Any], protocol: str
) -> Supplied:
    """What makes the values of `SUPPLIED`.

    Args:
        suite: its own task vectors make the teacher; its files get the record of the base's.
        task_vectors: what is merged.
        given: `base_settings`.
        protocol: of the run.
    """
    backbone, heads = suite.clip.backbone, suite.heads

    def base(static: bool = True) -> nn.Module | None:
        if given.get("base") is None:
            return None
        encoder, suite.files["base"] = _base_encoder(suite, given["base"], protocol, static)
        return encoder

    def encoder() -> nn.Module:
        encoder = base(static=False)
        if encoder is not None:
            return encoder
        tower, init = Tower(backbone), given.get("init", INIT)
        tower.check(task_vectors)
        init = 1 / len(task_vectors.tasks) if init is None else float(init)
        return merged_encoder(tower, task_vectors, init)

    return {
        "backbone": lambda: backbone,
        "task_vectors": lambda: task_vectors,
        "heads": lambda: heads,
        "teacher": lambda: Experts(backbone, suite.task_vectors),
        "encoder": encoder,
        "tasks": lambda: heads.tasks,
        "dim": lambda: int(suite.clip.config["model_cfg"]["embed_dim"]),
        "base": base,
    }


def _base_encoder(
    suite: Suite, source: str, protocol: str, static: bool
) -> tuple[nn.Module, dict[str, str]]:
    """The encoder of a checkpoint, an exported folder, or the one in a run's folder; its record."""
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        folder = folder / "merged"
        if not folder.is_dir():
            raise AdamergeError(
                f"method.base ({source}) is a run that is not finished: go on with it first"
            )
    layout = read_layout(folder)
    before = layout.record.get("protocol")
    if protocol == "heldout" and before == "paper":
        raise AdamergeError(
            f"method.base ({source}) was adapted on all test images (protocol paper): scored under "
            "protocol heldout it would have seen what is scored; adapt it under heldout too"
        )
    if layout.kind not in (("static",) if static else ("static", "per_task", "dynamic")):
        raise AdamergeError(
            f"method.base ({source}) is an export of kind {layout.kind}: expected "
            f"{'static' if static else 'static, per_task or dynamic'}; name the merge below it"
        )
    known = {} if before is None else {"protocol": str(before)}
    if layout.kind == "static":
        checkpoint = read(folder if folder.is_dir() else source)
        return _static(suite.clip, checkpoint), checkpoint.record(suite.digest) | known
    encoder, stated = read_encoder(folder, layout)
    if stated["model_cfg"] != suite.clip.config["model_cfg"]:
        raise _misfit(folder, "its model config is another")
    digest = joined(suite.digest(file) for file in sorted(folder.rglob("*.safetensors")))
    record = {"path": str(folder), "sha256": digest}
    return for_tasks(encoder, layout, suite.heads.tasks), record | known


def _static(clip: Clip, checkpoint: Checkpoint) -> FoldedEncoder:
    state, weights = tower_state(checkpoint, clip.backbone), {}
    for name, tensor in clip.backbone.state_dict().items():
        shape, wanted = list(state[name].shape), list(tensor.shape)
        if shape != wanted:
            raise _misfit(checkpoint.path, f"tensor {name!r} is {shape}, expected {wanted}")
        weights[name] = state[name].detach().to(tensor)
    return FoldedEncoder(Tower(clip.backbone), weights)


def _misfit(path: Path, what: str) -> AdamergeError:
    return AdamergeError(
        f"method.base ({path}) does not fit the suite's architecture: {what}; give a merge of the "
        "same architecture"
    )
