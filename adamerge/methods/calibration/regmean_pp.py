"""RegMean++: RegMean block by block, on what the merged blocks before make of the images."""

from __future__ import annotations

from torch import Tensor, nn

from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import Images, Moments
from adamerge.methods.calibration.base import Calibration, Streams, Weights
from adamerge.transforms.inputs import damped, factored, solved
from adamerge.transforms.layers import check_number


class RegMeanPP(Calibration):
    """Closed-form merge of all linear layers, block by block.

    RegMean++ (arXiv 2508.03121). As `transforms.regmean`, `W = Σ_t W_t Ĝ_t (Σ_t Ĝ_t)⁻¹`, but the
    Gram matrices G_t of a block are those of expert t's block on tokens that the merged embedding
    and the merged blocks before it make of task t's images. All other layers stay those of
    `encoder`, the mean of the experts in the paper. So do these along directions that no image
    gives to them (with `off_diagonal` 1 there are some where tokens are fewer than inputs).

    It costs two passes over the images and one product of every layer's inputs, without labels and
    gradients. In memory are a model, the tokens of all tasks' images, and one block's products.

    Args:
        encoder: a static encoder whose layers outside the blocks, normalisations and biases stay;
            left unchanged.
        teacher: the T experts, untransformed.
        images: unlabeled, of every task, on the device that computes.
        off_diagonal: what is left of the Gram matrices' entries off the diagonal, from 0 to 1.

    Raises:
        AdamergeError: a setting out of range, or an encoder that is not static or has no blocks.
    """

    def __init__(
        self, encoder: nn.Module, teacher: Experts, images: Images, off_diagonal: float = 0.95
    ) -> None:
        super().__init__(encoder, teacher, images)
        check_number("regmean_pp", "off_diagonal", off_diagonal, 0, 1)
        self.off_diagonal = off_diagonal

    def block(self, index: int, merged: Weights, ours: Streams, theirs: Streams) -> Weights:
        weighted: dict[str, Tensor] = {}
        total: dict[str, Tensor] = {}
        for task, parts in ours.items():
            device = parts[0].device
            expert = self.experts.weights(task, device, self.blocks.names(index))
            for name, moments in self._moments(index, expert, parts).items():
                gram = damped(moments.gram.double(), self.off_diagonal)
                product = expert[name].double() @ gram
                weighted[name] = weighted[name] + product if name in weighted else product
                total[name] = total[name] + gram if name in total else gram
        found = {}
        for name, product in weighted.items():
            factor, ridge = factored(total[name], name)
            held = product + ridge * merged[name].double() if ridge else product
            found[name] = solved(held, factor)
        return found

    def _moments(self, index: int, expert: Weights, parts: list[Tensor]) -> dict[str, Moments]:
        """Of the inputs of an expert's linear layers in a block."""
        found: dict[str, Moments] = {}

        def see(name: str, inputs: Tensor) -> None:
            if expert[name].ndim == 2:
                found.setdefault(name, Moments.of(expert[name])).add(inputs)

        for part in parts:
            self.blocks.run(index, expert, part, see)
        return found
