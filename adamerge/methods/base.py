"""What every method is: an encoder with learnables, and nothing else that requires a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import Images, refuse_no_images
from adamerge.encoders.tower import FoldedEncoder, Tower


class MergeMethod(nn.Module):
    """An encoder whose parameters are exactly what is learned.

    A subclass gives `weights`, `encode` and `fold`. The split of the forward pass in two lets a
    step compute once what all its images share, however many micro-batches they come in.
    """

    # Whether all that is done with task vectors is `TaskVectors.combine`, whose layers may then be
    # stored in any type and place, and shared out among processes: set as `self.task_vectors`.
    combines = False

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """What all images of a step share, as differentiable functions of the learnables.

        By default the learnables themselves; a method that merges returns the merged weights.
        """
        return dict(self.named_parameters())

    def encode(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        """Features `[B, D]` of images `[B, 3, H, W]` given the shared `weights`."""
        raise NotImplementedError

    def trace(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        """As `encode`, with the token means `[B, W]` after each block before the features:
        `[B, blocks · W + D]`. Only for methods that an objective over blocks can teach."""
        raise AdamergeError(
            f"the objective compares features after each block, which {type(self).__name__} does "
            "not learn: use it with Surgery and positions: blocks, or another objective"
        )

    @property
    def traceable(self) -> bool:
        """Whether `trace` is there."""
        return False

    def frozen_features(self, images: Tensor, task_ids: Tensor) -> Tensor | None:
        """Features `[B, F]` that `encode` takes in place of the images, and that no learning
        changes; None where there are none."""
        return None

    def frozen_state(self) -> dict[str, Tensor]:
        """The weights that decide `frozen_features`; empty where there are none."""
        return {}

    @property
    def mixes_images(self) -> bool:
        """Whether images of one call change each other's features, so that `micro_batch` would
        change the gradient."""
        return False

    @property
    def looks_inside(self) -> bool:
        """Whether it changes or reads what is inside its tower's blocks."""
        return self.traceable or self.mixes_images

    def forward(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """`[B, 3, H, W], [B] -> [B, D]`, differentiable in the learnables.

        Raises:
            AdamergeError: no images, or not one task id for each.
        """
        if not len(images) == len(task_ids) > 0:
            raise AdamergeError(
                f"a batch of {len(images)} images has {len(task_ids)} task_ids: expected at least "
                "one image, and one task id for each"
            )
        return self.encode(self.weights(), images, task_ids)

    def fold(self) -> nn.Module:
        """An encoder of plain tensors with nothing left to learn; exact."""
        raise NotImplementedError

    @property
    def folds(self) -> dict[str, bool]:
        """What `fold_as` makes, by name, and whether it is as exact as `fold`.

        `dynamic` merges anew for every image, `per_task` is a static encoder per task, `single` one
        static encoder.
        """
        return {}

    @property
    def own_fold(self) -> str | None:
        """The name in `folds` of what `fold` makes, if it has one there."""
        return None

    def statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """What `fold_as` must know of unlabeled images: of `[B, 3, H, W]` and task ids `[B]`."""
        return None

    def fold_as(self, name: str, statistics: Any) -> nn.Module:
        """The encoder of a name in `folds`; a `PerTaskEncoder` for `per_task`."""
        raise NotImplementedError

    def coefficient_table(self) -> tuple[list[str], Tensor] | None:
        """Column names and the `[T, columns]` coefficients in effect, for reports; or None."""
        return None

    def coefficients_in_effect(self) -> Tensor | None:
        """The `[T, columns]` of `coefficient_table` where they are, so that nothing has to wait for
        the device; detached."""
        table = self.coefficient_table()
        return None if table is None else table[1]


class Calibration(MergeMethod):
    """A static encoder that is computed from unlabeled images, with nothing to learn.

    A subclass gives `calibrated`, which is called once, when the encoder is first asked for.
    Nothing of it is in a checkpoint: the same inputs give it again.

    Args:
        encoder: the static encoder that it starts from, as `merged_encoder` gives it; left
            unchanged.
        teacher: the T experts.
        images: unlabeled, of every task, on the device that computes, in the experts' type.

    Raises:
        AdamergeError: an encoder of another kind, or a task without images.
    """

    def __init__(self, encoder: nn.Module, teacher: Experts, images: Images) -> None:
        super().__init__()
        if not isinstance(encoder, FoldedEncoder):
            raise AdamergeError(
                f"{type(self).__name__} starts from one static encoder, not from a "
                f"{type(encoder).__name__}: name as method.base a run or checkpoint that is one, "
                "as AdaMerging makes it"
            )
        self._tower = Tower(encoder.backbone)
        self._start = {name: t.detach() for name, t in encoder.backbone.state_dict().items()}
        self._experts, self._images = teacher, images
        self._done: dict[str, Tensor] | None = None

    def calibrated(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The calibrated weights of the whole tower, from those of `start` in the experts' type."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The calibrated weights; nothing is learned."""
        if self._done is None:
            vectors = self._experts.task_vectors
            like = vectors.pretrained[vectors.names[0]].dtype
            for task in vectors.tasks:
                refuse_no_images(self._images, task)
            floats = {n: t.to(like) for n, t in self._start.items() if t.is_floating_point()}
            made = self.calibrated({**self._start, **floats})
            self._done = {name: made[name].to(tensor) for name, tensor in self._start.items()}
        return self._done

    def encode(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        return self._tower(weights, images)

    def fold(self) -> FoldedEncoder:
        """The calibrated tower as a static encoder."""
        return FoldedEncoder(self._tower, self.weights())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Calibration:
        """Takes the weights along when the module is moved; they are no part of it."""
        super()._apply(fn, recurse)
        self._start = {name: fn(tensor) for name, tensor in self._start.items()}
        self._done = self._done and {name: fn(tensor) for name, tensor in self._done.items()}
        self._tower.apply_buffers(fn)
        return self
