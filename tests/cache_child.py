"""Builds a cache folder, as a program of its own that can be killed; imports little.

python -m tests.cache_child FOLDER KILL_AT: kills itself at the decoding of that image (0: never);
says `ready` first and waits for a line.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adamerge.images import cache, decoding
from adamerge.images.arrays import ArraySource


def channels_first(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def build(folder: Path) -> dict[str, Any]:
    """Writes a cache folder from `x.npy`."""
    source = ArraySource("data", folder / "x.npy", "test")
    target = folder / "cache" / "k"
    return cache.write_folder(target, "t", source, "image", channels_first)


def count_decodes(kill_at: int = 0) -> list[Any]:
    """What is decoded from now on, as it goes."""
    decoded: list[Any] = []
    decode = decoding.decode

    def counting(value: Any, *then: Any) -> Any:
        decoded.append(value)
        if len(decoded) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(value, *then)

    decoding.decode = counting
    return decoded


if __name__ == "__main__":
    decoding._CHUNK = 16
    count = count_decodes(int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(build(Path(sys.argv[1]))["sha256"], len(count))
