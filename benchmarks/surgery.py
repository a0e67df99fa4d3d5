"""A step of Surgery with and without stored features, in one run.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 \
        python benchmarks/surgery.py

- stored: merged and expert features are read from memory-mapped files, `adamerge.learn.features`;
- computed: the merged tower and the experts encode the images of every step.

Both are optimizer steps of the same method, objective, heads and images, with random weights; the
adapters they end with are compared. Times are CPU seconds (process time; device-synchronised wall
seconds on a GPU). Computing the store once is stated beside it, per image.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_world import tower
from torch import Tensor
from torch.nn.functional import normalize

from adamerge import TaskVectors
from adamerge.encoders.clip import Normalizer
from adamerge.encoders.experts import Experts
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower, merged_encoder
from adamerge.images.batches import Stream, UnlabeledBatches
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.features import StoredBatches, stored_features
from adamerge.learn.objectives import ExpertL1
from adamerge.methods import Surgery

NORMALIZER = Normalizer([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])


class Setting:
    """A random tower, T random experts, their images and heads."""

    def __init__(self, architecture: str, tasks: int, images: int, batch: int, device: str) -> None:
        self.device = torch.device(device)
        backbone: Any = tower(architecture, self.device)
        pretrained = dict(backbone.state_dict())
        self.tasks = [f"t{index}" for index in range(tasks)]
        experts = {
            task: {name: t + 1e-3 * torch.randn_like(t) for name, t in pretrained.items()}
            for task in self.tasks
        }
        self.vectors = TaskVectors(pretrained, experts)
        self.encoder = merged_encoder(Tower(backbone), self.vectors, 0.3)
        self.teacher = Experts(backbone, self.vectors)
        size, self.dim = backbone.image_size[0], backbone.output_dim
        generator = np.random.default_rng(0)
        self.images = {
            task: generator.integers(0, 256, (images, 3, size, size), dtype=np.uint8)
            for task in self.tasks
        }
        weights = {task: 100 * normalize(torch.randn(10, self.dim), dim=-1) for task in self.tasks}
        self.heads = Heads(weights, {task: [str(i) for i in range(10)] for task in self.tasks})
        self.batch = batch

    def module(self) -> Adaptation:
        torch.manual_seed(1)
        method = Surgery(self.encoder, self.tasks, self.dim)
        objective = ExpertL1(self.heads, self.teacher)
        optimizer = torch.optim.Adam
        module = Adaptation(method, objective, self.heads, NORMALIZER, optimizer, log_every=10**9)
        return module.to(self.device)

    def batches(self) -> UnlabeledBatches:
        streams = [
            Stream(task, np.arange(len(array)), 0, self.batch)
            for task, array in self.images.items()
        ]
        return UnlabeledBatches(self.images, streams, 0)

    def store(self, folder: Path, encode: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        normalizer = NORMALIZER.to(self.device)
        found = {}
        for index, task in enumerate(self.tasks):

            def run(images: Tensor, index: int = index) -> Tensor:
                return encode(normalizer(images), torch.full((len(images),), index))

            found[task] = stored_features(run, self.images[task], folder, task, 64, self.device)
        return found


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def steps(setting: Setting, module: Adaptation, batches: Iterator[Any], count: int) -> list[float]:
    """Seconds of every optimizer step."""
    optimizer = torch.optim.Adam(module.method.parameters(), lr=1e-3, fused=True)
    seconds = []
    for step in range(count):
        start = now(setting.device)
        batch = next(batches)
        if setting.device.type == "cuda":
            batch = module.transfer_batch_to_device(batch, setting.device, 0)
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
        seconds.append(now(setting.device) - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="images per task")
    parser.add_argument("--images", type=int, default=48, help="per task")
    parser.add_argument("--rounds", type=int, default=3, help="steps without the store")
    parser.add_argument("--steps", type=int, default=1000, help="with the store")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    a = parser.parse_args()
    setting = Setting(a.architecture, a.tasks, a.images, a.batch, a.device)
    with tempfile.TemporaryDirectory() as name:
        plain, stored = setting.module(), setting.module()
        start = now(setting.device)
        method = stored.method
        assert isinstance(method, Surgery)
        features = setting.store(Path(name) / "merged", method.frozen_features)
        targets = setting.store(Path(name) / "experts", setting.teacher)
        once = (now(setting.device) - start) / (a.tasks * a.images)
        computed = steps(setting, plain, iter(setting.batches()), a.rounds)
        read = iter(StoredBatches(setting.batches(), targets, features))
        first = steps(setting, stored, read, a.rounds)
        off = max(
            float((p.detach() - q.detach()).abs().max())
            for p, q in zip(plain.method.parameters(), method.parameters(), strict=True)
        )
        fast = steps(setting, stored, read, a.steps)
        del features, targets, read, first
    slow, quick = statistics.median(computed), statistics.median(fast)
    text = (
        f"# A step of Surgery with and without stored features\n\n{date.today()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} "
        f"thread(s), {a.architecture}, T = {a.tasks}, {a.batch} images per task and step, rank 16, "
        f"{a.device}; medians of {a.rounds} and {a.steps} steps.\n\n"
        f"    python benchmarks/surgery.py {' '.join(sys.argv[1:])}\n\n"
        "| | seconds per step | steps per second |\n|---|--:|--:|\n"
        f"| computed at every step | {slow:.3f} | {1 / slow:.2f} |\n"
        f"| stored | {quick:.5f} | {1 / quick:.0f} |\n"
        f"| ratio | {slow / quick:.0f} × | |\n\n"
        f"Computing the store takes {once:.3f} s per image, once. Largest difference of an adapter "
        f"weight after {a.rounds} steps: {off:.1e} (Adam, lr 1e-3).\n"
    )
    print(text)
    if a.out:
        a.out.write_text(text)


if __name__ == "__main__":
    main()
