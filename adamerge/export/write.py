"""Export: a folded encoder as a folder, verified before it appears."""

from __future__ import annotations

import csv
import functools
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing, replacing_folder, sha256
from adamerge.encoders.clip import Clip
from adamerge.encoders.heads import Heads
from adamerge.export.card import card
from adamerge.export.kinds import Encode, verify, write_encoder, write_safetensors
from adamerge.export.read import BIAS, HEADS, RECORD
from adamerge.methods.base import MergeMethod

_PACKAGES = ("adamerge", "torch", "lightning", "open_clip_torch", "datasets", "torchmetrics")


def export(
    folder: Path,
    encoder: nn.Module,
    wanted: Encode,
    clip: Clip,
    heads: Heads,
    samples: tuple[Tensor, Tensor],
    provenance: Mapping[str, Any],
    table: str = "",
    method: MergeMethod | None = None,
) -> dict[str, Any]:
    """Writes the merged model, reads it back, and compares features; returns its `merge.json`.

    The folder appears only when all of it is written and verified; one that stood there before
    stays as it was until then.

    Args:
        folder: the target, replaced if it exists.
        encoder: a fold, on the CPU, in float32.
        wanted: what the written encoder's features are compared with: the trained method, or the
            fold itself where that is not exact.
        clip: gives the text tower and the model's configuration.
        heads: stored beside the model.
        samples: normalised images `[n, 3, H, W]` of every task, and their task ids `[n]`.
        provenance: the content of `merge.json`.
        table: results in Markdown, for the model card.
        method: gives `coefficients.csv`, if it has merging coefficients.

    Raises:
        AdamergeError: the reloaded model's features differ by more than 1e-5 of their norm, or
            its preprocessing differs; an encoder of no kind that can be exported; a folder that
            holds anything but an export, or is a file.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise AdamergeError(
            f"{folder} holds files that are no export: name a new or empty folder, or an earlier "
            "export, which is replaced"
        )
    with replacing_folder(folder) as temporary:
        layout = write_encoder(temporary, encoder, clip, heads.tasks)
        weights = {task: heads.weight(task) for task in heads.tasks}
        biases = {f"{BIAS}{task}": heads.bias(task) for task in heads.tasks}
        weights |= {name: bias for name, bias in biases.items() if bias is not None}
        write_safetensors(temporary / HEADS, weights, ("classes", json.dumps(heads.classes)))
        difference = verify(temporary, layout, wanted, clip, *samples)
        if method is not None:
            write_coefficients(temporary / "coefficients.csv", method, heads.tasks)
        files = {
            file.relative_to(temporary).as_posix(): file
            for file in sorted(temporary.rglob("*.safetensors"))
        }
        record = {
            "kind": layout.kind,
            **({"base": layout.base} if layout.base else {}),
            "tasks": list(layout.tasks),
            "bytes": {name: file.stat().st_size for name, file in files.items()},
            "sha256": {name: sha256(file) for name, file in files.items()},
            **provenance,
            "largest_relative_difference": difference,
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=2))
        (temporary / "README.md").write_text(card(record, heads, table))
    return record


def write_coefficients(path: Path, method: MergeMethod, tasks: tuple[str, ...]) -> None:
    """`task, layer, coefficient` lines, for methods that have merging coefficients."""
    table = method.coefficient_table()
    if table is None:
        return
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "layer", "coefficient"])
        for task, values in zip(tasks, table[1].tolist(), strict=True):
            writer.writerows([task, layer, v] for layer, v in zip(table[0], values, strict=True))


def environment() -> dict[str, Any]:
    """Package versions, Python, time, and the git commit where the package is a checkout."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {package: _version(package) for package in _PACKAGES}
    known = {"versions": versions, "python": platform.python_version(), "time": time}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        known |= {"git_commit": answer.stdout.strip()} if answer.returncode == 0 else {}
    return known


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
