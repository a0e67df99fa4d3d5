"""Exported folders as ready objects: `adamerge.load`. Needs nothing that training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import open_clip
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from adamerge._base.binding import nearest
from adamerge._base.errors import AdamergeError
from adamerge._base.pictures import eight_bits
from adamerge.encoders.clip import Normalizer
from adamerge.encoders.heads import Heads
from adamerge.export.read import (
    Layout,
    check_files,
    find_export,
    read_encoder,
    read_heads,
    read_layout,
)

Images: TypeAlias = Image.Image | Sequence[Image.Image] | Tensor


class Prediction(NamedTuple):
    """What an image shows: the class name, and its probability."""

    name: str
    probability: float


@dataclass
class Merged:
    """A merged model with all that classification takes, in evaluation mode and frozen.

    Attributes:
        encoder: `encoder(images [B, 3, H, W], task_ids [B]) -> features [B, D]`.
        heads: `heads.logits(features, task)`.
        tasks: the tasks, in the order of `task_ids`.
        preprocess: a PIL image -> normalised float32 `[3, H, W]`, as the backbone wants it.
        normalizer: the end of that for uint8 images `[B, 3, H, W]` that are resized already.
        size: (H, W).
        kind: `static`, `per_task`, `dynamic` or `adapters`.
        record: the content of `merge.json`: settings, inputs, versions, accuracies.
    """

    encoder: nn.Module
    heads: Heads
    tasks: tuple[str, ...]
    preprocess: Callable[[Image.Image], Tensor]
    normalizer: Normalizer
    size: tuple[int, int]
    kind: str
    record: dict[str, Any]

    def to(self, device: torch.device | str) -> Merged:
        """Moves everything; images and results stay where they are."""
        for module in (self.encoder, self.heads, self.normalizer):
            module.to(device)
        return self

    def classify(self, images: Images, task: str, batch_size: int = 64) -> list[Prediction]:
        """The most probable class of every image among those of its task.

        Args:
            images: PIL images, or one, which are turned upright and reduced to 8 bits as in
                training; or a tensor `[B, 3, H, W]`, either normalised floats as `preprocess`
                gives, or uint8 images of that size.
            task: one of `tasks`.
            batch_size: images encoded at a time.

        Raises:
            AdamergeError: an unknown task, or images of another form.
        """
        best = self.probabilities(images, task, batch_size).max(1)
        names = self.heads.classes[task]
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Prediction(names[index], value) for index, value in pairs]

    @torch.no_grad()
    def probabilities(self, images: Images, task: str, batch_size: int = 64) -> Tensor:
        """As `classify`: `[B, C]` on the CPU, columns in the order of `heads.classes[task]`."""
        if batch_size < 1:
            raise AdamergeError(f"batch_size is {batch_size}: expected at least 1")
        if task not in self.tasks:
            raise AdamergeError(
                f"task {task!r} is not in this model{nearest(str(task), self.tasks)}: expected "
                f"{' or '.join(self.tasks)}"
            )
        device, parts = self.heads.weight(task).device, []
        for batch in self._batches(images, batch_size):
            ids = torch.full((len(batch),), self.tasks.index(task))
            batch = batch.to(device)
            batch = self.normalizer(batch) if batch.dtype == torch.uint8 else batch.float()
            parts.append(self.heads.logits(self.encoder(batch, ids), task).softmax(1).cpu())
        return torch.cat(parts) if parts else torch.empty(0, len(self.heads.classes[task]))

    def _batches(self, images: Images, size: int) -> Iterator[Tensor]:
        if isinstance(images, Tensor):
            floats = images.is_floating_point() or images.dtype == torch.uint8
            if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.size) or not floats:
                raise AdamergeError(
                    f"images are {images.dtype} {list(images.shape)}: expected [B, 3, "
                    f"{self.size[0]}, {self.size[1]}], uint8 or normalised floats; or give PIL "
                    "images, which are resized"
                )
            yield from images.split(size) if len(images) else ()
            return
        listed = [images] if isinstance(images, Image.Image) else list(images)
        for image in listed:
            if not isinstance(image, Image.Image):
                raise AdamergeError(
                    f"an image is a {type(image).__name__}: expected PIL images, or one tensor "
                    "[B, 3, H, W]"
                )
        for start in range(0, len(listed), size):
            yield torch.stack([self._prepared(image) for image in listed[start : start + size]])

    def _prepared(self, image: Image.Image) -> Tensor:
        """As training and scoring see the picture: of 8 bits a channel, and upright."""
        try:
            return self.preprocess(ImageOps.exif_transpose(eight_bits(image)))
        except ValueError as error:
            raise AdamergeError(f"an image cannot be used: {error}") from error


def load(folder: str | Path, device: torch.device | str = "cpu") -> Merged:
    """A merged model from the folder that a run, or `adamerge export`, left (or the run's own).

    Works for every kind of export; only safetensors and JSON are read, nothing is executed.

    Raises:
        AdamergeError: no export there, of a kind that this version does not know, or with a
            missing or damaged file.
    """
    where = find_export(Path(folder).expanduser())
    layout = read_layout(where)
    check_files(where, layout)
    encoder, config = read_encoder(where, layout)
    heads = read_heads(where, layout)
    tasks = layout.tasks or heads.tasks
    cfg = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])
    height, width = (cfg.size, cfg.size) if isinstance(cfg.size, int) else cfg.size
    cfg.size = cfg.size if isinstance(cfg.size, int) else (height, width)  # not a list
    preprocess = cast(Any, open_clip.transform.image_transform_v2(cfg, is_train=False))
    normalizer, size = Normalizer(cfg.mean, cfg.std), (height, width)
    return Merged(
        encoder, heads, tasks, preprocess, normalizer, size, layout.kind, layout.record
    ).to(device)


def for_tasks(encoder: nn.Module, layout: Layout, tasks: Sequence[str]) -> nn.Module:
    """An exported encoder with `task_ids` in the order of `tasks`.

    Raises:
        AdamergeError: the encoder depends on the task, and lacks one of them.
    """
    if not layout.by_task or tuple(tasks) == layout.tasks:
        return encoder
    lacking = [task for task in tasks if task not in layout.tasks]
    if lacking:
        raise AdamergeError(
            f"the exported model encodes images of {', '.join(layout.tasks)} alone: leave out "
            f"task {lacking[0]!r} of the suite, or merge it too"
        )
    return _Reordered(encoder, [layout.tasks.index(task) for task in tasks], tuple(tasks))


class _Reordered(nn.Module):
    """An encoder under other task ids: `places[i]` is what it calls task i."""

    def __init__(self, encoder: nn.Module, places: list[int], tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.places, self.tasks = encoder, torch.tensor(places), tasks

    def forward(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(images, self.places[task_ids.cpu()]))
