"""The parts of `gpu.py`: each gives rows, one at a time, so that a stop loses nothing that is done.

python benchmarks/gpu_parts.py PART [PART …] --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hardware
import torch
from gpu_world import Learner, World, by_kernel, measured, stored_in

from adamerge.learn.blocks import compiled, recomputing
from adamerge.methods import WEMoE
from adamerge.weights import fused

Row = dict[str, Any]
Way = Callable[[], contextlib.AbstractContextManager[object]]
ROOT = Path(__file__).parent.parent
# Images encoded at a time where the activations of all of them would not fit into 80 GB.
MICRO = {"ViT-L-14": 64, "ViT-H-14": 32}
SMOKE = "tiny"


class Sizes:
    """How much is measured: on a GPU all, in a trial (`smoke`) a step of the smallest."""

    def __init__(self, smoke: bool) -> None:
        self.towers = [SMOKE] if smoke else ["ViT-B-32", "ViT-L-14"]
        self.tasks = [2] if smoke else [8, 20]
        self.batch = 1 if smoke else 16
        self.rounds = 1 if smoke else 12
        self.growth = [(SMOKE, 2)] if smoke else GROWTH
        self.smoke = smoke

    def rates(self, device: torch.device) -> hardware.Rates:
        """The machine's; in a trial of something small."""
        small = ((256,), 2**24) if self.smoke else ()
        return hardware.Rates.measured(device, *small)


GROWTH = [
    *(("ViT-B-32", tasks) for tasks in (2, 4, 8, 16, 32, 64)),
    *(("ViT-L-14", tasks) for tasks in (2, 8, 32)),
    *(("ViT-H-14", tasks) for tasks in (2, 8, 16)),
]


def step(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """A layer-wise step: float32 and bfloat16; fused kernels, layer by layer, compiled blocks."""
    rates = sizes.rates(device)
    yield {"machine": str(rates)}
    for architecture in sizes.towers:
        for tasks in sizes.tasks:
            world = World.make(architecture, tasks, sizes.batch, device)
            for bf16 in (True, False):
                floor = world.floor(rates, bf16)
                learner = Learner.layer_wise(world, bf16, MICRO.get(architecture))
                rounds = sizes.rounds if bf16 else max(sizes.rounds // 4, 1)
                several = bf16 or architecture != "ViT-L-14"
                for name, around in ways(learner, device, several).items():
                    with around():
                        row = measured(learner.step, device, rounds)
                    yield {
                        **{"tower": architecture, "T": tasks, "images": len(world.images)},
                        **{"precision": "bf16-mixed" if bf16 else "float32", "way": name},
                        **row,
                        "floor_ms": 1e3 * floor.seconds,
                        "floor_compute_ms": 1e3 * floor.compute,
                        "floor_traffic_ms": 1e3 * floor.traffic,
                        "wall_over_floor": row["wall_ms"] / (1e3 * floor.seconds),
                    }
                del learner
            del world
            cleared(device)


def where(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The kernels of a bfloat16 step that take most of its time."""
    world = World.make(sizes.towers[0], sizes.tasks[0], sizes.batch, device)
    learner = Learner.layer_wise(world, True)
    for name in ("no graph", "compile")[: 1 if sizes.smoke else 2]:
        with compiled(learner.method, name == "compile"):
            for _ in range(3):
                learner.step()
            yield {"way": name}
            for kernel, spent, calls in by_kernel(learner.step, device)[:25]:
                yield {"kernel": kernel[:90], "ms": spent, "calls": calls}


def ways(learner: Learner, device: torch.device, several: bool = True) -> dict[str, Way]:
    """The ways of a step: as a run makes it, and with and without what changes time or memory."""
    method = learner.method

    @contextlib.contextmanager
    def blocks_compiled() -> Iterator[None]:
        with compiled(method), learner.replaying():
            yield

    found: dict[str, Way] = {"default": learner.replaying}
    if not several:
        return found
    found["compile"] = blocks_compiled
    if device.type == "cuda":
        found["no graph"] = contextlib.nullcontext
        found["no graph, layer by layer"] = plain_merging
    return found | {"recompute": lambda: recomputing(method)}


@contextlib.contextmanager
def plain_merging() -> Iterator[None]:
    """Layers merged one after the other, by torch's own products."""
    known = set(fused.DEVICES)
    fused.DEVICES.clear()
    try:
        yield
    finally:
        fused.DEVICES.update(known)


def merging(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Merge and contraction alone, by the type of τ, with and without the fused kernels."""
    bandwidth = sizes.rates(device).bandwidth
    for architecture in sizes.towers:
        for tasks in sizes.tasks:
            for stored in (
                ("float32", "bfloat16", "int8") if tasks == sizes.tasks[0] else ("float32",)
            ):
                world = World.make(
                    architecture, tasks, 1, device, stored_in(Path(), stored, "auto")
                )
                learner = Learner.layer_wise(world)
                vectors = learner.method.task_vectors
                for half in (False, True):
                    dtype = torch.bfloat16 if half else None
                    grads = {
                        name: torch.randn_like(merged)
                        for name, merged in vectors.combine(
                            learner.method.layer_coefficients().detach(), dtype
                        ).items()
                    }

                    def work(grads: Any = grads, dtype: Any = dtype, given: Any = learner) -> None:
                        merged = given.method.task_vectors.combine(
                            given.method.layer_coefficients(), dtype
                        )
                        torch.autograd.backward(list(merged.values()), list(grads.values()))
                        given.optimizer.zero_grad()

                    size = vectors.numel()
                    moved = 2 * vectors.nbytes() + 2 * size * (2 if half else 4) + 4 * size
                    fused_row = measured(work, device, sizes.rounds)
                    with plain_merging():
                        plain_row = measured(work, device, sizes.rounds)
                    yield {
                        **{"tower": architecture, "T": tasks, "τ": stored},
                        "W": "bfloat16" if half else "float32",
                        **{f"fused {k}": v for k, v in fused_row.items()},
                        **{f"plain {k}": v for k, v in plain_row.items()},
                        "plain_over_fused": plain_row["wall_ms"] / fused_row["wall_ms"],
                        "floor_ms": 1e3 * moved / bandwidth,
                    }
                    del grads, work
                del world, learner, vectors
                cleared(device)


def peers(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """The step of the package fusion-bench on the same weights, images and heads, in turns."""
    if importlib.util.find_spec("fusion_bench") is None:
        yield {"note": "the package fusion-bench is not installed"}
        return
    import peers_compare as compare
    from peers_world import SHAPES
    from peers_world import World as Shared

    for architecture in sizes.towers:
        tasks, shape = sizes.tasks[0], SHAPES[architecture]
        world = Shared.make(shape, tasks, sizes.batch, device)
        names = ("adamerge", "adamerge, bf16")
        steps, works, line = compare.compare_steps(
            world, max(sizes.rounds // 4, 1), names, MICRO.get(architecture)
        )
        for name, seconds in steps.items():
            theirs = steps["fusion-bench, bf16" if name.endswith("bf16") else "fusion-bench"]
            yield {
                **{"tower": architecture, "T": tasks, "images": sizes.batch * tasks},
                **{"scheme": name, "step_ms": 1e3 * seconds, "theirs_over_it": theirs / seconds},
                "merging_ms": 1e3 * works[name] if name in works else None,
            }
        yield {"tower": architecture, "note": line}
        for name in compare.THEIRS if device.type == "cuda" else ():
            yield {
                "tower": architecture,
                "scheme": name,
                "peak_GB": compare.peak_of(name, world) / 1e9,
            }
        del world
        cleared(device)
    shape = replace(SHAPES[sizes.towers[0]], blocks=2)
    found, line = compare.compare_mixtures(
        Shared.make(shape, sizes.tasks[0], 2, device), max(sizes.rounds // 4, 1)
    )
    for name, seconds in found.items():
        yield {"tower": "two blocks", "T": 8, "scheme": name, "step_ms": 1e3 * seconds}
    yield {"tower": "two blocks", "note": line}


def tiers(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Task vectors on the GPU, in host memory and on disk; what of the copies is hidden."""
    tasks = sizes.tasks[0]
    for architecture in sizes.towers:
        for stored in ("float32", "bfloat16", "int8"):
            base = None
            for place in ("auto", "host", "disk"):
                with tempfile.TemporaryDirectory() as folder:
                    kept = stored_in(Path(folder), stored, place)
                    start = time.perf_counter()
                    world = World.make(architecture, tasks, sizes.batch, device, kept)
                    built = time.perf_counter() - start
                    learner = Learner.layer_wise(world, True, MICRO.get(architecture))
                    row = measured(learner.step, device, max(sizes.rounds // 2, 1))
                    base = base or row["wall_ms"]
                    moved = 2 * sum(layer.nbytes for layer in world.vectors.layers.values())
                    found = {
                        **{"tower": architecture, "T": tasks, "τ": stored, "place": place},
                        **{"built_s": built, "read_GB_per_step": moved / 1e9},
                        **row,
                        "over_auto": row["wall_ms"] / base,
                    }
                    if place != "auto" and device.type == "cuda":
                        alone = 1e3 * _copies(world, device)
                        hidden = 1 - max(row["wall_ms"] - base, 0) / alone
                        found |= {"copies_alone_ms": alone, "hidden_share": hidden}
                    yield found
                    del learner, world
                    cleared(device)


def _copies(world: World, device: torch.device) -> float:
    """Seconds to bring τ of all layers to the GPU twice, with nothing else to do."""
    vectors = world.vectors.apply(lambda tensor: tensor.to(device))

    def work() -> None:
        for order in (1, -1):
            groups = range(len(vectors.groups))[::order]
            for group in groups:
                vectors.bring(group, group + order)

    work()
    start = hardware.now(device)
    work()
    return hardware.now(device) - start


def methods(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Steps of WEMoE and Surgery."""
    tower, tasks = sizes.towers[0], sizes.tasks[0]
    for batch in (1, 4) if sizes.batch > 1 else (1,):
        world = World.make(tower, tasks, batch, device)
        for bf16 in (True, False):
            for batch_gate in (False, True):
                method = WEMoE(world.backbone, world.vectors, init=0.3, batch_gate=batch_gate)
                learner = Learner(world, method, bf16)
                yield {
                    **{"method": "wemoe", "gates": "per batch" if batch_gate else "per image"},
                    **{"tower": tower, "T": tasks, "images": len(world.images)},
                    "precision": "bf16-mixed" if bf16 else "float32",
                    **measured(learner.step, device, max(sizes.rounds // 4, 1)),
                }
                del learner, method
        del world
        cleared(device)
    yield from _surgery(device, sizes)


def _surgery(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    import surgery as bench

    from adamerge.learn.features import StoredBatches

    tasks = sizes.tasks[0]
    setting = bench.Setting(sizes.towers[0], tasks, 2 * sizes.batch, sizes.batch, device.type)
    with tempfile.TemporaryDirectory() as folder:
        module = setting.module()
        features = setting.store(Path(folder) / "merged", module.method.frozen_features)
        targets = setting.store(Path(folder) / "experts", setting.teacher)
        batches = {
            "computed": iter(setting.batches()),
            "stored": iter(StoredBatches(setting.batches(), targets, features)),
        }
        for way, given in batches.items():
            found = bench.steps(setting, module, given, sizes.rounds + 3)[3:]
            milliseconds = 1e3 * statistics.median(found or [float("nan")])
            facts = {"method": "surgery", "way": way, "tower": sizes.towers[0], "T": tasks}
            yield facts | {"wall_ms": milliseconds}


def end_to_end(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """`train.py` on the demo suite, each time a process of its own: cold start to export."""
    steps = 2 if sizes.rounds == 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm")[: 1 if sizes.smoke else 2]:
            words = [f"cache_dir={folder}/cache", f"run_dir={folder}/{name}", "wandb=off"]
            words += [f"trainer.max_steps={steps}", "evaluate.oracle=false"]
            words += [f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}"]
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *words],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            spent = time.perf_counter() - start
            results = json.loads((Path(folder) / name / "results.json").read_text())
            own = next(row for row in results["rows"] if row["name"] == results["method"])
            yield {"run": name, "steps": steps, "wall_s": spent, "average": own["average"]}


def growth(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """A bfloat16 step as T and P grow, τ in bfloat16, four images a task."""
    rates = sizes.rates(device)
    for architecture, tasks in sizes.growth:
        world = World.make(architecture, tasks, 4, device, stored_in(Path(), "bfloat16", "auto"))
        learner = Learner.layer_wise(world, True, MICRO.get(architecture))
        with learner.replaying():
            row = measured(learner.step, device, max(sizes.rounds // 4, 1))
        floor = world.floor(rates, True)
        yield {
            **{"tower": architecture, "P_millions": world.vectors.numel() / 1e6, "T": tasks},
            **{"images": len(world.images), "inputs_GB": world.vectors.nbytes() / 1e9},
            **row,
            "floor_ms": 1e3 * floor.seconds,
            "wall_over_floor": row["wall_ms"] / (1e3 * floor.seconds),
        }
        del world, learner
        cleared(device)


def cleared(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PARTS = {
    part.__name__: part
    for part in (step, merging, where, peers, tiers, methods, end_to_end, growth)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tower", help="this one alone")
    parser.add_argument("--tasks", type=int, nargs="+")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.smoke)
    if arguments.tower:
        sizes.towers = [arguments.tower]
    sizes.tasks = arguments.tasks or sizes.tasks
    for part in arguments.parts:
        for row in PARTS[part](torch.device(arguments.device), sizes):
            print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
