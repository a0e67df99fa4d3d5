"""What is computed from unlabeled images, with nothing to learn: the base of such methods."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import Images, embedded, refuse_no_images, refuse_not_finite
from adamerge.encoders.tower import FoldedEncoder, Tower
from adamerge.encoders.walk import Blocks
from adamerge.methods.base import MergeMethod

log = logging.getLogger("adamerge")

Weights = Mapping[str, Tensor]
Streams = dict[str, list[Tensor]]  # task -> the tokens [B, N, W] of its batches of images


class Calibration(MergeMethod):
    """A static encoder that is computed from unlabeled images, with nothing to learn.

    A subclass gives `block`, which is called for one block of the tower after the other, when the
    encoder is first asked for. What lies outside the blocks stays as it was. Nothing of it is in a
    checkpoint: the same inputs give it again.

    Args:
        encoder: the static encoder that it starts from, as `merged_encoder` gives it; left
            unchanged.
        teacher: the T experts.
        images: unlabeled, of every task, on the device that computes, in the experts' type.

    Attributes:
        blocks: those of the tower.
        experts: as given.

    Raises:
        AdamergeError: an encoder of another kind or without blocks; once the encoder is asked for,
            a task without images, with an iterator in their place, or with images that give NaN.
    """

    follows_experts = False  # whether tokens also run through every task's expert

    def __init__(self, encoder: nn.Module, teacher: Experts, images: Images) -> None:
        super().__init__()
        if not isinstance(encoder, FoldedEncoder):
            raise AdamergeError(
                f"{type(self).__name__} starts from one static encoder, not from a "
                f"{type(encoder).__name__}: name as method.base a run or checkpoint that is one, "
                "as AdaMerging makes it"
            )
        self.tower = Tower(encoder.backbone)
        self.blocks, self.experts = Blocks(self.tower), teacher
        self._start = {name: t.detach() for name, t in encoder.backbone.state_dict().items()}
        self._images = images
        self._done: dict[str, Tensor] = {}

    def block(self, index: int, merged: Weights, ours: Streams, theirs: Streams) -> Weights:
        """The weights of a block that are to replace those of the merge, by their full names.

        Args:
            index: of the block.
            merged: all its weights in the merge, in the experts' type, where the images are.
            ours: tokens before the block, as the blocks before it that were replaced give them.
            theirs: if it `follows_experts`, the same of each task's own expert; to be replaced here
                by those after the block. Empty otherwise.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _calibrated(self, start: Weights) -> dict[str, Tensor]:
        blocks, found = self.blocks, dict(start)
        outside, ours, theirs = blocks.outside(), Streams(), Streams()
        for task in self.experts.tasks:
            refuse_no_images(self._images, task)
            own, batches = {name: start[name] for name in outside}, self._images[task]
            ours[task] = embedded(blocks, own, batches)
            if self.follows_experts:
                own = self.experts.weights(task, names=outside)
                theirs[task] = embedded(blocks, own, batches)
        device = ours[self.experts.tasks[0]][0].device
        for index in range(len(blocks)):
            log.info("block %d of %d", index + 1, len(blocks))
            for task, parts in (*ours.items(), *theirs.items()):
                for tokens in parts:
                    refuse_not_finite(tokens, task, f"block {index}")
            merged = {name: start[name].to(device) for name in blocks.names(index)}
            made = self.block(index, merged, ours, theirs)
            found |= {name: weight.to(start[name]) for name, weight in made.items()}
            if index < len(blocks) - 1:
                own = {name: found[name].to(device) for name in merged}
                for parts in ours.values():
                    parts[:] = [blocks.run(index, own, part) for part in parts]
        return found

    def weights(self) -> dict[str, Tensor]:
        """The calibrated weights; nothing is learned."""
        if not self._done:
            vectors = self.experts.task_vectors
            like = vectors.pretrained[vectors.names[0]].dtype
            floats = {n: t.to(like) for n, t in self._start.items() if t.is_floating_point()}
            made = self._calibrated({**self._start, **floats})
            self._done = {name: made[name].to(tensor) for name, tensor in self._start.items()}
        return self._done

    def shared_weights(self) -> dict[str, Tensor]:
        return self.weights()

    def fold(self) -> FoldedEncoder:
        """The calibrated tower as a static encoder."""
        return FoldedEncoder(self.tower, self.weights())
