"""LoRA experts: a PEFT adapter added to the pretrained image tower, exactly.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685): W = W0 + s · B A, with
s = alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json
from adamerge.weights.formats.layouts import Computed, Layout
from adamerge.weights.formats.matching import heads_in, several

log = logging.getLogger("adamerge")

# Settings that change what the adapter computes in ways that B A alone does not say.
_UNSUPPORTED = (
    *("use_dora", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("use_bdlora", "use_qalora", "arrow_config", "kasa_config", "alora_invocation_tokens"),
    *("monteclora_config", "velora_config"),
)
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # by what init_lora_weights says
_WRAPPERS = ("base_model.model.", "base_layer.", "modules_to_save.", "default.")
# Of an `nn.MultiheadAttention`, PEFT (to 0.21 at least) adds the output projection's B A twice
# whenever it runs or merges the model, training included: the expert is what was trained.
_TWICE = "base_layer.out_proj.lora_A"
_SAVE_AGAIN = "expected the JSON that PEFT writes; save the adapter again"
_MERGE = "merge the adapter with PEFT (merge_and_unload) and give the merged checkpoint"
_Change = Callable[[Tensor], Tensor]


class LoraConfig:
    """The settings of an `adapter_config.json` that matter for merging.

    Raises:
        AdamergeError: no LoRA, unreadable, or of a variant that B A alone does not describe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = read_json(path, "an adapter config", _SAVE_AGAIN)
        try:
            self.alpha = float(loaded.get("lora_alpha", 8))
            self.alphas = {str(k): float(v) for k, v in (loaded.get("alpha_pattern") or {}).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise AdamergeError(
                f"{path} is not an adapter config ({' '.join(str(error).split())[:80]}): "
                f"{_SAVE_AGAIN}"
            ) from error
        self.rslora = bool(loaded.get("use_rslora"))
        self.transposed = bool(loaded.get("fan_in_fan_out"))
        kind, start = loaded.get("peft_type"), str(loaded.get("init_lora_weights")).lower()
        unsupported = [key for key in _UNSUPPORTED if loaded.get(key)]
        unsupported += ["init_lora_weights"] if start.startswith(_CHANGES_BASE) else []
        if kind != "LORA" or unsupported:
            what = f"{unsupported[0]} set" if unsupported else f"peft_type {kind}"
            raise AdamergeError(
                f"{path} has {what}: only plain LoRA can be merged exactly from its files; {_MERGE}"
            )
        for pattern in self.alphas:
            if not pattern.lstrip("^").rstrip("$").replace(".", "").replace("_", "").isalnum():
                raise AdamergeError(
                    f"{path} has the pattern {pattern!r} in alpha_pattern: expected (ends of) "
                    f"module names without regular expressions; {_MERGE}"
                )

    def scale(self, key: str, rank: int) -> float:
        """s of the module of a tensor's key; a pattern matches a whole dotted end of the module's
        name in the model that was adapted, as in PEFT."""
        # PEFT gives the output projection of an `nn.MultiheadAttention` the settings of the whole.
        name = key.removeprefix("base_model.model.").replace(".base_layer.out_proj.", ".")
        module, alpha = name.partition(".lora_")[0], self.alpha
        for pattern, value in self.alphas.items():
            name = pattern.lstrip("^").rstrip("$")
            if module == name or (module.endswith(f".{name}") and not pattern.startswith("^")):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def lora_expert(
    adapter: Mapping[str, Tensor], config: LoraConfig, pretrained: Mapping[str, Tensor]
) -> Computed:
    """The expert of an adapter, tensor by tensor, under the pretrained tower's (open_clip) names.

    Args:
        adapter: tensors of `adapter_model.safetensors`; names in open_clip's or transformers'
            layout, of the tower alone or of a whole CLIP (whose text part is left out).
        config: its settings.
        pretrained: the image tower that the adapter was trained on, open_clip's names.

    Raises:
        AdamergeError: an adapter tensor that belongs to no tensor of the tower, or does not fit.
    """
    layout, folder = Layout(pretrained), config.path.parent
    changes = _changes(adapter, config)
    saved = {str(_tower_name(key)): adapter[key] for key in adapter if "lora_" not in key}
    known = [*pretrained, *layout.names]
    heads = heads_in([name for name in saved if name in changes], known, saved)
    if heads:
        log.info("%s: %s left out: a head of its task", folder, several(heads))
    changes = {name: change for name, change in changes.items() if name not in heads}
    in_ours = all(name in pretrained for name in changes)
    base: Mapping[str, Tensor] = pretrained if in_ours else layout.names
    if not changes:
        raise AdamergeError(f"{folder} changes no tensor of an image tower")
    for name in changes:
        if name not in base:
            raise AdamergeError(
                f"{folder} adapts {name!r}, which this image tower does not have: set "
                "suite.architecture and suite.pretrained to the model the adapter was trained on"
            )

    def changed(name: str) -> Tensor:
        before = base[name]
        try:
            after = changes[name](before) if name in changes else before
        except RuntimeError as error:
            raise AdamergeError(f"{folder}: {name!r} cannot be merged ({error})") from error
        if after.shape != before.shape:
            raise AdamergeError(
                f"{folder} adapts {name!r} with shape {list(after.shape)}, the tower has "
                f"{list(before.shape)}: set suite.architecture to the model it was trained on"
            )
        return after

    expert = Computed({name: functools.partial(changed, name) for name in base})
    return expert if in_ours else layout.to_ours(expert)


def _changes(adapter: Mapping[str, Tensor], config: LoraConfig) -> dict[str, _Change]:
    """Tensor name of the tower -> what the adapter makes of that tensor."""
    changes: dict[str, _Change] = {}
    for key in adapter:
        name = None if ".original_module." in key else _tower_name(key)
        if name is None or ".lora_B." in f".{name}" or name.endswith("lora_embedding_B"):
            continue  # of the text tower, or replaced; or read together with its A
        if "lora_" not in name:
            changes[name] = functools.partial(_replace, adapter, key)
            continue
        module, _, kind = name.partition(".lora_")
        other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if other == key or other not in adapter:
            raise AdamergeError(
                f"{config.path.parent} has {key!r}, but not the B that belongs to it: expected "
                "plain LoRA tensors; save the adapter again"
            )
        target = f"{module}.in_proj_weight" if module.endswith(".attn") else f"{module}.weight"
        transposed = config.transposed or kind.startswith("embedding")
        scale = config.scale(key, len(adapter[key]))
        changes[target] = functools.partial(_add, adapter, key, other, scale, transposed)
        bias = other.replace(".weight", ".bias")
        if bias != other and bias in adapter:
            changes[f"{module}.bias"] = functools.partial(_add_bias, adapter, bias, scale)
    return changes


def _tower_name(key: str) -> str | None:
    """The name within the image tower, in either layout; None for the text tower's."""
    name = key
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    if "text_model." in name or name.startswith(("text_projection", "logit_scale")):
        return None
    for tower in ("visual.", "vision_model."):
        if f".{tower}" in f".{name}":
            return name.rpartition(tower)[2]
    return name.removeprefix("model.").removeprefix("image_encoder.")


def _replace(adapter: Mapping[str, Tensor], key: str, before: Tensor) -> Tensor:
    return adapter[key].to(before.dtype)


def _add(
    adapter: Mapping[str, Tensor], a: str, b: str, scale: float, transposed: bool, before: Tensor
) -> Tensor:
    low, high = adapter[a].to(before.dtype), adapter[b].to(before.dtype)
    delta = (high.flatten(1) @ low.flatten(1)) * (scale * (2 if _TWICE in a else 1))
    return before + (delta.T if transposed else delta).reshape(before.shape)


def _add_bias(adapter: Mapping[str, Tensor], bias: str, scale: float, before: Tensor) -> Tensor:
    return before + adapter[bias].to(before.dtype) * scale
