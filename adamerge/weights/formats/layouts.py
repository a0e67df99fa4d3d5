"""One CLIP, two layouts: open_clip's and transformers' names and shapes of the same tensors.

transformers keeps q, k and v apart, and its projections transposed; of a SigLIP, whose image tower
is timm's in open_clip, it keeps q, k and v of the pooling together. Both describe the same
function, so a conversion is exact in either direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_PATCHES = "embeddings.patch_embedding.weight"  # only transformers' image towers have it

# open_clip's and transformers' names of the same tensors: `#` is the number of each block, `*` the
# weight and the bias, `{q,kv}` several tensors that are one, joined over rows, on the other side,
# `../` beside the tower. Third, where they differ: `transposed`, or ours with an `axis` of length 1
# before.
_BLOCKS = (
    ("transformer.resblocks.#.ln_1.*", "encoder.layers.#.layer_norm1.*"),
    ("transformer.resblocks.#.attn.in_proj_*", "encoder.layers.#.self_attn.{q,k,v}_proj.*"),
    ("transformer.resblocks.#.attn.out_proj.*", "encoder.layers.#.self_attn.out_proj.*"),
    ("transformer.resblocks.#.ln_2.*", "encoder.layers.#.layer_norm2.*"),
    ("transformer.resblocks.#.mlp.c_fc.*", "encoder.layers.#.mlp.fc1.*"),
    ("transformer.resblocks.#.mlp.c_proj.*", "encoder.layers.#.mlp.fc2.*"),
)
_VIT = (
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.weight", _PATCHES),
    ("ln_pre.*", "pre_layrnorm.*"),
    ("ln_post.*", "post_layernorm.*"),
    *_BLOCKS,
    ("proj", "../visual_projection.weight", "transposed"),
)
_SIGLIP = (
    ("trunk.pos_embed", "embeddings.position_embedding.weight", "axis"),
    ("trunk.patch_embed.proj.*", "embeddings.patch_embedding.*"),
    ("trunk.blocks.#.norm1.*", "encoder.layers.#.layer_norm1.*"),
    ("trunk.blocks.#.attn.qkv.*", "encoder.layers.#.self_attn.{q,k,v}_proj.*"),
    ("trunk.blocks.#.attn.proj.*", "encoder.layers.#.self_attn.out_proj.*"),
    ("trunk.blocks.#.norm2.*", "encoder.layers.#.layer_norm2.*"),
    ("trunk.blocks.#.mlp.fc1.*", "encoder.layers.#.mlp.fc1.*"),
    ("trunk.blocks.#.mlp.fc2.*", "encoder.layers.#.mlp.fc2.*"),
    ("trunk.norm.*", "post_layernorm.*"),
    ("trunk.attn_pool.latent", "head.probe"),
    ("trunk.attn_pool.{q,kv}.*", "head.attention.in_proj_*"),
    ("trunk.attn_pool.proj.*", "head.attention.out_proj.*"),
    ("trunk.attn_pool.norm.*", "head.layernorm.*"),
    ("trunk.attn_pool.mlp.fc1.*", "head.mlp.fc1.*"),
    ("trunk.attn_pool.mlp.fc2.*", "head.mlp.fc2.*"),
)
_TEXT = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.*", "final_layer_norm.*"),
    *_BLOCKS,
    ("../logit_scale", "../logit_scale"),
)
_VIT_TEXT = (
    *_TEXT,
    ("text_projection", "../text_projection.weight", "transposed"),
)
_SIGLIP_TEXT = (
    *_TEXT,
    ("../logit_bias", "../logit_bias"),
    ("text_projection.*", "head.*"),
)


class Computed(Mapping[str, Tensor]):
    """A state dict whose tensors are made when they are asked for, and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def renamed(source: Mapping[str, Tensor], names: Mapping[str, str]) -> Computed:
    """A view of a state dict under other names (new -> old)."""
    return Computed({new: functools.partial(source.__getitem__, old) for new, old in names.items()})


class _Rule(NamedTuple):
    ours: list[str]
    theirs: list[str]
    how: str

    def tensor(self, state: Mapping[str, Tensor], to_ours: bool, part: int) -> Tensor:
        """One of the tensors of the other side."""
        here, there = (self.theirs, self.ours) if to_ours else (self.ours, self.theirs)
        whole = torch.cat([state[name] for name in here]) if len(here) > 1 else state[here[0]]
        if self.how == "transposed":
            return whole.T.contiguous()
        if self.how == "axis":
            return whole[None] if to_ours else whole[0]
        if len(there) == 1:
            return whole
        third = len(whole) // 3  # q, k and v: each apart, or q and kv
        return whole[third * part : len(whole) if part == len(there) - 1 else third * (part + 1)]


def _rules(
    table: Iterable[tuple[str, ...]], ours: str, theirs: str, names: Iterable[str], blocks: str
) -> list[_Rule]:
    """The rules of a table with its names behind two prefixes, for as many blocks as there are
    among `names` behind the prefix `blocks`."""
    inside = (name.removeprefix(blocks) for name in names if name.startswith(blocks))
    words = {name.partition(".")[0] for name in inside}
    numbers = range(sum(word.isdigit() for word in words))
    return [
        _Rule(_parts(ours, mine, number, kind), _parts(theirs, other, number, kind), "".join(how))
        for mine, other, *how in table
        for number in (numbers if "#" in mine else (0,))
        for kind in (("weight", "bias") if "*" in mine else ("",))
    ]


def _parts(prefix: str, name: str, number: int, kind: str) -> list[str]:
    """`a.#.{q,kv}.*` -> `a.0.q.weight` and `a.0.kv.weight`, behind the prefix."""
    if name.startswith("../"):
        for tower in ("vision_model.", "text_model.", "text."):
            prefix = prefix.removesuffix(tower)
    whole = prefix + name.removeprefix("../").replace("#", str(number)).replace("*", kind)
    start, _, rest = whole.partition("{")
    words, _, end = rest.partition("}")
    return [f"{start}{word}{end}" for word in words.split(",")]


class Layout:
    """The names and shapes that transformers gives the tensors of an open_clip model: an image
    tower, whose names begin with `vision` there, or a whole CLIP, whose tower is under `visual.`.

    Attributes:
        names: transformers' name -> tensor, made when asked for.
    """

    def __init__(self, model: Mapping[str, Tensor], vision: str = "") -> None:
        whole = any(name.startswith("visual.") for name in model)
        ours, theirs = ("visual.", "vision_model.") if whole else ("", vision)
        text = "text." if "text.ln_final.weight" in model else ""
        siglip = f"{ours}trunk.attn_pool.latent" in model
        blocks = f"{ours}trunk.blocks." if siglip else f"{ours}transformer.resblocks."
        self._rules = _rules(_SIGLIP if siglip else _VIT, ours, theirs, model, blocks)
        if whole:
            table, blocks = _SIGLIP_TEXT if siglip else _VIT_TEXT, f"{text}transformer.resblocks."
            self._rules += _rules(table, text, "text_model.", model, blocks)
        self.names = _converted(model, self._rules, to_ours=False)

    def to_ours(self, state: Mapping[str, Tensor]) -> Computed:
        """Tensors under transformers' names -> under open_clip's; what has no place keeps its
        name, to be reported."""
        return _converted(state, self._rules, to_ours=True)


def _converted(state: Mapping[str, Tensor], rules: Iterable[_Rule], to_ours: bool) -> Computed:
    makers: dict[str, Callable[[], Tensor]] = {}
    used: set[str] = set()
    for rule in rules:
        here, there = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        if all(name in state for name in here):
            used.update(here)
            for part, name in enumerate(there):
                makers[name] = functools.partial(rule.tensor, state, to_ours, part)
    left = [name for name in state if name not in used]
    return Computed(makers | {name: functools.partial(state.__getitem__, name) for name in left})


def tower_to_transformers(state: Mapping[str, Tensor], prefix: str = "vision_model.") -> Computed:
    """An open_clip image tower -> transformers' names (`CLIPVisionModelWithProjection`)."""
    return Layout(state, prefix).names


def clip_to_transformers(state: Mapping[str, Tensor]) -> Computed:
    """A whole open_clip CLIP -> transformers' names (`CLIPModel`)."""
    return Layout(state).names


def tower_from_transformers(state: Mapping[str, Tensor], prefix: str) -> Computed:
    """A CLIP's image tower in transformers' layout -> open_clip's names, made when asked for."""
    rules = _rules(_VIT, "", prefix, state, f"{prefix}encoder.layers.")
    return _converted(state, rules, to_ours=True)


def transformers_prefix(names: Iterable[str]) -> str | None:
    """What stands before an image tower's names in transformers' layout; None: another layout."""
    prefixes = [name.removesuffix(_PATCHES) for name in names if name.endswith(_PATCHES)]
    return prefixes[0] if len(prefixes) == 1 else None
