"""Memory of every process that holds its part of the task vectors (`task_vectors.shard`).

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536 \
        python benchmarks/shards.py --out benchmarks/results/shards_cpu.md

N processes (gloo) share out the task vectors of T random experts of ViT-B/32, which lie whole in
one memory-mapped file, and take a step each, one image per task, as under DDP. Memory is what
belongs to a process alone (`RssAnon`); the file's pages are the system's, and can be dropped. One
process alone holds all task vectors in memory, as without the setting.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from meters import resident
from scale import Bench, tower
from step import RandomExpert

from adamerge import TaskVectors
from adamerge.weights.shards import ShardedTaskVectors
from adamerge.weights.storage import Storage


def work(rank: int, ranks: int, file: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}.meet-{ranks}", rank=rank, world_size=ranks)
    backbone = tower("ViT-B-32")
    whole = TaskVectors.mapped(backbone.state_dict(), Storage("float32", "disk", file))
    before = resident("RssAnon")
    if ranks == 1:
        vectors = whole.with_deltas(whole.deltas, Storage())
        vectors.layers = {name: layer.map(torch.clone) for name, layer in vectors.layers.items()}
    else:
        vectors = ShardedTaskVectors(whole, rank, ranks)
    held = resident("RssAnon") - before
    bench = Bench(backbone, vectors, torch.device("cpu"))
    bench.step()
    found = {"tau": vectors.nbytes(), "held": held, "after": resident("RssAnon") - before}
    (out / f"{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    arguments = parser.parse_args()
    rows: list[tuple[int, list[dict[str, Any]]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, state = folder / "tau.safetensors", tower("ViT-B-32").state_dict()
        experts = {f"t{i}": RandomExpert(state, i) for i in range(arguments.tasks)}
        TaskVectors(state, experts, share=True, storage=Storage("float32", "disk", file))
        for ranks in arguments.ranks:
            mp.spawn(work, (ranks, file, folder), nprocs=ranks)
            found = [json.loads((folder / f"{ranks}-{r}.json").read_text()) for r in range(ranks)]
            rows.append((ranks, found))
    lines = [
        f"# Task vectors shared out\n\n{date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, ViT-B/32, T = {arguments.tasks}, float32.\n\n"
        f"    python benchmarks/shards.py {' '.join(sys.argv[1:])}\n\n"
        "What is measured: see the top of `benchmarks/shards.py`.\n",
        "| processes | τ held by each | memory it takes | of one process's | memory after a step |",
        "|--:|--:|--:|--:|--:|",
    ]
    alone = rows[0][1][0]["held"]
    for ranks, found in rows:
        cells = [
            ", ".join(f"{x[key] / 1e9:.3f}" for x in found) for key in ("tau", "held", "after")
        ]
        share = max(x["held"] for x in found) / alone
        lines.append(f"| {ranks} | {cells[0]} GB | {cells[1]} GB | {share:.3f} | {cells[2]} GB |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
