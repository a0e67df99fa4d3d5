"""Every benchmark that wants a GPU, in order of worth, each within a limit of its own.

    python benchmarks/gpu.py OUT --minutes 25
    python benchmarks/gpu.py OUT --device cpu --smoke      # a trial of the same on a CPU

The CUDA tests come first. Each part is a process of `gpu_parts.py`; what it has printed stays when
it is stopped, and `OUT/gpu.md` and `OUT/gpu.json` are written after each. `gpu.sh` calls this on a
machine that lacks some packages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("torch", "triton", "lightning", "open_clip_torch", "transformers", "fusion-bench")


@dataclass
class Part:
    """A part of the report: its command, the seconds it may take, and what it printed."""

    title: str
    words: list[str]
    seconds: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: str = "not started"


def parts(b32: list[str], l14: list[str]) -> list[Part]:
    """In order of worth."""
    return [
        Part("Layer-wise step, ViT-B/32", ["step", *b32], 100),
        Part("Merging work alone, ViT-B/32", ["merging", *b32], 45),
        Part("Where the time goes, ViT-B/32", ["where", *b32], 45),
        Part("Beside fusion-bench, ViT-B/32, T = 8", ["peers", *b32, "--tasks", "8"], 70),
        Part("Layer-wise step, ViT-L/14", ["step", *l14], 110),
        Part("Beside fusion-bench, ViT-L/14, T = 8", ["peers", *l14, "--tasks", "8"], 150),
        Part("Where task vectors are kept", ["tiers", *b32], 80),
        Part("WEMoE and Surgery", ["methods", *b32], 80),
        Part("From a cold start to the export", ["end_to_end"], 100),
        Part("Growth", ["growth"], 120),
        Part("Merging work alone, ViT-L/14", ["merging", *l14], 80),
    ]


def run(part: Part, options: list[str], seconds: float) -> None:
    """Runs a part for at most so many seconds; its rows so far stay."""
    command = [sys.executable, str(HERE / "gpu_parts.py"), *part.words, *options]
    start = time.monotonic()
    child = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, errors = child.communicate(timeout=seconds)
        last = errors.decode(errors="replace").strip().splitlines()[-12:]
        failed = f"failed: {' '.join(last)[-1500:]}"
        part.ended = "complete" if child.returncode == 0 else failed
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
        part.ended = f"stopped after {seconds:.0f} s"
    lines = out.decode(errors="replace").splitlines()
    part.rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    part.ended += f", {time.monotonic() - start:.0f} s"


def tests(device: str, seconds: float) -> str:
    """What failed of the tests that need a CUDA device, and their last line."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    chosen = ["-k", "cuda or gpu", "tests"] if device == "cuda" else ["tests/test_hardware.py"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *chosen],
            **{"cwd": HERE.parent, "capture_output": True, "text": True, "timeout": seconds},
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    lines = done.stdout.strip().splitlines()
    return "\n".join([*(line for line in lines if line.startswith("FAILED")), *lines[-1:]])


def machine(device: str) -> dict[str, str]:
    """Card, driver, versions."""
    found = {"python": platform.python_version(), "date": str(date.today()), "device": device}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        found["card"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def markdown(known: dict[str, str], tested: str, done: list[Part], options: list[str]) -> str:
    lines = ["# On a GPU", "", ", ".join(f"{k} {v}" for k, v in known.items()) + ".", ""]
    lines += [f"    python benchmarks/gpu.py {' '.join(sys.argv[1:])}", ""]
    lines += ["Tests:", "", *(f"    {line}" for line in tested.splitlines()), ""]
    for part in done:
        command = " ".join(["python benchmarks/gpu_parts.py", *part.words, *options])
        lines += [f"## {part.title}", "", f"`{command}`: {part.ended}.", "", *tables(part.rows), ""]
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each run of rows with the same columns; a line for a row of one value."""
    lines: list[str] = []
    head: list[str] = []
    for row in rows:
        if len(row) == 1 or "note" in row:
            lines += ["", "; ".join(f"{key}: {cell(value)}" for key, value in row.items()), ""]
            head = []
            continue
        if list(row) != head:
            head = list(row)
            lines += ["", f"| {' | '.join(head)} |", "|" + "--:|" * len(head)]
        lines.append(f"| {' | '.join(cell(value) for value in row.values())} |")
    return lines


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.2f}"
    return "–" if value is None else str(value).replace("|", "/").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="the smallest of everything")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="the first N parts")
    parser.add_argument("--no-tests", action="store_true")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = ["--device", arguments.device, *(["--smoke"] if arguments.smoke else [])]
    towers = ([], []) if arguments.smoke else (["--tower", "ViT-B-32"], ["--tower", "ViT-L-14"])
    planned = parts(*towers)[arguments.skip :]
    if arguments.smoke:
        names = list(dict.fromkeys(part.words[0] for part in planned))
        planned = [Part("The smallest of everything, in one process", names, 300)]
    known = machine(arguments.device)
    tested = "not run" if arguments.no_tests else tests(arguments.device, 150)
    done: list[Part] = []
    for part in planned:
        left = end - time.monotonic()
        if left > 5:
            run(part, options, min(part.seconds, left))
        done.append(part)
        print(f"{part.title}: {part.ended}, {len(part.rows)} rows", flush=True)
        (arguments.out / "gpu.md").write_text(markdown(known, tested, done, options))
        record = {"machine": known, "tests": tested, "parts": [vars(part) for part in done]}
        (arguments.out / "gpu.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
    os.sync()
    bad = ("failed", "stopped") if arguments.smoke else ("failed",)
    if "FAILED" in tested or any(part.ended.startswith(bad) for part in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
