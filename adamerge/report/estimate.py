"""Memory and time of adaptation, by a real step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from adamerge._base.memory import memory_available
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.precomputed import learns_on_features, taught_by_experts
from adamerge.learn.step import step_loss
from adamerge.methods.base import OnFrozenFeatures
from adamerge.weights.task_vectors import TaskVectors


@dataclass(frozen=True)
class Estimate:
    """What adaptation will take, per process.

    Attributes:
        memory: bytes: weights, task vectors, merged weights and their gradient, activations.
        available: bytes of memory the process may have in all; None where it cannot be told.
        seconds: per step; None where memory does not do for one.
        steps: to be taken; None where only time ends the run.
        device: where.
    """

    memory: int
    available: int | None
    seconds: float | None
    steps: int | None
    device: str

    def text(self) -> str:
        """`estimated: 1.9 GB of memory (23 GB here), 0.21 s per step, 300 steps ≈ 1 min 3 s`."""
        here = "" if self.available is None else f" ({in_bytes(self.available)} here)"
        parts = [f"{in_bytes(self.memory)} of memory{here}"]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.2g} s per step")
            if self.steps is not None:
                parts.append(f"{self.steps} steps ≈ {_duration(self.seconds * self.steps)}")
        return f"estimated on {self.device}: {', '.join(parts)}"


def estimate(
    module: Adaptation,
    pixels: Mapping[str, Tensor],
    batch_size: int,
    steps: int | None,
    precision: str,
    device: torch.device,
    stored: bool = False,
) -> Estimate | None:
    """Measures on real images; gradients, modes and random state stay.

    Memory is counted: everything the method holds, the merged weights, their gradient, and what
    autograd keeps for one more image per task times the images encoded together; the gradient comes
    as the activations go, so the larger counts, but with micro-batches both. Time is that of one
    whole step with its backward pass. On a GPU the module is left there, or put back if it does not
    fit.

    Args:
        pixels: task -> uint8 `[n, 3, H, W]`, n >= 1; repeated to fill a batch.
        precision: `32-true` or `bf16-mixed`, as for the trainer.
        stored: whether steps read what `precomputed` keeps; computing that once is not in the time.

    Returns:
        None where the GPU's memory does not do for two images per task.
    """
    available, held = memory_available(device), _held(module)
    total = None if available is None else available + (held if device.type == "cpu" else 0)
    bf16 = precision.startswith("bf16")
    try:
        module.to(device)
        with untouched(module):
            one, two = (
                _step(module, _batch(module, pixels, count, stored), None, bf16)[0]
                for count in (1, 2)
            )
            images = len(module.heads.tasks) * batch_size
            together = min(module.micro_batch or images, images)
            activations = max(two - one, 0) * together / len(module.heads.tasks)
            merged = sum(
                w.untyped_storage().nbytes() for w in module.method.shared_weights().values()
            )
            gradient = merged + activations if together < images else max(merged, activations)
            memory, seconds = int(held + merged + gradient), None
            if total is None or memory <= total:
                batch = _batch(module, pixels, batch_size, stored)
                seconds = _step(module, batch, module.micro_batch, bf16)[1]
    except torch.OutOfMemoryError:
        module.to("cpu")
        return None
    return Estimate(memory, total, seconds, steps, str(device))


def _batch(
    module: Adaptation, pixels: Mapping[str, Tensor], count: int, stored: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, task ids and stored targets of a step with that many images per task."""
    tasks, method = module.heads.tasks, module.method
    images = torch.cat([pixels[t][torch.arange(count) % len(pixels[t])] for t in tasks])
    ids = torch.arange(len(tasks)).repeat_interleave(count)
    inputs, targets = module.normalizer(images.to(module.device)), None
    if stored and taught_by_experts(module):
        targets = module.objective.targets(inputs, ids)
    known = None
    if stored and learns_on_features(module) and isinstance(method, OnFrozenFeatures):
        known = method.frozen_features(inputs, ids)
    return inputs if known is None else known, ids, targets


def _step(
    module: Adaptation,
    batch: tuple[Tensor, Tensor, Tensor | None],
    micro_batch: int | None,
    bf16: bool,
) -> tuple[int, float]:
    """Bytes that autograd keeps from the forward pass, and seconds."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would keep its own graph alive

    images, ids, targets = batch
    _synchronize(module.device)
    start = time.perf_counter()
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(module.device.type, torch.bfloat16, enabled=bf16),
    ):
        rows = torch.arange(len(ids)) if module.objective.sees_image_ids else None
        known = (micro_batch, targets, rows)
        loss, *_ = step_loss(module.method, module.objective, images, ids, *known)
    loss.backward()
    _synchronize(module.device)
    seconds = time.perf_counter() - start
    for parameter in module.parameters():
        parameter.grad = None
    return sum(kept.values()), seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def untouched(module: Adaptation) -> Iterator[None]:
    """Puts back what a step without an optimizer could change: gradients, modes, randomness.

    Within, the module is in evaluation mode, where no layer counts or draws.
    """
    modes = {part: part.training for part in module.modules()}
    gradients = [parameter.grad for parameter in module.parameters()]
    memory = [(buffer, buffer.detach().clone()) for buffer in module.objective.buffers()]
    try:
        with isolate_rng(), torch.enable_grad():
            module.eval()
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        for buffer, before in memory:
            buffer.copy_(before)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient


def _held(module: Adaptation) -> int:
    """Bytes of the tensors and task vectors that a module holds: in attributes, and in containers
    and data classes of them; what several share counts once."""
    waiting: list[Any] = [vars(part) for part in module.modules()]
    seen, sizes = set(), dict[object, int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, TaskVectors):
            # Where they are kept: in a file, or in memory from here on.
            place = value.storage.file or value.layers[value.names[0]].values.data_ptr()
            sizes["task vectors", place] = value.nbytes()
            waiting += value.pretrained.values()
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = 0 if value.is_meta else storage.nbytes()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            waiting += [getattr(value, entry.name, None) for entry in dataclasses.fields(value)]
    return sum(sizes.values())


def in_bytes(count: float) -> str:
    """`37 MB`, `1.9 GB`, `23 GB`."""
    if count < 1e9:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"
