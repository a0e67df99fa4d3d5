"""Writing every kind of folded encoder, and reading it back to compare features."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing
from adamerge.encoders.clip import Clip
from adamerge.encoders.experts import PerTaskEncoder
from adamerge.encoders.tower import FoldedEncoder
from adamerge.export.read import (
    ADAPTERS,
    CONFIG,
    OWN_CONFIG,
    OWN_WEIGHTS,
    WEIGHTS,
    Layout,
    read_encoder,
    task_folder,
)
from adamerge.methods.adapters import AdaptedEncoder
from adamerge.methods.mixtures import DynamicEncoder

TOLERANCE = 1e-5
Encode = Callable[[Tensor, Tensor], Tensor]


def write_encoder(folder: Path, encoder: nn.Module, clip: Clip, tasks: tuple[str, ...]) -> Layout:
    """Writes an encoder's files into a folder; returns what was written.

    A dynamic encoder is written without the text tower, which classification does not need; all
    others as folders that open_clip loads, with the pretrained text tower.

    Raises:
        AdamergeError: an encoder of none of these kinds.
    """
    if isinstance(encoder, FoldedEncoder):
        state = clip.model.state_dict()
        state |= {
            f"visual.{name}": tensor for name, tensor in encoder.backbone.state_dict().items()
        }
        write_open_clip(folder, state, clip)
        return Layout("static", tasks)
    if isinstance(encoder, PerTaskEncoder) and all(
        isinstance(static, FoldedEncoder) for static in encoder.encoders
    ):
        for task, static in zip(encoder.tasks, encoder.encoders, strict=True):
            (folder / task_folder(task)).mkdir()
            write_encoder(folder / task_folder(task), static, clip, tasks)
        return Layout("per_task", tasks)
    if isinstance(encoder, DynamicEncoder):
        write_safetensors(folder / OWN_WEIGHTS, encoder.state())
        _write_config(folder / OWN_CONFIG, clip)
        return Layout("dynamic", tasks)
    if isinstance(encoder, AdaptedEncoder) and not isinstance(encoder.encoder, AdaptedEncoder):
        base = write_encoder(folder, encoder.encoder, clip, tasks)
        adapters = {
            f"{task_folder(task)}/{place}/{name}": tensor
            for task, by_place in zip(encoder.tasks, encoder.by_task, strict=True)
            for place, adapter in enumerate(cast(Any, by_place))
            for name, tensor in (("down", adapter.down), ("up", adapter.up))
        }
        notes = {"activation": encoder.activation, "tasks": encoder.tasks}
        write_safetensors(folder / ADAPTERS, adapters, ("adapters", json.dumps(notes)))
        return Layout("adapters", tasks, base.kind)
    raise AdamergeError(
        f"a {type(encoder).__name__} cannot be exported: expected a fold that is a FoldedEncoder, "
        "PerTaskEncoder, DynamicEncoder, or AdaptedEncoder on one of these"
    )


def write_open_clip(folder: Path, state: Mapping[str, Tensor], clip: Clip) -> None:
    """Writes a whole CLIP's weights and configuration as open_clip reads them (`local-dir:`)."""
    write_safetensors(folder / WEIGHTS, state)
    _write_config(folder / CONFIG, clip)
    for extra in clip.extras:
        shutil.copyfile(extra, folder / extra.name)


def _write_config(path: Path, clip: Clip) -> None:
    path.write_text(json.dumps(clip.config, indent=2))


def write_safetensors(
    target: Path, state: Mapping[str, Tensor], note: tuple[str, str] = ("format", "pt")
) -> None:
    """Writes tensors in the form every library reads, whole or not at all.

    Args:
        note: the one entry of the file's metadata; several are written in any order, and the same
            weights must make the same file.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(target) as path:
        save_file(plain, path, metadata=dict([note]))


@torch.no_grad()
def verify(
    folder: Path, layout: Layout, wanted: Encode, clip: Clip, images: Tensor, task_ids: Tensor
) -> float:
    """The largest relative difference between the written encoder's features and the wanted ones.

    Largest over images of ‖a − b‖ / ‖b‖, on the CPU in float32, of the folder read as
    `adamerge.load` reads it and, where open_clip can, as open_clip does. A `per_task` folder is
    read one task at a time.

    Args:
        wanted: what was to be written, with its task ids.
        images: normalised `[n, 3, H, W]`, some of every task.
        task_ids: `[n]`.

    Raises:
        AdamergeError: it is above 1e-5, or the preprocessing differs.
    """
    images, difference = images.float(), 0.0
    for place, inner, rows in _parts(folder, layout, task_ids):
        part, ids = images[rows], task_ids[rows]
        target = wanted(part, ids)
        encoder, config = read_encoder(place, inner)
        difference = max(difference, _relative(encoder(part, ids), target))
        _check_preprocessing(config["preprocess_cfg"], clip)
        if (place / CONFIG).is_file():
            model: Any = open_clip.create_model_and_transforms(f"local-dir:{place}")[0]
            target = encoder.encoder(part, ids) if isinstance(encoder, AdaptedEncoder) else target
            features = model.eval().encode_image(part, normalize=False)
            difference = max(difference, _relative(features, target))
            _check_preprocessing(model.visual.preprocess_cfg, clip)
    if not difference <= TOLERANCE:
        raise AdamergeError(
            f"export: features of the written model differ from the trained one by "
            f"{difference:.2e} of their norm, more than {TOLERANCE:.0e}: nothing was exported"
        )
    return difference


def _parts(
    folder: Path, layout: Layout, task_ids: Tensor
) -> list[tuple[Path, Layout, Tensor | slice]]:
    """What is read together: the folder, what it holds, and the rows that go through it."""
    if layout.kind != "per_task":
        return [(folder, layout, slice(None))]
    return [
        (folder / task_folder(task), Layout(), task_ids == index)
        for index, task in enumerate(layout.tasks)
    ]


def _relative(features: Tensor, wanted: Tensor) -> float:
    """Infinity, not nan, where a feature is not finite."""
    norms = wanted.norm(dim=1).clamp_min(torch.finfo(wanted.dtype).tiny)
    ratios = ((features - wanted).norm(dim=1) / norms).nan_to_num(float("inf"))
    return float(ratios.max()) if len(ratios) else 0.0


def _check_preprocessing(written: Mapping[str, Any], clip: Clip) -> None:
    both = (open_clip.transform.PreprocessCfg(**written), clip.preprocess_cfg)
    theirs, ours = (json.loads(json.dumps(dataclasses.asdict(cfg))) for cfg in both)  # no tuples
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise AdamergeError(
                f"export: preprocessing of the written model has {key} = {theirs.get(key)}, "
                f"expected {value}: nothing was exported"
            )
