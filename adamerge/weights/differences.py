"""Task vectors read layer by layer from the experts' tensors; every mismatch is named."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.fitting import other_shape

_STATISTICS = ("running_mean", "running_var")
_SAME = "use an expert fine-tuned from this architecture"
StateDict = Mapping[str, Tensor]
Model = StateDict | nn.Module


class Where:
    """Names an input in a message: `expert of task 'a' (file)` or `pretrained (file)`."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources

    def __call__(self, key: str) -> str:
        label = "pretrained" if key == "pretrained" else f"expert of task {key!r}"
        return f"{label} ({self.sources[key]})" if key in self.sources else label


class Differences:
    """`θ_t − θ0` of one layer after the other, each of the experts' tensors read once.

    Args:
        experts: (task, state dict) pairs.
        where: names the inputs in messages.

    Attributes:
        promoted: half-precision type -> the inputs (`pretrained`, task names) stored in it.

    Raises:
        AdamergeError: no expert, a task named twice, or tensors that are not those of
            `pretrained`; when read, one of another shape, not floating-point or not finite.
    """

    def __init__(
        self, pretrained: StateDict, experts: list[tuple[str, StateDict]], where: Where
    ) -> None:
        self.tasks = tuple(task for task, _ in experts)
        if not experts:
            raise AdamergeError("no experts were given: task vectors need at least one expert")
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if twice:
            raise AdamergeError(f"task {twice[0]!r} is listed twice: give every task its own name")
        for task, expert in experts:
            _check_names(pretrained, expert, task, where)
        self.promoted: dict[str, list[str]] = {}
        self._experts, self._where = experts, where

    def read(self, name: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """θ0 of a layer in float32 (float64 where it is so), and the deltas `[T, *shape]`."""
        pretrained = base.to(_full(base))
        if pretrained.dtype != base.dtype:
            self._note(base, "pretrained")
        _check_finite(pretrained, "pretrained", name, self._where)
        deltas = pretrained.new_empty((len(self.tasks), *base.shape))
        for row, (task, tensor) in zip(deltas, self._tensors(name, base), strict=True):
            if tensor.dtype.itemsize < base.dtype.itemsize:
                self._note(tensor, task)
            torch.sub(tensor.to(deltas), pretrained, out=row)
            _check_finite(row, task, name, self._where)
        return pretrained, deltas

    def values(self, name: str, base: Tensor) -> Tensor:
        """The pretrained model's and each expert's value of a buffer, `[1 + T, *shape]`."""
        values = [base.to(_full(base))]
        for task, tensor in self._tensors(name, base):
            values.append(tensor.to(values[0]))
            _check_finite(values[-1], task, name, self._where)
        return torch.stack(values)

    def _tensors(self, name: str, base: Tensor) -> Iterator[tuple[str, Tensor]]:
        for task, expert in self._experts:
            tensor = expert[name].detach()
            if tensor.shape != base.shape:
                raise AdamergeError(
                    f"{self._where(task)} has tensor {name!r} of shape {list(tensor.shape)}, but "
                    f"the pretrained weights have {list(base.shape)}: "
                    f"{other_shape(name, tensor.shape, base.shape, _SAME)}"
                )
            if not tensor.is_floating_point():
                raise AdamergeError(
                    f"{self._where(task)} has tensor {name!r} of type {tensor.dtype}: expected "
                    "floating-point weights; give the expert as it was before it was quantised"
                )
            yield task, tensor

    def _note(self, tensor: Tensor, key: str) -> None:
        keys = self.promoted.setdefault(str(tensor.dtype).removeprefix("torch."), [])
        if key not in keys:
            keys.append(key)


def _full(base: Tensor) -> torch.dtype:
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def state_of(model: Model, what: str, again: Mapping[str, str]) -> StateDict:
    """A model's tensors without those named in `again`; without any, a mapping is given back.

    Args:
        what: names the model in a message.
        again: further name of a tensor -> its first name, see `tied_names`.

    Raises:
        AdamergeError: it is neither a module nor a mapping, or holds two tensors under the names
            of one.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise AdamergeError(
            f"{what} is a {type(model).__name__}: expected a torch module or its state dict"
        )
    state: StateDict = model.state_dict() if isinstance(model, nn.Module) else model
    if state is model and not again:
        return state
    for name, first in again.items():
        one, other = state.get(first), state.get(name)
        if one is not None and other is not None and not one.equal(other):
            raise AdamergeError(
                f"{what} has two tensors where the pretrained model has one, tied, under the names "
                f"{first!r} and {name!r}: use an expert whose weights are tied as well, or untie "
                "those of the pretrained model (a copy of its own for each)"
            )
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and n not in again}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further name of a tensor that a module holds more than once -> its first name."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {n: f for n, t in state.items() if (f := first.setdefault(id(t), n)) != n}


def is_buffer(name: str, tensor: Tensor, known: Collection[str] = ()) -> bool:
    """Whether a floating-point tensor is no parameter: a batch norm's statistics, or as known."""
    return tensor.is_floating_point() and (name.endswith(_STATISTICS) or name in known)


def identical(where: Where, task: str) -> AdamergeError:
    """What is said of an expert that is the pretrained model."""
    return AdamergeError(
        f"{where(task)} is identical to the pretrained weights: give the fine-tuned checkpoint of "
        f"task {task!r}"
    )


def _check_names(pretrained: StateDict, expert: StateDict, task: str, where: Where) -> None:
    missing = [name for name in pretrained if name not in expert]
    extra = [name for name in expert if name not in pretrained]
    for names, verb in ((missing, "lacks"), (extra, "has the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise AdamergeError(
                f"{where(task)} {verb} tensor {names[0]!r}{more}: expected exactly the "
                f"{len(pretrained)} tensors of {where('pretrained')}; use an expert of the same "
                "architecture"
            )


def _check_finite(tensor: Tensor, key: str, name: str, where: Where) -> None:
    # Least and most need no copy of the tensor, and NaN passes through them.
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise AdamergeError(
            f"{where(key)} has NaN or infinite values in tensor {name!r}: the checkpoint is "
            "damaged or its training diverged; use another one"
        )


def other_layers(names: Collection[str]) -> AdamergeError:
    """What is said of changed task vectors that lack layers, or have more."""
    return AdamergeError(
        f"deltas are not of the same layers as the task vectors ({min(names)!r}): give one "
        "[T, *shape] for each layer"
    )


def not_the_last() -> AdamergeError:
    """What is said of a transform after one that makes an encoder of its own for every task."""
    return AdamergeError(
        "the transform (emr, tall, twin) makes an encoder of its own for every task, whose vectors "
        "no other transform can take: let it be the last"
    )
