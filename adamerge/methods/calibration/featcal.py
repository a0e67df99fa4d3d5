"""FeatCal: the blocks of a merge solved anew, so that its features come back to the experts'."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import Images, add_lower, mirrored
from adamerge.methods.calibration.base import Calibration, Streams, Weights
from adamerge.transforms.layers import check_number

_EPS = 1e-8  # added to the ridge, as in the authors' code


class FeatCal(Calibration):
    """Closed-form calibration of a merge on unlabeled images, block by block.

    FeatCal (arXiv 2605.13030). Student tokens run through the calibrated blocks, teacher tokens of
    task t through expert t. In each block, x_s are a layer's inputs before it is calibrated, x_e
    those in the expert's block, and `x_t = mix x_e + (1 − mix) x_s`. With `C_t = E x_s x_sᵀ`,
    `X_t = E x_s x_tᵀ`, `z_t = ‖C_t‖` and `anchor(θ) = θ0 + extrapolation (θ − θ0)` for the merge's
    θ, a linear layer of the calibrated block is

        Wᵀ = (Σ_t C_t / z_t + ridge I)⁻¹ (Σ_t X_t W_tᵀ / z_t + ridge anchor(W)ᵀ)

    and its bias, and the scales and biases of normalisations, are minima of the same kind. In the
    last block tokens other than the class token count little, but for keys and values. What lies
    outside the blocks stays as it was merged.

    It costs three passes over the images and two products of every layer's inputs, without labels
    and gradients. In memory are two models, the tokens of all images twice, and one block's
    products.

    Args:
        encoder: the merge, a static encoder; left unchanged.
        teacher: the T experts, untransformed.
        images: unlabeled, of every task, on the device that computes.
        ridge: how strongly layers are held at the anchor.
        extrapolation: where that is: 1 at the merge, above 1 beyond it, seen from the pretrained.
        mix: the share of the expert's inputs in the targets, from 0 to 1.
        other_tokens: what a token that is not the class token counts in the last block.

    Raises:
        AdamergeError: a setting out of range, or an encoder that is not static or has no blocks.
    """

    follows_experts = True

    def __init__(
        self,
        encoder: nn.Module,
        teacher: Experts,
        images: Images,
        ridge: float = 0.05,
        extrapolation: float = 2.2,
        mix: float = 0.25,
        other_tokens: float = 0.01,
    ) -> None:
        super().__init__(encoder, teacher, images)
        check_number("featcal", "ridge", ridge, 0, 1e6)
        check_number("featcal", "extrapolation", extrapolation, 0, 1e6)
        check_number("featcal", "mix", mix, 0, 1)
        check_number("featcal", "other_tokens", other_tokens, 0, 1)
        self.ridge, self.extrapolation, self.mix = ridge, extrapolation, mix
        self.other_tokens = other_tokens

    def block(self, index: int, merged: Weights, ours: Streams, theirs: Streams) -> Weights:
        solver = _Block(self.ridge, self.mix, merged, self._anchor(merged))
        for task, parts in ours.items():
            device = parts[0].device
            expert = self.experts.weights(task, device, self.blocks.names(index))
            for place, tokens in enumerate(parts):
                given: dict[str, Tensor] = {}
                wanted: dict[str, Tensor] = {}
                self.blocks.run(index, merged, tokens, given.__setitem__)
                theirs[task][place] = self.blocks.run(
                    index, expert, theirs[task][place], wanted.__setitem__
                )
                solver.see(given, wanted, expert, self._counts(index, tokens))
            solver.end_task(expert)
        return solver.solved()

    def _anchor(self, merged: Weights) -> dict[str, Tensor]:
        vectors = self.experts.task_vectors
        pretrained = {**vectors.constants, **vectors.pretrained}
        return {
            name: torch.lerp(pretrained[name].to(tensor), tensor, self.extrapolation)
            for name, tensor in merged.items()
        }

    def _counts(self, index: int, tokens: Tensor) -> Tensor | None:
        """What each token counts, `[N]`, in the last block of a tower that pools a class token."""
        tower = self.tower.skeleton
        pools = getattr(tower, "pool_type", None) == "tok" and hasattr(tower, "class_embedding")
        if not pools or index < len(self.blocks) - 1:
            return None
        counts = tokens.new_full(tokens.shape[1:2], self.other_tokens)
        counts[0] = 1
        return counts


class _Block:
    """The layers of one block, as they are seen, and what solves them.

    Args:
        merged: the block's weights before it is calibrated.
        anchor: where they are held.
    """

    def __init__(self, ridge: float, mix: float, merged: Weights, anchor: Weights) -> None:
        self.ridge, self.mix, self.merged, self.anchor = ridge, mix, merged, anchor
        self._layers: dict[tuple[str, str], tuple[slice, _Linear | _Norm]] = {}

    def see(self, ours: Weights, theirs: Weights, expert: Weights, counts: Tensor | None) -> None:
        """Adds what the student's and an expert's block multiply with each weight.

        Args:
            ours, theirs: by name of the weight, `[B, N, in]`.
            expert: the expert's weights.
            counts: what each token counts, `[N]`; None: 1.
        """
        for name, inputs in ours.items():
            for rows, used in self._parts(name, counts):
                key = name, str(rows)
                if key not in self._layers:
                    weight = self.merged[name][rows]
                    kind = _Norm if weight.ndim == 1 else _Linear
                    self._layers[key] = rows, kind(weight, self.mix)
                self._layers[key][1].see(inputs, theirs[name], expert[name][rows], used)

    def _parts(self, name: str, counts: Tensor | None) -> list[tuple[slice, Tensor | None]]:
        """Rows that are solved together, and what tokens count for them."""
        if counts is None or not name.endswith("in_proj_weight"):
            return [(slice(None), counts)]
        queries = len(self.merged[name]) // 3
        return [(slice(0, queries), counts), (slice(queries, None), None)]

    def end_task(self, expert: Weights) -> None:
        """Goes over from sums over one task's tokens to equations."""
        for (name, _), (rows, layer) in self._layers.items():
            bias = expert.get(_bias_of(name))
            layer.end_task(expert[name][rows], None if bias is None else bias[rows])

    def solved(self) -> dict[str, Tensor]:
        """The calibrated weights of the layers seen."""
        found: dict[str, Tensor] = {}
        for (name, _), (rows, layer) in self._layers.items():
            held = self.anchor.get(_bias_of(name))
            weight, bias = layer.solved(
                self.anchor[name][rows], None if held is None else held[rows], self.ridge
            )
            for key, part in ((name, weight), (_bias_of(name), bias)):
                if part is not None:
                    found[key] = torch.cat([found[key], part]) if key in found else part
        return found


def _bias_of(name: str) -> str:
    """`attn.in_proj_bias` for `attn.in_proj_weight`, `ln_1.bias` for `ln_1.weight`."""
    return f"{name.removesuffix('weight')}bias"


class _Linear:
    """Rows of a linear layer: `Σ_t C_t / z_t`, `Σ_t X_t W_tᵀ / z_t` and the same of its bias.

    Where a layer has fewer outputs than inputs, `X_t W_tᵀ` is added up as it is, `E x_s y_tᵀ` of
    the outputs `y_t = W_t x_t`: X_t would be larger and cost more. Elsewhere it is X_t that is.
    """

    def __init__(self, weight: Tensor, mix: float) -> None:
        out, width = weight.shape
        self.mix, self.narrow = mix, out < width
        zeros = functools.partial(weight.new_zeros, dtype=torch.float64)
        self.left, self.right = zeros((width, width)), zeros((width, out))
        self.given, self.wanted, self.total = zeros(width), zeros(out), zeros(())
        self._begin_task(weight)

    def _begin_task(self, weight: Tensor) -> None:
        out, width = weight.shape
        self._count = 0.0
        self._gram = weight.new_zeros(width, width)
        self._cross = weight.new_zeros(width, out if self.narrow else width)
        self._ours, self._theirs = weight.new_zeros(width), weight.new_zeros(width)

    def see(self, ours: Tensor, theirs: Tensor, weight: Tensor, counts: Tensor | None) -> None:
        """Adds tokens `[B, N, in]` that count `[N]`, for an expert's weight `[out, in]`."""
        by_token = ours.new_ones(ours.shape[1]) if counts is None else counts
        rows = (ours * by_token[:, None]).flatten(0, 1)
        add_lower(self._gram, rows, ours.flatten(0, 1))
        beside = torch.lerp(ours, theirs, self.mix) @ weight.T if self.narrow else theirs
        self._cross.addmm_(rows.T, beside.flatten(0, 1))
        self._ours += rows.sum(0)
        self._theirs += (theirs * by_token[:, None]).sum((0, 1))
        self._count += len(ours) * float(by_token.sum())

    def end_task(self, weight: Tensor, bias: Tensor | None) -> None:
        sums = (mirrored(self._gram), self._cross, self._ours, self._theirs)
        gram, cross, ours, theirs = (total.double() / self._count for total in sums)
        scale = 1 / gram.norm().clamp_min(torch.finfo(gram.dtype).tiny)
        self.left += gram * scale
        if not self.narrow:
            cross = torch.lerp(gram, cross, self.mix) @ weight.T.double()
        self.right += cross * scale
        target = weight.double() @ torch.lerp(ours, theirs, self.mix)
        self.wanted += (target if bias is None else target + bias) * scale
        self.given += ours * scale
        self.total += scale
        self._begin_task(weight)

    def solved(
        self, anchor: Tensor, bias: Tensor | None, ridge: float
    ) -> tuple[Tensor, Tensor | None]:
        left = self.left.clone()
        left.diagonal().add_(ridge + _EPS)
        weight = torch.linalg.solve(left, self.right + ridge * anchor.T).T
        if bias is None:
            return weight, None
        shift = self.wanted - weight @ self.given + ridge * bias
        return weight, shift / (self.total + ridge)


class _Norm:
    """A normalisation's scale and bias: least squares in each channel by itself."""

    def __init__(self, weight: Tensor, mix: float) -> None:
        zeros = functools.partial(weight.new_zeros, dtype=torch.float64)
        self.squares, self.means, self.tasks = zeros(weight.shape), zeros(weight.shape), 0
        self.right, self._sums = zeros((2, *weight.shape)), zeros((2, *weight.shape))
        self._count = 0.0

    def see(self, ours: Tensor, theirs: Tensor, weight: Tensor, counts: Tensor | None) -> None:
        weights = ours.new_ones(ours.shape[1]) if counts is None else counts
        rows, by_token = ours.double(), weights.double()[:, None]
        self._sums[0] += (rows.square() * by_token).sum((0, 1))
        self._sums[1] += (rows * by_token).sum((0, 1))
        self._count += len(ours) * float(weights.sum())

    def end_task(self, weight: Tensor, bias: Tensor | None) -> None:
        squares, means = self._sums / self._count
        shift = torch.zeros_like(weight) if bias is None else bias
        self.squares += squares
        self.means += means
        self.tasks += 1
        self.right += torch.stack([squares * weight + means * shift, means * weight + shift])
        self._sums, self._count = torch.zeros_like(self._sums), 0.0

    def solved(
        self, anchor: Tensor, bias: Tensor | None, ridge: float
    ) -> tuple[Tensor, Tensor | None]:
        first = self.right[0] + ridge * anchor
        if bias is None:
            return first / (self.squares + ridge), None
        second = self.right[1] + ridge * bias
        high, low = self.squares + ridge, self.tasks + ridge
        determinant = high * low - self.means.square()
        weight = (first * low - second * self.means) / determinant
        return weight, (second * high - first * self.means) / determinant
