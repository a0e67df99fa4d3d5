"""Concrete subspace learning: a mask over all weights, shared by the tasks, is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adamerge._base.errors import AdamergeError
from adamerge.methods.base import MergeMethod
from adamerge.transforms.draws import uniform
from adamerge.transforms.layers import check_number
from adamerge.weights.storage import Layer, contract, merge
from adamerge.weights.task_vectors import TaskVectors


class Concrete(MergeMethod):
    """`W_l = θ0_l + m_l ∘ Σ_t λ[t, l] τ[t, l]` with learnable λ and a learned random mask m.

    Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion
    (arXiv 2312.06173). Every weight has a logit x, at the start 0, and for numbers u drawn from
    [0, 1) `q = sigmoid((x + log u − log(1 − u)) / temperature)` and `m = q / mean(q)`, the mean
    taken over a layer. Two phases:

    1. For the first `mask_steps` steps every step has a sample of its own, and the logits are
       learned; with them λ, or (`granularity: fixed`, Concrete Task Arithmetic) λ stays at `init`.
    2. Then the mask is that of one last sample, and λ alone is learned.

    What folds, and what is encoded outside of training, has the mask of the last sample throughout.
    The paper learns the first phase in two levels: λ steps from `init` on its own, then the logits
    step given that λ, on fresh images: so does `update=bilevel` (`learn.updates.Bilevel`).

    Samples depend on the seed, their number and the layer alone, so that processes draw the same
    and a resumed run goes on with its own; they are drawn on the CPU. A logit per weight is
    learned: with Adam that takes the memory of about nine models beside the task vectors, and a
    checkpoint is as large as three.

    Args:
        backbone: the network (of a CLIP `model.visual`), for its architecture only; left unchanged.
        task_vectors: T task vectors of L layers; frozen, moved with the module, never saved in a
            state dict.
        granularity: `layer` learns λ `[T, L]`, `task` λ `[T]`, `fixed` none.
        init: initial value of every coefficient.
        mask_steps: how many steps the first phase takes.
        temperature: the lower, the nearer masks are to 0 and 1 before they are scaled.
        seed: of the samples.

    Attributes:
        logits: the learnable x of every layer, in the order of the task vectors.
        coefficients: the learnable λ, or a plain tensor where it is fixed.
        learns: which of `logits` and `coefficients` get a gradient.
        sample: the number of the sample in effect while training; None: the last one.

    Raises:
        AdamergeError: a setting out of range, or task vectors that do not fit the backbone.
    """

    streams = staged = True

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        granularity: Literal["layer", "task", "fixed"] = "layer",
        init: float = 0.3,
        mask_steps: int = 1000,
        temperature: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, task_vectors)
        _check(granularity)
        # With fixed coefficients the mask alone is learned.
        check_number("Concrete", "init", init, -1e6, 1e6)
        least = int(granularity == "fixed")
        check_number("Concrete", "mask_steps", mask_steps, least, 1e9, whole=True)
        check_number("Concrete", "temperature", temperature, 0, 1e6, open_low=True)
        self.granularity = granularity
        self.mask_steps, self.temperature, self.seed = mask_steps, temperature, seed
        self.learns: tuple[str, ...] = ("logits", "coefficients")
        self.sample: int | None = None
        first = task_vectors.pretrained[task_vectors.names[0]]
        tasks, layers = len(task_vectors.tasks), len(task_vectors.names)
        start = first.new_full((tasks, layers) if granularity == "layer" else (tasks,), float(init))
        self.coefficients = start if granularity == "fixed" else nn.Parameter(start)
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros_like(base)) for base in task_vectors.pretrained.values()
        )

    @classmethod
    def problems(cls, settings: Mapping[str, Any], steps: int) -> list[str]:
        """Steps after those of the mask, where it is all that is learned."""
        masks = settings.get("mask_steps", steps)
        if settings.get("granularity") != "fixed" or steps <= masks:
            return []
        return [_too_many(masks, f"trainer.max_steps={steps} would go on to learn")]

    def begin_step(self, number: int | None) -> None:
        """What step `number`, counted from 0, of training learns, and on which sample; None changes
        nothing."""
        if number is None:
            return
        first = number < self.mask_steps
        if not first and self.granularity == "fixed":
            raise AdamergeError(_too_many(self.mask_steps, f"step {number} would learn"))
        self.sample = number if first else None
        self.learns = ("logits", "coefficients") if first else ("coefficients",)

    @property
    def below(self) -> list[nn.Parameter]:
        """λ in the first phase, if it is learned at all."""
        used = self.coefficients
        return [used] if isinstance(used, nn.Parameter) and "logits" in self.learns else []

    def mask(self, layer: str) -> Tensor:
        """The mask m of a layer in the sample in effect, `[*shape]`; differentiable in its logits.

        Its mean is 1.
        """
        logits = self.logits[self.task_vectors.names.index(layer)]
        if "logits" not in self.learns:
            logits = logits.detach()
        number = str(self.sample) if self.training and self.sample is not None else "last"
        drawn = uniform(self.seed, f"sample {number}", layer, logits.shape).to(logits)
        tiny = torch.finfo(drawn.dtype).eps
        drawn = drawn.clamp(tiny, 1 - tiny)
        soft = torch.sigmoid((logits + torch.logit(drawn)) / self.temperature)
        return soft / soft.mean()

    def layer_coefficients(self) -> Tensor:
        """λ as it is applied, `[T, L]`."""
        used = self.coefficients
        if "coefficients" not in self.learns:
            used = used.detach()
        return used if used.ndim == 2 else used[:, None].expand(-1, len(self.task_vectors.names))

    def weights(self) -> dict[str, Tensor]:
        """The merged weights, by layer; differentiable in what is learned."""
        vectors, merged = self.task_vectors, {}
        for column, name in zip(self.layer_coefficients().unbind(1), vectors.names, strict=True):
            base, layer = vectors.pretrained[name], vectors.layers[name]
            merged[name] = _Masked.apply(column, self.mask(name), base, layer)
        return merged

    def fold(self) -> nn.Module:
        """The network merged under the mask of the last sample, as a static encoder."""
        sample, self.sample = self.sample, None
        try:
            return super().fold()
        finally:
            self.sample = sample

    def coefficient_table(self) -> tuple[list[str], Tensor]:
        """Layer names and λ, `[T, L]`."""
        return list(self.task_vectors.names), self.layer_coefficients().detach()


def _too_many(mask_steps: int, what: str) -> str:
    return (
        f"the mask is learned for {mask_steps} steps and coefficients are fixed, so that {what} "
        "nothing: take no more steps than method.mask_steps, or set method.granularity to layer"
    )


def _check(granularity: str) -> None:
    if granularity not in ("layer", "task", "fixed"):
        raise AdamergeError(
            f"granularity is {granularity!r}: expected 'layer', 'task' or 'fixed' "
            "(method.granularity)"
        )


class _Masked(torch.autograd.Function):
    """`θ0 + m ∘ Σ_t λ_t τ_t` of one layer; the backward reads τ again, and keeps the mask alone."""

    @staticmethod
    def forward(ctx: Any, column: Tensor, mask: Tensor, base: Tensor, layer: Layer) -> Tensor:
        ctx.save_for_backward(column, mask)
        ctx.given = base, layer
        with torch.autocast(base.device.type, enabled=False):
            return torch.addcmul(base, mask, _sum(column, base, layer))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        column, mask = ctx.saved_tensors
        base, layer = ctx.given
        grad = grad.to(base.dtype)
        of_column = of_mask = None
        with torch.autocast(base.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_column = contract(grad * mask, layer, base).to(column.dtype)
            if ctx.needs_input_grad[1]:
                of_mask = grad * _sum(column, base, layer)
        return of_column, of_mask, None, None


def _sum(column: Tensor, base: Tensor, layer: Layer) -> Tensor:
    """`Σ_t λ_t τ_t`, `[*shape]`."""
    return merge(torch.zeros_like(base), layer, column.to(base))
