"""Features of frozen encoders, computed once for the images that are used, and batches of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from adamerge._base.errors import AdamergeError
from adamerge._base.files import locked, replacing
from adamerge.images.batches import DeviceImages, Stream, UnlabeledBatches

log = logging.getLogger("adamerge")

_FORMAT = 2  # of a stored file; another number makes new files
_AT_ONCE = 4096  # rows read or made in memory at a time
Encode = Callable[[Tensor], Tensor]  # uint8 [B, 3, H, W] -> float [B, F]


def content_key(weights: Mapping[str, Tensor], *parts: object) -> str:
    """A name for features: sha256 over the encoder's weights and whatever else decides them.

    Args:
        parts: such as `TaskImages.key`, the mean and std of the images, the precision.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *map(str, parts)]).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def stored_features(
    encode: Encode,
    images: np.ndarray,
    folder: Path,
    key: str,
    batch_size: int = 256,
    device: torch.device | None = None,
    order: np.ndarray | None = None,
    what: str = "images",
) -> np.ndarray:
    """Features of images, memory-mapped float32 `[N, F]`; those that are missing are computed.

    What is there stays: an interrupted computation goes on after its last whole batch, and a later
    call with a longer `order` adds to it. One process computes at a time, others wait for it. Every
    row is kept with its checksum: a damaged file is made again.

    Args:
        encode: a frozen encoder of uint8 images on `device`, normalisation included.
        images: uint8 `[N, 3, H, W]`, usually memory-mapped.
        folder: for the files; made if needed.
        key: what decides the features, see `content_key`, and where `order` is given, what decides
            its sequence: of two orders under one key, one must begin with the other.
        order: the rows that are needed, first to last; None: all. Others hold NaN.
        what: is encoded, for the log.

    Raises:
        AdamergeError: no images, features that are not `[B, F]`, or NaN among them.
    """
    if len(images) == 0:
        raise AdamergeError("there are no images to compute features of: give at least one")
    order = np.arange(len(images)) if order is None else order
    path = folder / f"{key}.npy"
    if _missing(path, len(images), order) != []:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{key}.lock"):
            missing = _missing(path, len(images), order)  # another process may have added some
            if missing is None and path.exists():
                log.warning("stored features %s are damaged and computed again", path)
                path.unlink()
            rows = order if missing is None else np.asarray(missing, dtype=np.int64)
            if len(rows):
                log.info("encoding once: %d %s", len(rows), what)
            for start in range(0, len(rows), batch_size):
                picked = rows[start : start + batch_size]
                _write(path, len(images), picked, _encoded(encode, images, picked, device))
    return np.load(path, mmap_mode="r", allow_pickle=False)[:, :-1]


def _missing(path: Path, count: int, order: np.ndarray) -> list[int] | None:
    """The rows of the order that are not stored; None without a sound file of `count` rows."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # NumPy raises many types for a damaged header
        return None
    if stored.dtype != np.float32 or stored.ndim != 2 or len(stored) != count:
        return None
    missing: list[int] = []
    for start in range(0, len(order), _AT_ONCE):
        rows = order[start : start + _AT_ONCE]
        block = np.ascontiguousarray(stored[rows])
        right = _checksums(block[:, :-1]) == block.view(np.uint32)[:, -1]
        if not np.isnan(block[~right]).all():
            return None
        missing += rows[~right].tolist()
    return missing


def _checksums(features: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row.tobytes()) for row in features], dtype=np.uint32)


def _write(path: Path, count: int, rows: np.ndarray, features: np.ndarray) -> None:
    """Puts features and their checksums at rows of a file, which is made where there is none.

    By writing, not through a map: a disk without space is an error then, not a signal that kills.
    """
    block = np.empty((len(rows), features.shape[1] + 1), np.float32)
    block[:, :-1] = features
    block.view(np.uint32)[:, -1] = _checksums(features)
    width = block.shape[1] * block.itemsize
    if not path.exists():
        nothing = np.full((1, block.shape[1]), np.nan, np.float32)  # not to pass for features
        header = {"descr": nothing.dtype.str, "fortran_order": False}
        with replacing(path) as temporary, temporary.open("wb") as file:
            shape = (count, block.shape[1])
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            for start in range(0, count, _AT_ONCE):
                file.write(nothing.repeat(min(_AT_ONCE, count - start), 0).data)
    with path.open("r+b") as file:
        for row, values in zip(rows.tolist(), block, strict=True):
            file.seek((row - count) * width, os.SEEK_END)
            file.write(values.data)


def _encoded(
    encode: Encode, images: np.ndarray, rows: np.ndarray, device: torch.device | None
) -> np.ndarray:
    with torch.no_grad():
        batch = torch.from_numpy(np.asarray(images[rows])).to(device)
        features = encode(batch).float().cpu()
    if features.shape[:1] != (len(rows),) or features.ndim != 2:
        raise AdamergeError(
            f"an encoder gave features of shape {list(features.shape)} for {len(rows)} images: "
            "expected [images, size]"
        )
    bad = (~torch.isfinite(features)).any(1).nonzero().flatten().tolist()
    if bad:
        raise AdamergeError(
            f"an encoder gave NaN or infinite features for image {rows[bad[0]]} ({len(bad)} of a "
            "batch): look at these images and at the encoder's weights"
        )
    return features.numpy()


class StoredBatches(IterableDataset[dict[str, dict[str, Tensor]]]):
    """The batches of `UnlabeledBatches` with what is stored of their images.

    `{task: {"images" or "features": [B, …], "targets": [B, F], "image_ids": [B]}}` per step: the
    same rows in the same order as without a store.

    Args:
        batches: of the images, uint8; gives the order.
        targets: task -> stored outputs of the teacher `[N, F]`; none if empty.
        features: task -> stored features of the frozen encoder `[N, D]`, in place of the images.
        online: every image once: a task ends with its images, and the batches with the last task.
        image_ids: whether the rows themselves are there as well.
    """

    def __init__(
        self,
        batches: UnlabeledBatches,
        targets: Mapping[str, np.ndarray],
        features: Mapping[str, np.ndarray] | None = None,
        online: bool = False,
        image_ids: bool = False,
    ) -> None:
        super().__init__()
        self.image_ids = image_ids
        self.streams, self.first_step, self.online = batches.streams, batches.first_step, online
        self.arrays: dict[str, Mapping[str, np.ndarray | DeviceImages]] = {}
        self.arrays |= {"images": batches.images} if features is None else {"features": features}
        self.arrays |= {"targets": targets} if targets else {}
        for name, arrays in self.arrays.items():
            for task, array in arrays.items():
                if len(array) != len(batches.images[task]):
                    raise AdamergeError(
                        f"{name} of task {task!r} are stored for {len(array)} images, but there "
                        f"are {len(batches.images[task])}: compute them for these images"
                    )

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        worker = torch.utils.data.get_worker_info()
        step = self.first_step + (worker.id if worker else 0)
        while True:
            rows = {s.task: _once(s, step) if self.online else s.batch(step) for s in self.streams}
            if not any(map(len, rows.values())):
                return
            yield {
                task: {
                    name: torch.as_tensor(arrays[task][picked])
                    for name, arrays in self.arrays.items()
                }
                | ({"image_ids": torch.as_tensor(picked)} if self.image_ids else {})
                for task, picked in rows.items()
                if len(picked)
            }
            step += worker.num_workers if worker else 1


def _once(stream: Stream, step: int) -> np.ndarray:
    """The rows of a step that the stream's first epoch still has."""
    start = (step * stream.ranks + stream.rank) * stream.batch_size
    return stream.batch(step)[: max(0, len(stream.rows) - start)]


def online_steps(streams: Sequence[Stream]) -> int:
    """How many steps it takes to see every image once."""
    return max(-(-len(s.rows) // (s.batch_size * s.ranks)) for s in streams)
