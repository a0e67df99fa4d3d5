"""What constructors of methods and objectives get by name, each made when it is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import joined, sha256
from adamerge._base.kept import Digest
from adamerge.encoders.clip import Clip
from adamerge.encoders.experts import Experts
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import FoldedEncoder, Tower, merged_encoder
from adamerge.export.load import for_tasks
from adamerge.export.read import read_encoder, read_layout
from adamerge.learn.classifiers import LearnedHeads
from adamerge.weights.formats.read import Checkpoint, read, tower_state
from adamerge.weights.task_vectors import TaskVectors

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
    heads: Heads | LearnedHeads,
    own: Mapping[str, Any],
    files: dict[str, dict[str, str]],
    protocol: str,
    digest: Digest = sha256,
) -> Supplies:
    """The values of `SUPPLIED`.

    Args:
        task_vectors: as loaded: the teacher is made of them.
        transformed: what is merged.
        own: from `split_base`.
        files: gets the record of the base's file.
        protocol: of the run.
        digest: gives the sha256 of a file.
    """
    backbone = clip.backbone

    def base(static: bool = True) -> nn.Module | None:
        if own.get("base") is None:
            return None
        encoder, files["base"] = _base_encoder(
            clip, own["base"], heads.tasks, protocol, static, digest
        )
        return encoder

    def encoder() -> nn.Module:
        given = base(static=False)
        if given is not None:
            return given
        Tower(backbone).check(transformed)
        return merged_encoder(Tower(backbone), transformed, float(own.get("init", INIT)))

    return {
        "backbone": lambda: backbone,
        "task_vectors": lambda: transformed,
        "heads": lambda: heads,
        "teacher": lambda: Experts(backbone, task_vectors),
        "encoder": encoder,
        "tasks": lambda: heads.tasks,
        "dim": lambda: int(clip.config["model_cfg"]["embed_dim"]),
        "base": base,
    }


def _base_encoder(
    clip: Clip,
    source: str,
    tasks: tuple[str, ...],
    protocol: str,
    static: bool,
    digest: Digest,
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
    if layout.kind in (("static",) if static else ("static", "per_task", "dynamic")):
        if layout.kind != "static":
            encoder, stated = read_encoder(folder, layout)
            if stated["model_cfg"] != clip.config["model_cfg"]:
                raise _misfit(folder, "its model config is another")
            record = {"path": str(folder), "sha256": _hash_of(folder, digest)}
            return for_tasks(encoder, layout, tasks), record | _known(before)
        checkpoint = read(folder if folder.is_dir() else source)
        found = _static(clip, checkpoint)
        return found, checkpoint.record(digest) | _known(before)
    raise AdamergeError(
        f"method.base ({source}) is an export of kind {layout.kind}: expected "
        f"{'static' if static else 'static, per_task or dynamic'}; name the merge below it"
    )


def _known(protocol: Any) -> dict[str, str]:
    return {} if protocol is None else {"protocol": str(protocol)}


def _hash_of(folder: Path, digest: Digest) -> str:
    files = sorted(folder.rglob("*.safetensors"))
    return joined(digest(file) for file in files)


def _static(clip: Clip, checkpoint: Checkpoint) -> FoldedEncoder:
    state, own = tower_state(checkpoint, clip.backbone), clip.backbone.state_dict()
    for name, tensor in own.items():
        found, wanted = list(state[name].shape), list(tensor.shape)
        if found != wanted:
            raise _misfit(checkpoint.path, f"tensor {name!r} is {found}, expected {wanted}")
    weights = {name: state[name].detach().to(tensor) for name, tensor in own.items()}
    return FoldedEncoder(Tower(clip.backbone), weights)


def _misfit(path: Path, what: str) -> AdamergeError:
    return AdamergeError(
        f"method.base ({path}) does not fit the suite's architecture: {what}; give a merge of the "
        "same architecture"
    )
