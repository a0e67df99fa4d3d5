"""Checkpoints of every kind as one thing: tensors under open_clip's names; nothing is executed."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge import hub
from adamerge.encoders import Clip
from adamerge.errors import AdamergeError
from adamerge.files import joined, sha256
from adamerge.kept import Digest
from adamerge.layouts import (
    Computed,
    clip_from_transformers,
    renamed,
    tower_from_transformers,
    transformers_prefix,
)
from adamerge.lora import LoraConfig, lora_expert
from adamerge.model_configs import VISION
from adamerge.weight_files import open_weights

log = logging.getLogger("adamerge")

# Constants that OpenAI's own files carry beside the weights.
_LEFT_OVER = ("input_resolution", "context_length", "vocab_size", "attn_mask", "image_size")


@dataclass(frozen=True)
class Checkpoint:
    """A source of weights, opened.

    Attributes:
        source: as the user named it.
        path: the file or folder on this disk.
        files: every weight file.
        tensors: raw names -> tensors, each read when asked for.
        lora: the settings, where the tensors are a LoRA adapter's.
        revision: the commit on the hub, where it came from there.
    """

    source: str
    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    lora: LoraConfig | None = None
    revision: str | None = None

    def record(self, digest: Digest = sha256) -> dict[str, str]:
        """Where it came from and what it is: path, sha256 (of all files, a LoRA adapter's settings
        among them), revision on the hub.

        Args:
            digest: gives the sha256 of a file.

        Raises:
            AdamergeError: the content differs from the hash under which the hub's cache keeps it.
        """
        settings = [self.lora.path] if self.lora is not None else []  # they decide the expert too
        digests = [_checked_sha256(path, digest) for path in (*self.files, *settings)]
        found = {
            "path": str(self.path),
            "sha256": digests[0] if len(digests) == 1 else joined(digests),
        }
        if self.revision:
            found |= {"source": self.source, "revision": self.revision}
        return found

    def stated(self) -> dict[str, Any]:
        """What transformers' `config.json` beside the weights states of the image tower and its
        tensors' shapes do not show: `quick_gelu`, `heads` and `layer_norm_eps`; empty without one.
        """
        path = self.files[0].parent / "config.json"
        try:
            config = json.loads(path.read_text())
            given = {**VISION, **(config.get("vision_config") or config)}
            kind = str(config.get("model_type"))
        except (OSError, ValueError, AttributeError, TypeError):  # it is not needed for reading
            return {}
        if not kind.startswith("clip"):
            return {}
        return {
            "quick_gelu": given["hidden_act"] == "quick_gelu",
            "heads": given["num_attention_heads"],
            "layer_norm_eps": given["layer_norm_eps"],
        }


def read(source: str | Path) -> Checkpoint:
    """Opens a checkpoint: a file, a folder, or `hf://owner/repo[@revision][/file]`.

    A file is a state dict, a training checkpoint or a pickled module, in `.safetensors` or any
    format of `torch.save`. A folder is of open_clip, of transformers (sharded or not), or a PEFT
    LoRA adapter; or it holds one weight file.

    Raises:
        AdamergeError: missing, damaged, of another format, or asking to execute something.
    """
    source, revision = str(source), None
    path = Path(source)
    if hub.is_hub(source):
        path, revision = (fetched := hub.fetch(source)).path, fetched.revision
    files = _weight_files(path)
    parts = [open_weights(file) for file in files]
    tensors = parts[0] if len(parts) == 1 else _joined(files, parts)
    config = files[0].parent / "adapter_config.json"
    lora = LoraConfig(config) if config.is_file() and "adapter" in files[0].name else None
    return Checkpoint(source, path, files, tensors, lora, revision)


def _weight_files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".index.json"):
        return tuple(path.parent / name for name in hub.shards(path))
    return (path,)


def _in_folder(folder: Path) -> Path:
    for name in hub.WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in hub.SUFFIXES and p.is_file())
    if len(found) != 1:
        names = f"several: {', '.join(p.name for p in found[:5])}" if found else "none"
        raise AdamergeError(
            f"folder {folder} holds no weights under a known name ({', '.join(hub.WEIGHTS[:5])} …) "
            f"and not exactly one weight file ({names}): name the file itself"
        )
    return found[0]


def _joined(files: tuple[Path, ...], parts: list[Mapping[str, Tensor]]) -> Computed:
    makers: dict[str, Callable[[], Tensor]] = {}
    for file, part in zip(files, parts, strict=True):
        for name in part:
            if name in makers:
                raise AdamergeError(f"{file} repeats tensor {name!r} of another shard: save again")
            makers[name] = functools.partial(part.__getitem__, name)
    return Computed(makers)


def tower_state(checkpoint: Checkpoint, backbone: nn.Module) -> Mapping[str, Tensor]:
    """A checkpoint's image tower under the backbone's names, in its order.

    Args:
        backbone: the pretrained tower: its names are looked for behind any prefix (`visual.`,
            `module.model.visual.` …); a LoRA adapter is added to its weights; a transformers tower
            without a projection keeps its projection.

    Unknown names stay, at the end, for `TaskVectors` to report.

    Raises:
        AdamergeError: no image tower in there, or several.
    """
    own: dict[str, Tensor] = backbone.state_dict()
    if checkpoint.lora is not None:
        found: Mapping[str, Tensor] = lora_expert(checkpoint.tensors, checkpoint.lora, own)
    elif (prefix := transformers_prefix(checkpoint.tensors)) is not None:
        found = tower_from_transformers(checkpoint.tensors, prefix)
        if "proj" in own and "proj" not in found:
            log.info("%s has no projection: the pretrained one is used", checkpoint.source)
            makers = {name: functools.partial(found.__getitem__, name) for name in found}
            found = Computed({**makers, "proj": functools.partial(own.__getitem__, "proj")})
    else:
        prefix = _prefix(checkpoint, own)
        names = [name for name in checkpoint.tensors if name.startswith(prefix)]
        found = renamed(checkpoint.tensors, {name[len(prefix) :]: name for name in names})
    known = [name for name in own if name in found]
    rest = [n for n in found if n not in own and n.rpartition(".")[2] not in _LEFT_OVER]
    return renamed(found, {name: name for name in [*known, *rest]})


def _prefix(checkpoint: Checkpoint, own: Mapping[str, Tensor]) -> str:
    """What stands before the tower's names in a checkpoint of open_clip's layout."""
    anchor = "conv1.weight" if "conv1.weight" in own else next(iter(own))
    tails = (name for name in checkpoint.tensors if f".{name}".endswith(f".{anchor}"))
    found = [name.removesuffix(anchor) for name in tails]
    visual = [prefix for prefix in found if prefix.endswith("visual.")]
    choices = visual or found
    if len(choices) == 1:
        return choices[0]
    if not choices:
        example = next(iter(checkpoint.tensors))
        raise AdamergeError(
            f"{checkpoint.source} holds no image tower of this architecture: expected a tensor "
            f"named {anchor!r} behind any prefix, or transformers' names, found names like "
            f"{example!r}; check the file and suite.architecture"
        )
    raise AdamergeError(
        f"{checkpoint.source} holds {len(choices)} image towers ({', '.join(choices)}): save the "
        "one that is meant as a state dict of its own"
    )


def load_pretrained(clip: Clip, checkpoint: Checkpoint) -> None:
    """Fills a CLIP, image and text tower, from a checkpoint.

    Raises:
        AdamergeError: names or shapes that do not fit the architecture; an image tower alone is
            not enough, because the heads come from the text tower.
    """
    where = f"pretrained ({checkpoint.path})"
    if checkpoint.lora is not None:
        raise AdamergeError(f"{where} is a LoRA adapter: expected the whole CLIP it was trained on")
    state, own = _whole(checkpoint), clip.model.state_dict()
    missing = [name for name in own if name not in state]
    extra = [n for n in state if n not in own and n.rpartition(".")[2] not in _LEFT_OVER]
    if missing and ("token_embedding.weight" in missing or len(missing) == len(own)):
        raise AdamergeError(
            f"{where} lacks tensor {missing[0]!r}: expected a whole CLIP, because the heads are "
            "made by its text tower; name the CLIP it was fine-tuned from (of `adamerge convert`: "
            "--pretrained)"
        )
    for names, verb in ((missing, "lacks"), (extra, "has the unknown")):
        if names:
            raise AdamergeError(
                f"{where} {verb} tensor {names[0]!r} ({len(names)} such): it is not of this "
                "architecture; set suite.architecture to the one it was trained with"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            loaded = state[name]
            scalar = loaded.numel() == tensor.numel() == 1  # logit_scale is [] or [1]
            if loaded.shape != tensor.shape and not scalar:
                raise AdamergeError(
                    f"{where} has tensor {name!r} of shape {list(loaded.shape)}, the architecture "
                    f"has {list(tensor.shape)}: set suite.architecture to the one it was trained "
                    "with"
                )
            tensor.copy_(loaded.reshape(tensor.shape))


def _whole(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """A whole CLIP under open_clip's names, prefixes taken off."""
    prefix = transformers_prefix(checkpoint.tensors)
    if prefix is not None:
        return clip_from_transformers(checkpoint.tensors, prefix)
    anchors = [n for n in checkpoint.tensors if f".{n}".endswith(".visual.conv1.weight")]
    before = anchors[0].removesuffix("visual.conv1.weight") if len(anchors) == 1 else ""
    if not before and all(name.startswith("module.") for name in checkpoint.tensors):
        before = "module."
    names = [name for name in checkpoint.tensors if name.startswith(before)]
    return renamed(checkpoint.tensors, {name[len(before) :]: name for name in names})


def read_head(source: str | Path) -> Tensor:
    """A stored head, `[classes, features]`: a pickled `ClassificationHead` or a state dict.

    Rows are used as stored, logit scale included, as the papers' scripts save them.

    Raises:
        AdamergeError: no weight matrix in there, several, or one with a bias that is not zero.
    """
    tensors = read(source).tensors
    matrices = [name for name in tensors if tensors[name].ndim == 2]
    if len(matrices) != 1:
        raise AdamergeError(
            f"head {source} holds {len(matrices)} matrices: expected one, [classes, features]"
        )
    for name in tensors:
        if name != matrices[0] and bool(tensors[name].count_nonzero()):
            raise AdamergeError(
                f"head {source} has a non-zero {name!r} beside its weight: expected a zero-shot "
                "head, which has no bias"
            )
    return tensors[matrices[0]].float()


def _checked_sha256(path: Path, digest: Digest) -> str:
    """The hub's cache names large files by their SHA-256: a damaged download is found by it."""
    found, name = digest(path), path.resolve().name
    if path.is_symlink() and len(name) == 64 and name != found:
        raise AdamergeError(
            f"{path} differs from what the hub has (sha256 {found[:12]}…, expected {name[:12]}…): "
            "the download is damaged; delete that file from the cache and run again"
        )
    return found
