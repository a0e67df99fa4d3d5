"""Pareto: merging coefficients as a function of how much each task matters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.tower import FoldedEncoder, merged_encoder
from adamerge.methods.base import MergeMethod
from adamerge.transforms.layers import check_number
from adamerge.weights.task_vectors import TaskVectors


class Pareto(MergeMethod):
    """A merge for every preference p over tasks:
    `λ[t, l] = λ0[t, l] + Σ_s M[t, l, s] (p[s] − 1/T)`.

    Learned once, it folds into a static encoder at any preference. The idea is that of Towards
    Efficient Pareto Set Approximation via Mixture of Experts Based Model Fusion (PWE-MoE, arXiv
    2406.09770), whose mixtures are learned from labels; here one linear map is learned by any
    objective of unlabeled images.

    While it learns, every step has another preference, drawn evenly from all (Dirichlet of ones),
    and the gradient of each task's images is T · p[task] times what it would be. So any objective
    is weighted by the preference; its reported values are not.

    Args:
        backbone: the network, for its architecture only; left unchanged.
        task_vectors: T task vectors of L layers; frozen.
        init: initial value of λ0; M starts at 0.
        preference: p of `fold` and of evaluation, by task (others have 0) or in the order of tasks,
            scaled to a sum of 1; None: all the same.
        seed: of the preferences drawn, along with the step's number.

    Attributes:
        coefficients: λ0 `[T, L]`.
        slopes: M `[T, L, T]`.

    Raises:
        AdamergeError: a preference that is negative, all 0, of another length or of unknown tasks.
    """

    combines = True

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        init: float = 0.3,
        preference: dict[str, float] | list[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, task_vectors)
        check_number("Pareto", "init", init, -1e6, 1e6)
        tasks, layers = len(task_vectors.tasks), len(task_vectors.names)
        first = task_vectors.pretrained[task_vectors.names[0]]
        self.coefficients = nn.Parameter(first.new_full((tasks, layers), float(init)))
        self.slopes = nn.Parameter(first.new_zeros(tasks, layers, tasks))
        self.preference = _checked(preference, task_vectors.tasks)
        self.seed = seed
        # Changed in place, so that a recorded step reads what it is by then.
        self._drawn = first.new_tensor(self.preference)
        self._draws = False

    def begin_step(self, number: int | None) -> None:
        """Draws the preference of a step, the same for the same step; None: `preference` again."""
        self._draws = number is not None
        if number is not None:
            ones = np.ones(len(self.preference))
            draw = torch.from_numpy(np.random.default_rng([self.seed, number]).dirichlet(ones))
            self._drawn.copy_(draw, non_blocking=True)

    def at(self, preference: Tensor) -> Tensor:
        """λ `[T, L]` of a preference `[T]`."""
        return self.coefficients + self.slopes @ (preference - 1 / len(self.preference))

    def _chosen(self, preference: Any = None) -> Tensor:
        numbers = self.preference
        if preference is not None:
            numbers = _checked(preference, self.task_vectors.tasks)
        return self.coefficients.new_tensor(numbers)

    def weights(self) -> dict[str, Tensor]:
        device = self.coefficients.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        preference = self._drawn if self._learning else self._chosen()
        return self.task_vectors.combine(self.at(preference), low)

    @property
    def _learning(self) -> bool:
        return self.training and self._draws

    def encode(self, weights: Mapping[str, Tensor], inputs: Any, task_ids: Tensor) -> Tensor:
        features = self.tower(weights, inputs)
        if not self._learning:
            return features
        factors = self._drawn[task_ids.to(features.device)] * len(self._drawn)
        scaled: Tensor = _Scaled.apply(features, factors[:, None])
        return scaled

    def fold(self) -> FoldedEncoder:
        """The static encoder of `preference`."""
        return self.fold_at(None)

    def fold_at(self, preference: Mapping[str, float] | Sequence[float] | None) -> FoldedEncoder:
        """The static encoder of another preference, given as the constructor's.

        Raises:
            AdamergeError: as the constructor.
        """
        chosen = self.at(self._chosen(preference))
        return merged_encoder(self.tower, self.task_vectors, chosen)

    def coefficient_table(self) -> tuple[list[str], Tensor]:
        """Layer names and λ at `preference`, `[T, L]`."""
        return list(self.task_vectors.names), self.at(self._chosen()).detach()


class _Scaled(torch.autograd.Function):
    """Features as they are; their gradient times a factor for each row."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factors: Tensor) -> Tensor:
        ctx.factors = factors
        return features.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factors.to(grad), None


def _checked(preference: Any, tasks: tuple[str, ...]) -> list[float]:
    """Numbers of all tasks that sum to 1."""
    if preference is None:
        return [1 / len(tasks)] * len(tasks)
    given = dict(preference) if isinstance(preference, Mapping) else {}
    unknown = set(given) - set(tasks)
    listed = list(preference) if isinstance(preference, Iterable) else []
    numbers = [given.get(task, 0.0) for task in tasks] if given else listed
    plain = all(isinstance(n, int | float) and n >= 0 for n in numbers)
    if unknown or len(numbers) != len(tasks) or not plain or not 0 < sum(numbers) < math.inf:
        raise AdamergeError(
            f"preference is {preference!r}: expected a number of 0 or more for each of "
            f"{', '.join(tasks)}, not all 0, with a finite sum (method.preference)"
        )
    return [float(number) / sum(numbers) for number in numbers]
