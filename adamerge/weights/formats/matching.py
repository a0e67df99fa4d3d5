"""A model found in a checkpoint by all of its names, whatever stands before or between them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.layouts import Computed, Layout, renamed

log = logging.getLogger("adamerge")

# Words that torch's own wrappers (DDP, compile, FSDP, checkpointing, DeepSpeed) put anywhere.
_WRAPPERS = (
    *("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
    *("_forward_module", "_ddp_module", "_dpp_module", "_fpw_module", "_wrapped_module"),
)
_TEXT = ("token_embedding.weight", "ln_final.weight", "final_layer_norm.weight")
_VISUAL = ("visual.", "vision_model.", "image_encoder.")
_FEW = 3
_NEAR = 0.9  # of the most names: then it is a second model of the same kind
# Constants that OpenAI's own files and old versions of transformers carry beside the weights.
_CONSTANTS = (
    *("input_resolution", "context_length", "vocab_size", "attn_mask", "image_size"),
    "position_ids",
)
_OF_LOGITS = ("logit_scale", "logit_bias")
_NO_HEADS = ("adapter", "lora", "prompt", "pool", "norm", "ln_", "token", "embed", "proj", "scale")


@dataclass(frozen=True)
class Match:
    """Where a model's tensors are in a checkpoint.

    Attributes:
        source: the checkpoint, for messages.
        tensors: the checkpoint's.
        wanted: the model's, under the names of the checkpoint's layout.
        names: name in that layout -> name in the checkpoint, the model's or not.
        layout: gives open_clip's names; None where the checkpoint has them.
    """

    source: str
    tensors: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]
    names: dict[str, str]
    layout: Layout | None

    @property
    def missing(self) -> list[str]:
        """What the checkpoint lacks, but for counters that old versions of torch did not save."""
        lost = [name for name in self.wanted if name not in self.names]
        return [name for name in lost if self.wanted[name].is_floating_point()]

    @property
    def extra(self) -> list[str]:
        """What the model does not have, but for constants and, beside a tower, a whole model's
        scale of its logits."""
        unknown = [name for name in self.names if name not in self.wanted]
        if not any(name.startswith("visual.") for name in self.wanted):
            unknown = [name for name in unknown if name not in _OF_LOGITS]
        return [name for name in unknown if name.rpartition(".")[2] not in _CONSTANTS]

    def without_heads(self) -> Match:
        """This without classifiers that are attached to the model, of which a log line tells."""
        heads = heads_in(self.extra, self.wanted, renamed(self.tensors, self.names))
        if heads:
            log.info("%s: %s left out: a head attached to the model", self.source, several(heads))
        names = {name: raw for name, raw in self.names.items() if name not in heads}
        return dataclasses.replace(self, names=names)

    def state(self) -> Computed:
        """The model's tensors under open_clip's names; its own where the checkpoint lacks them."""
        tensors = Computed(
            {
                name: functools.partial(self.tensors.__getitem__, self.names[name])
                if name in self.names
                else functools.partial(self.wanted.__getitem__, name)
                for name in self.wanted
            }
        )
        return tensors if self.layout is None else self.layout.to_ours(tensors)


def match(source: str, tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Match:
    """Finds an image tower or a whole CLIP, `model` under open_clip's names, in a checkpoint of
    either layout.

    Raises:
        AdamergeError: several such models.
    """
    tensors, layout = unwrapped(tensors), Layout(model)
    choices = ((model, None), (layout.names, layout))
    fits = [(prefixes(tensors, names), names, used) for names, used in choices]
    counts, wanted, used = max(fits, key=lambda fit: max(fit[0].values(), default=0) / len(fit[1]))
    if len(counts) > 1 and not alike(tensors, counts, wanted):
        places = ", ".join(prefix or "one without a prefix" for prefix in counts)
        raise AdamergeError(
            f"{source} holds {len(counts)} image towers ({places}): save the one that is meant as "
            "a state dict of its own"
        )
    names: dict[str, str] = {}
    for prefix in [*counts][:1]:
        within = tuple(p for p in counts if p != prefix and p.startswith(prefix))  # its doubles
        own = [n for n in tensors if n.startswith(prefix) and not n.startswith(within)]
        names = {name[len(prefix) :]: name for name in own}
        # transformers' projection lies beside its tower
        beside = f"{prefix.removesuffix('vision_model.')}visual_projection.weight"
        if used is not None and beside in tensors:
            names["visual_projection.weight"] = beside
    return Match(source, tensors, wanted, names, used)


def alike(tensors: Mapping[str, Tensor], prefixes: Iterable[str], names: Iterable[str]) -> bool:
    """Whether the same model stands under each prefix: one saved under several names."""
    first, *others = prefixes
    return all(
        (one in tensors) == (other in tensors)
        and (one not in tensors or tensors[one].equal(tensors[other]))
        for one, other in ((first + n, prefix + n) for prefix in others for n in names)
    )


def unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors without the words of wrappers in their names, where that leaves them
    apart."""
    names = {
        ".".join(word for word in name.split(".") if word not in _WRAPPERS): name
        for name in tensors
    }
    return renamed(tensors, names) if len(names) == len(tensors) else tensors


def prefixes(names: Iterable[str], model: Mapping[str, Tensor]) -> dict[str, int]:
    """What stands before the names of a model's tensors, `model`, in a checkpoint, and before how
    many of them.

    The one under which most of them are; several where that many are under each. Those of an
    image tower go before others, and a text tower, whose blocks are named alike, is none.
    """
    names = dict.fromkeys(names)  # a set that keeps the order
    stems = [name for name in model if model[name].ndim == 4]

    def sees(prefix: str) -> bool:  # only images are convolved
        return any(f"{prefix}{stem}" in names for stem in stems)

    counts = Counter(prefix for name in names for prefix in _before(name, model))
    if not any(name.startswith("visual.") for name in model):
        text = {name[: -len(end)] for name in names for end in _TEXT if name.endswith(end)}
        text |= {prefix.removesuffix("embeddings.") for prefix in text}
        counts = Counter({prefix: count for prefix, count in counts.items() if prefix not in text})
        visual = {prefix: counts[prefix] for prefix in counts if prefix.endswith(_VISUAL)}
        most = max(visual.values(), default=0)
        others = {p: c for p, c in counts.items() if most and c >= _NEAR * most and sees(p)}
        counts = Counter(others | visual) or counts
    most = max(counts.values(), default=0)
    near = {prefix: count for prefix, count in counts.items() if count >= _NEAR * most}
    if most < _FEW and len(near) > 1:  # a name or two that other models have as well
        return {}
    whole = {prefix: count for prefix, count in near.items() if sees(prefix)}
    return whole or {prefix: count for prefix, count in near.items() if count == most}


def _before(name: str, model: Collection[str]) -> Iterable[str]:
    """Every beginning of a name behind which one of the model's own names follows."""
    words = name.split(".")
    ends = (".".join(words[start:]) for start in range(len(words)))
    return [name[: len(name) - len(end)] for end in ends if end in model]


def heads_in(
    extra: Sequence[str], model: Collection[str], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Those of the names that a model does not have (`extra`) that are a classifier attached to
    it: a module of its own beside the model's (`model`), of matrices and vectors alone."""
    known = {name.partition(".")[0] for name in model}
    modules: dict[str, list[str]] = {}
    for name in extra:
        module, dot, _ = name.partition(".")
        if dot and module not in known:
            modules.setdefault(module, []).append(name)
    heads: list[str] = []
    for names in modules.values():
        another = any(word in name.lower() for name in names for word in _NO_HEADS)
        if not another and max(tensors[name].ndim for name in names) == 2:
            heads += names
    return heads


def several(names: Sequence[str], count: int = 3) -> str:
    """The first of many names, for a message."""
    more = f" … ({len(names)} in all)" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"
