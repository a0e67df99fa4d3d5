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
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_POOL = {
    "proj": "attention.out_proj",
    "norm": "layernorm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


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
    """`ours` and `theirs` are the same tensor, or joined over rows they are; or transposed, or with
    an axis of length 1 before."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    how: str = "same"

    def to_ours(self, state: Mapping[str, Tensor], part: int) -> Tensor:
        tensor = self._joined(state, self.theirs, self.ours, part)
        return tensor[None] if self.how == "axis" else tensor

    def to_theirs(self, state: Mapping[str, Tensor], part: int) -> Tensor:
        tensor = self._joined(state, self.ours, self.theirs, part)
        return tensor[0] if self.how == "axis" else tensor

    def _joined(
        self, state: Mapping[str, Tensor], here: tuple[str, ...], there: tuple[str, ...], part: int
    ) -> Tensor:
        if len(here) == len(there) == 1:
            tensor = state[here[0]]
            return tensor.T.contiguous() if self.how == "transposed" else tensor
        whole = torch.cat([state[name] for name in here]) if len(here) > 1 else state[here[0]]
        third = len(whole) // 3  # q, k and v: each apart, or q and kv
        last = part == len(there) - 1
        return whole[third * part : len(whole) if last else third * (part + 1)]


def _same(ours: str, theirs: str, how: str = "same") -> _Rule:
    return _Rule((ours,), (theirs,), how)


def _linear(ours: str, theirs: str) -> list[_Rule]:
    return [_same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def _blocks(
    ours: str,
    theirs: str,
    count: int,
    parts: Mapping[str, str] = _BLOCK,
    qkv: str = "attn.in_proj_",
) -> Iterator[_Rule]:
    for block in range(count):
        a, b = f"{ours}{block}.", f"{theirs}encoder.layers.{block}."
        for kind in ("weight", "bias"):
            apart = tuple(f"{b}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield _Rule((f"{a}{qkv}{kind}",), apart)
        for mine, other in parts.items():
            yield from _linear(f"{a}{mine}", f"{b}{other}")


def _vit(ours: str, theirs: str, projection: str, count: int) -> Iterator[_Rule]:
    """The image tower of a CLIP: open_clip's VisionTransformer."""
    yield _same(f"{ours}class_embedding", f"{theirs}embeddings.class_embedding")
    yield _same(f"{ours}positional_embedding", f"{theirs}embeddings.position_embedding.weight")
    yield _same(f"{ours}conv1.weight", f"{theirs}{_PATCHES}")
    yield from _linear(f"{ours}ln_pre", f"{theirs}pre_layrnorm")
    yield from _linear(f"{ours}ln_post", f"{theirs}post_layernorm")
    yield from _blocks(f"{ours}transformer.resblocks.", theirs, count)
    yield _same(f"{ours}proj", f"{projection}visual_projection.weight", "transposed")


def _siglip(ours: str, theirs: str, count: int) -> Iterator[_Rule]:
    """The image tower of a SigLIP: timm's, pooled by attention."""
    trunk, head = f"{ours}trunk.", f"{theirs}head."
    yield _same(f"{trunk}pos_embed", f"{theirs}embeddings.position_embedding.weight", "axis")
    yield from _linear(f"{trunk}patch_embed.proj", f"{theirs}embeddings.patch_embedding")
    yield from _blocks(f"{trunk}blocks.", theirs, count, _TIMM_BLOCK, "attn.qkv.")
    yield from _linear(f"{trunk}norm", f"{theirs}post_layernorm")
    yield _same(f"{trunk}attn_pool.latent", f"{head}probe")
    for kind in ("weight", "bias"):
        apart = tuple(f"{trunk}attn_pool.{part}.{kind}" for part in ("q", "kv"))
        yield _Rule(apart, (f"{head}attention.in_proj_{kind}",))
    for mine, other in _POOL.items():
        yield from _linear(f"{trunk}attn_pool.{mine}", f"{head}{other}")


def _text(ours: str, count: int, siglip: bool) -> Iterator[_Rule]:
    theirs = "text_model."
    yield _same(f"{ours}token_embedding.weight", f"{theirs}embeddings.token_embedding.weight")
    yield _same(f"{ours}positional_embedding", f"{theirs}embeddings.position_embedding.weight")
    yield from _linear(f"{ours}ln_final", f"{theirs}final_layer_norm")
    yield _same("logit_scale", "logit_scale")
    yield from _blocks(f"{ours}transformer.resblocks.", theirs, count)
    if siglip:
        yield _same("logit_bias", "logit_bias")
        yield from _linear(f"{ours}text_projection", f"{theirs}head")
    else:
        yield _same(f"{ours}text_projection", "text_projection.weight", "transposed")


class Layout:
    """The names and shapes that transformers gives the tensors of an open_clip model.

    Args:
        own: tensors of an image tower, or of a whole CLIP (whose tower is under `visual.`).
        vision: what transformers' names of an image tower alone begin with.

    Attributes:
        names: transformers' name -> tensor, made when asked for.
    """

    def __init__(self, own: Mapping[str, Tensor], vision: str = "") -> None:
        whole = any(name.startswith("visual.") for name in own)
        before = "visual." if whole else ""
        vision = "vision_model." if whole else vision
        siglip = f"{before}trunk.attn_pool.latent" in own
        if siglip:
            rules = list(_siglip(before, vision, _count(own, f"{before}trunk.blocks.")))
        else:
            rules = list(_vit(before, vision, "", _count(own, f"{before}transformer.resblocks.")))
        if whole:
            text = "text." if "text.ln_final.weight" in own else ""
            rules += _text(text, _count(own, f"{text}transformer.resblocks."), siglip)
        self._rules = rules
        self.names = _converted(own, rules, to_ours=False)

    def to_ours(self, state: Mapping[str, Tensor]) -> Computed:
        """Tensors under transformers' names -> under open_clip's; what has no place keeps its
        name, to be reported."""
        return _converted(state, self._rules, to_ours=True)


def _converted(state: Mapping[str, Tensor], rules: Iterable[_Rule], to_ours: bool) -> Computed:
    makers: dict[str, Callable[[], Tensor]] = {}
    used: set[str] = set()
    for rule in rules:
        here, there = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        make = rule.to_ours if to_ours else rule.to_theirs
        if all(name in state for name in here):
            used.update(here)
            for part, name in enumerate(there):
                makers[name] = functools.partial(make, state, part)
    for name in state:
        if name not in used:
            makers[name] = functools.partial(state.__getitem__, name)
    return Computed(makers)


def tower_to_transformers(state: Mapping[str, Tensor], prefix: str = "vision_model.") -> Computed:
    """An open_clip image tower -> transformers' names (`CLIPVisionModelWithProjection`)."""
    return Layout(state, prefix).names


def clip_to_transformers(state: Mapping[str, Tensor]) -> Computed:
    """A whole open_clip CLIP -> transformers' names (`CLIPModel`)."""
    return Layout(state).names


def tower_from_transformers(state: Mapping[str, Tensor], prefix: str) -> Computed:
    """A CLIP's image tower in transformers' layout -> open_clip's names, made when asked for."""
    count = _count(state, f"{prefix}encoder.layers.")
    rules = _vit("", prefix, prefix.removesuffix("vision_model."), count)
    return _converted(state, rules, to_ours=True)


def _count(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are under a prefix like `transformer.resblocks.`."""
    inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return len({number for number in (n.partition(".")[0] for n in inside) if number.isdigit()})


def transformers_prefix(names: Iterable[str]) -> str | None:
    """What stands before an image tower's names in transformers' layout; None: another layout."""
    found = [name.removesuffix(_PATCHES) for name in names if name.endswith(_PATCHES)]
    return found[0] if len(found) == 1 else None
