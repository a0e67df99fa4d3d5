"""The files of an exported folder: their names, and the encoder and heads that they make again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import safe_open
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import parse_json, read_json, sha256
from adamerge.encoders.clip import build_backbone
from adamerge.encoders.experts import PerTaskEncoder
from adamerge.encoders.heads import Heads
from adamerge.encoders.model_check import check_preprocess_config
from adamerge.encoders.tower import FoldedEncoder, Tower
from adamerge.methods.adapters import AdaptedEncoder
from adamerge.methods.mixtures import DynamicEncoder, within

RECORD, HEADS = "merge.json", "heads.safetensors"
BIAS = "bias of "  # in front of a task's name: the bias of a learned head
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# A dynamic encoder is none that open_clip could build: under these names it does not try.
OWN_CONFIG, OWN_WEIGHTS = "adamerge_config.json", "encoder.safetensors"
ADAPTERS = "adapters.safetensors"
KINDS = ("static", "per_task", "dynamic", "adapters")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What an exported folder holds.

    Attributes:
        kind: `static`: an open_clip folder; `per_task`: one for each task; `dynamic`: routers and
            task vectors; `adapters`: adapters per task beside an encoder of kind `base`.
        tasks: the order of `task_ids`; () where the folder does not say.
        record: the content of `merge.json`.
    """

    kind: str = "static"
    tasks: tuple[str, ...] = ()
    base: str | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def by_task(self) -> bool:
        """Whether the encoder asks for the task of an image."""
        return self.kind in ("per_task", "adapters")


def find_export(folder: Path) -> Path:
    """The exported folder: `folder`, or that of a run.

    Raises:
        AdamergeError: there is none.
    """
    place = folder / "merged" if (folder / "config.yaml").is_file() else folder
    if not any((place / name).is_file() for name in (RECORD, CONFIG)):
        raise AdamergeError(
            f"{place} is no exported model (no {RECORD} or {CONFIG}): give a finished run or a "
            "folder that `adamerge export` wrote"
        )
    return place


def read_layout(folder: Path) -> Layout:
    """What a folder says of itself; without a word, as before there were kinds, it is static.

    Raises:
        AdamergeError: `merge.json` is damaged, or names a kind that this version does not know.
    """
    if not (folder / RECORD).is_file():
        return Layout()
    record = _json(folder / RECORD)
    kind, base, tasks = record.get("kind", "static"), record.get("base"), record.get("tasks", [])
    for key, value in (("kind", kind), ("base", base or "static")):
        if value not in KINDS:
            raise AdamergeError(
                f"{folder / RECORD}: {key} is {value!r}, which this version of adamerge does not "
                f"know (expected {', '.join(KINDS)}): the folder was made by a newer one; install "
                "that"
            )
    if kind == "adapters" and base == "adapters":
        raise _damaged(folder / RECORD, "base is adapters on adapters")
    if not isinstance(tasks, list) or (kind in ("per_task", "adapters") and not tasks):
        raise _damaged(folder / RECORD, f"tasks is {tasks!r}")
    return Layout(kind, tuple(map(str, tasks)), base, record)


def check_files(folder: Path, layout: Layout) -> None:
    """Holds the weight files against the sums that the export wrote down, if it did.

    Raises:
        AdamergeError: one is missing, of another export, or damaged; or `merge.json` does not know
            of adapters that are there.
    """
    if (folder / ADAPTERS).is_file() and layout.kind != "adapters":
        raise _damaged(folder / RECORD, f"it does not say what {ADAPTERS} is for")
    known = layout.record.get("sha256", {})
    for name, wanted in known.items() if isinstance(known, dict) else ():
        path = folder / str(name)
        if not path.is_file():
            raise _missing(path)
        if sha256(path) != wanted:
            raise _damaged(path, f"its sha256 is not that of {RECORD}")


def read_encoder(folder: Path, layout: Layout) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder of an exported folder, frozen, on the CPU, and its open_clip config.

    Raises:
        AdamergeError: a file is missing or damaged, or they do not fit together.
    """
    if layout.kind == "per_task":
        read = {task: _static(folder / task_folder(task)) for task in layout.tasks}
        encoders = {task: encoder for task, (encoder, _) in read.items()}
        return PerTaskEncoder(encoders), next(iter(read.values()))[1]
    if layout.kind == "dynamic":
        weights, _ = _tensors(folder / OWN_WEIGHTS)
        return _built(folder, OWN_CONFIG, OWN_WEIGHTS, lambda tower: DynamicEncoder(tower, weights))
    if layout.kind == "adapters":
        base = dataclasses.replace(layout, kind=layout.base or "static", base=None)
        encoder, config = read_encoder(folder, base)
        return _adapted(folder / ADAPTERS, encoder, layout.tasks), config
    return _static(folder)


def read_heads(folder: Path, layout: Layout) -> Heads:
    """The classifiers of an exported folder, held against its tasks.

    Raises:
        AdamergeError: the file is missing or damaged, or has heads of other tasks.
    """
    weights, notes = _tensors(folder / HEADS)
    try:
        classes = dict(parse_json(notes["classes"]))
        biases = {t: weights[f"{BIAS}{t}"] for t in classes if f"{BIAS}{t}" in weights}
        heads = Heads({task: weights[task] for task in classes}, classes, biases or None)
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(folder / HEADS, f"class names or heads are missing: {error}") from error
    if layout.tasks and set(layout.tasks) != set(heads.tasks):
        raise AdamergeError(
            f"{folder / HEADS} has heads for {', '.join(heads.tasks)}, {RECORD} names "
            f"{', '.join(layout.tasks)}: files of different exports are mixed; export it again"
        )
    return heads


def task_folder(task: str) -> str:
    """A task as the name of a folder in a `per_task` export, and of its adapters."""
    name = quote(task, safe=" ")
    return name.replace(".", "%2E") if not name.strip(". ") else name


def _static(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    weights, _ = _tensors(folder / WEIGHTS, "visual.")
    weights = within(weights, "visual.")
    return _built(folder, CONFIG, WEIGHTS, lambda tower: FoldedEncoder(tower, weights))


def _built(
    folder: Path, config: str, weights: str, build: Callable[[Tower], nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder on the tower of a config, and the config."""
    known = _config(folder / config)
    tower = Tower(build_backbone(known, str(folder)))
    try:
        return build(tower), known
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise AdamergeError(
            f"{folder / weights} does not hold the encoder of {config} "
            f"({' '.join(str(error).split())[:200]}): files of different exports are mixed; copy "
            "or export the folder again"
        ) from error


def _adapted(path: Path, encoder: nn.Module, tasks: tuple[str, ...]) -> AdaptedEncoder:
    tensors, notes = _tensors(path)
    try:
        adapters = {}
        for task in tasks:
            parts = within(tensors, f"{task_folder(task)}/")
            places = range(len(parts) // 2)
            adapters[task] = [(parts[f"{place}/down"], parts[f"{place}/up"]) for place in places]
        if len(set(map(len, adapters.values()))) != 1 or not adapters[tasks[0]]:
            raise KeyError("an adapter")
        return AdaptedEncoder(encoder, adapters, parse_json(notes["adapters"])["activation"])
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"{error} is missing") from error


def _config(path: Path) -> dict[str, Any]:
    config = _json(path)
    for key in ("model_cfg", "preprocess_cfg"):
        if not isinstance(config.get(key), dict):
            raise _damaged(path, f"{key} is missing")
    check_preprocess_config(config["preprocess_cfg"], str(path))
    return config


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _missing(path)
    try:
        return read_json(path)
    except AdamergeError as error:
        raise _damaged(path, str(error.__cause__)) from error


def _tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a safetensors file whose names begin so, and its notes."""
    if not path.is_file():
        raise _missing(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # the library raises many types for one thing
        raise _damaged(path, str(error)) from error


def _missing(path: Path) -> AdamergeError:
    return AdamergeError(f"{path} is missing: copy the whole exported folder, or export it again")


def _damaged(path: Path, reason: str) -> AdamergeError:
    return AdamergeError(
        f"{path} is damaged ({' '.join(reason.split())[:200]}): copy it again, or export it again"
    )
