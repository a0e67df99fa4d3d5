"""Memory and time of adaptation, estimated by small probes and one real step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from adamerge._base.memory import memory_available
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.precomputed import stores_features, stores_targets
from adamerge.learn.step import step_loss
from adamerge.methods.base import OnFrozenFeatures
from adamerge.report.findings import Finding
from adamerge.weights.task_vectors import TaskVectors

_LONGEST = 5.0  # seconds: longer steps are not taken whole but extrapolated


@dataclass(frozen=True)
class Estimate:
    """What adaptation will take, per process.

    Attributes:
        memory: bytes: weights, task vectors, merged weights and their gradient, activations.
        available: bytes of memory the process may have in all; None where it cannot be told.
        seconds: per step.
        steps: to be taken; None where only time ends the run.
        device: where.
    """

    memory: int
    available: int | None
    seconds: float
    steps: int | None
    device: str

    def text(self) -> str:
        """`estimated: 1.9 GB of memory (23 GB here), 0.21 s per step, 300 steps ≈ 1 min 3 s`."""
        here = "" if self.available is None else f" ({_bytes(self.available)} here)"
        parts = [f"{_bytes(self.memory)} of memory{here}", f"{self.seconds:.2g} s per step"]
        if self.steps is not None:
            parts.append(f"{self.steps} steps ≈ {_duration(self.seconds * self.steps)}")
        return f"estimated on {self.device}: {', '.join(parts)}"


def of_memory(cost: Estimate | None) -> Iterator[Finding]:
    """That memory will not do, if so."""
    mend = "set micro_batch, lower batch_size, or use a device with more"
    if cost is None:
        text = f"two images per task are more than the GPU's memory holds: {mend}"
        yield Finding("problem", "memory", (), text)
    elif cost.available is not None and cost.memory > cost.available:
        text = (
            f"adapting needs about {_bytes(cost.memory)} of memory and there are "
            f"{_bytes(cost.available)}: {mend}"
        )
        yield Finding("problem", "memory", (), text)


def estimate(
    module: Adaptation,
    pixels: Mapping[str, Tensor],
    batch_size: int,
    steps: int | None,
    precision: str,
    device: torch.device,
    stored: bool = False,
) -> Estimate | None:
    """Measures on real images; learned parameters, gradients, modes and random state stay.

    Memory is counted: everything the method holds, the merged weights, their gradient, and what
    autograd keeps for one more image per task times the images encoded together; the gradient comes
    as the activations go, so the larger counts, but with micro-batches both. Time is that of a
    whole step with its backward pass; where that would last, it is extrapolated from smaller ones.
    On a GPU the module is left there, or put back if it does not fit.

    Args:
        pixels: task -> uint8 `[n, 3, H, W]`, n >= 1; repeated to fill a batch.
        precision: `32-true` or `bf16-mixed`, as for the trainer.
        stored: whether steps read what `precomputed` keeps; computing that once is not in the time.

    Returns:
        None where the GPU's memory does not do for two images per task.
    """
    try:
        return _measured(module, pixels, batch_size, steps, precision, device, stored)
    except torch.OutOfMemoryError:
        module.to("cpu")
        return None


def _measured(
    module: Adaptation,
    pixels: Mapping[str, Tensor],
    batch_size: int,
    steps: int | None,
    precision: str,
    device: torch.device,
    stored: bool,
) -> Estimate:
    available = memory_available(device)
    held_before = _held(module) if device.type == "cpu" else 0
    module.to(device)
    probe = _Probe(module, pixels, precision, device, stored)
    with _untouched(module):
        kept_by_one, _ = probe.step(1, None)
        kept_by_two, second = probe.step(2, None)
        images = len(module.heads.tasks) * batch_size
        together = min(module.micro_batch or images, images)
        activations = max(kept_by_two - kept_by_one, 0) * together / len(module.heads.tasks)
        merged = sum(w.untyped_storage().nbytes() for w in module.method.shared_weights().values())
        by_parts = together < images
        passing = merged + activations if by_parts else max(merged, activations)
        memory = int(_held(module) + merged + passing)
        total = None if available is None else available + held_before
        fits = total is None or memory <= total
        seconds = _seconds(probe, second, batch_size, fits)
    return Estimate(memory, total, seconds, steps, str(device))


def _seconds(probe: _Probe, second: float, batch_size: int, fits: bool) -> float:
    """Of a step with `batch_size` images per task, `second` being that of one with two."""
    count = min(batch_size, max(int(2 * _LONGEST / second), 3)) if fits else min(batch_size, 3)
    measured = probe.step(count, probe.module.micro_batch)[1]
    if count <= 2 or count == batch_size:
        return measured
    expected = measured + max((measured - second) / (count - 2), 0) * (batch_size - count)
    if fits and expected <= _LONGEST:  # or so it seems, if the machine was busy for a moment
        return probe.step(batch_size, probe.module.micro_batch)[1]
    return expected


class _Probe:
    """Steps with a given number of images per task."""

    def __init__(
        self,
        module: Adaptation,
        pixels: Mapping[str, Tensor],
        precision: str,
        device: torch.device,
        stored: bool,
    ) -> None:
        self.module, self.pixels, self.device = module, pixels, device
        self.stored = stored
        self.bf16 = precision.startswith("bf16")

    def step(self, count: int, micro_batch: int | None) -> tuple[int, float]:
        """Bytes that autograd keeps from the forward pass, and seconds."""
        tasks = self.module.heads.tasks
        order = {t: torch.arange(count) % len(self.pixels[t]) for t in tasks}
        images = torch.cat([self.pixels[t][order[t]] for t in tasks])
        ids = torch.arange(len(tasks)).repeat_interleave(count)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself, it would keep its own graph alive

        inputs, targets = self._inputs(images, ids)
        self._synchronize()
        start = time.perf_counter()
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            module = self.module
            rows = torch.arange(len(ids)) if module.objective.sees_image_ids else None
            known = (micro_batch, targets, rows)
            loss, *_ = step_loss(module.method, module.objective, inputs, ids, *known)
        loss.backward()
        self._synchronize()
        seconds = time.perf_counter() - start
        for parameter in self.module.parameters():
            parameter.grad = None
        return sum(kept.values()), seconds

    def _inputs(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a step takes, and what it has stored of these images."""
        module = self.module
        batch = module.normalizer(images.to(self.device))
        if not self.stored:
            return batch, None
        targets = module.objective.targets(batch, ids) if stores_targets(module) else None
        method = module.method
        if isinstance(method, OnFrozenFeatures) and stores_features(module):
            known = method.frozen_features(batch, ids)
            batch = batch if known is None else known
        return batch, targets

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def _untouched(module: Adaptation) -> Iterator[None]:
    """Puts back whatever a step could change: parameters, gradients, buffers, modes, randomness.

    Steps are taken in evaluation mode, where a layer that counts or draws does neither.
    """
    modes = {m: m.training for m in module.modules()}
    state = [*module.parameters(), *module.buffers()]
    values = [tensor.detach().clone() for tensor in state]
    gradients = [parameter.grad for parameter in module.parameters()]
    try:
        with isolate_rng():
            module.eval()
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        with torch.no_grad():
            for tensor, value in zip(state, values, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient


def _held(module: Adaptation) -> int:
    """Bytes of everything a module holds: parameters, buffers, other tensors, task vectors."""
    found = list(_inside([vars(part) for part in module.modules()]))
    vectors = [value for value in found if isinstance(value, TaskVectors)]
    tensors = [value for value in found if isinstance(value, Tensor) and not value.is_meta]
    tensors += [base for own in vectors for base in own.pretrained.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    distinct = {_place(own): own for own in vectors}  # several may share what they hold
    total = sum(own.nbytes() for own in distinct.values())
    return total + sum(storage.nbytes() for storage in storages.values())


def _place(vectors: TaskVectors) -> object:
    """Where task vectors are kept: in a file, or in memory from here on."""
    return vectors.storage.file or vectors.layers[vectors.names[0]].values.data_ptr()


def _inside(values: Iterable[Any]) -> Iterator[Tensor | TaskVectors]:
    """The tensors and task vectors among values, and in containers and data classes of them."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | TaskVectors):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            waiting += [getattr(value, entry.name, None) for entry in dataclasses.fields(value)]


def _bytes(count: float) -> str:
    if count < 1e9:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {seconds % 60:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min"
