"""Export: a folded encoder as a folder, verified before it appears."""

from __future__ import annotations

import csv
import dataclasses
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
from adamerge.export.read import BIAS, HEADS, RECORD, Layout
from adamerge.methods.base import MergeMethod

_PACKAGES = ("adamerge", "torch", "lightning", "open_clip_torch", "datasets", "torchmetrics")


@dataclasses.dataclass
class Exported:
    """What was written.

    Attributes:
        difference: the largest relative difference of features found on reading it again.
        kind: see `read.Layout`.
        bytes: of all files of weights.
    """

    folder: Path
    difference: float
    kind: str
    bytes: int


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
) -> Exported:
    """Writes the merged model, reads it back, and compares features.

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
            holds anything but an export.
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
        record = _record(temporary, layout, provenance, difference)
        (temporary / RECORD).write_text(json.dumps(record, indent=2))
        (temporary / "README.md").write_text(card(record, heads, table))
    return Exported(folder, difference, layout.kind, sum(record["bytes"].values()))


def _record(
    folder: Path, layout: Layout, provenance: Mapping[str, Any], difference: float
) -> dict[str, Any]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        "kind": layout.kind,
        **({"base": layout.base} if layout.base else {}),
        "tasks": list(layout.tasks),
        "bytes": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
        "sha256": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
        **provenance,
        "largest_relative_difference": difference,
    }


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
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    found: dict[str, Any] = {
        "versions": versions,
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["git_commit"] = answer.stdout.strip()
    return found
