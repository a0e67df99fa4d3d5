"""Heads: zero-shot classifiers from the text tower, one per task."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import checksum, replacing
from adamerge.encoders.clip import Clip

log = logging.getLogger("adamerge")

_FORMAT = 3  # of a stored head; another number makes new files


@dataclass(frozen=True)
class Prompts:
    """What the text tower is asked for one task: class names, and templates with a `{}`."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]


class Heads(nn.Module):
    """Classifier weights per task; `logits = normalize(features) @ weight.T`, plus a bias, if any.

    Args:
        weights: task -> `[C, D]`, rows already multiplied by the logit scale.
        classes: task -> its C class names.
        biases: task -> `[C]`, of heads that were learned.

    They move with the module, and are not saved in checkpoints.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        classes: Mapping[str, Sequence[str]],
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(weights)
        self.classes = {task: tuple(classes[task]) for task in self.tasks}
        for index, task in enumerate(self.tasks):
            if len(weights[task]) != len(self.classes[task]):
                raise AdamergeError(
                    f"head of task {task!r} has {len(weights[task])} rows for "
                    f"{len(self.classes[task])} class names: expected one row per class"
                )
            self.register_buffer(f"weight_{index}", weights[task].detach(), persistent=False)
            bias = None if biases is None else biases[task].detach()
            self.register_buffer(f"bias_{index}", bias, persistent=False)

    def weight(self, task: str) -> Tensor:
        """The `[C, D]` weight of a task."""
        return getattr(self, f"weight_{self.tasks.index(task)}")

    def bias(self, task: str) -> Tensor | None:
        """The bias `[C]` of a task, where heads were learned."""
        return getattr(self, f"bias_{self.tasks.index(task)}")

    def logits(self, features: Tensor, task: str) -> Tensor:
        """`[B, D]` features (normalised here) -> `[B, C]` logits of a task.

        In the heads' own precision, also under autocast: logits of magnitude 100 do not survive
        bfloat16.
        """
        return classify(features, self.weight(task), self.bias(task))


def classify(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`normalize(features) @ weight.T + bias`, `[B, D] -> [B, C]`, in the weight's precision."""
    with torch.autocast(features.device.type, enabled=False):
        rows = nn.functional.normalize(features.to(weight.dtype), dim=-1)
        return rows @ weight.T if bias is None else rows @ weight.T + bias


def zero_shot_heads(
    clip: Clip,
    prompts: Mapping[str, Prompts],
    cache_dir: Path | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> Heads:
    """Heads from class names and templates, times `logit_scale.exp()`.

    Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020): the
    templates of a class are encoded, normalised, averaged and normalised again.

    Args:
        clip: gives the text tower, the tokenizer and the logit scale.
        prompts: class names and templates per task.
        cache_dir: heads are kept here under a hash of the text tower, the prompts and open_clip's
            version, and read from here when that hash is known.
        stored: heads `[C, D]` that are given and not made, by task.

    Raises:
        AdamergeError: a head with NaN or of zeros, or a stored one that does not fit the tower's
            features.
    """
    tower = "" if cache_dir is None else _text_hash(clip)
    dim, weights = clip.config["model_cfg"]["embed_dim"], {}
    for task, prompt in prompts.items():
        make = functools.partial(_encode, clip, prompt)
        if stored and task in stored:
            weight = stored[task]
        elif cache_dir is None:
            weight = make()
        else:
            parts = json.dumps([_FORMAT, tower, prompt.classes, prompt.templates])
            name = hashlib.sha256(parts.encode()).hexdigest()[:32]
            weight = _cached(cache_dir / "heads" / f"{name}.safetensors", make)
        if weight.shape[1] != dim:
            raise AdamergeError(
                f"head of task {task!r} is for {weight.shape[1]} features, the image tower has "
                f"{dim}: give the head of the same architecture, or leave head out to make it anew"
            )
        if not bool(torch.isfinite(weight).all()):
            damaged = (
                "its file is damaged; use another one, or leave head out to make it anew"
                if stored and task in stored
                else "the text tower of the pretrained checkpoint is damaged; use another one"
            )
            raise AdamergeError(f"head of task {task!r} has NaN or infinite values: {damaged}")
        if not bool(weight.any()):
            raise AdamergeError(
                f"head of task {task!r} is zero throughout: every class would be as probable; use "
                "another one, or leave head out to make it anew"
            )
        weights[task] = weight
    return Heads(weights, {task: prompt.classes for task, prompt in prompts.items()})


def _cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The head of a file; made, and the file written, where that is absent or damaged."""
    if path.exists():
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            weight: Tensor = file.get_tensor("weight")
            if (file.metadata() or {}).get("checksum") == _checksum(weight):
                return weight
        log.warning("stored head %s is damaged and made again", path)
    weight = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({"weight": weight}, temporary, metadata={"checksum": _checksum(weight)})
    return weight


def _checksum(weight: Tensor) -> str:
    return checksum(save({"weight": weight}))


def _encode(clip: Clip, prompt: Prompts) -> Tensor:
    columns = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, list(prompt.classes), list(prompt.templates)
    )
    return (columns.T * cast(Tensor, clip.model.logit_scale).detach().exp()).contiguous()


def _text_hash(clip: Clip) -> str:
    digest = hashlib.sha256(open_clip.__version__.encode())
    digest.update(json.dumps(clip.config["model_cfg"], sort_keys=True).encode())
    for name, tensor in sorted(clip.model.state_dict().items()):
        if not name.startswith("visual."):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode())
            digest.update(data.numpy())
    return digest.hexdigest()
