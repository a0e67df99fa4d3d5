"""What smaller types and other places of task vectors, and of merged weights, change of a run.

    OMP_NUM_THREADS=1 python benchmarks/storage.py --out benchmarks/results/storage_cpu.md

Runs of layer-wise AdaMerging on the demo suite that differ in one setting, against one in float32:
accuracy, the learned merging coefficients λ, bytes of task vectors. A run with another seed, which
sees other batches, tells what difference is noise. `full-precision W` is a method that merges in
float32 under autocast, so that every product casts the weights anew: what merging straight into
bfloat16 (the default under `trainer.precision=bf16-mixed`) is compared with.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adamerge.methods import AdaMerging

ROOT = Path(__file__).parent.parent


class FullPrecision(AdaMerging):
    """AdaMerging whose merged weights stay float32 under autocast."""

    def weights(self) -> dict[str, Tensor]:
        with torch.autocast(self.coefficients.device.type, enabled=False):
            return super().weights()


LOW = "trainer.precision=bf16-mixed"
RUNS = {
    "float32": [],
    "another seed": ["seed=1"],
    "τ bfloat16": ["task_vectors.dtype=bfloat16"],
    "τ int8": ["task_vectors.dtype=int8"],
    "τ on host": ["task_vectors.device=host"],
    "τ on disk": ["task_vectors.device=disk"],
    "τ int8 on disk": ["task_vectors.device=disk", "task_vectors.dtype=int8"],
    "bf16-mixed": [LOW],
    "bf16-mixed, full-precision W": [LOW, "method._target_=storage.FullPrecision"],
    "bf16-mixed, another seed": [LOW, "seed=1"],
}


def run(words: list[str], folder: Path, steps: int) -> tuple[float, np.ndarray]:
    """Average accuracy in %, and λ, of one run."""
    command = [sys.executable, str(ROOT / "train.py"), f"trainer.max_steps={steps}", "wandb=off"]
    command += ["evaluate.baselines=false", "preflight=off", f"cache_dir={folder / 'cache'}"]
    out = folder / str(len(list(folder.iterdir())))
    environment = {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    subprocess.run(
        [*command, *words, f"run_dir={out}"],
        check=True,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    accuracy = json.loads((out / "results.json").read_text())["rows"][-1]["average"]
    with (out / "coefficients.csv").open(newline="") as file:
        learned = np.array([float(row["coefficient"]) for row in csv.DictReader(file)])
    return 100 * accuracy, learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    arguments = parser.parse_args()
    lines = [
        f"# Storage of task vectors and type of merged weights\n\n{date.today()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} "
        f"thread(s), {arguments.steps} steps, demo suite.\n",
        f"    python benchmarks/storage.py {' '.join(sys.argv[1:])}\n",
        "What is measured: see the top of `benchmarks/storage.py`. Differences of λ are to the run "
        "in float32; λ began at 0.3.\n",
        "| run | average accuracy | points off | largest difference in λ | correlation of λ |",
        "|---|--:|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for title, words in RUNS.items():
            found[title] = run(words, Path(name), arguments.steps)
            accuracy, learned = found[title]
            base, exact = found["float32"]
            alike = float(np.corrcoef(learned, exact)[0, 1])
            lines.append(
                f"| {title} | {accuracy:.2f} | {accuracy - base:+.2f} | "
                f"{np.abs(learned - exact).max():.1e} | {alike:.5f} |"
            )
            print(lines[-1], flush=True)
    merged = found["bf16-mixed"][1]
    lines.append("\nUnder bf16-mixed, λ of weights merged into bfloat16:\n")
    for title in ("bf16-mixed, full-precision W", "bf16-mixed, another seed"):
        other = found[title][1]
        lines.append(
            f"- against {title.removeprefix('bf16-mixed, ')}: largest difference "
            f"{np.abs(merged - other).max():.1e}, mean {np.abs(merged - other).mean():.1e}, "
            f"correlation {float(np.corrcoef(merged, other)[0, 1]):.5f}"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
