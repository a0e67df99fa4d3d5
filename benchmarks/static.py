"""Static merges from files to a file, beside the same of the public package `fusion-bench`.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=2 python benchmarks/static.py --out benchmarks/results/static_cpu.md

Experts of ViT-B/32, the pretrained weights and seeded noise, and uint8 images lie in files; each
scheme runs in a process of its own, one after the other, and writes its merged weights to a file.
Wall and CPU seconds are of that process after its imports, the peak is that of its resident memory,
imports included. Theirs are its own `RegMeanAlgorithmForCLIP` and `TaskSingularVectorMerging`, on
its transformers tower; TSV-M of ours is on the names of that tower as well, where q, k and v are
matrices of their own, so that the results can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_world import SHAPES, State, World, open_clip_tower
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPE, BATCH = SHAPES["ViT-B-32"], 32
PACKAGES = ("fusion-bench", "torch", "transformers", "open_clip_torch")
SCHEMES = (
    *("adamerge regmean", "adamerge regmean, task vectors on disk", "fusion-bench regmean"),
    *("adamerge featcal", "adamerge tsv_m", "adamerge tsv_m, task vectors on disk"),
    "fusion-bench tsv_m",
)


class File(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for; nothing of it stays mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Stored:
    """Batches of a task's images, `[B, 3, H, W]`, in [-1, 1]."""

    def __init__(self, path: Path) -> None:
        self._images = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self._images[row])).float() / 127.5 - 1, 0

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            yield torch.stack([self[row][0] for row in range(start, stop)])


def write_world(folder: Path, tasks: int, images: int) -> None:
    """Weights in both layouts, and images."""
    world = World.make(SHAPE, tasks, 1, torch.device("cpu"))
    for name in ("pretrained", *world.tasks):
        state = world.pretrained if name == "pretrained" else world.expert(name)
        save_file({k: t.contiguous() for k, t in state.items()}, folder / f"{name}.safetensors")
        theirs = {k: t for k, t in world.converted(state).items() if "projection" not in k}
        save_file(theirs, folder / f"{name}-theirs.safetensors")
    for number, task in enumerate(world.tasks):
        drawn = np.random.default_rng(number).integers(
            0, 256, (images, 3, SHAPE.size, SHAPE.size), np.uint8
        )
        np.save(folder / f"{task}.npy", drawn)


def ours(folder: Path, tasks: list[str], scheme: str) -> Callable[[], State]:
    from adamerge import TaskVectors, methods, transforms
    from adamerge.encoders import Experts, Tower, merged_encoder
    from adamerge.encoders.statistics import gather_inputs, in_files
    from adamerge.weights.storage import Storage

    layout = "-theirs" if "tsv_m" in scheme else ""
    disk = Storage(device="disk", file=folder / "task-vectors")
    storage = disk if "disk" in scheme else None
    images = {task: Stored(folder / f"{task}.npy") for task in tasks}

    def work() -> State:
        files = {name: folder / f"{name}{layout}.safetensors" for name in ("pretrained", *tasks)}
        experts = {task: File(files[task]) for task in tasks}
        vectors = TaskVectors(File(files["pretrained"]), experts, storage=storage)
        if "tsv_m" in scheme:
            return transforms.tsv_m(vectors).combine(torch.ones(len(tasks)))
        backbone = open_clip_tower(SHAPE)
        teacher = Experts(backbone, vectors)
        if "featcal" in scheme:
            start = merged_encoder(Tower(backbone), vectors, 0.3)
            return methods.FeatCal(start, teacher, images).weights()
        keep = in_files(folder / "statistics", {task: f"{scheme}-{task}" for task in tasks})
        merged = transforms.regmean(vectors, gather_inputs(teacher, images, keep))
        return {**merged.constants, **merged.combine(torch.ones(len(tasks)))}

    return work


def theirs(folder: Path, tasks: list[str], scheme: str) -> Callable[[], State]:
    import fusion_bench.method.regmean.clip_regmean as clip_regmean
    from fusion_bench import BaseModelPool
    from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
    from omegaconf import DictConfig
    from peers_theirs import Marks, quietly
    from peers_world import transformers_tower

    class Pool(BaseModelPool):  # type: ignore[misc]
        def load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
            file = "pretrained" if name == "_pretrained_" else name
            model = transformers_tower(SHAPE)
            model.load_state_dict(load_file(folder / f"{file}-theirs.safetensors"))
            return model

        def load_train_dataset(self, name: str, *args: Any, **kwargs: Any) -> Any:
            return Stored(folder / f"{name}.npy")

    class RegMean(clip_regmean.RegMeanAlgorithmForCLIP):  # type: ignore[misc]
        clip_processor = None

        def on_regmean_start(self) -> None:
            own: Any = self
            own.visual_projection = torch.nn.Linear(SHAPE.width, SHAPE.dim, bias=False)
            own.logit_scale_exp = torch.tensor(100.0)
            own.zeroshot_weights = dict.fromkeys(tasks, torch.eye(SHAPE.dim)[:100])

    # Its data set decodes pictures: here they are decoded already.
    clip_regmean.CLIPDataset = lambda images, processor: images
    pool = Pool(DictConfig({name: None for name in ("_pretrained_", *tasks)}))

    def work() -> State:
        algorithm: Any = TaskSingularVectorMerging()
        if "regmean" in scheme:
            algorithm = RegMean(
                num_regmean_examples=len(Stored(folder / f"{tasks[0]}.npy")),
                exclude_param_names_regex=[],
                reduce_non_diagonal_ratio=0.95,
                weight_transpose=True,
                dataloader_kwargs=DictConfig({"batch_size": BATCH, "num_workers": 0}),
            )
        algorithm._fabric_instance = algorithm._fabric = Marks(torch.device("cpu"), False)
        return dict(quietly(lambda: algorithm.run(pool)).state_dict())

    return work


def run(folder: Path, tasks: list[str], scheme: str) -> dict[str, float]:
    """One scheme in this process: wall and CPU seconds, and the peak in bytes."""
    torch.manual_seed(0)
    work = (ours if scheme.startswith("adamerge") else theirs)(folder, tasks, scheme)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        merged = {name: tensor.contiguous() for name, tensor in work().items()}
    save_file(merged, folder / f"{scheme}.safetensors")
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall": seconds[0], "cpu": seconds[1], "peak": peak}


def difference(folder: Path, method: str) -> str:
    """How far both sides' merges are from each other, on their names."""
    from adamerge.weights.formats.layouts import tower_to_transformers

    found, other = (
        load_file(folder / f"{side} {method}.safetensors") for side in ("adamerge", "fusion-bench")
    )
    base = load_file(folder / "pretrained-theirs.safetensors")
    found = tower_to_transformers(found, "") if method == "regmean" else found
    moved = {name: other[name] - base[name] for name in base if other[name].is_floating_point()}
    off = [(found[n] - other[n]).norm() / move.norm() for n, move in moved.items() if move.any()]
    return f"{method}: ‖ours − theirs‖ is at most {max(off):.1e} of ‖theirs − θ0‖ in any layer."


def report(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    tasks = [f"t{number}" for number in range(arguments.tasks)]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield (
        f"# Static merges, from files to a file\n\n{date.today()}, {versions}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads; ViT-B/32, "
        f"{arguments.tasks} random experts, {arguments.images} images of each task.\n\n"
        f"    python benchmarks/static.py {' '.join(sys.argv[1:])}\n\n"
        "What is measured: see the top of `benchmarks/static.py`.\n\n"
        "| scheme | wall | CPU | peak memory |\n|---|--:|--:|--:|"
    )
    if not (folder / f"{tasks[-1]}.npy").exists():
        write_world(folder, arguments.tasks, arguments.images)
    for scheme in arguments.schemes:
        words = [sys.executable, __file__, "--one", scheme, str(folder), *tasks]
        answer = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if answer.returncode:
            yield f"| {scheme} | failed | | |"
            continue
        found = json.loads(answer.stdout.splitlines()[-1])
        yield (
            f"| {scheme} | {found['wall']:.1f} s | {found['cpu']:.1f} s | "
            f"{found['peak'] / 1e9:.2f} GB |"
        )
    lines = []
    for method in ("regmean", "tsv_m"):
        with contextlib.suppress(FileNotFoundError):
            lines.append(difference(folder, method))
    yield "\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=256, help="of each task")
    parser.add_argument("--folder", type=Path, help="keep the files here, and use what is there")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        scheme, folder, *tasks = arguments.one
        print(json.dumps(run(Path(folder), tasks, scheme)))
        return
    lines = []
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for line in report(arguments, folder):
            lines.append(line)
            print(line, flush=True)
            if arguments.out:
                arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
