"""The tensors of task vectors, read from models and experts or from a file: layers, constants,
buffers."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import parse_json
from adamerge.weights.differences import (
    Differences,
    Model,
    StateDict,
    Where,
    identical,
    is_buffer,
    state_of,
    tied_names,
)
from adamerge.weights.disk import MappedLayers, storing
from adamerge.weights.storage import Layer, Storage, keep

log = logging.getLogger("adamerge")

_PIECE = 2**16  # numbers per task vector promoted to float64 at a time
_FORMAT = 1  # of the metadata in a file of task vectors
_NOTES = ("tasks", "names", "promoted", "norms", "format")  # the texts in it


@dataclass
class Contents:
    """What task vectors hold; see `TaskVectors`.

    Attributes:
        lengths: the Euclidean norm of each task vector, `[T]`, float64.
    """

    tasks: tuple[str, ...]
    lengths: Tensor
    promoted: dict[str, list[str]]
    pretrained: dict[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def add_buffer(self, name: str, values: Tensor) -> None:
        """Adds a floating-point buffer `[1 + T, *shape]`; a merge has the mean of the experts'."""
        self.buffers[name] = values
        mean = values[1:].mean(0)
        self.constants[name] = mean.clamp_min(0) if name.endswith("running_var") else mean


def read(
    pretrained: Model,
    experts: list[tuple[str, Model]],
    buffers: Collection[str],
    share: bool,
    storage: Storage,
    where: Where,
    start: str | None = None,
) -> Contents:
    """Every tensor of all models, one layer at a time; the arguments are those of `TaskVectors`."""
    again = tied_names(pretrained) if isinstance(pretrained, nn.Module) else {}
    if isinstance(pretrained, nn.Module):
        buffers = {*buffers, *(name for name, _ in pretrained.named_buffers())}
    state = state_of(pretrained, where("pretrained"), again)
    differences = Differences(
        state, [(task, state_of(expert, where(task), again)) for task, expert in experts], where
    )
    lengths = torch.zeros(len(experts), dtype=torch.float64)
    found = Contents(differences.tasks, lengths, differences.promoted)
    with storing(storage, list(state)) as shelf:
        for name in state:
            base = state[name].detach()
            if is_buffer(name, base, buffers):
                found.add_buffer(name, differences.values(name, base))
            elif base.is_complex():
                raise AdamergeError(
                    f"{where('pretrained')} has tensor {name!r} of type {base.dtype}: expected "
                    "real weights; keep its real and imaginary parts as parameters of their own"
                )
            elif not base.is_floating_point():
                found.constants[name] = base.clone()
            else:
                tensor, deltas = differences.read(name, base if share else base.clone())
                if not bool(deltas.count_nonzero()):
                    found.constants[name] = tensor
                    continue
                found.pretrained[name] = tensor
                lengths += squares(deltas)
                shelf.add(name, keep(deltas, storage.dtype))
        if not found.pretrained:
            raise _nothing(found, where)
        lengths.sqrt_()
        known = [found.tasks, list(found.pretrained), found.promoted, lengths.tolist(), _FORMAT]
        found.layers = shelf.close({k: json.dumps(v) for k, v in zip(_NOTES, known, strict=True)})
        _check_distinct(found, where, start)
    for stored, keys in found.promoted.items():
        log.info("stored in %s, promoted to float32: %s", stored, ", ".join(map(str, keys)))
    return found


def read_file(
    pretrained: StateDict,
    storage: Storage,
    experts: list[tuple[str, StateDict]],
    buffers: Collection[str],
) -> Contents:
    """What `read` left in `storage.file`; the arguments are those of `TaskVectors.mapped`."""
    if storage.file is None:
        raise AdamergeError("no file of task vectors is named: give Storage(file=…)")
    layers = MappedLayers(storage.file).verified()
    try:
        notes = {key: parse_json(layers.metadata[key]) for key in _NOTES}
        names, lengths = tuple(notes["names"]), torch.tensor(notes["norms"], dtype=torch.float64)
        found = Contents(tuple(notes["tasks"]), lengths, dict(notes["promoted"]))
        fits = notes["format"] == _FORMAT and all(
            pretrained[name].shape == layers[name].values.shape[1:] for name in names
        )
    except (KeyError, ValueError, TypeError) as error:
        raise _another_model(storage, error) from error
    if not fits:
        raise _another_model(storage, "its tensors have other shapes")
    promote = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    base = {n: t.detach().to(promote.get(t.dtype, t.dtype)) for n, t in pretrained.items()}
    found.layers, found.pretrained = layers, {name: base[name] for name in names}
    found.constants = {name: base[name] for name in base if name not in found.pretrained}
    known = [name for name in base if is_buffer(name, base[name], buffers)]
    if known:
        differences = Differences(pretrained, experts, Where({}))
        for name in known:
            found.add_buffer(name, differences.values(name, pretrained[name].detach()))
    return found


def squares(deltas: Tensor) -> Tensor:
    """`Σ τ²` of each task, `[T]`, float64 on the CPU; a little at a time."""
    total = torch.zeros(len(deltas), dtype=torch.float64, device=deltas.device)
    for piece in deltas.reshape(len(deltas), -1).split(_PIECE, dim=1):
        piece = piece.double()
        total += torch.linalg.vecdot(piece, piece)
    return total.cpu()


def finite_squares(deltas: Tensor, name: str) -> Tensor:
    """As `squares`, of a layer that a transform changed.

    Raises:
        AdamergeError: NaN or infinite values.
    """
    found = squares(deltas)
    if not bool(found.isfinite().all()):
        raise AdamergeError(
            f"the changed task vectors have NaN or infinite values in layer {name!r}: a setting of "
            "the transform is too large there, or use another transform"
        )
    return found


def _nothing(found: Contents, where: Where) -> AdamergeError:
    if any(tensor.is_floating_point() for tensor in found.constants.values()):
        return identical(where, found.tasks[0])
    return AdamergeError(f"{where('pretrained')} holds no floating-point tensor to merge")


def _check_distinct(found: Contents, where: Where, start: str | None) -> None:
    lengths = found.lengths.tolist()
    for row, task in enumerate(found.tasks):
        if lengths[row] == 0.0 and task != start:
            raise identical(where, task)
        for other in range(row):
            if lengths[other] == lengths[row] and _equal(found, other, row):
                raise AdamergeError(
                    f"{where(task)} is identical to {where(found.tasks[other])}: give every task "
                    "its own fine-tuned checkpoint"
                )


def _equal(found: Contents, one: int, other: int) -> bool:
    return all(
        torch.equal(layer.row(one, base), layer.row(other, base))
        for layer, base in ((found.layers[n], t) for n, t in found.pretrained.items())
    )


def _another_model(storage: Storage, why: Any) -> AdamergeError:
    return AdamergeError(
        f"{storage.file} holds task vectors of another model or format ({why}): delete it, and it "
        "is made again"
    )
