"""Statistics of unlabeled images under each task's expert: of the inputs of its linear layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge._base.files import locked
from adamerge.encoders.experts import Experts
from adamerge.encoders.walk import Blocks, has_blocks, seeing
from adamerge.weights.disk import MappedLayers, storing
from adamerge.weights.storage import Layer, Storage

log = logging.getLogger("adamerge")

# task -> batches of images [B, 3, H, W] as the tower takes them, which may be gone through again
Images = Mapping[str, Iterable[Tensor]]
Named = Iterator[tuple[str, Tensor]]
# (task, names that may come, what makes them) -> the tensors by name
Keep = Callable[[str, Sequence[str], Callable[[], Named]], Mapping[str, Tensor]]

_MEAN, _COUNT = " mean", " count"  # what ends the names of these
_STRIPE = 256  # columns of a Gram matrix computed at a time


class Moments:
    """First and second moments of rows that come a batch at a time.

    Args:
        dtype: in which they are added up; None: that of the rows.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.count, self._dtype = 0, dtype
        self._total: Tensor | None = None
        self._products: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Moments:
        """Of the inputs of a layer `[out, in]`; in float64 where out is at least in.

        What such a layer is given comes from a normalisation, as a rule, and nearly satisfies an
        equation: float32 would not do to invert its Gram matrix.
        """
        return cls(torch.float64 if len(weight) >= weight.shape[1] else None)

    def add(self, inputs: Tensor) -> None:
        """Adds the rows of `[..., width]`."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._dtype or inputs.dtype)
        width = rows.shape[1]
        if self._total is None or self._products is None:
            self._total, self._products = rows.new_zeros(width), rows.new_zeros(width, width)
        self.count += len(rows)
        self._total += rows.sum(0)
        add_lower(self._products, rows, rows)

    @property
    def mean(self) -> Tensor:
        """The mean of the rows, `[width]`."""
        assert self._total is not None
        return self._total / self.count

    @property
    def gram(self) -> Tensor:
        """`Σ x xᵀ / rows`, `[width, width]`."""
        assert self._products is not None
        return mirrored(self._products / self.count)


def add_lower(products: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `leftᵀ right`, which is symmetric, to `products`: no more than what `mirrored` reads."""
    for start in range(0, len(products), _STRIPE):
        stripe = right[:, start : start + _STRIPE]
        products[start:, start : start + _STRIPE].addmm_(left[:, start:].T, stripe)


def mirrored(products: Tensor) -> Tensor:
    """A symmetric matrix, of which the lower half is given; in place."""
    for start in range(0, len(products), _STRIPE):
        own = slice(start, start + _STRIPE)
        products[own, own.stop :] = products[own.stop :, own].T
        products[own, own] = products[own, own].tril() + products[own, own].tril(-1).T
    return products


@dataclass(frozen=True)
class LayerInputs:
    """What T experts' images give to one linear layer.

    Attributes:
        gram: `Σ x xᵀ / count`, `[T, in, in]`; float64 for layers with `out >= in`.
        mean: `[T, in]`.
        count: rows (tokens of all images) of each task, `[T]`.
    """

    gram: Tensor
    mean: Tensor
    count: Tensor


class Inputs(Mapping[str, LayerInputs]):
    """`LayerInputs` by the name of the weight that multiplies them, of tasks in order.

    A layer's tensors are put together when they are asked for: where the statistics are in files,
    one layer is in memory at a time.
    """

    def __init__(self, by_task: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.tasks, self._by_task = tuple(by_task), tuple(by_task.values())
        first = self._by_task[0]
        self._names = [name for name in first if not name.endswith((_MEAN, _COUNT))]

    def __getitem__(self, name: str) -> LayerInputs:
        if name not in self._names:
            raise KeyError(name)

        def stacked(ending: str) -> Tensor:
            return torch.stack([own[name + ending] for own in self._by_task])

        return LayerInputs(stacked(""), stacked(_MEAN), stacked(_COUNT))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def gather_inputs(experts: Experts, images: Images, keep: Keep | None = None) -> Inputs:
    """The moments of every linear layer's inputs, under each task's own expert.

    One task after the other, block by block: in memory are one block of one expert, its moments,
    and the tokens of one task's images. A tower without blocks (a ResNet) is run whole, with the
    moments of all its linear layers at once.

    Args:
        experts: the T experts.
        images: unlabeled, of every task, on the device that computes and in the experts' type.
        keep: where each task's statistics go, as `in_files`; None: in memory.

    Raises:
        AdamergeError: a task without images, with an iterator of them, or with such as give NaN.

    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    >>> start = {name: tensor.detach() for name, tensor in network.named_parameters()}
    >>> vectors = adamerge.TaskVectors(start, {"a": {n: t + 1 for n, t in start.items()}})
    >>> inputs = gather_inputs(Experts(network, vectors), {"a": [torch.ones(5, 3, 2, 2)]})
    >>> inputs["1.weight"].gram.shape, inputs["1.weight"].count.tolist()
    (torch.Size([1, 12, 12]), [5.0])
    """
    keep = keep or in_memory
    matrices = [name for name, t in experts.task_vectors.pretrained.items() if t.ndim == 2]
    names = [name + ending for name in matrices for ending in ("", _MEAN, _COUNT)]
    by_task = {}
    for task in experts.tasks:

        def made(task: str = task) -> Named:
            refuse_no_images(images, task)
            log.info("task %s: statistics of its expert's inputs are gathered", task)
            for name, found in _moments(experts, task, images[task]):
                if name in matrices:
                    gram = found.gram
                    refuse_not_finite(gram.diagonal(), task, f"layer {name!r}")
                    yield name, gram
                    yield name + _MEAN, found.mean
                    yield name + _COUNT, torch.tensor(float(found.count), dtype=torch.float64)

        by_task[task] = keep(task, names, made)
    return Inputs(by_task)


def refuse_no_images(images: Images, task: str) -> None:
    """Raises AdamergeError where a task has no images, or such as end once they are looked at."""
    batches = iter(given := images.get(task, ()))
    if batches is given:
        raise AdamergeError(
            f"the images of task {task!r} are an iterator, which ends: give a list or a DataLoader"
        )
    if next(batches, None) is None:
        raise AdamergeError(
            f"there are no images of task {task!r} to gather statistics from: give batches "
            "[B, 3, H, W] of every task"
        )


def refuse_not_finite(numbers: Tensor, task: str, where: str) -> None:
    """Raises AdamergeError where a task's images give NaN or infinite numbers to something."""
    if not bool(torch.isfinite(numbers).all()):
        raise AdamergeError(
            f"the images of task {task!r} give NaN or infinite numbers to {where}: expected finite "
            "ones; look at these images, and at how they are normalised"
        )


@torch.no_grad()
def _moments(
    experts: Experts, task: str, batches: Iterable[Tensor]
) -> Iterator[tuple[str, Moments]]:
    """Names of weights and the moments of what they multiply, as they are complete."""
    found: dict[str, Moments] = {}

    def see(name: str, inputs: Tensor) -> None:
        weight = experts.task_vectors.pretrained.get(name)
        if weight is not None and weight.ndim == 2:
            found.setdefault(name, Moments.of(weight)).add(inputs)

    if not has_blocks(experts.tower):
        weights: dict[str, Tensor] = {}
        for batch in batches:
            weights = weights or experts.weights(task, batch.device)
            with seeing(experts.tower.skeleton, see):
                experts.tower(weights, batch)
        yield from found.items()
        return
    blocks = Blocks(experts.tower)
    tokens = embedded(blocks, experts.weights(task, names=blocks.outside()), batches)
    for index in range(len(blocks)):
        own = experts.weights(task, tokens[0].device, blocks.names(index))
        for place, part in enumerate(tokens):
            tokens[place] = blocks.run(index, own, part, see)
        yield from found.items()
        found.clear()


def embedded(
    blocks: Blocks, weights: Mapping[str, Tensor], batches: Iterable[Tensor]
) -> list[Tensor]:
    """Tokens of batches as the first block is given them.

    Args:
        weights: those outside the blocks, brought to the images' device.
    """
    tokens: list[Tensor] = []
    for batch in batches:
        weights = {name: tensor.to(batch.device) for name, tensor in weights.items()}
        tokens.append(blocks.embed(weights, batch))
    return tokens


def in_memory(task: str, names: Sequence[str], made: Callable[[], Named]) -> dict[str, Tensor]:
    """Keeps a task's statistics in the host's memory."""
    return {name: tensor.cpu() for name, tensor in made()}


def in_files(folder: Path, keys: Mapping[str, str]) -> Keep:
    """Keeps each task's statistics in a memory-mapped file; made once, by one process.

    Args:
        folder: for the files; made if needed.
        keys: task -> name of its file, which tells all that its statistics depend on.
    """

    def keep(task: str, names: Sequence[str], made: Callable[[], Named]) -> Mapping[str, Tensor]:
        path = folder / f"{keys[task]}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            known = _known(path)
            if known is None:
                with storing(Storage(device="disk", file=path), list(names)) as shelf:
                    for name, tensor in made():
                        shelf.add(name, Layer(tensor))
                    shelf.close({})
        return _Values(known or MappedLayers(path))

    return keep


def _known(path: Path) -> MappedLayers | None:
    """The layers of a file that is there and sound."""
    if not path.is_file():
        return None
    try:
        return MappedLayers(path).verified()
    except AdamergeError as error:
        log.warning("%s now", error)  # "…, and it is made again"
        return None


class _Values(Mapping[str, Tensor]):
    """Tensors of a mapped file by name, copied, so that nothing of the file stays in memory."""

    def __init__(self, layers: MappedLayers) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Tensor:
        found = self._layers[name].values.clone()
        self._layers.release()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
