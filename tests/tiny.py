"""A tiny suite on disk, made of real files: an open_clip folder, experts, data sets."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from adamerge.encoders.clip import build_clip
from adamerge.methods import AdaMerging

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
    },
}  # fmt: skip
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
CLASSES = {"stripes": ["one", "two", "three"], "dots": ["red", "green", "blue", "grey"]}


def images(task: str, count: int = 40) -> datasets.Dataset:
    """Noise images with a label-dependent tint, 20 x 24 pixels."""
    generator = np.random.default_rng(sum(map(ord, task)))
    labels = generator.integers(0, len(CLASSES[task]), count)
    pixels = generator.integers(0, 200, (count, 20, 24, 3)) + 15 * labels[:, None, None, None]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES[task])
    )
    pictures = [Image.fromarray(array.astype(np.uint8)) for array in pixels]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def make_suite(folder: Path) -> Path:
    """Writes everything and returns the path of the suite's YAML file."""
    shutil.copytree(_suite(), folder, dirs_exist_ok=True)
    return folder / "tiny.yaml"


@functools.cache
def _suite() -> Path:
    """The folder of one that is only copied."""
    folder = Path(tempfile.mkdtemp(prefix="adamerge-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = folder / "model"
    model.mkdir()
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = build_clip(str(model))
    state = {name: tensor.contiguous() for name, tensor in clip.model.state_dict().items()}
    save_file(state, model / "open_clip_model.safetensors")
    tasks = {}
    for task in CLASSES:
        images(task).save_to_disk(str(folder / f"{task}-images"))
        save_file(expert(clip.backbone.state_dict(), task), folder / f"{task}.safetensors")
        tasks[task] = {
            "expert": f"{task}.safetensors",
            "data": {"path": f"{task}-images"},
            "classes": CLASSES[task],
            "templates": ["a photo of {}.", "{}"],
        }
    suite = {"architecture": "model", "pretrained": "model", "tasks": tasks}
    suite["defaults"] = {"keep": "last"}  # its merges are of noise: none beats its start
    (folder / "tiny.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return folder


class Recording(AdaMerging):
    """AdaMerging that writes λ of every step to `rank-<rank>.txt` in the working folder."""

    def weights(self) -> dict[str, Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if self.training:
            with Path(f"rank-{rank}.txt").open("a") as file:
                file.write(f"{self.coefficients.tolist()}\n")
        return super().weights()


def expert(pretrained: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """The pretrained tower with seeded noise on every tensor."""
    generator = torch.Generator().manual_seed(len(task))
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in pretrained.items()
    }


def learned(run: Path) -> dict[str, Tensor]:
    """What a run's last checkpoint holds."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, Tensor] = saved["state_dict"]
    return state
