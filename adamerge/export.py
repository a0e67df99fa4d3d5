"""Export: a folded encoder as a folder that open_clip loads, verified before it appears."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.encoders import Clip, FoldedEncoder
from adamerge.errors import AdamergeError
from adamerge.files import replace_folder, replacing
from adamerge.heads import Heads
from adamerge.methods.base import MergeMethod

TOLERANCE = 1e-5
_PACKAGES = ("adamerge", "torch", "lightning", "open_clip_torch", "datasets", "torchmetrics")


@dataclasses.dataclass
class Exported:
    """What was written: the folder, and the largest relative difference of features found."""

    folder: Path
    difference: float


def export(
    folder: Path,
    method: MergeMethod,
    clip: Clip,
    heads: Heads,
    images: Tensor,
    provenance: Mapping[str, Any],
    table: str = "",
) -> Exported:
    """Writes the merged model, reads it back through open_clip, and compares features.

    The folder appears only when all of it is written and verified; one that stood there before
    stays as it was until then.

    Args:
        folder: the target, replaced if it exists.
        method: trained, on the CPU, in float32.
        clip: gives the text tower and the model's configuration.
        heads: stored beside the model.
        images: normalised `[n, 3, H, W]` to compare features on.
        provenance: the content of `merge.json`.
        table: results in Markdown, for the model card.

    Raises:
        AdamergeError: the reloaded model's features differ by more than 1e-5 of their norm, or
            its preprocessing differs.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_model(temporary, method.fold(), clip)
        difference = verify(temporary, method, clip, images)
        with replacing(temporary / "heads.safetensors") as path:
            weights = {task: heads.weight(task).cpu().contiguous() for task in heads.tasks}
            save_file(weights, path, metadata={"classes": json.dumps(heads.classes)})
        write_coefficients(temporary / "coefficients.csv", method, heads.tasks)
        record = {**provenance, "largest_relative_difference": difference}
        (temporary / "merge.json").write_text(json.dumps(record, indent=2))
        (temporary / "README.md").write_text(_card(record, heads, table))
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, difference)


def _write_model(folder: Path, encoder: nn.Module, clip: Clip) -> None:
    if not isinstance(encoder, FoldedEncoder):
        raise AdamergeError(
            f"a {type(encoder).__name__} is not one static tower: open_clip can hold only an "
            "encoder that folds into plain weights"
        )
    state = {
        name: tensor
        for name, tensor in clip.model.state_dict().items()
        if not name.startswith("visual.")
    }
    state |= {f"visual.{name}": tensor for name, tensor in encoder.backbone.state_dict().items()}
    write_open_clip(folder, state, clip)


def write_open_clip(folder: Path, state: Mapping[str, Tensor], clip: Clip) -> None:
    """Writes a whole CLIP's weights and configuration as open_clip reads them (`local-dir:`)."""
    write_safetensors(folder / "open_clip_model.safetensors", state)
    (folder / "open_clip_config.json").write_text(json.dumps(clip.config, indent=2))
    for extra in clip.extras:
        shutil.copyfile(extra, folder / extra.name)


def write_safetensors(target: Path, state: Mapping[str, Tensor]) -> None:
    """Writes tensors in the form every library reads, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(target) as path:
        save_file(plain, path, metadata={"format": "pt"})


@torch.no_grad()
def verify(folder: Path, method: MergeMethod, clip: Clip, images: Tensor) -> float:
    """The largest relative difference between the written model's features and the method's.

    Largest over images of ‖a − b‖ / ‖b‖; both run on the CPU in float32.

    Raises:
        AdamergeError: it is above 1e-5, or the preprocessing differs.
    """
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    written = model.encode_image(images.float())
    wanted = method(images.float(), torch.zeros(len(images), dtype=torch.long))
    norms = wanted.norm(dim=1).clamp_min(torch.finfo(wanted.dtype).tiny)
    difference = float(((written - wanted).norm(dim=1) / norms).max())
    if not difference <= TOLERANCE:
        raise AdamergeError(
            f"export: features of the written model differ from the trained one by "
            f"{difference:.2e} of their norm, more than {TOLERANCE:.0e}: nothing was exported"
        )
    ours = dataclasses.asdict(clip.preprocess_cfg)
    theirs = cast(dict[str, Any], model.visual.preprocess_cfg)
    for key, value in ours.items():
        if _listed(theirs.get(key)) != _listed(value):
            raise AdamergeError(
                f"export: preprocessing of the written model has {key} = {theirs.get(key)}, "
                f"expected {value}: nothing was exported"
            )
    return difference


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["git_commit"] = answer.stdout.strip()
    return found


def _card(record: Mapping[str, Any], heads: Heads, table: str) -> str:
    method = record.get("method", "")
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [model-merging, adamerge]
---

# {record.get("suite", "merged")}: {len(heads.tasks)} experts merged into one model by {method}

One CLIP whose image tower merges the experts of {", ".join(heads.tasks)}. The merging coefficients
were learned without labels by adamerge; the text tower is the pretrained one.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")  # this folder
tokenizer = open_clip.get_tokenizer("local-dir:.")
```

`heads.safetensors` holds a classifier per task, `[classes, features]`, rows times the logit scale:
`logits = normalize(features) @ head.T`; the class names are in its metadata. `coefficients.csv`
holds the merging coefficients, `merge.json` the settings, inputs and versions.

{table}
Features read back from this folder differ from the trained model's by at most
{record["largest_relative_difference"]:.1e} of their norm.
"""
