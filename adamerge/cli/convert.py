"""`adamerge convert`: any readable checkpoint as an open_clip or a transformers folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing_folder
from adamerge.config import inputs
from adamerge.encoders.clip import Clip, build_clip
from adamerge.encoders.model_configs import to_transformers
from adamerge.encoders.pretrained import load_pretrained
from adamerge.export.kinds import write_open_clip, write_safetensors
from adamerge.weights.formats.layouts import clip_to_transformers
from adamerge.weights.formats.read import read, tower_state


def convert(
    source: str,
    folder: Path,
    layout: str = "open_clip",
    pretrained: str | None = None,
    architecture: str | None = None,
) -> None:
    """Writes a checkpoint as a folder that open_clip or transformers loads; weights stay exact.

    The folder appears when it is complete and has been read back with equal weights.

    Args:
        source: anything `read.read` opens.
        folder: must not exist yet, or be empty.
        layout: `open_clip` (`create_model_and_transforms("local-dir:…")`) or `transformers`
            (`CLIPModel.from_pretrained`, also `CLIPVisionModel…`).
        pretrained: the whole CLIP that lends what the source lacks: its text tower, and the image
            tower that a LoRA adapter belongs to. None: the source is a whole CLIP.
        architecture: as in a suite; None where the (pretrained) folder tells.

    Raises:
        AdamergeError: a source that cannot be read or lacks parts, a folder that holds files, or
            an architecture the layout cannot express.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdamergeError(f"{folder} already holds files: name a new folder")
    clip = _whole(source, pretrained, architecture)
    with replacing_folder(folder) as temporary:
        _write(temporary, clip, layout)
        _check(temporary, clip)


def _whole(source: str, pretrained: str | None, architecture: str | None) -> Clip:
    settings = {"architecture": architecture, "pretrained": pretrained or source}
    clip, _ = inputs.load_clip(settings)
    if pretrained is not None:
        tower = tower_state(read(source), clip.backbone)
        own = clip.backbone.state_dict()
        wrong = [name for name in own if tower[name].shape != own[name].shape]
        if wrong:
            raise AdamergeError(
                f"{source} does not fit {pretrained} at tensor {wrong[0]!r} ({len(wrong)} such): "
                "name the pretrained model it was fine-tuned from"
            )
        clip.backbone.load_state_dict({name: tower[name] for name in own})
    for name, tensor in clip.model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdamergeError(
                f"{source}: tensor {name!r} has NaN or infinite values: the checkpoint is damaged; "
                "use another one"
            )
    return clip


def _write(folder: Path, clip: Clip, layout: str) -> None:
    state = clip.model.state_dict()
    if layout == "open_clip":
        write_open_clip(folder, state, clip)
        return
    config, processor = to_transformers(clip.config)
    write_safetensors(folder / "model.safetensors", clip_to_transformers(state))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def _check(folder: Path, clip: Clip) -> None:
    again = build_clip(str(folder))
    load_pretrained(again, read(folder))
    found = again.model.state_dict()
    for name, tensor in clip.model.state_dict().items():
        if not torch.equal(found[name], tensor):
            raise AdamergeError(
                f"{folder}: tensor {name!r} differs after reading it back: nothing was converted; "
                "the disk may be damaged"
            )
