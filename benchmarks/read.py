"""Memory and time of building task vectors from files of every format.

    python benchmarks/read.py --out benchmarks/results/read_cpu.md

T experts of a ViT-B/32 (random weights) are written in each format, then read in a process of its
own: `read.read`, `tower_state`, `TaskVectors`. Peak memory is of anonymous pages (`RssAnon`,
sampled every millisecond), beyond what the process held with the pretrained CLIP's text tower but
without its image tower; pages mapped from the files are the page cache's. P is the size of one
image tower as it is stored in the task vectors (float32). Seconds are wall time, files in the page
cache, checksums of zip files included, sha256 (which a run computes too) apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.encoders.clip import build_clip
from adamerge.weights.formats.layouts import tower_to_transformers
from adamerge.weights.formats.read import read, tower_state
from adamerge.weights.task_vectors import TaskVectors

ARCHITECTURE = "ViT-B-32-quickgelu"
State = dict[str, Tensor]


class ImageEncoder(nn.Module):
    """As the papers' scripts pickle theirs."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.visual = visual


def as_safetensors(state: State, path: Path) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_half(state: State, path: Path) -> Path:
    return as_safetensors({name: tensor.half() for name, tensor in state.items()}, path)


def as_transformers(state: State, path: Path) -> Path:
    theirs = tower_to_transformers(state)
    return as_safetensors({name: theirs[name].contiguous() for name in theirs}, path)


def as_pickle(state: State, path: Path, zipped: bool = True) -> Path:
    visual = build_clip(ARCHITECTURE).backbone
    visual.load_state_dict(state)
    path = path.with_suffix(".pt")
    torch.save(ImageEncoder(visual), path, _use_new_zipfile_serialization=zipped)
    return path


def as_legacy(state: State, path: Path) -> Path:
    return as_pickle(state, path, zipped=False)


FORMATS: dict[str, Callable[[State, Path], Path]] = {
    "state dict, .safetensors": as_safetensors,
    "state dict, .safetensors, float16": as_half,
    "transformers, .safetensors": as_transformers,
    "pickled module, zip": as_pickle,
    "pickled module, legacy": as_legacy,
}


def anonymous() -> int:
    """Anonymous resident memory of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: run this on Linux")


def child(files: list[str]) -> dict[str, float]:
    """Builds task vectors from files; peak memory and seconds."""
    clip = build_clip(ARCHITECTURE)
    size = 4 * sum(tensor.numel() for tensor in clip.backbone.state_dict().values())
    before, peak, done = anonymous() - size, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    experts = {file: tower_state(read(file), clip.backbone) for file in files}
    vectors = TaskVectors(clip.backbone.state_dict(), experts, share=True)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    peak = max(peak, anonymous())
    return {"peak": (peak - before) / size, "seconds": seconds, "layers": len(vectors.names)}


def measure(folder: Path, count: int) -> list[str]:
    """A table line per format."""
    torch.manual_seed(0)
    plain = build_clip(ARCHITECTURE).backbone.state_dict()
    lines = []
    for name, write in FORMATS.items():
        files = []
        for index in range(count):
            state = {n: (t + 1e-3 * torch.randn_like(t)).contiguous() for n, t in plain.items()}
            files.append(str(write(state, folder / f"expert{index}")))
        command = [sys.executable, __file__, "--child", *files]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(answer.stdout.splitlines()[-1])
        peak = f"{found['peak']:.2f} P"
        lines.append(f"| {name} | {peak} | {count + 2} P | {found['seconds']:.1f} s |")
        for file in files:
            Path(file).unlink()
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--experts", type=int, default=4)
    options.add_argument("--out", type=Path)
    options.add_argument("--child", nargs="+")
    given = options.parse_args()
    if given.child:
        print(json.dumps(child(given.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), given.experts)
    head = (
        f"# Task vectors from files\n\n{date.today()}, torch {version('torch')}, "
        f"{torch.get_num_threads()} thread(s), {given.experts} experts of {ARCHITECTURE}; "
        f"`python benchmarks/read.py --experts {given.experts}`\n\n"
        "| format | peak memory | allowed (T + 2) | wall time |\n|---|--:|--:|--:|\n"
    )
    text = head + "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
