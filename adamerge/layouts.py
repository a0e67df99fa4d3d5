"""One CLIP, two layouts: open_clip's and transformers' names and shapes of the same tensors.

transformers keeps q, k and v apart, and its projections transposed. Both describe the same
function, so a conversion is exact in either direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_PATCHES = "embeddings.patch_embedding.weight"  # only transformers' image towers have it
_TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": _PATCHES,
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LEFT_OVER = ("position_ids",)  # constants that old versions of transformers saved


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
    """`ours` is `theirs` concatenated over rows (q, k, v), or transposed, or the same."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False

    def to_ours(self, state: Mapping[str, Tensor]) -> Tensor:
        if len(self.theirs) > 1:
            return torch.cat([state[name] for name in self.theirs])
        tensor = state[self.theirs[0]]
        return tensor.T.contiguous() if self.transposed else tensor

    def to_theirs(self, state: Mapping[str, Tensor], part: int) -> Tensor:
        tensor = state[self.ours]
        if len(self.theirs) > 1:
            return tensor.chunk(len(self.theirs))[part]
        return tensor.T.contiguous() if self.transposed else tensor


def _blocks(ours: str, theirs: str, count: int) -> Iterable[_Rule]:
    for block in range(count):
        a, b = f"{ours}transformer.resblocks.{block}.", f"{theirs}encoder.layers.{block}."
        for kind in ("weight", "bias"):
            qkv = tuple(f"{b}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield _Rule(f"{a}attn.in_proj_{kind}", qkv)
            for mine, other in _BLOCK.items():
                yield _Rule(f"{a}{mine}.{kind}", (f"{b}{other}.{kind}",))


def _tower_rules(ours: str, theirs: str, projection: str, count: int) -> list[_Rule]:
    rules = [_Rule(f"{ours}{a}", (f"{theirs}{b}",)) for a, b in _TOWER.items()]
    rules += _blocks(ours, theirs, count)
    return [*rules, _Rule(f"{ours}proj", (f"{projection}visual_projection.weight",), True)]


def _text_rules(count: int) -> list[_Rule]:
    rules = [_Rule(a, (b,)) for a, b in _TEXT.items()]
    rules += _blocks("", "text_model.", count)
    return [*rules, _Rule("text_projection", ("text_projection.weight",), True)]


def _count(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are under a prefix like `vision_model.encoder.layers.`."""
    inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({number for number in (n.partition(".")[0] for n in inside) if number.isdigit()})


def transformers_prefix(names: Iterable[str]) -> str | None:
    """What stands before an image tower's names in transformers' layout; None: another layout."""
    found = [name.removesuffix(_PATCHES) for name in names if name.endswith(_PATCHES)]
    return found[0] if len(found) == 1 else None


def tower_from_transformers(state: Mapping[str, Tensor], prefix: str) -> Computed:
    """An image tower in transformers' layout -> open_clip's names, made when asked for.

    Names that belong to no open_clip tensor stay as they are, to be reported as unknown; a tower
    without a projection gives none.
    """
    parent = prefix.removesuffix("vision_model.")
    rules = _tower_rules("", prefix, parent, _count(state, f"{prefix}encoder.layers."))
    return _to_ours(state, rules, [name for name in state if name.startswith(prefix)])


def clip_from_transformers(state: Mapping[str, Tensor], prefix: str) -> Computed:
    """A whole CLIP in transformers' layout -> open_clip's names, made when asked for."""
    tower = prefix.removesuffix("vision_model.")
    inner = renamed(state, {n.removeprefix(tower): n for n in state if n.startswith(tower)})
    rules = [
        *_tower_rules(
            "visual.", "vision_model.", "", _count(inner, "vision_model.encoder.layers.")
        ),
        *_text_rules(_count(inner, "text_model.encoder.layers.")),
    ]
    return _to_ours(inner, rules, list(inner))


def _to_ours(
    state: Mapping[str, Tensor], rules: Iterable[_Rule], expected: Iterable[str]
) -> Computed:
    makers: dict[str, Callable[[], Tensor]] = {}
    used: set[str] = set()
    for rule in rules:
        if all(name in state for name in rule.theirs):
            makers[rule.ours] = functools.partial(rule.to_ours, state)
            used.update(rule.theirs)
    for name in expected:
        if name not in used and not name.endswith(_LEFT_OVER):
            makers[name] = functools.partial(state.__getitem__, name)
    return Computed(makers)


def tower_to_transformers(state: Mapping[str, Tensor], prefix: str = "vision_model.") -> Computed:
    """An open_clip image tower -> transformers' names (`CLIPVisionModelWithProjection`)."""
    return _to_theirs(state, _tower_rules("", prefix, "", _count(state, "transformer.resblocks.")))


def clip_to_transformers(state: Mapping[str, Tensor]) -> Computed:
    """A whole open_clip CLIP -> transformers' names (`CLIPModel`)."""
    blocks = _count(state, "visual.transformer.resblocks.")
    text = [name for name in state if not name.startswith("visual.")]
    rules = _tower_rules("visual.", "vision_model.", "", blocks)
    return _to_theirs(state, [*rules, *_text_rules(_count(text, "transformer.resblocks."))])


def _to_theirs(state: Mapping[str, Tensor], rules: Iterable[_Rule]) -> Computed:
    makers: dict[str, Callable[[], Tensor]] = {}
    used = set()
    for rule in rules:
        if rule.ours in state:
            used.add(rule.ours)
            for part, name in enumerate(rule.theirs):
                makers[name] = functools.partial(rule.to_theirs, state, part)
    for name in state:  # what transformers has no place for keeps its name, to be reported
        if name not in used:
            makers[name] = functools.partial(state.__getitem__, name)
    return Computed(makers)
