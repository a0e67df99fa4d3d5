"""Accuracies on the demo suite: methods and objectives over several seeds, beside the baselines.

    python benchmarks/demo.py --seeds 0 1 2 --out benchmarks/results/demo.md

Every cell comes from a run of `adamerge train` as a user would start it, with the suite's own
defaults; the seed is that of the order of the unlabeled images. `least` is the lowest accuracy of
any task in any seed, to show a collapse. `--only "wemoe, entropy" …` runs some of the variants; a
method on another one's merge needs that one in the same call.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from adamerge.cli import main as adamerge

VARIANTS = (
    ("task_wise", "entropy"),
    ("layer_wise", "entropy"),
    ("layer_wise", "infomax"),
    ("layer_wise_pp", "entropy"),
    ("layer_wise_pp", "infomax"),
    ("layer_wise", "expert_kl"),
    ("wemoe", "entropy"),
    ("wemoe", "infomax"),
    ("wemoe", "expert_kl"),
    ("e_wemoe", "entropy"),
    ("surgery", "surgery"),
    ("surgery_v2", "surgery_v2"),
    # On top of the merge that `layer_wise`, `entropy` has learned with the same seed.
    ("surgery on layer_wise", "surgery"),
)


def run(method: str, objective: str, seed: int, baselines: bool, folder: Path) -> dict[str, Any]:
    """`results.json` of one run, and its seconds."""
    target = folder / f"{method}-{objective}-{seed}".replace(" ", "-")
    method, _, below = method.partition(" on ")
    words = [f"method={method}", f"objective={objective}", f"seed={seed}", f"run_dir={target}"]
    words += [f"method.base={folder / f'{below}-entropy-{seed}'}"] if below else []
    words += [f"evaluate.baselines={str(baselines).lower()}", "wandb=off"]
    start = time.perf_counter()
    if adamerge(["train", "suite=demo", *words]) != 0:
        sys.exit(f"the run {target.name} failed")
    results: dict[str, Any] = json.loads((target / "results.json").read_text())
    return {**results, "seconds": time.perf_counter() - start}


def line(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """One line of the table from the rows of all seeds."""
    tasks = list(rows[0]["accuracy"])
    averages = [100 * row["average"] for row in rows]
    spread = f" ± {statistics.stdev(averages):.1f}" if len(rows) > 1 else ""
    cells = [f"{100 * statistics.mean(r['accuracy'][t] for r in rows):.1f}" for t in tasks]
    least = 100 * min(min(row["accuracy"].values()) for row in rows)
    return (
        f"| {name} | {' | '.join(cells)} | {statistics.mean(averages):.1f}{spread} | {least:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None)
    names = [f"{method}, {objective}" for method, objective in VARIANTS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="VARIANT")
    arguments = parser.parse_args()
    lines: list[str] = []
    tasks: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for method, objective in (v for v in VARIANTS if ", ".join(v) in arguments.only):
            found = [
                run(method, objective, seed, not lines, Path(folder)) for seed in arguments.seeds
            ]
            if not lines:
                tasks = list(found[0]["rows"][0]["accuracy"])
                for row in found[0]["rows"]:
                    if row["name"] == method:
                        break
                    at = f" (λ = {row['coefficient']})" if "coefficient" in row else ""
                    lines.append(line(row["name"].replace("_", " ") + at, [row]))
            own = method.partition(" on ")[0]  # as trained, then its folds that give something up
            names = [r["name"] for r in found[0]["rows"] if r["name"].partition(",")[0] == own]
            for name in names:
                rows = [row for result in found for row in result["rows"] if row["name"] == name]
                lines.append(line(f"{method}, {objective}{name.removeprefix(own)}", rows))
    text = (
        f"# The demo suite\n\n{date.today()}, accuracy in %, protocol paper, mean over seeds "
        f"{', '.join(map(str, arguments.seeds))} (± standard deviation).\n\n"
        f"    python benchmarks/demo.py {shlex.join(sys.argv[1:])}\n\n"
        f"| | {' | '.join(tasks)} | average | least |\n|---|{'--:|' * (len(tasks) + 2)}\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
