"""Task vectors: what the experts know, frozen, and the merge of them with coefficients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.errors import AdamergeError

log = logging.getLogger("adamerge")

StateDict = Mapping[str, Tensor]
_PIECE = 2**18  # numbers per task vector promoted to float64 at a time


class TaskVectors:
    """The pretrained weights θ0 and the task vectors τ_t = θ_t − θ0 of T experts.

    Editing Models with Task Arithmetic (arXiv 2212.04089). A *layer* is one tensor; layers keep the
    order of `pretrained`. Everything is computed and stored in float32 (float64 where `pretrained`
    is float64); half-precision inputs are promoted, and a log line says so. Integer entries
    (batch-norm counters) and tensors that no expert changed (a projection the experts do not have,
    what LoRA leaves alone) are constants, taken from the pretrained weights, and are not layers.

    Not an `nn.Module` on purpose: task vectors must appear in no checkpoint and no DDP broadcast.

    Args:
        pretrained: state dict of the image tower. Any mapping works; each tensor is read once.
        experts: state dicts by task name (a mapping, or pairs in order).
        sources: where each input came from (`"pretrained"` or a task -> file), for error messages.
        share: keep the pretrained tensors themselves, not copies, where their type is the right
            one: one model less in memory, if nothing changes them afterwards.

    Attributes:
        tasks: the T task names, in order.
        names: the L layer names, in order.
        pretrained: layer name -> tensor.
        deltas: layer name -> `[T, *shape]`.
        promoted: half-precision type -> the inputs (`pretrained`, task names) stored in it.

    Raises:
        AdamergeError: a missing, extra, mis-shaped or non-finite tensor, a duplicate task, an
            expert identical to the pretrained weights, or no expert or layer at all.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    pretrained: dict[str, Tensor]
    deltas: dict[str, Tensor]
    constants: dict[str, Tensor]
    promoted: dict[str, list[str]]

    def __init__(
        self,
        pretrained: StateDict,
        experts: Mapping[str, StateDict] | Iterable[tuple[str, StateDict]],
        *,
        sources: Mapping[str, str] | None = None,
        share: bool = False,
    ) -> None:
        pairs = list(experts.items() if isinstance(experts, Mapping) else experts)
        self.tasks = tuple(task for task, _ in pairs)
        if not pairs:
            raise AdamergeError("no experts were given: task vectors need at least one expert")
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if twice:
            raise AdamergeError(f"task {twice[0]!r} is listed twice: give every task its own name")
        where = _Where(sources or {})
        for task, expert in pairs:
            _check_names(pretrained, expert, task, where)
        self.pretrained, self.deltas, self.constants = {}, {}, {}
        promoted: dict[str, list[str]] = {}
        self.promoted = promoted
        for name in pretrained:
            base = pretrained[name].detach()
            if not base.is_floating_point():
                self.constants[name] = base.clone()
                continue
            self._read_layer(name, base if share else base.clone(), pairs, where, promoted)
        self.names = tuple(self.pretrained)
        if not self.names and any(tensor.is_floating_point() for tensor in self.constants.values()):
            raise _identical(where, self.tasks[0])
        if not self.names:
            raise AdamergeError(f"{where('pretrained')} holds no floating-point tensor to merge")
        for stored, keys in promoted.items():
            log.info("stored in %s, promoted to float32: %s", stored, ", ".join(map(str, keys)))
        self._check_distinct(where)

    def _read_layer(
        self,
        name: str,
        base: Tensor,
        experts: list[tuple[str, StateDict]],
        where: _Where,
        promoted: dict[str, list[str]],
    ) -> None:
        """One layer of all experts, each tensor read once and written straight to its place."""
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        if base.dtype != dtype:
            _note(promoted, base, "pretrained")
        pretrained = base.to(dtype)
        _check_finite(pretrained, "pretrained", name, where)
        deltas = torch.empty((len(experts), *base.shape), dtype=dtype, device=base.device)
        for row, (task, expert) in zip(deltas, experts, strict=True):
            tensor = expert[name].detach()
            if tensor.shape != base.shape:
                raise AdamergeError(
                    f"{where(task)} has tensor {name!r} of shape {list(tensor.shape)}, but the "
                    f"pretrained weights have {list(base.shape)}: use an expert fine-tuned "
                    "from this architecture"
                )
            if not tensor.is_floating_point():
                raise AdamergeError(
                    f"{where(task)} has tensor {name!r} of type {tensor.dtype}: expected "
                    "floating-point weights; give the expert as it was before it was quantised"
                )
            if tensor.dtype in (torch.float16, torch.bfloat16):
                _note(promoted, tensor, task)
            torch.sub(tensor.to(deltas), pretrained, out=row)
            _check_finite(row, task, name, where)
        if bool(deltas.count_nonzero()):
            self.pretrained[name], self.deltas[name] = pretrained, deltas
        else:
            self.constants[name] = pretrained

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Merged weights `W_l = θ0_l + Σ_t λ[t, l] τ[t, l]`, differentiable in `coefficients`.

        One pass over the task vectors here and one more in the backward pass, whatever the number
        of images and losses in between; nothing the size of the model is kept for the backward.

        Args:
            coefficients: merging coefficients λ, `[T]` (task-wise) or `[T, L]` (layer-wise), on
                the device of the task vectors. Cast to their dtype for the arithmetic.

        Returns:
            layer name -> tensor, in the dtype of the task vectors (autocast does not apply).
        """
        expected = (len(self.tasks), len(self.names))
        if coefficients.shape == expected[:1]:
            coefficients = coefficients[:, None].expand(-1, expected[1])
        if coefficients.shape != expected:
            raise AdamergeError(
                f"coefficients have shape {list(coefficients.shape)}: expected [{expected[0]}] or "
                f"{list(expected)} ([tasks] or [tasks, layers])"
            )
        return dict(zip(self.names, _Merge.apply(coefficients, self), strict=True))

    def expert(self, task: str) -> dict[str, Tensor]:
        """The weights θ0 + τ_t of one expert (equal to its file's up to one rounding)."""
        row = self.index(task)
        return {name: self.pretrained[name] + self.deltas[name][row] for name in self.names}

    def index(self, task: str) -> int:
        """The row of `task`. Raises AdamergeError for a task that is not here."""
        if task not in self.tasks:
            raise AdamergeError(f"no task {task!r} here: the tasks are {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def with_deltas(self, deltas: Mapping[str, Tensor]) -> TaskVectors:
        """The same tasks and (shared) pretrained weights with other deltas: for transforms."""
        other = object.__new__(TaskVectors)
        other.tasks, other.names = self.tasks, self.names
        other.pretrained, other.constants = self.pretrained, self.constants
        other.promoted = self.promoted
        other.deltas = dict(deltas)
        return other

    def apply(self, fn: Callable[[Tensor], Tensor]) -> TaskVectors:
        """A copy with every tensor mapped (to a device or dtype); what `fn` keeps is shared."""
        other = self.with_deltas({name: fn(delta) for name, delta in self.deltas.items()})
        other.pretrained = {name: fn(tensor) for name, tensor in self.pretrained.items()}
        other.constants = {name: fn(tensor) for name, tensor in self.constants.items()}
        return other

    def norms(self) -> Tensor:
        """Euclidean norm of each task vector over all layers, `[T]`, float64."""
        first = self.deltas[self.names[0]]
        total = torch.zeros(len(self.tasks), dtype=torch.float64, device=first.device)
        for delta in self.deltas.values():
            for piece in _rows(delta).split(_PIECE, dim=1):  # float64 a little at a time
                total += piece.double().square().sum(1)
        return total.sqrt()

    def numel(self) -> int:
        """P, the number of parameters of one model (all layers)."""
        return sum(tensor.numel() for tensor in self.pretrained.values())

    def _check_distinct(self, where: _Where) -> None:
        norms = self.norms().tolist()
        for row, task in enumerate(self.tasks):
            if norms[row] == 0.0:
                raise _identical(where, task)
            for other in range(row):
                if norms[other] == norms[row] and all(
                    torch.equal(delta[other], delta[row]) for delta in self.deltas.values()
                ):
                    raise AdamergeError(
                        f"{where(task)} is identical to {where(self.tasks[other])}: give every "
                        "task its own fine-tuned checkpoint"
                    )


class _Where:
    """Names an input in a message: `expert of task 'a' (file)` or `pretrained (file)`."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources

    def __call__(self, key: str) -> str:
        label = "pretrained" if key == "pretrained" else f"expert of task {key!r}"
        return f"{label} ({self.sources[key]})" if key in self.sources else label


def _identical(where: _Where, task: str) -> AdamergeError:
    return AdamergeError(
        f"{where(task)} is identical to the pretrained weights: give the fine-tuned checkpoint of "
        f"task {task!r}"
    )


def _check_names(pretrained: StateDict, expert: StateDict, task: str, where: _Where) -> None:
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


def _note(promoted: dict[str, list[str]], tensor: Tensor, key: str) -> None:
    keys = promoted.setdefault(str(tensor.dtype).removeprefix("torch."), [])
    if key not in keys:
        keys.append(key)


def _check_finite(tensor: Tensor, key: str, name: str, where: _Where) -> None:
    # Least and most need no copy of the tensor, and NaN passes through them.
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise AdamergeError(
            f"{where(key)} has NaN or infinite values in tensor {name!r}: the checkpoint is "
            "damaged or its training diverged; use another one"
        )


def _rows(delta: Tensor) -> Tensor:
    """`[T, *shape] -> [T, n]`, also for scalars."""
    return delta.view(len(delta), -1)


class _Merge(torch.autograd.Function):
    """`[T, L]` coefficients -> L merged tensors; the backward contracts dL/dW with τ once.

    Plain autograd would keep T scaled copies of the model per merge and walk them again for every
    backward pass; here the graph holds one node that needs nothing but τ itself.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, vectors: TaskVectors) -> tuple[Tensor, ...]:
        ctx.vectors, ctx.dtype = vectors, coefficients.dtype
        ctx.set_materialize_grads(False)
        merged = []
        with torch.autocast(coefficients.device.type, enabled=False):
            for name, column in zip(vectors.names, coefficients.unbind(1), strict=True):
                base, delta = vectors.pretrained[name], vectors.deltas[name]
                flat = torch.addmv(base.flatten(), _rows(delta).T, column.to(delta.dtype))
                merged.append(flat.view(base.shape))
        return tuple(merged)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        vectors: TaskVectors = ctx.vectors
        first = vectors.deltas[vectors.names[0]]
        columns = []
        with torch.autocast(first.device.type, enabled=False):
            for name, grad in zip(vectors.names, grads, strict=True):
                delta = vectors.deltas[name]
                if grad is None:  # the layer had no part in the loss
                    columns.append(delta.new_zeros(len(delta)))
                else:
                    columns.append(torch.mv(_rows(delta), grad.to(delta.dtype).flatten()))
        return torch.stack(columns, dim=1).to(ctx.dtype), None
