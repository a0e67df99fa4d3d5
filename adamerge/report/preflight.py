"""Measurements before training: what the task vectors look like, and who solves which task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from adamerge.encoders.clip import Normalizer
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower, static_encoder
from adamerge.learn.data import TaskData
from adamerge.learn.features import content_key
from adamerge.learn.losses import marginal_entropy, sample_entropy
from adamerge.report.evaluation import machine
from adamerge.weights.task_vectors import TaskVectors

_MEASURING = 1  # how it is measured; another number forgets what was measured before
_BATCH = 64  # images encoded at a time
_CHUNK = 2**18  # numbers per task vector promoted to float64 at a time
_QUIET = 5.0  # seconds without a bar
_FOR_ACTIVATION = 16  # images per task for which the other activation is tried


class Images(NamedTuple):
    """A few images per task, in order of the tasks.

    Attributes:
        pixels: uint8 `[n, 3, H, W]`.
        labels: int64 `[n]`, or None.
    """

    pixels: dict[str, Tensor]
    labels: dict[str, Tensor | None]


def choose(data: TaskData, count: int) -> Images:
    """At most `count` images per task out of those adapted on, always the same for a seed."""
    chosen = Images({}, {})
    for task, images in data.tasks.items():
        rows, labels = data.picked("preflight", task, count), images.labels
        chosen.pixels[task] = torch.from_numpy(images.images[rows])
        chosen.labels[task] = None if labels is None else torch.from_numpy(labels[rows])
    return chosen


def key(images: Images, heads: Heads, normalizer: Normalizer, device: torch.device) -> str:
    """Of all that decides `measure` and `activation_change` beside the models."""
    tensors = dict(heads.named_buffers()) | dict(normalizer.named_buffers())
    tensors |= {f"pixels/{task}": pixels for task, pixels in images.pixels.items()}
    tensors |= {f"labels/{task}": v for task, v in images.labels.items() if v is not None}
    return content_key(tensors, _MEASURING, *machine(device), *heads.tasks)


def gram(task_vectors: TaskVectors) -> Tensor:
    """Inner products of the pretrained weights (row 0) and all task vectors (row 1 + t), over all
    layers and over matrices alone, `[2, 1 + T, 1 + T]`, float64 on the CPU.

    Summed in float64 piece by piece; nothing the size of a layer is copied.
    """
    size = 1 + len(task_vectors.tasks)
    total = torch.zeros(2, size, size, dtype=torch.float64)
    for name, base in task_vectors.pretrained.items():
        deltas = task_vectors.deltas[name].flatten(1)
        pieces = zip(base.flatten().split(_CHUNK), deltas.split(_CHUNK, dim=1), strict=True)
        for piece, delta in pieces:
            rows = torch.cat([piece[None].double(), delta.double()])
            products = (rows @ rows.T).cpu()
            total[: 2 if base.ndim > 1 else 1] += products
    return total


def cosines(products: Tensor) -> Tensor:
    """Cosines of all pairs, of their inner products `[n, n]`."""
    norms = products.diagonal().sqrt()
    return products / norms[:, None] / norms[None, :]


def likeness(products: Tensor) -> Tensor:
    """Cosine of each expert's matrices with the pretrained ones, `[T]`, by what `gram` gives.

    Of matrices alone: normalisations are near one in any model.
    """
    base, mixed, vectors = products[1, 0, 0], products[1, 0, 1:], products[1].diagonal()[1:]
    return (base + mixed) / (base * (base + 2 * mixed + vectors)).sqrt()


class Matrix:
    """How the pretrained model (row 0) and the T experts (row 1 + t) do on every task's images.

    Attributes:
        tasks: the T names.
        classes: number of classes C per task.
        entropies: per task `[1 + T, n]`, of each image's prediction, divided by log C; float64.
        marginal: entropy of the mean prediction divided by log C, `[1 + T, T]`; float64.
        right: per task `[1 + T, n]`, whether each image is classified right; None without labels.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        classes: Sequence[int],
        entropies: Sequence[Any],
        marginal: Any,
        right: Sequence[Any],
    ) -> None:
        self.tasks, self.classes = tuple(tasks), tuple(classes)
        self.entropies = [torch.as_tensor(rows, dtype=torch.float64) for rows in entropies]
        self.marginal = torch.as_tensor(marginal, dtype=torch.float64)
        self.right = [None if rows is None else torch.as_tensor(rows) for rows in right]

    def entropy(self) -> Tensor:
        """Mean entropy over each task's images, `[1 + T, T]`, from 0 (certain) to 1 (log C)."""
        return torch.stack([values.mean(1) for values in self.entropies], dim=1)

    def accuracy(self) -> Tensor:
        """Fraction right, `[1 + T, T]`; NaN in the column of a task without labels."""
        nothing = torch.full((1 + len(self.tasks),), float("nan"), dtype=torch.float64)
        columns = [nothing if r is None else r.double().mean(1) for r in self.right]
        return torch.stack(columns, dim=1)

    def information(self) -> Tensor:
        """What predictions tell about the image, `[1 + T, T]`: entropy of their mean minus mean
        entropy, divided by log C. Unlike low entropy it cannot be had by collapsing."""
        return self.marginal - self.entropy()


def measure(
    tower: Tower,
    task_vectors: TaskVectors,
    heads: Heads,
    normalizer: Normalizer,
    images: Images,
    device: torch.device,
) -> dict[str, Any]:
    """How the pretrained model and every expert do on every task's images: the arguments of a
    `Matrix`, in lists.

    `(T + 1) · T · n` images are encoded without gradients, one model at a time: one copy of the
    weights is in memory beside the task vectors.

    Args:
        task_vectors: untransformed.
        device: where models run, one after another.
    """
    tasks = task_vectors.tasks
    entropies: dict[str, list[Any]] = {task: [] for task in tasks}
    right: dict[str, list[Any]] = {task: [] for task in tasks}
    marginal: list[list[float]] = []
    models = tqdm((None, *tasks), "pre-flight", unit="model", delay=_QUIET, leave=False)
    for model in models:
        marginal.append([])
        encoder = static_encoder(tower, task_vectors, model)
        for task, logits in predictions(encoder, heads, normalizer, images.pixels, device):
            entropies[task].append(_entropies(logits).tolist())
            scale = math.log(max(logits.shape[1], 2))
            marginal[-1].append(float(marginal_entropy(logits).double() / scale))
            labels = images.labels[task]
            if labels is not None:
                right[task].append((logits.argmax(1) == labels).tolist())
    return {
        "tasks": tasks,
        "classes": [len(heads.classes[task]) for task in tasks],
        "entropies": list(entropies.values()),
        "marginal": marginal,
        "right": [rows or None for rows in right.values()],
    }


def _entropies(logits: Tensor) -> Tensor:
    """Of each prediction, divided by log C, `[n, C] -> [n]`, float64."""
    return sample_entropy(logits).double() / math.log(max(logits.shape[1], 2))


@torch.no_grad()
def predictions(
    encoder: nn.Module,
    heads: Heads,
    normalizer: Normalizer,
    pixels: Mapping[str, Tensor],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Each task's logits `[n, C]`, on the CPU, of one encoder, for the tasks with images."""
    encoder, heads, normalizer = encoder.to(device), heads.to(device), normalizer.to(device)
    for index, task in enumerate(heads.tasks):
        parts = []
        for batch in pixels[task].split(_BATCH) if task in pixels else ():
            features = encoder(normalizer(batch.to(device)), torch.full((len(batch),), index))
            parts.append(heads.logits(features, task).cpu())
        if parts:
            yield task, torch.cat(parts)


def activation_change(
    other: Tower,
    task_vectors: TaskVectors,
    heads: Heads,
    normalizer: Normalizer,
    images: Images,
    matrix: Matrix,
    device: torch.device,
) -> list[float]:
    """By how much the other activation lowers each expert's entropy on its own task, for T tasks.

    Mean over the first `_FOR_ACTIVATION` images, divided by log C. The heads stay those of the text
    tower as it is configured. `findings.of_activation` judges it.

    Args:
        matrix: measured under the configured activation, on these images.
    """
    change = []
    for row, task in enumerate(task_vectors.tasks):
        pixels = {task: images.pixels[task][:_FOR_ACTIVATION]}
        encoder = static_encoder(other, task_vectors, task)
        ((_, logits),) = predictions(encoder, heads, normalizer, pixels, device)
        there = _entropies(logits)
        change.append(float((matrix.entropies[row][1 + row, : len(there)] - there).mean()))
    return change
