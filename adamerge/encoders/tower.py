"""Towers: an architecture without weights, and the encoders that weights make of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.encoders.fast_paths import attention_for, use_fast_paths
from adamerge.encoders.rows import Inputs
from adamerge.weights.differences import tied_names
from adamerge.weights.task_vectors import TaskVectors

Tap = Callable[[int, Tensor], Tensor | None]  # (index, output) -> what goes on; None: the same


class Tower:
    """A network without its weights: `tower(weights, inputs) -> features or logits [B, D]`.

    Of any module that gives a tensor `[B, D]`, a pair whose first is one, or an output with
    `logits` or `pooler_output`. Made of a whole encoder it takes its `task_ids` as well.

    Its own parameters are empty (meta) tensors, so no second copy of the model is held, and the
    module it was made from is never touched. A plain object, so that it is registered nowhere.

    >>> tower = Tower(nn.Linear(2, 1, bias=False))
    >>> tower({"weight": torch.tensor([[1.0, 2.0]])}, torch.ones(3, 2)).flatten()
    tensor([3., 3., 3.])

    Args:
        network: evaluated as in evaluation mode; left unchanged.

    Attributes:
        names: of its tensors, one of each that it holds more than once.
        tied: further name of such a tensor -> its first name.
    """

    # What a call is made within (see `recompute`).
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def __init__(self, network: nn.Module) -> None:
        self._of(_skeleton(network))

    def _of(self, skeleton: nn.Module) -> None:
        self.skeleton, self.tied = skeleton, tied_names(skeleton)
        self.names = frozenset(skeleton.state_dict()) - self.tied.keys()
        # Further places of tied tensors. A module that is used twice is one place, under the first
        # of its names; to be given under both, a call would leave it with other weights.
        modules = dict(skeleton.named_modules())
        self._elsewhere = {
            name: first for name, first in self.tied.items() if name.rpartition(".")[0] in modules
        }

    def changed(self, change: Callable[[nn.Module], None]) -> Tower:
        """Another tower, of a copy of the skeleton that `change` was called with."""
        other = copy.copy(self)
        skeleton = copy.deepcopy(self.skeleton)
        change(skeleton)
        other._of(skeleton.eval())
        return other

    def __call__(
        self, weights: Mapping[str, Tensor], inputs: Inputs, task_ids: Tensor | None = None
    ) -> Tensor:
        given, named = rows.arguments(inputs) if task_ids is None else ((inputs, task_ids), {})
        if not weights.keys() >= self.names:
            raise AdamergeError(rows.missing(self.names - weights.keys()))
        own = {name: weight for name, weight in weights.items() if name not in self.tied}
        own |= {name: weights[first] for name, first in self._elsewhere.items()}
        device = rows.tensors(inputs)[0].device
        try:
            with attention_for(self.skeleton, device), self.around():
                output = functional_call(self.skeleton, own, given, named, tie_weights=False)
        except (RuntimeError, TypeError) as error:
            why = rows.misfit(self.skeleton, own, given, named)
            if why is None:
                raise
            raise AdamergeError(why) from error
        return rows.pooled(output, type(self.skeleton).__name__)

    def check(self, task_vectors: TaskVectors, per_task: bool = False) -> None:
        """Raises AdamergeError unless the task vectors are of exactly this tower's tensors.

        Args:
            per_task: whether they may be those of an encoder for each task.
        """
        if task_vectors.per_task and not per_task:
            raise AdamergeError(
                "the transform (emr, tall, twin) makes an encoder of its own for every task, which "
                "this method would add up: use it with AdaMerging, as method=task_wise, and give "
                "the finished run as method.base to what adapts an encoder further"
            )
        shapes = {name: list(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}
        given = {**task_vectors.pretrained, **task_vectors.constants}
        for name in [*shapes, *given]:
            found = list(given[name].shape) if name in given else "nothing"
            wanted = shapes.get(name, "nothing")
            if found != wanted and not (name in self.tied and name not in given):
                raise AdamergeError(
                    f"task vectors do not fit the backbone: tensor {name!r} is {found}, the "
                    f"backbone has {wanted}; use weights of the same architecture"
                )

    def filled(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A module of this architecture that holds `weights` (not copied)."""
        module = copy.deepcopy(self.skeleton)
        again = {name: weights[first] for name, first in self.tied.items()}
        module.load_state_dict({**weights, **again}, strict=True, assign=True)
        return module.requires_grad_(False)

    def apply_buffers(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Maps the few real buffers that are no weights (positional tables), e.g. to a device."""
        for module in self.skeleton.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = fn(buffer)


def _skeleton(network: nn.Module) -> nn.Module:
    empty: dict[int, Any] = {}
    for tensor in network.state_dict(keep_vars=True).values():
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(meta, requires_grad=False) if is_parameter else meta
    skeleton = copy.deepcopy(network, empty).eval().requires_grad_(False)
    for part in skeleton.modules():
        if getattr(part, "grad_checkpointing", False):  # would recompute when the weights are gone
            part.grad_checkpointing = False  # type: ignore[assignment]
    use_fast_paths(skeleton)
    return skeleton


def towers_of(module: nn.Module) -> list[Tower]:
    """The towers that a module holds as plain objects."""
    return [value for value in vars(module).values() if isinstance(value, Tower)]


def block_of(name: str) -> str:
    """`transformer.resblocks.3.mlp.c_fc.weight` -> `transformer.resblocks.3`; `ln_pre.bias` ->
    `ln_pre`: everything up to the first number, or the outermost name."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def resblocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of an open_clip image tower, or of an encoder holding one.

    Raises:
        AdamergeError: there are none.
    """
    tower = getattr(module, "backbone", module)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        raise AdamergeError(
            f"the backbone {type(tower).__name__} has no blocks transformer.resblocks.*: expected "
            "the VisionTransformer of an open_clip model such as ViT-B-32"
        )
    return list(blocks)


@contextlib.contextmanager
def tapped(modules: Sequence[nn.Module], tap: Tap) -> Iterator[None]:
    """While open, every module's output goes through `tap`."""

    def hook(index: int) -> Callable[..., Tensor | None]:
        return lambda module, inputs, output: tap(index, output)

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def traced(
    blocks: Sequence[nn.Module], encode: Callable[[], Tensor], tap: Tap | None = None
) -> Tensor:
    """A trace `[B, blocks · W + D]`: the token means after each block, then the features.

    Args:
        encode: runs the tower that holds `blocks`, giving features `[B, D]`.
        tap: changes the outputs of the blocks first, `[B, N, W]`.
    """
    means: list[Tensor] = []

    def note(index: int, output: Tensor) -> Tensor:
        changed = None if tap is None else tap(index, output)
        output = output if changed is None else changed
        means.append(output.mean(1))
        return output

    with tapped(blocks, note):
        features = encode()
    return torch.cat([*means, features], 1)


def equal_runs(task_ids: Tensor) -> list[int] | None:
    """The tasks of a batch, in order, if it is a run of neighbours per task, all equally long.

    That is how batches come in training: then a batch is `[tasks, images, …]` without an index.
    """
    tasks, counts = torch.unique_consecutive(task_ids.cpu(), return_counts=True)
    found = tasks.tolist()
    whole = len(set(found)) == len(found) and bool((counts == counts[:1]).all())
    return found if whole and found else None


class FoldedEncoder(nn.Module):
    """A static encoder: one tower with plain weights, the same for every task.

    Args:
        tower: the architecture.
        weights: a full state dict of it; held, not copied.
    """

    def __init__(self, tower: Tower, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backbone = tower.filled(weights)

    def forward(self, inputs: Inputs, task_ids: Tensor | None = None) -> Tensor:
        """Features or logits `[B, D]`; `task_ids` is accepted and ignored."""
        given, named = rows.arguments(inputs)
        return rows.pooled(self.backbone(*given, **named))


def merged_encoder(
    tower: Tower, task_vectors: TaskVectors, coefficients: Tensor | float
) -> FoldedEncoder:
    """The static encoder of fixed coefficients: `[T]`, `[T, L]`, or one number for all.

    1/T is weight averaging, any other number task arithmetic (arXiv 2212.04089). Buffers are the
    mean of the experts', whatever the coefficients: see `static_encoder` for the models themselves.
    """
    whole = task_vectors.whole
    first = whole.pretrained[whole.names[0]]
    if not isinstance(coefficients, Tensor):
        coefficients = torch.full((len(whole.tasks),), float(coefficients), dtype=torch.float64)
    with torch.no_grad():
        weights = whole.combine(coefficients.detach().to(first))
    return FoldedEncoder(tower, {**weights, **whole.constants})


def static_encoder(tower: Tower, task_vectors: TaskVectors, task: str | None) -> FoldedEncoder:
    """The expert of a task, or the pretrained model (None), as it was given."""
    whole = task_vectors.whole
    if task is None:
        buffers = {name: values[0] for name, values in whole.buffers.items()}
        return FoldedEncoder(tower, {**whole.constants, **whole.pretrained, **buffers})
    return FoldedEncoder(tower, {**whole.constants, **whole.expert(task)})


def block_widths(blocks: Sequence[nn.Module]) -> list[int]:
    """W of every block: the size of its first normalisation, which all tokens pass."""
    return [int(cast(Any, block).ln_1.normalized_shape[0]) for block in blocks]
