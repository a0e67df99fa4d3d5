"""Checkpoints of every kind as one thing: tensors under open_clip's names; nothing is executed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import joined, read_json, sha256
from adamerge._base.kept import Digest
from adamerge.weights.formats import hub
from adamerge.weights.formats.files import open_weights
from adamerge.weights.formats.fitting import check_tower
from adamerge.weights.formats.layouts import Computed, renamed
from adamerge.weights.formats.lora import LoraConfig, lora_expert
from adamerge.weights.formats.matching import match

log = logging.getLogger("adamerge")


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
        record = {
            "path": str(self.path),
            "sha256": digests[0] if len(digests) == 1 else joined(digests),
        }
        if self.revision:
            record |= {"source": self.source, "revision": self.revision}
        return record

    def stated(self) -> dict[str, Any]:
        """What pickled modules, or transformers' `config.json` beside the weights, state of the
        image tower and its tensors' shapes do not show: `quick_gelu`, `heads`, `layer_norm_eps`,
        as far as they do; `activation` where it is no GELU.
        """
        stated = dict(getattr(self.tensors, "stated", {}))
        path = self.files[0].parent / "config.json"
        try:
            config = read_json(path)
            given = {**VISION, **(config.get("vision_config") or config)}
            kind = str(config.get("model_type"))
        except (AdamergeError, AttributeError, TypeError):  # it is not needed for reading
            return stated
        if not kind.startswith("clip") or stated:
            return stated
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
    source = str(source)
    fetched = hub.fetch(source) if hub.is_hub(source) else hub.Fetched(Path(source), None)
    path, files = fetched.path, _weight_files(fetched.path)
    parts = {file: open_weights(file) for file in files}
    tensors = parts[files[0]] if len(parts) == 1 else _joined(parts)
    config = files[0].parent / "adapter_config.json"
    lora = LoraConfig(config) if config.is_file() and "adapter" in files[0].name else None
    return Checkpoint(source, path, files, tensors, lora, fetched.revision)


def _weight_files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        path = _in_folder(path)
    elif path.suffix == ".distcp" or path.name.endswith("_optim_states.pt"):
        hub.refuse_sharded(path.parent)
    if path.name.endswith(".index.json"):
        return tuple(path.parent / name for name in hub.shards(path))
    return (path,)


def _in_folder(folder: Path) -> Path:
    hub.refuse_sharded(folder)
    for name in hub.WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    weights = sorted(p for p in folder.iterdir() if p.suffix in hub.SUFFIXES and p.is_file())
    if len(weights) != 1:
        names = f"several: {', '.join(p.name for p in weights[:5])}" if weights else "none"
        raise AdamergeError(
            f"folder {folder} holds no weights under a known name ({', '.join(hub.WEIGHTS[:5])} …) "
            f"and not exactly one weight file ({names}): name the file itself"
        )
    return weights[0]


def _joined(parts: Mapping[Path, Mapping[str, Tensor]]) -> Computed:
    makers: dict[str, Callable[[], Tensor]] = {}
    for file, part in parts.items():
        for name in part:
            if name in makers:
                raise AdamergeError(f"{file} repeats tensor {name!r} of another shard: save again")
            makers[name] = functools.partial(part.__getitem__, name)
    return Computed(makers)


def tower_state(
    checkpoint: Checkpoint, backbone: nn.Module, fill: bool = False
) -> Mapping[str, Tensor]:
    """A checkpoint's image tower under the backbone's names, in its order.

    Args:
        backbone: the pretrained tower. Its names are looked for in either layout, behind any
            prefix and between the words of wrappers; a LoRA adapter is added to its weights; a
            transformers tower without a projection keeps its projection.
        fill: take the pretrained tensors where the checkpoint lacks some.

    Raises:
        AdamergeError: no image tower in there, several, or one with missing or unknown tensors.
    """
    model: dict[str, Tensor] = backbone.state_dict()
    if checkpoint.lora is not None:
        tensors: Mapping[str, Tensor] = lora_expert(checkpoint.tensors, checkpoint.lora, model)
    else:
        matched = match(checkpoint.source, checkpoint.tensors, model).without_heads()
        missing = matched.missing
        if missing == ["visual_projection.weight"]:
            log.info("%s has no projection: the pretrained one is used", checkpoint.source)
        elif missing or matched.extra:
            check_tower(matched, fill)
        tensors = matched.state()
    return renamed(tensors, {name: name for name in model})


def read_head(source: str | Path) -> Tensor:
    """A stored head, `[classes, features]`: a pickled `ClassificationHead` or a state dict.

    Rows are used as stored, logit scale included, as the papers' scripts save them.

    Raises:
        AdamergeError: no weight matrix in there, several, one with a bias that is not zero, or one
            that was made for features as they come.
    """
    checkpoint = read(source)
    tensors = checkpoint.tensors
    if checkpoint.stated().get("normalize") is False:
        raise AdamergeError(
            f"head {source} has normalize=False: it is for features as they come, and heads are "
            "used with normalised ones; give one made for these, or leave head out to make it anew"
        )
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
    sha, name = digest(path), path.resolve().name
    if path.is_symlink() and len(name) == 64 and name != sha:
        raise AdamergeError(
            f"{path} differs from what the hub has (sha256 {sha[:12]}…, expected {name[:12]}…): "
            "the download is damaged; delete that file from the cache and run again"
        )
    return sha


# Defaults of transformers' CLIPVisionConfig and CLIPTextConfig, which its files may leave out.
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
