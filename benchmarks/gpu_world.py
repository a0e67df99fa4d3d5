"""What `gpu.py` measures on: towers, experts and images made on the device that computes."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hardware
import open_clip
import torch
from step import RandomExpert
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from adamerge import TaskVectors
from adamerge.encoders.clip import build_backbone
from adamerge.encoders.heads import Heads
from adamerge.learn.graphs import Compute, ReplayedSteps
from adamerge.learn.objectives import Entropy
from adamerge.learn.step import step_loss
from adamerge.methods import AdaMerging
from adamerge.methods.base import MergeMethod
from adamerge.weights.storage import Storage

CLASSES = 100
TINY = {  # for a trial
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 64, "head_width": 32},
}
WARM_UP = 5  # more than steps go by before one is recorded


def tower(architecture: str, device: torch.device) -> nn.Module:
    """The image tower of an open_clip architecture with random weights."""
    torch.manual_seed(0)
    model = TINY if architecture == "tiny" else open_clip.get_model_config(architecture)
    config = {"model_cfg": model, "preprocess_cfg": {}}
    return build_backbone(config, architecture).to(device)


@dataclass
class World:
    """A tower, the task vectors of T random experts, one batch of every task, and heads."""

    backbone: Any
    vectors: TaskVectors
    images: Tensor  # [T · B, 3, H, W]
    ids: Tensor  # [T · B], on the CPU
    heads: Heads
    device: torch.device

    @classmethod
    def make(
        cls,
        architecture: str,
        tasks: int,
        batch: int,
        device: torch.device,
        storage: Storage | None = None,
    ) -> World:
        backbone = tower(architecture, device)
        state = dict(backbone.state_dict())
        names = [f"t{index}" for index in range(tasks)]
        experts = {name: RandomExpert(state, index) for index, name in enumerate(names)}
        if storage is not None and storage.stays:  # what stays outside the GPU is read there
            state = {name: tensor.cpu() for name, tensor in state.items()}
            experts = {name: OnHost(expert) for name, expert in experts.items()}
        vectors = TaskVectors(state, experts, share=True, storage=storage)
        size, dim = backbone.image_size[0], backbone.output_dim
        images = torch.randn(tasks * batch, 3, size, size, device=device)
        rows = {name: normalize(torch.randn(CLASSES, dim), dim=1) * 100 for name in names}
        classes = {name: [str(number) for number in range(CLASSES)] for name in names}
        ids = torch.arange(tasks).repeat_interleave(batch)
        return cls(backbone, vectors, images, ids, Heads(rows, classes).to(device), device)

    def forward_flops(self) -> int:
        """FLOPs of a forward pass over all images."""
        image = torch.empty_like(self.images[:1], device="meta")
        return hardware.forward_flops(_on_meta(self.backbone), image) * len(self.images)

    def floor(self, rates: hardware.Rates, bf16: bool) -> hardware.Floor:
        """The least time of a step; τ as it is stored."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        kept = sum(layer.nbytes for layer in self.vectors.layers.values())
        per_number = kept / (len(self.vectors.tasks) * self.vectors.numel())
        step = hardware.Step(
            tasks=len(self.vectors.tasks),
            parameters=self.vectors.numel(),
            forward_flops=self.forward_flops(),
            dtype=dtype,
            vector_bytes=per_number,
            weight_bytes=dtype.itemsize,
        )
        return hardware.floor(step, rates)


class OnHost(Mapping[str, Tensor]):
    """An expert made on the GPU and read on the host."""

    def __init__(self, expert: Mapping[str, Tensor]) -> None:
        self.expert = expert

    def __getitem__(self, name: str) -> Tensor:
        return self.expert[name].cpu()

    def __iter__(self) -> Any:
        return iter(self.expert)

    def __len__(self) -> int:
        return len(self.expert)


def _on_meta(backbone: nn.Module) -> nn.Module:
    return copy.deepcopy(backbone).to("meta")


class Learner:
    """A method with its optimizer, and a step as a run makes it."""

    def __init__(
        self, world: World, method: MergeMethod, bf16: bool = False, micro: int | None = None
    ) -> None:
        self.world, self.bf16, self.micro = world, bf16, micro
        self.method: Any = method.to(world.device).train()
        self.objective = Entropy(world.heads)
        self.compute: Compute = self.eager
        self.optimizer = torch.optim.Adam(self.method.parameters(), lr=1e-3)

    @classmethod
    def layer_wise(cls, world: World, bf16: bool = False, micro: int | None = None) -> Learner:
        return cls(world, AdaMerging(world.backbone, world.vectors, init=0.3), bf16, micro)

    def eager(
        self, images: Tensor, task_ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return step_loss(self.method, self.objective, images, task_ids, self.micro, targets)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """As a run on a GPU does by default."""
        self.compute = ReplayedSteps(self.eager, list(self.method.parameters()))
        try:
            yield
        finally:
            self.compute = self.eager

    def step(self) -> None:
        device = self.world.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            loss, *_ = self.compute(self.world.images, self.world.ids, None)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measured(work: Callable[[], object], device: torch.device, rounds: int) -> dict[str, Any]:
    """Median wall milliseconds of `work`, the time and number of its kernels, its peak of memory.

    The wall time is that of one call with the device idle before and after it; `queued` is the
    mean of calls that follow each other without waiting, as steps of a run do.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(WARM_UP):
        work()
    walls = []
    for _ in range(rounds):
        start = hardware.now(device)
        work()
        walls.append(hardware.now(device) - start)
    start = hardware.now(device)
    for _ in range(rounds):
        work()
    queued = (hardware.now(device) - start) / rounds
    found = {"wall_ms": 1e3 * statistics.median(walls), "queued_ms": 1e3 * queued}
    if device.type == "cuda":
        found["peak_GB"] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
        found |= kernels(work, device)
    return found


def kernels(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Number of kernels (copies and fills among them) of one call, and their milliseconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about itself
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize(device)
        on_gpu = torch.autograd.DeviceType.CUDA
        done = [event for event in seen.events() if event.device_type == on_gpu]
    spent = sum(event.time_range.elapsed_us() for event in done) / 1e3
    return {"kernel_ms": spent, "launches": len(done)}


def by_kernel(work: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """Name, milliseconds and number of calls of each kernel (or operation of a CPU), those that
    take most time first."""
    on_gpu = device.type == "cuda"
    watched = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about itself
        with profile(activities=[watched]) as seen:
            work()
            hardware.now(device)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        found = [(e.key, getattr(e, key) / 1e3, e.count) for e in seen.key_averages()]
    return sorted(found, key=lambda row: -row[1])


def stored_in(folder: Path, dtype: str, place: str) -> Storage:
    """A place for task vectors; the file of those on disk is in `folder`."""
    name = f"tau-{dtype}-{time.monotonic_ns()}.safetensors"
    return Storage(dtype, place, folder / name)
