"""What every method is: an encoder with learnables, and nothing else that requires a gradient.

Hooks that only some families have are protocols here: a method that has their names has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.encoders.rows import Inputs
from adamerge.encoders.tower import FoldedEncoder, Tower
from adamerge.methods import contract
from adamerge.weights.task_vectors import TaskVectors


class MergeMethod(nn.Module):
    """An encoder whose parameters are exactly what is learned.

    A subclass that merges one network gives `weights` alone. Another one gives `encode` and `fold`
    as well. The split of the forward pass in two lets a step compute once what all its inputs
    share, however many micro-batches they come in.

    Tensors, dictionaries of tensors, task vectors and towers that are plain attributes move with
    the module, and are no part of its state dict.

    Args:
        backbone: the network, for its architecture only; left unchanged. With `task_vectors`, which
            have to fit it. Neither for methods that keep what they need themselves.
        task_vectors: frozen, moved with the module, never saved in a state dict.

    Attributes:
        tower: the backbone without its weights.
        task_vectors: as given.
    """

    # Whether all that is done with task vectors is `TaskVectors.combine`, whose layers may then be
    # stored in any type and place, and shared out among processes: set as `self.task_vectors`.
    combines = False
    # Whether task vectors are used a layer at a time as they are stored, in any type and place.
    streams = False
    # Whether it takes task vectors that make an encoder of its own for every task.
    takes_per_task = False
    staged = False  # whether steps learn different parts, so that none stands for another
    # Whether a layer is learned in the step under way; None: all are.
    learned_layers: Callable[[str], bool] | None = None
    tower: Tower
    task_vectors: TaskVectors
    _is_checked = False

    def __init__(
        self, backbone: nn.Module | None = None, task_vectors: TaskVectors | None = None
    ) -> None:
        super().__init__()
        if backbone is not None and task_vectors is not None:
            self.tower, self.task_vectors = Tower(backbone), task_vectors
            self.tower.check(task_vectors, per_task=self.takes_per_task)
            self.tower.apply_buffers(lambda buffer: buffer.to(task_vectors.device))

    @classmethod
    def problems(cls, settings: Mapping[str, Any], steps: int) -> list[str]:
        """What is wrong with learning so many steps by these settings, those left out included."""
        return []

    @property
    def has_learnables(self) -> bool:
        """Whether there is anything to learn."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def below(self) -> Sequence[Tensor]:
        """Learnables that an update in two levels adapts anew within every step."""
        return ()

    def weights(self) -> dict[str, Tensor]:
        """What all inputs of a step share, as differentiable functions of the learnables.

        By default the learnables themselves; a method that merges returns the merged weights.
        `constants` of the task vectors (what no expert changed, buffers) need not be among them.
        """
        return dict(self.named_parameters())

    def encode(self, weights: Mapping[str, Tensor], inputs: Any, task_ids: Tensor) -> Tensor:
        """Features or logits `[B, D]` of inputs given the shared `weights`; by default the tower's.
        Inputs are images `[B, 3, H, W]`, or whatever the network takes, see `encoders.rows`."""
        if "tower" not in vars(self):
            raise contract.lacks(self, "encode", "the features [B, D] of a batch")
        return self.tower(weights, inputs)

    def begin_step(self, number: int | None) -> None:
        """Called before step `number` (from 0, resumed or not), and with None after the last."""

    def fold(self) -> nn.Module:
        """An encoder of plain tensors with nothing left to learn; exact.

        By default the network with the weights as they are.
        """
        self._refuse_without_fold()
        whole, held = self.task_vectors.whole, self.task_vectors
        self.task_vectors = whole
        try:
            with torch.no_grad(), torch.autocast(whole.device.type, enabled=False):
                found = self.shared_weights()
        finally:
            self.task_vectors = held
        learned = set(map(id, self.parameters()))
        plain = {n: w.detach().clone() if id(w) in learned else w for n, w in found.items()}
        return FoldedEncoder(self.tower, plain)

    def _refuse_without_fold(self) -> None:
        """The fold that is here needs a tower, and features that are the tower's."""
        own = type(self)
        one_network = "tower" in vars(self) and own.encode is MergeMethod.encode
        if own.fold is MergeMethod.fold and not one_network:
            raise contract.lacks(self, "fold", "an encoder of plain tensors")

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The merge as a state dict of the user's own model, parameters and buffers.

        `model.load_state_dict(method.merged_state_dict())` makes the model the merge; then
        `model.save_pretrained(…)` or whatever else it offers.

        Raises:
            AdamergeError: what is learned is more than the weights of one such network.
        """
        folded = self.fold()
        if not isinstance(folded, FoldedEncoder):
            raise AdamergeError(
                f"{type(self).__name__} folds into a {type(folded).__name__}, which is more than "
                "the weights of one network: use what fold() returns, or adamerge export"
            )
        return {name: tensor.clone() for name, tensor in folded.backbone.state_dict().items()}

    def forward(self, inputs: Inputs, task_ids: Tensor) -> Tensor:
        """Features or logits `[B, D]` of inputs and tasks `[B]`, differentiable in the learnables.

        Raises:
            AdamergeError: no inputs, or not one task id for each.
        """
        if not rows.count(inputs) == len(task_ids) > 0:
            raise AdamergeError(
                f"a batch of {rows.count(inputs)} images has {len(task_ids)} task_ids: expected at "
                "least one image, and one task id for each"
            )
        return self.encode(self.shared_weights(), inputs, task_ids)

    def shared_weights(self) -> dict[str, Tensor]:
        """`weights` with the constants of the task vectors.

        Raises:
            AdamergeError: what the method forgot, the first time it is asked, see `contract`.
        """
        try:
            found = self.weights()
        except RuntimeError as error:
            wrong = contract.misplaced(self)
            if wrong is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise AdamergeError(wrong) from error
        if not self._is_checked and torch.is_grad_enabled():
            self._refuse_without_fold()
            contract.check(self, found)
            self._is_checked = True
        if (learned := self.learned_layers) is not None:
            found = {n: w if learned(n) else w.detach() for n, w in found.items()}
        vectors = vars(self).get("task_vectors")
        return found if vectors is None else {**vectors.constants, **found}

    def readings(self) -> dict[str, Tensor]:
        """Numbers to log by name: `[]`, or `[T]` for one per task; on the device, detached.

        They reach the metrics, W&B and the pictures of a run. By default the mean, least and
        greatest merging coefficient of every task.
        """
        table = self.coefficient_table()
        if table is None:
            return {}
        _, values = table
        return {
            "coefficient_mean": values.mean(1),
            "coefficient_min": values.amin(1),
            "coefficient_max": values.amax(1),
        }

    def coefficient_table(self) -> tuple[list[str], Tensor] | None:
        """Column names and the `[T, columns]` coefficients in effect, detached; or None."""
        return None

    @property
    def own_fold(self) -> str | None:
        """The name in `folds` of what `fold` makes, if it has one there."""
        return None

    @property
    def mixes_images(self) -> bool:
        """Whether images of one call change each other's features, so that `micro_batch` would
        change the gradient."""
        return False

    @property
    def looks_inside(self) -> bool:
        """Whether it changes or reads what is inside its tower's blocks."""
        return self.mixes_images

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeMethod:
        """Takes along what the module keeps as plain attributes."""
        super()._apply(fn, recurse)
        self._is_checked = False
        with torch.no_grad():
            for name, value in contract.plain(self).items():
                vars(self)[name] = _moved(value, fn)
        return self


def _moved(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, TaskVectors):
        return value.apply(fn)
    if isinstance(value, Tower):
        value.apply_buffers(fn)
    if type(value) is Tensor:
        return fn(value)
    if type(value) is dict and value and all(type(part) is Tensor for part in value.values()):
        return {name: fn(part) for name, part in value.items()}
    return value


@runtime_checkable
class Traced(Protocol):
    """A method that an objective over the blocks of its tower can teach."""

    @property
    def traceable(self) -> bool:
        """Whether it can with these settings."""
        ...

    def trace(self, weights: Mapping[str, Tensor], inputs: Any, task_ids: Tensor) -> Tensor:
        """As `encode`, with the token means `[B, W]` after each block before the features:
        `[B, blocks · W + D]`."""
        ...


@runtime_checkable
class OnFrozenFeatures(Protocol):
    """A method that learns on features which no learning changes: they can be stored."""

    def frozen_state(self) -> dict[str, Tensor]:
        """The weights that decide `frozen_features`; empty where there are none."""
        ...

    def frozen_features(self, inputs: Any, task_ids: Tensor) -> Tensor | None:
        """Features `[B, F]` that `encode` takes in place of the inputs; None without any."""
        ...


@runtime_checkable
class FoldsInWays(Protocol):
    """A method with folds beside its own, some of which must know of unlabeled images."""

    @property
    def folds(self) -> dict[str, bool]:
        """What `fold_as` makes, by name, and whether it is as exact as `fold`.

        `dynamic` merges anew for every image, `per_task` is a static encoder per task, `single` one
        static encoder.
        """
        ...

    def statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """What `fold_as` must know: of images `[B, 3, H, W]` and task ids `[B]`."""
        ...

    def fold_as(self, name: str, statistics: Any) -> nn.Module:
        """The encoder of a name in `folds`; a `PerTaskEncoder` for `per_task`."""
        ...


def folds_of(method: MergeMethod) -> dict[str, bool]:
    """The folds of a method beside its own; see `FoldsInWays`."""
    return method.folds if isinstance(method, FoldsInWays) else {}


def tracing(method: MergeMethod) -> Traced:
    """The method, where it can be taught block by block; else an AdamergeError."""
    if isinstance(method, Traced) and method.traceable:
        return method
    raise AdamergeError(
        f"the objective compares features after each block, which {type(method).__name__} with "
        "these settings does not learn: use it with method=surgery_v2 (Surgery with positions: "
        "blocks), or another objective"
    )
