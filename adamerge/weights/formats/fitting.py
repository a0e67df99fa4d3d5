"""What it means that a checkpoint's tensors are not those of an architecture, and the mend."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.matching import Match, several

log = logging.getLogger("adamerge")

_IMAGE = ("visual.", "vision_model.", "visual_projection.")
# What names tell of a model, the first that fits; each all of its words.
_FAMILIES = (
    (("lora_A",), "a model with unmerged LoRA matrices: call merge_and_unload before saving it"),
    (("lora_down",), "LoRA matrices of another library than PEFT"),
    (("transformer.resblocks.",), "open_clip's vision transformer"),
    (("embeddings.patch_embedding.bias",), "transformers' SigLIP (model_type siglip)"),
    (("head.probe",), "transformers' SigLIP (model_type siglip)"),
    (("embeddings.cls_token",), "transformers' ViT or DINOv2"),
    (("embeddings.patch_embedding.weight",), "transformers' CLIP"),
    (("encoder.layers.", "self_attn.q_proj"), "transformers' CLIP"),
    (("attnpool.", "layer4."), "CLIP's ResNet"),
    (("layer4.", "bn1."), "a ResNet"),
    (("patch_embed.", "blocks."), "timm's vision transformer"),
    (("blocks.", "attn.qkv"), "timm's vision transformer"),
    (("stages.", "blocks."), "a ConvNeXt or another of timm's"),
    (("word_embeddings",), "a text model"),
    (("model.layers.", "self_attn.q_proj"), "a language model"),
)


def check_tower(matched: Match, fill: bool) -> None:
    """Judges an image tower of which names are missing or unknown; `fill` takes the pretrained
    tensors for those that are missing.

    Raises:
        AdamergeError: a tower of another kind, or one that only `fill` completes.
    """
    source, missing, extra, wanted = matched.source, matched.missing, matched.extra, matched.wanted
    kind = _kind(matched)
    if len(missing) == len(wanted) or kind is not None:
        expected = family(wanted) or f"one with {next(iter(wanted))!r}"
        said = f"it is {kind}" if kind else f"found names like {next(iter(matched.tensors))!r}"
        raise AdamergeError(
            f"{source} holds no image tower of this architecture ({expected}, behind any prefix): "
            f"{said}; check the file and suite.architecture"
        )
    looks = f" ({family(matched.names)})" if matched.layout is not None else ""
    wrong = [
        name
        for name, raw in matched.names.items()
        if name in wanted and matched.tensors[raw].shape != wanted[name].shape
    ]
    if extra or wrong:
        lacks = f"lacks {len(missing)} ({several(missing)}), " if missing else ""
        has = f"has {len(extra)} that it has not ({several(extra)}), " if extra else ""
        shapes = f"has {len(wrong)} of other shapes ({several(wrong)}), " if wrong else ""
        raise AdamergeError(
            f"{source}{looks} {lacks}{has}{shapes}of the {len(wanted)} tensors of this image tower:"
            " it is of another architecture; set suite.architecture to the one it was trained with"
        )
    if not fill:
        raise AdamergeError(
            f"{source}{looks} lacks {len(missing)} of the tower's {len(wanted)} tensors, such as "
            f"{missing[0]}, and has {len(wanted) - len(missing)}: if those it lacks were frozen in "
            "fine-tuning, set missing: pretrained for its task, or for the suite (suite.missing), "
            "which takes the pretrained ones"
        )
    log.info(
        "%s lacks %d of the tower's %d tensors (%s): the pretrained ones are used",
        *(source, len(missing), len(wanted), several(missing)),
    )


def with_text_names(matched: Match) -> Match:
    """With text towers under `text.` and without it told apart no more."""
    names = {}
    for name, raw in matched.names.items():
        other = name.removeprefix("text.") if name.startswith("text.") else f"text.{name}"
        names[other if name not in matched.wanted and other in matched.wanted else name] = raw
    return dataclasses.replace(matched, names=names)


def lacks_text(matched: Match) -> bool:
    """Whether a CLIP comes without a text tower, or with the rest of one."""
    names = [name for name in matched.names if not name.startswith(_IMAGE)]
    embeds = any("token_embedding" in n or "word_embeddings" in n for n in names)
    return not embeds or not any("resblocks." in n or "encoder.layer" in n for n in names)


def check_whole(matched: Match, missing: list[str], extra: list[str], where: str) -> None:
    """Refuses a whole CLIP of which tensors are missing or unknown."""
    kind = _kind(matched) if missing or extra else None
    if missing and lacks_text(matched) and kind is None:
        raise AdamergeError(
            f"{where} lacks tensor {missing[0]!r} ({len(missing)} such): expected a whole CLIP, "
            "because the heads are made by its text tower; name the CLIP it was fine-tuned from "
            "(of `adamerge convert`: --pretrained), or give every task a stored head (head:)"
        )
    if missing == ["logit_scale"]:
        raise AdamergeError(
            f"{where} lacks logit_scale, the temperature of the heads: give what similarities were "
            "multiplied with in training as suite.logit_scale (100 for OpenAI's), or every task a "
            "stored head (head:)"
        )
    it = "it is not of this architecture" if kind is None else f"it is {kind}"
    for names, verb in ((missing, "lacks"), (extra, "has the unknown")):
        if names:
            raise AdamergeError(
                f"{where} {verb} tensor {names[0]!r} ({len(names)} such): {it}; set "
                "suite.architecture to the one it was trained with"
            )


def _kind(matched: Match) -> str | None:
    """What kind of model the names are of, if it is known and another than the wanted one."""
    kind = family(matched.names or matched.tensors)
    ours = matched.wanted if matched.layout is None else matched.layout.to_ours(matched.wanted)
    return None if kind in (family(matched.wanted), family(ours)) else kind


def family(names: Iterable[str]) -> str | None:
    """What kind of model has such names; None if that is not known."""
    text = "\n".join(names)
    return next((said for words, said in _FAMILIES if all(w in text for w in words)), None)


def other_shape(name: str, given: Sequence[int], wanted: Sequence[int], mend: str) -> str:
    """What it means that a tensor has another shape than the architecture's, and the mend: that
    given where it means no more than that."""
    if 0 in given:
        return (
            "it is a place-holder of a sharded training (ZeRO-3): join the shards with DeepSpeed's "
            "`python zero_to_fp32.py . joined` in the checkpoint's folder, and give that file"
        )
    grids = [_grid(shape) for shape in (given, wanted)]
    if "pos" in name and all(grids) and given[-1] == wanted[-1]:
        sides = " against ".join(f"{side} x {side}" for side in grids)
        return (
            f"it was trained at another resolution (a grid of {sides} patches): set "
            "suite.architecture to the same model at that image size"
        )
    return mend


def _grid(shape: Sequence[int]) -> int | None:
    """The side of a square of patches, with a class token or without, of a table of positions."""
    counts = (shape[-2] - 1, shape[-2]) if len(shape) > 1 else ()
    return next((round(n**0.5) for n in counts if n > 0 and round(n**0.5) ** 2 == n), None)
