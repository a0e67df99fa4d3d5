"""The unfinished images of a cache folder, and the record of how far they are sound."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adamerge.errors import AdamergeError
from adamerge.files import read_json, replacing


@dataclass
class Staging:
    """A folder with `images.npy`, uint8 `[N, 3, H, W]`, being filled from the first row on.

    `progress.json` is written after the images it speaks of are on the disk, so what it says
    holds whenever the process, or the machine, dies.

    Attributes:
        done: rows `[0, done)` need not be decoded again.
        bad: those among them that could not be decoded, with the reason.
    """

    folder: Path
    shape: tuple[int, ...]
    done: int = 0
    bad: dict[int, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, shape: tuple[int, ...]) -> Staging:
        """Goes on from what an earlier process left in the folder, or starts a new one.

        Raises:
            OSError: no space for all of the images.
        """
        try:
            record = read_json(folder / "progress.json")
            bad = {int(row): str(reason) for row, reason in record["bad"].items()}
            images = np.load(folder / "images.npy", mmap_mode="r")
            if images.shape == shape and 0 <= record["done"] <= shape[0]:
                return cls(folder, shape, int(record["done"]), bad)
        except (AdamergeError, OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing there, or nothing to rely on
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        allocate(folder / "images.npy", shape)
        return cls(folder, shape)

    def add(self, rows: Sequence[np.ndarray | str]) -> None:
        """The next rows; a text says why one could not be decoded."""
        empty = np.zeros(self.shape[1:], np.uint8)
        self._write(self.done, np.stack([empty if isinstance(row, str) else row for row in rows]))
        self.bad |= {self.done + i: row for i, row in enumerate(rows) if isinstance(row, str)}
        self.done += len(rows)
        self._record()

    def mend(self, row: int, image: np.ndarray | str) -> None:
        """A second try of a row that could not be decoded before."""
        if isinstance(image, str):
            self.bad[row] = image
            return
        self._write(row, image[None])
        del self.bad[row]
        self._record()

    def _write(self, start: int, images: np.ndarray) -> None:
        with (self.folder / "images.npy").open("r+b") as file:
            size = int(np.prod(self.shape[1:]))
            file.seek(start * size - self.shape[0] * size, os.SEEK_END)
            file.write(np.ascontiguousarray(images).data)
            file.flush()
            os.fsync(file.fileno())

    def _record(self) -> None:
        with replacing(self.folder / "progress.json") as temporary, temporary.open("w") as file:
            json.dump({"done": self.done, "bad": self.bad}, file)
            file.flush()
            os.fsync(file.fileno())


def allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A mapped .npy file with its space reserved: a full disk is an error now, not later."""
    target = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
    return target
