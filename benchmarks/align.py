"""The straight line between two networks of different seeds, before and after alignment.

    OMP_NUM_THREADS=1 python benchmarks/align.py --out benchmarks/results/align.md

Pairs of networks (an MLP, a small ResNet with batch norm, a small vision transformer) are trained
apart on the handwritten digits of scikit-learn, from other initial weights and in another order.
Then the second is aligned with the first, and both are interpolated.

- barrier: the largest loss along the line beyond the line between the endpoints' losses;
- midpoint: accuracy with half of each.

Loss and accuracy are of test images; what takes unlabeled inputs gets 300 training images.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib
import ot
import scipy
import sklearn
import torch
from open_clip.transformer import VisionTransformer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamerge import TaskVectors, align
from adamerge.encoders.tower import Tower

matplotlib.use("Agg")
from matplotlib import pyplot as plt

POINTS = torch.linspace(0, 1, 7).tolist()
Curve = list[tuple[float, float]]  # loss and accuracy, at every point


@dataclass
class Digits:
    """Images `[n, 1, 8, 8]` of two halves, and their labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def unlabeled(self) -> list[Tensor]:
        """Training images, for what takes inputs alone."""
        return [self.images[:300]]

    @classmethod
    def read(cls) -> Digits:
        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.tensor(found.target)[order]
        return cls(images[:1200], labels[:1200], images[1200:], labels[1200:])


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.shortcut = nn.Identity() if a == b else nn.Conv2d(a, b, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, four blocks and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = ((width, width), (width, width), (width, 2 * width), (2 * width, 2 * width))
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in sizes))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.norm(self.stem(images)))).mean((2, 3)))


class Vit(nn.Module):
    """The image tower of open_clip, small, on grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = VisionTransformer(8, 2, 48, 2, 4, 4.0, output_dim=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images.expand(-1, 3, -1, -1))


def mlp(width: int = 512) -> nn.Module:
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float, int]] = {  # epochs, rate, pairs
    "MLP": (mlp, 20, 1e-3, 5),
    "ResNet": (ResNet, 8, 3e-3, 3),
    "ViT": (Vit, 25, 2e-3, 3),
}


def trained(name: str, seed: int, digits: Digits) -> nn.Module:
    """A network of a seed of its own."""
    build, epochs, rate, _ = NETWORKS[name]
    torch.manual_seed(seed)
    module = build().train()
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=1e-2)
    steps = epochs * (len(digits.images) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.images)).split(100):
            optimizer.zero_grad()
            cross_entropy(module(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return module.eval().requires_grad_(False)


def filled(module: nn.Module, state: align.symmetry.State) -> nn.Module:
    found = copy.deepcopy(module)
    found.load_state_dict(dict(state))
    return found


@torch.no_grad()
def scored(module: nn.Module, digits: Digits) -> tuple[float, float]:
    """Loss and accuracy in %, of the test images."""
    logits = module(digits.test_images)
    right = (logits.argmax(1) == digits.test_labels).double().mean()
    return float(cross_entropy(logits, digits.test_labels)), 100 * float(right)


def line(spec: align.Spec, one: nn.Module, two: nn.Module, digits: Digits, mend: bool) -> Curve:
    """From one network to the other; `mend`: with REPAIR at every point."""
    found = []
    for t in POINTS:
        shares = [1 - t, t]
        states = [one.state_dict(), two.state_dict()]
        middle = filled(one, align.average(states, shares))
        if mend:
            middle = align.repair(spec, middle, [one, two], digits.unlabeled, shares)
        found.append(scored(middle, digits))
    return found


def learned(spec: align.Spec, one: nn.Module, two: nn.Module, digits: Digits) -> float:
    """Accuracy with a coefficient per layer that minimises the entropy on unlabeled images.

    Statistics of batch norm are those of the repaired midpoint meanwhile, and then computed anew.
    """
    ends, inputs = [one, two], digits.unlabeled
    states = [one.state_dict(), two.state_dict()]
    middle = align.repair(spec, filled(one, align.average(states)), ends, inputs)
    buffers = dict(middle.named_buffers())
    vectors, tower = TaskVectors(states[0], {"second": states[1]}), Tower(one)
    coefficients = torch.full((1, len(vectors.names)), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        batch = torch.randint(300, (64,), generator=generator)
        weights = {**vectors.combine(coefficients), **vectors.constants, **buffers}
        logs = tower(weights, inputs[0][batch]).log_softmax(1)
        loss = -(logs.exp() * logs).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    merged = {**vectors.combine(coefficients.detach()), **vectors.constants, **buffers}
    return scored(align.repair(spec, filled(one, merged), ends, inputs), digits)[1]


def barrier(curve: Curve) -> float:
    first, last = curve[0][0], curve[-1][0]
    over = [loss - (1 - t) * first - t * last for t, (loss, _) in zip(POINTS, curve, strict=True)]
    return max(over)


def compared(name: str, pairs: int, digits: Digits) -> tuple[dict[str, list[Curve]], list[str]]:
    """The curves of all pairs, and rows of a table."""
    curves: dict[str, list[Curve]] = {}
    points: dict[str, list[float]] = {}
    for pair in range(pairs):
        one, two = (trained(name, 2 * pair + side, digits) for side in (0, 1))
        spec, inputs = align.spec(one), digits.unlabeled
        states = one.state_dict(), two.state_dict()
        matched = align.weight_matching(spec, *states)
        active = align.activation_matching(spec, one, two, inputs)
        others = {
            "naive": two,
            "weight matching": filled(two, align.apply(spec, matched, states[1])),
            "activation matching": filled(two, align.apply(spec, active, states[1])),
        }
        for title, other in others.items():
            for mend in (False, True):
                curve = line(spec, one, other, digits, mend)
                curves.setdefault(title + ", REPAIR" * mend, []).append(curve)
        for title, other in others.items():
            key = f"{title}, λ learned, REPAIR"
            points.setdefault(key, []).append(learned(spec, one, other, digits))
        fused = filled(one, align.ot_fusion(spec, states))
        points.setdefault("OT fusion (weights)", []).append(scored(fused, digits)[1])
        by_outputs = align.ot_fusion(spec, states, modules=(one, two), batches=inputs)
        fused = align.repair(
            spec, filled(one, by_outputs), [one, others["activation matching"]], inputs
        )
        points.setdefault("OT fusion (outputs), REPAIR", []).append(scored(fused, digits)[1])
        zipped = filled(one, align.zipit(spec, states, (one, two), inputs)[0])
        zipped = align.repair(spec, zipped, [zipped], inputs)  # batch norms alone
        points.setdefault("ZipIt, first head", []).append(scored(zipped, digits)[1])
    rows = []
    for title, found in curves.items():
        heights = [barrier(curve) for curve in found]
        middles = [curve[len(POINTS) // 2][1] for curve in found]
        rows.append(
            f"| {title} | {statistics.mean(heights):.3f} | {statistics.mean(middles):.1f} |"
        )
    rows += [f"| {title} | | {statistics.mean(found):.1f} |" for title, found in points.items()]
    own = [curve[side][1] for curve in curves["naive"] for side in (0, -1)]
    rows.append(f"| the networks themselves | 0 | {statistics.mean(own):.1f} |")
    return curves, rows


def drawn(found: dict[str, dict[str, list[Curve]]], path: Path) -> None:
    """The mean loss along the lines."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 2.8), squeeze=False)
    titles = ("naive", "weight matching", "weight matching, REPAIR")
    for axis, (name, curves) in zip(axes[0], found.items(), strict=True):
        for title in titles:
            losses = torch.tensor([[loss for loss, _ in curve] for curve in curves[title]])
            axis.plot(POINTS, losses.mean(0), label=title)
        axis.set(title=name, xlabel="share of the second network")
    axes[0][0].set_ylabel("test loss")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(titles), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, help="of every kind; 5 MLPs, 3 of the others")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--picture", type=Path, help="a PNG file")
    settings = parser.parse_args()
    digits, start = Digits.read(), time.process_time()
    parts, curves = [], {}
    for name in settings.networks:
        pairs = settings.pairs or NETWORKS[name][3]
        curves[name], rows = compared(name, pairs, digits)
        head = ["| | barrier of the test loss | accuracy at the midpoint, % |", "|---|--:|--:|"]
        parts.append("\n".join([f"## {name}, mean of {pairs} pairs", "", *head, *rows]))
        print(parts[-1], flush=True)
    versions = f"torch {torch.__version__}, scipy {scipy.__version__}, POT {ot.__version__}"
    about = (
        f"{date.today()}, {versions}, scikit-learn {sklearn.__version__}, "
        f"Python {platform.python_version()}, {time.process_time() - start:.0f} CPU seconds."
    )
    command = f"    python benchmarks/align.py {' '.join(sys.argv[1:])}"
    title = "# Networks of different seeds, between them"
    if settings.out:
        settings.out.write_text("\n\n".join([title, about, command, *parts]) + "\n")
    if settings.picture:
        drawn(curves, settings.picture)


if __name__ == "__main__":
    main()
