"""Measurements before training: what the task vectors look like, and who solves which task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adamerge.encoders.clip import Normalizer
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower, static_encoder
from adamerge.images.batches import stream_seed
from adamerge.learn.data import TaskData
from adamerge.learn.features import content_key
from adamerge.learn.losses import marginal_entropy, sample_entropy
from adamerge.report.accuracy_matrix import Solving
from adamerge.report.evaluation import machine
from adamerge.weights.task_vectors import TaskVectors

_MEASURING = 1  # how it is measured; another number forgets what was measured before
_BATCH = 64  # images encoded at a time
_CHUNK = 2**18  # numbers per task vector promoted to float64 at a time
_QUIET = 5.0  # seconds without a line of progress


@dataclass(frozen=True)
class Images:
    """A few images per task, in order of the tasks.

    Attributes:
        pixels: uint8 `[n, 3, H, W]`.
        labels: int64 `[n]`, or None.
    """

    pixels: dict[str, Tensor]
    labels: dict[str, Tensor | None]

    def first(self, count: int) -> Images:
        """The first few of every task."""
        labels = {t: v if v is None else v[:count] for t, v in self.labels.items()}
        return Images({t: v[:count] for t, v in self.pixels.items()}, labels)


def choose(data: TaskData, count: int, seed: int) -> Images:
    """At most `count` images per task out of those adapted on, always the same for a seed."""
    pixels: dict[str, Tensor] = {}
    labels: dict[str, Tensor | None] = {}
    for task, rows in data.adapt_rows.items():
        generator = np.random.default_rng(stream_seed("preflight", seed, task))
        picked = rows[generator.permutation(len(rows))[:count]]
        found = data.tasks[task]
        pixels[task] = torch.from_numpy(found.images[picked])
        labels[task] = None if found.labels is None else torch.from_numpy(found.labels[picked])
    return Images(pixels, labels)


def key(images: Images, heads: Heads, normalizer: Normalizer, device: torch.device) -> str:
    """Of all that decides `measure` and `activation_change` beside the models."""
    tensors = dict(heads.named_buffers()) | dict(normalizer.named_buffers())
    tensors |= {f"pixels/{task}": pixels for task, pixels in images.pixels.items()}
    tensors |= {f"labels/{task}": v for task, v in images.labels.items() if v is not None}
    return content_key(tensors, _MEASURING, *machine(device), *heads.tasks)


def gram(task_vectors: TaskVectors) -> Tensor:
    """Inner products of all pairs of task vectors over all layers, `[T, T]`, float64 on the CPU.

    Summed in float64 piece by piece; nothing the size of a layer is copied.
    """
    total = torch.zeros((len(task_vectors.tasks),) * 2, dtype=torch.float64)
    for delta in task_vectors.deltas.values():
        for piece in delta.view(len(delta), -1).split(_CHUNK, dim=1):
            wide = piece.double()
            total += (wide @ wide.T).cpu()
    return total


def likeness(task_vectors: TaskVectors) -> Tensor:
    """Cosine of each expert's matrices with the pretrained ones, `[T]`, float64 on the CPU.

    Of matrices alone: normalisations are near one in any model.
    """
    parts = torch.zeros(3, len(task_vectors.tasks), dtype=torch.float64)  # θ0·θ0, θ0·θ, θ·θ
    for name, base in task_vectors.pretrained.items():
        if base.ndim < 2:
            continue
        deltas = task_vectors.deltas[name].flatten(1)
        for piece, delta in zip(
            base.flatten().split(_CHUNK), deltas.split(_CHUNK, dim=1), strict=True
        ):
            wide = piece.double()
            expert = wide + delta.double()
            rows = (wide.square().sum().expand(len(delta)), expert @ wide, expert.square().sum(1))
            parts += torch.stack(rows).cpu()
    return parts[1] / (parts[0] * parts[2]).sqrt()


def cosines(products: Tensor) -> Tensor:
    """`[T, T]` cosines of the inner products that `gram` gives."""
    norms = products.diagonal().sqrt()
    return products / norms[:, None] / norms[None, :]


def measure(
    tower: Tower,
    task_vectors: TaskVectors,
    heads: Heads,
    normalizer: Normalizer,
    images: Images,
    device: torch.device,
    say: Callable[[str], None] = lambda _: None,
) -> Solving:
    """How the pretrained model and every expert do on every task's images.

    `(T + 1) · T · n` images are encoded without gradients, one model at a time: one copy of the
    weights is in memory beside the task vectors.

    Args:
        task_vectors: untransformed.
        device: where models run, one after another.
        say: told how far it is, if it lasts.
    """
    tasks = task_vectors.tasks
    entropies: dict[str, list[Tensor]] = {task: [] for task in tasks}
    right: dict[str, list[Tensor]] = {task: [] for task in tasks}
    marginal: list[list[Tensor]] = []
    spoken = time.perf_counter()
    models = (static_encoder(tower, task_vectors, task) for task in (None, *tasks))
    for row, encoder in enumerate(models):
        if time.perf_counter() - spoken > _QUIET:
            spoken = time.perf_counter()
            say(f"pre-flight: {row} of {len(tasks) + 1} models looked at")
        marginal.append([])
        for task, logits in predictions(encoder, heads, normalizer, images, device):
            scale = math.log(max(logits.shape[1], 2))
            entropies[task].append(sample_entropy(logits).double() / scale)
            marginal[-1].append(marginal_entropy(logits).double() / scale)
            labels = images.labels[task]
            if labels is not None:
                right[task].append(logits.argmax(1) == labels)
    return Solving(
        tasks,
        tuple(len(heads.classes[task]) for task in tasks),
        tuple(torch.stack(entropies[task]) for task in tasks),
        torch.stack([torch.stack(values) for values in marginal]),
        tuple(torch.stack(right[task]) if right[task] else None for task in tasks),
    )


@torch.no_grad()
def predictions(
    encoder: nn.Module,
    heads: Heads,
    normalizer: Normalizer,
    images: Images,
    device: torch.device,
    tasks: Sequence[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Each task's logits `[n, C]`, on the CPU, of one encoder (all tasks unless named)."""
    encoder, heads, normalizer = encoder.to(device), heads.to(device), normalizer.to(device)
    for index, task in enumerate(heads.tasks):
        if tasks is not None and task not in tasks:
            continue
        parts = []
        for batch in images.pixels[task].split(_BATCH):
            features = encoder(normalizer(batch.to(device)), torch.full((len(batch),), index))
            parts.append(heads.logits(features, task).cpu())
        yield task, torch.cat(parts)


def activation_change(
    other: Tower,
    task_vectors: TaskVectors,
    heads: Heads,
    normalizer: Normalizer,
    images: Images,
    own: Solving,
    device: torch.device,
) -> Tensor:
    """By how much the other activation lowers each expert's entropy on its own task, `[T]`.

    Mean over images, divided by log C, float64. The heads stay those of the text tower as it is
    configured. `findings.of_activation` judges it.

    Args:
        own: measured under the configured activation, on these images and maybe more after them.
    """
    change = []
    for row, task in enumerate(task_vectors.tasks):
        encoder = static_encoder(other, task_vectors, task)
        ((_, logits),) = predictions(encoder, heads, normalizer, images, device, [task])
        there = sample_entropy(logits).double() / math.log(max(logits.shape[1], 2))
        here = own.entropies[row][1 + row, : len(there)]
        change.append((here - there).mean())
    return torch.stack(change)


def sources(files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Where each input came from: `pretrained` or a task -> path."""
    return {name: file["path"] for name, file in files.items()}
