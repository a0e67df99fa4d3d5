"""open_clip's models, built from a name, a folder or a file; checked before anything is made."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import read_json
from adamerge.encoders.architectures import activation_fits, is_known
from adamerge.encoders.model_check import check_model_config, check_preprocess_config, refuse_code
from adamerge.encoders.model_configs import from_transformers
from adamerge.encoders.tower import Tower

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)

# What open_clip raises of a config that is wrong, or damaged in any way.
_REFUSALS = (
    *(TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError),
    *(AssertionError, OSError),
)


@dataclass
class Clip:
    """An open_clip model with what is needed to use it and to write it again.

    Attributes:
        model: the CLIP; its image tower is `model.visual`, the backbone of every method.
        config: `{"model_cfg": …, "preprocess_cfg": …}` as in an `open_clip_config.json`.
        tokenizer: texts -> token ids `[n, context]`.
        weights: the file an open_clip tag was read from, if one was named.
        extras: files of a tokenizer of its own, which an export must carry along.
    """

    model: nn.Module
    config: dict[str, Any]
    tokenizer: Callable[..., Tensor]
    weights: Path | None = None
    extras: tuple[Path, ...] = ()

    @property
    def backbone(self) -> nn.Module:
        return cast(nn.Module, self.model.visual)

    @property
    def preprocess_cfg(self) -> open_clip.transform.PreprocessCfg:
        """The open_clip preprocessing of this model's images."""
        return open_clip.transform.PreprocessCfg(**self.config["preprocess_cfg"])


def build_clip(architecture: str, pretrained_tag: str | None = None) -> Clip:
    """The open_clip model of an architecture, on the CPU in float32, in evaluation mode.

    Args:
        architecture: a built-in name (`ViT-B-32`), a folder with `open_clip_config.json`, one of
            transformers with a CLIP's `config.json`, or the path of a model config in JSON.
        pretrained_tag: an open_clip weight tag (`openai`, `laion2b_s34b_b79k`) to load; None
            leaves random weights, to be filled from a file.

    Raises:
        AdamergeError: unknown name or tag, or an unreadable config.
    """
    config = _read_config(architecture, pretrained_tag)
    # A tokenizer's own files lie beside an open_clip config, or come with the built-in name.
    with_files = (Path(architecture) / "open_clip_config.json").is_file()
    with _built(config, architecture) as (model, folder):
        tokenizer = _tokenizer(architecture, config, architecture if with_files else folder)
    weights = None
    if pretrained_tag is not None:
        weights = _download(architecture, pretrained_tag)
        open_clip.load_checkpoint(model, str(weights), weights_only=True)
    model.eval().requires_grad_(False)
    size = getattr(model.visual, "image_size", None) or 224
    config["preprocess_cfg"] = {**config["preprocess_cfg"], "size": size}
    extras = tuple(Path(architecture) / name for name in _TOKENIZER_FILES if with_files)
    return Clip(model, config, tokenizer, weights, tuple(p for p in extras if p.is_file()))


def _tokenizer(architecture: str, config: Mapping[str, Any], folder: str) -> Callable[..., Tensor]:
    """The tokenizer of a built-in architecture, or the one whose files lie in a folder."""
    files = [Path(architecture, name) for name in ("open_clip_config.json", "config.json")]
    built_in = architecture in open_clip.list_models() and not any(p.is_file() for p in files)
    if not built_in:
        refuse_code(Path(folder), _TOKENIZER_FILES)
    limits = {"trust_remote_code": False, "local_files_only": not built_in}
    named = config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    name = architecture if built_in else f"local-dir:{folder}"
    return open_clip.get_tokenizer(name, **(limits if named else {}))


def build_backbone(config: Mapping[str, Any], name: str) -> nn.Module:
    """The image tower of an open_clip config, with random weights and without a text tower.

    Args:
        config: as `Clip.config`.
        name: what errors call it.

    Raises:
        AdamergeError: open_clip cannot build it.
    """
    image_part = {k: config["model_cfg"].get(k) for k in ("embed_dim", "vision_cfg", "quick_gelu")}
    image_part["quick_gelu"] = bool(image_part["quick_gelu"])
    smallest = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    part = {**config, "model_cfg": {**image_part, "text_cfg": smallest}}
    check_model_config(part["model_cfg"], name)
    with torch.random.fork_rng(devices=[]), _built(part, name) as (model, _):
        return model.visual.eval().requires_grad_(False)


@contextlib.contextmanager
def _built(config: Mapping[str, Any], name: str) -> Iterator[tuple[Any, str]]:
    """open_clip's model of a config, and the folder that holds the config meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        # One path for built-in, folder and file alike: open_clip reads configs from a folder.
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        root, before = logging.getLogger(), logging.getLogger().level
        root.setLevel(logging.ERROR)  # open_clip warns of random weights, which are filled later
        try:
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            root.setLevel(before)
            yield model, folder
        except _REFUSALS as error:
            raise AdamergeError(
                f"architecture {name!r} is not a model open_clip can build "
                f"({one_line(error)}): expected model_cfg with embed_dim, vision_cfg and text_cfg"
            ) from error
        except ImportError as error:
            raise AdamergeError(
                f"architecture {name!r} needs a package that is not installed ({error}): "
                "install it, as with `pip install transformers`"
            ) from error
        finally:
            root.setLevel(before)


def _download(architecture: str, tag: str) -> Path:
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    try:
        return Path(open_clip.pretrained.download_pretrained(weights))
    except Exception as error:  # of the hub, the network, the cache: one thing to the user
        raise AdamergeError(
            f"pretrained {tag!r} of {architecture} cannot be downloaded ({one_line(error)}): "
            "connect, or name a local checkpoint as suite.pretrained"
        ) from error


def _read_config(architecture: str, pretrained_tag: str | None) -> dict[str, Any]:
    path, theirs = Path(architecture), Path(architecture, "config.json")
    path = path / "open_clip_config.json" if path.is_dir() else path
    if path.is_file():
        loaded = read_json(path, "a model config", "expected JSON like an open_clip_config.json")
        preprocess = loaded.get("preprocess_cfg", {})
        config = {"model_cfg": loaded.get("model_cfg", loaded), "preprocess_cfg": preprocess}
    elif theirs.is_file():
        path, processor = theirs, theirs.with_name("preprocessor_config.json")
        preprocess = read_json(processor) if processor.is_file() else {}
        config = from_transformers(read_json(theirs), preprocess, str(theirs))
    else:
        return _built_in_config(architecture, pretrained_tag)
    check_model_config(config["model_cfg"], str(path))
    check_preprocess_config(config["preprocess_cfg"], str(path))
    return config


def _built_in_config(architecture: str, pretrained_tag: str | None) -> dict[str, Any]:
    if architecture not in open_clip.list_models():  # it would look on the hub, too
        raise AdamergeError(
            f"architecture {architecture!r} is neither an open_clip model name nor a folder "
            "with open_clip_config.json or a CLIP's config.json nor a JSON file: see "
            "open_clip.list_models()"
        )
    model = open_clip.get_model_config(architecture)
    for key in ("hf_model_name", "hf_tokenizer_name"):
        name = model["text_cfg"].get(key)
        if name and Path(name).exists():  # which transformers prefers to the hub
            raise AdamergeError(
                f"architecture {architecture!r} takes {name} from the hub, but a folder of that "
                "name lies here and would be read in its place: work in another folder"
            )
    if pretrained_tag is None:
        return {"model_cfg": model, "preprocess_cfg": {}}
    tag = open_clip.get_pretrained_cfg(architecture, pretrained_tag)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise AdamergeError(
            f"pretrained {pretrained_tag!r} is neither a file nor a weight tag of "
            f"{architecture}: its tags are {tags}"
        )
    if not activation_fits(architecture, pretrained_tag):
        raise other_activation(
            f"pretrained {pretrained_tag!r}", architecture, tag.get("quick_gelu")
        )
    keys = open_clip.transform.PreprocessCfg.__dataclass_fields__
    preprocess = {key: value for key, value in tag.items() if key in keys}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def other_activation(what: str, architecture: str, quick_gelu: bool) -> AdamergeError:
    """Says that weights were trained with another activation than an architecture has."""
    name = architecture.removesuffix("-quickgelu") + ("-quickgelu" if quick_gelu else "")
    other = f"one with quick_gelu: {str(bool(quick_gelu)).lower()}"
    return AdamergeError(
        f"{what} was trained with another activation than {architecture} has (QuickGELU or not), "
        "which silently costs accuracy: set suite.architecture to "
        f"{name if is_known(name) else other}"
    )


class Normalizer(nn.Module):
    """uint8 images to the backbone's normalised floats, a batch at a time, on their device.

    Args:
        mean: of every channel of images scaled to [0, 1].
        std: their standard deviations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` -> float32 `[B, 3, H, W]`."""
        return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)


def with_other_activation(backbone: nn.Module) -> Tower | None:
    """The tower with QuickGELU for GELU, or GELU for QuickGELU; None where it has neither."""
    tower, quick = Tower(backbone), open_clip.transformer.QuickGELU
    activations = [
        (module, name, child)
        for module in tower.skeleton.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.GELU | quick)
    ]
    for module, name, child in activations:
        setattr(module, name, quick() if isinstance(child, nn.GELU) else nn.GELU())
    return tower if activations else None
