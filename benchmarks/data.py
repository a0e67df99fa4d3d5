"""Images per second: JPEG files through the usual transform, and adamerge's image cache.

    OMP_NUM_THREADS=1 python benchmarks/data.py --out benchmarks/results/data_cpu.md

- per image: a JPEG file opened and put through open_clip's whole inference transform (decode,
  resize, crop, float, normalise), as a DataLoader does at every step, then stacked to batches;
- cache: shuffled batches of uint8 images from the memory-mapped file, as a training step draws
  them (`Stream`), with and without the conversion to normalised floats (`Normalizer`).

Both give the same batches, which is checked. The pictures are smooth colours with noise, so that
JPEG files of 500 x 375 pixels have the size of photos. Throughput is per CPU second of one thread,
the median over rounds in which the schemes take turns; the file's pages are in memory, as they are
from the second pass over a data set that fits there. Building the cache is wall time, all cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from adamerge.encoders.clip import Normalizer
from adamerge.images.batches import Stream
from adamerge.images.cache import TaskImages, cache_images
from adamerge.images.decoding import cores
from adamerge.images.sources import open_dataset


def write_pictures(folder: Path, count: int) -> int:
    """JPEG files of 500 x 375 pixels; returns their mean size in bytes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        colours = Image.fromarray(generator.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(smooth + generator.normal(0, 14, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:05}.jpg", quality=92)
    return sum(path.stat().st_size for path in folder.iterdir()) // count


def build(folder: Path, cache: Path, cfg: open_clip.transform.PreprocessCfg) -> TaskImages:
    """The cache of a folder of images, made or opened."""
    dataset = open_dataset("pictures", {"path": str(folder)})
    return cache_images("pictures", dataset, ("one", "two"), cfg, cache)


def compare(
    schemes: dict[str, Callable[[int], Tensor]], steps: int, rounds: int, batch: int
) -> dict[str, list[float]]:
    """Images per CPU second of each scheme: median and range over rounds."""
    rates: dict[str, list[float]] = {name: [] for name in schemes}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, draw in schemes.items():
            count = steps if name == "per image" else 20 * steps
            start = time.process_time()
            for step in range(count):
                draw(turn * count + step)
            if turn:
                rates[name].append(count * batch / (time.process_time() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, default=8, help="batches per round, 20 x from the cache"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        text = report(arguments, Path(scratch))
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(arguments: argparse.Namespace, scratch: Path) -> str:
    """Measures everything and describes it in Markdown."""
    pictures, cfg = scratch / "pictures", open_clip.transform.PreprocessCfg(size=arguments.size)
    size = write_pictures(pictures, arguments.images)
    seconds = []
    for place in ("a", "b", "b"):  # two builds, then one opening
        start = time.perf_counter()
        images = build(pictures, scratch / place, cfg)
        seconds.append(time.perf_counter() - start)
    built, opened = min(seconds[:2]), seconds[2]
    files, rows = sorted(pictures.iterdir()), np.arange(arguments.images)
    stream = Stream("pictures", rows, 0, arguments.batch)
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    normalizer = Normalizer(cfg.mean, cfg.std)

    def per_image(step: int) -> Tensor:
        return torch.stack([transform(Image.open(files[row])) for row in stream.batch(step)])

    def uint8(step: int) -> Tensor:
        return torch.from_numpy(images.images[stream.batch(step)])

    def floats(step: int) -> Tensor:
        return normalizer(uint8(step))

    difference = float((per_image(0) - floats(0)).abs().max())
    schemes = {"per image": per_image, "cache, uint8": uint8, "cache, normalised floats": floats}
    rates = compare(schemes, arguments.steps, arguments.rounds, arguments.batch)
    base = statistics.median(rates["per image"])
    lines = [
        "# Images per second, from JPEG and from the cache\n",
        f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, Pillow "
        f"{version('pillow')}, open_clip {version('open_clip_torch')}, {platform.machine()}; one "
        f"thread, median of {arguments.rounds} rounds in one run.\n",
        f"    python benchmarks/data.py {' '.join(sys.argv[1:])}\n",
        f"{arguments.images} JPEG files of 500 x 375 pixels, {size / 1000:.0f} kB each, to "
        f"{arguments.size} pixels; shuffled batches of {arguments.batch}. The batches of both ways "
        f"differ by at most {difference:.1e}. All pages are in memory.\n",
        "| way | images per CPU second | range | ÷ per image |",
        "|---|--:|--:|--:|",
    ]
    for name, values in rates.items():
        rate = statistics.median(values)
        spread = f"{min(values):,.0f} – {max(values):,.0f}"
        lines.append(f"| {name} | {rate:,.0f} | {spread} | {rate / base:.1f} × |")
    lines += [
        "",
        f"Building the cache ({images.images.nbytes / 1e6:,.0f} MB) takes {built:.1f} s of wall "
        f"time with {cores()} threads, {arguments.images / built:,.0f} images/s; opening it again "
        f"takes {opened:.3f} s (load average of the {cores()} cores meanwhile: "
        f"{os.getloadavg()[0]:.1f}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
