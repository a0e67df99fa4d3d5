"""From a configuration to a run's inputs: pretrained model, task vectors, heads, images."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge import __version__
from adamerge._base.errors import AdamergeError
from adamerge._base.files import locked, sha256
from adamerge._base.kept import Digest, Kept, remembered
from adamerge.config.aligned import aligned, asks_images, own_heads
from adamerge.config.settings import Config
from adamerge.config.suite import require_root
from adamerge.config.trainer import may_touch_gpu, run_device
from adamerge.encoders.architectures import is_known
from adamerge.encoders.clip import Clip, Normalizer, build_clip
from adamerge.encoders.heads import Heads, Prompts, zero_shot_heads
from adamerge.encoders.pretrained import check_stated, load_pretrained
from adamerge.images.cache import TaskImages, cache_images
from adamerge.images.sources import open_dataset
from adamerge.learn.data import TaskData
from adamerge.learn.features import content_key
from adamerge.report.evaluation import Scorer
from adamerge.weights.formats import hub
from adamerge.weights.formats.read import Checkpoint, read, read_head, tower_state
from adamerge.weights.storage import Storage
from adamerge.weights.task_vectors import TaskVectors

log = logging.getLogger("adamerge")

States = dict[str, Mapping[str, Tensor]]


@dataclass
class Suite:
    """What is merged, loaded.

    Attributes:
        task_vectors: untransformed.
        files: sha256 of every weight file, by where it is used (`pretrained`, task names).
        key: of the weights: another one as soon as one of them, or the architecture, is another.
        digest: gives the sha256 of a file.
    """

    clip: Clip
    task_vectors: TaskVectors
    heads: Heads
    files: dict[str, dict[str, str]]
    key: str
    digest: Digest


@dataclass
class Inputs:
    """What settings name, loaded; nothing learns yet.

    Attributes:
        unseen: heads and images of the tasks that are only scored.
    """

    settings: Config
    suite: Suite
    data: TaskData
    unseen: tuple[Heads, TaskData] | None

    def kept(self, kind: str, *parts: object) -> Kept:
        """What is kept, of one kind, of these weights in this version and `parts`."""
        key = content_key({}, __version__, self.suite.key, *parts)
        return Kept(cache_root(self.settings) / kind / f"{key}.json")

    @property
    def device(self) -> torch.device:
        """Where the main process of a run computes."""
        return run_device(self.settings["trainer"])

    @property
    def normalizer(self) -> Normalizer:
        """The backbone's own normalisation."""
        return normalizer(self.suite.clip)

    def scorer(self, device: torch.device | None = None) -> Scorer:
        """Measures encoders on the suite's scored images, those of unseen tasks included."""
        given = (device or self.device, self.settings["evaluate"]["batch_size"])
        unseen = None
        if self.unseen is not None:
            heads, data = self.unseen
            unseen = Scorer(heads, self.normalizer, data, *given, merged=False)
        return Scorer(self.suite.heads, self.normalizer, self.data, *given, unseen=unseen)


def cache_root(config: Config) -> Path:
    """Where preprocessed images and heads are kept."""
    if config["cache_dir"]:
        return Path(config["cache_dir"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adamerge"


def load_clip(suite: Config, digest: Digest = sha256) -> tuple[Clip, dict[str, dict[str, str]]]:
    """The pretrained CLIP of a suite and the record of its file."""
    source, architecture = str(suite["pretrained"]), suite.get("architecture")
    if is_known(architecture) and not (Path(source).exists() or hub.is_hub(source)):
        clip = build_clip(str(architecture), source)
        assert clip.weights is not None  # a tag was given
        return clip, {"pretrained": {"path": source, "sha256": digest(clip.weights)}}
    checkpoint = read(source)
    clip = build_clip(_architecture(architecture, checkpoint))
    load_pretrained(clip, checkpoint, _needs_text(suite), suite.get("logit_scale"))
    check_stated(clip, checkpoint, str(architecture))
    return clip, {"pretrained": checkpoint.record(digest)}


def _needs_text(suite: Config) -> bool:
    """Whether a head is made by the text tower."""
    entries = {**suite.get("tasks", {}), **(suite.get("unseen") or {})}
    return not entries or any(entry.get("head") is None for entry in entries.values())


def _architecture(given: Any, pretrained: Checkpoint) -> str:
    """The architecture as named, fetched from the hub, or as the pretrained's folder says."""
    if given is not None:
        return str(hub.fetch(str(given)).path) if hub.is_hub(str(given)) else str(given)
    folder = pretrained.files[0].parent
    if any((folder / name).is_file() for name in ("open_clip_config.json", "config.json")):
        return str(folder)
    raise AdamergeError(
        f"the architecture is not named (suite.architecture, or --architecture), and {folder} has "
        "no open_clip_config.json or config.json that would tell it: name an open_clip model, like "
        "ViT-B-32-quickgelu"
    )


def load_suite(config: Config) -> Suite:
    """Pretrained model, task vectors and heads; experts are read tensor by tensor."""
    suite, digest = config["suite"], remembered(cache_root(config))
    require_root(suite)
    opened = {task: read(str(entry["expert"])) for task, entry in suite["tasks"].items()}
    sources = {task: expert.source for task, expert in opened.items()}
    start = next(iter(sources.values())) if suite.get("align") else str(suite["pretrained"])
    clip, files = load_clip({**suite, "pretrained": start}, digest)
    experts: States = {}
    for task, entry in suite["tasks"].items():
        files[task] = opened[task].record(digest)
        if entry.get("head") is not None:
            files[f"head of {task}"] = read(entry["head"]).record(digest)
        check_stated(clip, opened[task], str(suite.get("architecture")))
        if not suite.get("align"):
            fill = "pretrained" in (entry.get("missing"), suite.get("missing"))
            experts[task] = tower_state(opened[task], clip.backbone, fill)
    shape = json.dumps(clip.config["model_cfg"], sort_keys=True)
    weights = [files[name]["sha256"] for name in ("pretrained", *suite["tasks"])]
    heads, reference = load_heads(config, clip, opened=opened), None
    if suite.get("align"):
        data, folder = load_data(config, clip) if asks_images(suite) else None, cache_root(config)
        experts, reference = aligned(config, clip, opened, data, folder / "align", files)
        weights[0] = files["pretrained"]["sha256"]
    key = content_key({}, *weights, *suite["tasks"], shape)
    storage = _storage(config, key)
    vectors = _task_vectors(clip, experts, {"pretrained": start, **sources}, storage, reference)
    return Suite(clip, vectors, heads, files, f"{key}-{storage.dtype}", digest)


def _storage(config: Config, key: str) -> Storage:
    """How the experts' own task vectors are kept: those that a transform changes, in float32."""
    asked = config["task_vectors"]
    dtype = "float32" if config["transform"] else asked["dtype"]
    device = "disk" if asked["shard"] else asked["device"]
    if device != "disk":
        return Storage(dtype, device, pinned=may_touch_gpu(config["trainer"]))
    name = f"{key}-{dtype}.safetensors"
    return Storage(dtype, device, cache_root(config) / "task_vectors" / name)


def _task_vectors(
    clip: Clip,
    experts: States,
    sources: Mapping[str, str],
    storage: Storage,
    reference: str | None,
) -> TaskVectors:
    """Computed; or where they are kept on disk, once, by the first process that wants them."""
    pretrained = clip.backbone.state_dict()
    buffers = [name for name, _ in clip.backbone.named_buffers()]

    def on_disk(file: Path) -> TaskVectors | None:
        try:
            return (
                TaskVectors.mapped(pretrained, storage, experts, buffers)
                if file.is_file()
                else None
            )
        except AdamergeError as error:
            log.warning("%s now", error)  # "…, and it is made again"
            return None

    def computed() -> TaskVectors:
        return TaskVectors(
            pretrained,
            experts,
            sources=sources,
            share=True,
            storage=storage,
            buffers=buffers,
            start=reference,
        )

    if storage.file is None:
        return computed()
    if (kept := on_disk(storage.file)) is not None:
        return kept
    storage.file.parent.mkdir(parents=True, exist_ok=True)
    with locked(storage.file.with_suffix(".lock")):
        if (kept := on_disk(storage.file)) is not None:  # of a process that has just made them
            return kept
        log.info("task vectors are written to %s", storage.file)
        return computed()


def load_heads(
    config: Config, clip: Clip, part: str = "tasks", opened: Mapping[str, Checkpoint] | None = None
) -> Heads:
    """Zero-shot heads, but for tasks whose `head:` names a stored one.

    Args:
        opened: experts by task, whose own text towers make the heads where they are aligned.
    """
    stored = {
        task: read_head(entry["head"])
        for task, entry in config["suite"][part].items()
        if entry.get("head") is not None
    }
    asked, folder = prompts(config, part), cache_root(config)
    if config["suite"].get("align") and opened is not None:
        stored = own_heads(clip, opened, asked, folder) | stored
    return zero_shot_heads(clip, asked, folder, stored)


def prompts(config: Config, part: str = "tasks") -> dict[str, Prompts]:
    """Class names and templates per task; `part` is `tasks` or `unseen`."""
    return {
        task: Prompts(tuple(map(str, entry["classes"])), tuple(map(str, entry["templates"])))
        for task, entry in (config["suite"].get(part) or {}).items()
    }


def load_data(config: Config, clip: Clip) -> TaskData:
    """The cached images of every merged task, made on first use."""
    given = (config["batch_size"], config["seed"], config["protocol"], config["num_workers"])
    return TaskData(_load_images(config, clip, "tasks"), *given)


def _load_images(config: Config, clip: Clip, part: str) -> dict[str, TaskImages]:
    images = {}
    for task, asked in prompts(config, part).items():
        source = config["suite"][part][task]["data"]
        images[task] = cache_images(
            task,
            open_dataset(task, source, part),
            asked.classes,
            clip.preprocess_cfg,
            cache_root(config),
            config["on_bad_image"],
            str(source.get("image", "image")),
            source.get("label", "label"),
            source.get("label") is not None,
        )
    return images


def normalizer(clip: Clip) -> Normalizer:
    """The backbone's own normalisation."""
    return Normalizer(clip.preprocess_cfg.mean, clip.preprocess_cfg.std)


def load(settings: Config) -> Inputs:
    """Loads the weights, heads and images that a checked configuration names.

    Those of unseen tasks are kept apart from what a method, an objective and the batches get.
    """
    suite = load_suite(settings)
    clip, data, unseen = suite.clip, load_data(settings, suite.clip), None
    if prompts(settings, "unseen"):
        images = TaskData(_load_images(settings, clip, "unseen"))
        unseen = load_heads(settings, clip, "unseen"), images
    return Inputs(settings, suite, data, unseen)
