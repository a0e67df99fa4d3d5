"""What an open_clip config from a file may say: a model's shape, and nothing to import or fetch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from adamerge._base.binding import describe, fits, nearest
from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json

_MODEL = {
    "embed_dim": int,
    "quick_gelu": bool | None,
    "custom_text": bool | None,
    "init_logit_scale": float | None,
    "init_logit_bias": float | None,
    "nonscalar_logit_scale": bool | None,
}
_PARTS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")
# Several times what open_clip's own architectures have; all other numbers are at most _MOST_OTHER.
_MOST = {"layers": 512, "mlp_ratio": 64, "image_size": 8192, "eps": 1}
_MOST |= dict.fromkeys(("vocab_size", "eos_id", "pad_id"), 2_000_000)
_MOST_OTHER = 16384
_MOST_PARAMETERS = 8e9
_SIZES = ("embed_dim", "layers", "width", "head_width", "heads", "patch_size", "image_size",
          "context_length", "vocab_size", "mlp_ratio", "dim_head", "n_queries",
          "attn_pooler_heads", "attn_pooler_queries")  # fmt: skip
# Dictionaries handed on as arguments, of which a file may set these.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "act_kwargs": {"approximate": Literal["none", "tanh"]},
    "norm_kwargs": {"eps": float},
    "tokenizer_kwargs": {
        "clean": Literal["canonicalize", "lower", "whitespace"],
        "strip_sep_token": bool,
    },
}
_WORD = re.compile(r"[\w.-]*")
_TOKENIZER = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_model_config(model: Any, where: str) -> None:
    """Refuses a `model_cfg` that is not the description of a model of reasonable size.

    Keys and types are those of open_clip's own config classes.

    Args:
        where: what messages call it.

    Raises:
        AdamergeError: unknown keys, values of another type or size, or a name that would make
            open_clip, timm or transformers look elsewhere or run code.
    """
    if not isinstance(model, Mapping) or not all(key in model for key in _NEEDED):
        raise AdamergeError(
            f"{where} lacks embed_dim, vision_cfg or text_cfg: expected an open_clip model config "
            "in JSON"
        )
    whole = {key: value for key, value in model.items() if key not in _PARTS}
    wrong = list(_problems("model_cfg", whole, _MODEL))
    for name, kind in _PARTS.items():
        if name in model:
            wrong += _problems(name, model[name], get_type_hints(kind))
    wrong += [] if wrong else _too_large(model)
    if wrong:
        raise AdamergeError(
            f"architecture {where!r} is not a model open_clip can build from a file "
            f"({'; '.join(wrong)}): expected keys, types and sizes as in open_clip's own configs"
        )


def check_preprocess_config(preprocess: Any, where: str) -> None:
    """Refuses a `preprocess_cfg` that open_clip could not use.

    Raises:
        AdamergeError: unknown keys, or values of another type or size.
    """
    if not isinstance(preprocess, Mapping):
        raise AdamergeError(f"{where}: preprocess_cfg is {preprocess!r}: expected keys and values")
    wrong = []
    for key, value in preprocess.items():
        wanted, fits_it = _PREPROCESS.get(key, ("", None))
        if fits_it is None:
            wrong.append(f"preprocess_cfg.{key} is unknown{nearest(str(key), _PREPROCESS)}")
        elif not fits_it(value):
            wrong.append(f"preprocess_cfg.{key} is {_short(value)}: expected {wanted}")
    if wrong:
        raise AdamergeError(f"{where}: {'; '.join(wrong)}; mend that file, or copy it again")


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(type(side) is int and 1 <= side <= _MOST["image_size"] for side in sides)


def _is_triple(value: Any) -> bool:
    numbers = value if isinstance(value, list | tuple) else ()
    return len(numbers) == 3 and all(type(n) in (int, float) and 0 <= n < 1e6 for n in numbers)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


_PREPROCESS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": (f"whole numbers up to {_MOST['image_size']}", _is_size),
    "mean": ("3 numbers", _is_triple),
    "std": ("3 numbers", _is_triple),
    "mode": ("'RGB'", ("RGB",).__contains__),
    "interpolation": ("a name", _is_word),
    "resize_mode": ("a name", _is_word),
    "fill_color": ("a number from 0 to 255", range(256).__contains__),
}


def refuse_code(folder: Path, names: Iterable[str]) -> None:
    """Refuses a tokenizer whose files name code of their own, or no tokenizer of transformers.

    Raises:
        AdamergeError: naming the file and the key.
    """
    for path in (folder / name for name in names if name.endswith(".json")):
        if path.name == "tokenizer.json" or not path.is_file():  # a vocabulary, not settings
            continue
        settings = read_json(path)
        wrong: list[str] = [k for k in ("auto_map", "trust_remote_code") if k in settings]
        kind = settings.get("tokenizer_class")
        if kind is not None and not re.fullmatch(r"\w+Tokenizer(Fast)?", str(kind)):
            wrong.append("tokenizer_class")
        if wrong:
            raise AdamergeError(
                f"{path} sets {wrong[0]}, which would run code that comes with the model: nothing "
                "of it is run; use a model with a tokenizer of transformers' own, or remove the "
                "key if the tokenizer is one"
            )


def _problems(where: str, given: Any, hints: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(given, Mapping):
        yield f"{where} is {_short(given)}: expected keys and values"
        return
    for key, value in given.items():
        at = f"{where}.{key}"
        if key not in hints:
            yield f"{at} is unknown{nearest(key, hints)}"
        elif key == "hf_model_name" and value is not None:
            yield (
                f"{at} names a text tower to be fetched from elsewhere; set suite.architecture to "
                "open_clip's name of the model"
            )
        elif value is None:
            continue  # as left out
        elif key in _ARGUMENTS:
            yield from _problems(at, value, _ARGUMENTS[key])
        elif key in ("layers", "image_size") and isinstance(value, list):
            for number in value if 1 < len(value) < 5 else [value]:
                yield from _value_problems(at, key, number, int)
        else:
            yield from _value_problems(at, key, value, hints[key])


def _value_problems(at: str, key: str, value: Any, hint: Any) -> Iterator[str]:
    if isinstance(value, list | dict) or not fits(value, hint):
        yield f"{at} is {_short(value)}: expected {describe(hint)}"
    elif isinstance(value, str):
        shape = _TOKENIZER if key == "hf_tokenizer_name" else _WORD
        if not shape.fullmatch(value):
            yield f"{at} is {_short(value)}: expected a plain name, and no address or path"
    elif not isinstance(value, bool):
        most = _MOST.get(key, _MOST_OTHER)
        least = 1 if key in _SIZES else 0 if key == "eps" else -_MOST_OTHER
        if not least <= value <= most:
            yield f"{at} is {value}: expected a number from {least} to {most}"


def _too_large(model: Mapping[str, Any]) -> Iterator[str]:
    """A rough count of parameters, before any is made."""
    count = 0.0
    for name, kind in _PARTS.items():
        if name not in model:
            continue
        usual = {field.name: field.default for field in dataclasses.fields(kind)}
        part = {**usual, **{k: v for k, v in model[name].items() if v is not None}}
        layers = sum(part["layers"]) if isinstance(part["layers"], list) else part["layers"]
        width, side = part["width"], part.get("image_size", 0)
        side = max(side) if isinstance(side, list) else side
        positions = (side / part.get("patch_size", 1)) ** 2 + part.get("context_length", 0)
        per_layer = width**2 * (4 + 2 * part["mlp_ratio"])
        if isinstance(part["layers"], list):  # a ResNet, whose last stage is 32 times as wide
            per_layer, positions = (32 * width) ** 2, (side / 32) ** 2
        count += layers * per_layer + width * (positions + part.get("vocab_size", 0))
    if count > _MOST_PARAMETERS:
        yield f"it has about {count:.0e} parameters, more than {_MOST_PARAMETERS:.0e}"


def _short(value: Any) -> str:
    return repr(value)[:60]
