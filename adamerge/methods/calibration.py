"""What is computed from unlabeled images, with nothing to learn: the base of such methods."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import Images, refuse_no_images
from adamerge.encoders.tower import FoldedEncoder, Tower
from adamerge.methods.base import MergeMethod


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
        self.tower = Tower(encoder.backbone)
        self._start = {name: t.detach() for name, t in encoder.backbone.state_dict().items()}
        self._experts, self._images = teacher, images
        self._done: dict[str, Tensor] = {}

    def calibrated(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The calibrated weights of the whole tower, from those of `start` in the experts' type."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """The calibrated weights; nothing is learned."""
        if not self._done:
            vectors = self._experts.task_vectors
            like = vectors.pretrained[vectors.names[0]].dtype
            for task in vectors.tasks:
                refuse_no_images(self._images, task)
            floats = {n: t.to(like) for n, t in self._start.items() if t.is_floating_point()}
            made = self.calibrated({**self._start, **floats})
            self._done = {name: made[name].to(tensor) for name, tensor in self._start.items()}
        return self._done

    def shared_weights(self) -> dict[str, Tensor]:
        return self.weights()

    def fold(self) -> FoldedEncoder:
        """The calibrated tower as a static encoder."""
        return FoldedEncoder(self.tower, self.weights())
