"""Who solves which task: the measure of all models on all tasks, and what it says of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.report.findings import Finding

CLEAR = 0.05  # of log C: a difference of mean entropies that counts
CLEAR_ACCURACY = 0.1
ERRORS = 3.0  # and that many standard errors of the difference, image by image
LITTLE = 0.6  # of the pretrained model's entropy: an expert leaves less of it on its own task
COLLAPSED = 0.1  # of log C: entropy of the mean prediction
FEWEST = 4  # images below which nothing is concluded


@dataclass(frozen=True)
class Solving:
    """How the pretrained model (row 0) and the T experts (row 1 + t) do on every task's images.

    Attributes:
        tasks: the T names.
        classes: number of classes C per task.
        entropies: per task `[1 + T, n]`, of each image's prediction, divided by log C; float64.
        marginal: entropy of the mean prediction divided by log C, `[1 + T, T]`; float64.
        right: per task `[1 + T, n]`, whether each image is classified right; None without labels.
    """

    tasks: tuple[str, ...]
    classes: tuple[int, ...]
    entropies: tuple[Tensor, ...]
    marginal: Tensor
    right: tuple[Tensor | None, ...]

    def as_lists(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "tasks": self.tasks,
            "classes": self.classes,
            "entropies": [values.tolist() for values in self.entropies],
            "marginal": self.marginal.tolist(),
            "right": [None if values is None else values.tolist() for values in self.right],
        }

    @classmethod
    def from_lists(cls, kept: Mapping[str, Any]) -> Solving:
        """What `as_lists` gave."""
        return cls(
            tuple(kept["tasks"]),
            tuple(kept["classes"]),
            tuple(torch.tensor(values, dtype=torch.float64) for values in kept["entropies"]),
            torch.tensor(kept["marginal"], dtype=torch.float64),
            tuple(None if values is None else torch.tensor(values) for values in kept["right"]),
        )

    def entropy(self) -> Tensor:
        """Mean entropy over each task's images, `[1 + T, T]`, from 0 (certain) to 1 (log C)."""
        return torch.stack([values.mean(1) for values in self.entropies], dim=1)

    def accuracy(self) -> Tensor:
        """Fraction right, `[1 + T, T]`; NaN in the column of a task without labels."""
        nothing = torch.full((1 + len(self.tasks),), float("nan"), dtype=torch.float64)
        columns = [nothing if r is None else r.double().mean(1) for r in self.right]
        return torch.stack(columns, dim=1)

    def information(self) -> Tensor:
        """What predictions tell about the image, `[1 + T, T]`: entropy of their mean minus mean
        entropy, divided by log C. Unlike low entropy it cannot be had by collapsing."""
        return self.marginal - self.entropy()


def findings(found: Solving, files: Mapping[str, str]) -> Iterator[Finding]:
    """Whether every expert solves its own task, and which other one it solves if not.

    An expert is doubted where another expert has a clearly lower entropy on its task's images
    (`CLEAR`, and `ERRORS` standard errors of the paired difference) without telling less about
    them, or classifies clearly more of them right; labels, where there are any, overrule the
    entropy. Doubted too is one that leaves most of the pretrained model's entropy there (`LITTLE`),
    but is the best or near-best on another task and does more for it. An expert that just does not
    lower the entropy is a warning.

    Measured on the demo suite over 50 choices of images, with labels and without: no finding with
    its five experts, from 4 images per task on; with 16, 32 and 64 images all 500 trials of the ten
    exchanges of two experts named both ways, and at least 998 of 1000 trials of one task's expert
    in another's place named; with 8 images 470 and 960.

    Args:
        files: task -> where its expert came from.
    """
    for task, values in zip(found.tasks, found.entropies, strict=True):
        for row in (~torch.isfinite(values).all(1)).nonzero().flatten().tolist():
            who = f"the expert of task {found.tasks[row - 1]!r}" if row else "the pretrained model"
            text = f"{who} gives NaN or infinite values on the images of {task!r}: use another one"
            yield Finding("problem", "not-finite", (task,), text)
    for index in range(len(found.tasks)):
        # NaN fails every comparison below, and is named above.
        if found.entropies[index].shape[1] >= FEWEST:
            doubt = _exchanged(found, index, files) or _idle(found, index, files)
            yield from [doubt] if doubt else []
            yield from _collapsed(found, index, files)
            yield from _at_chance(found, index, files)


def _exchanged(found: Solving, own: int, files: Mapping[str, str]) -> Finding | None:
    task, entropy = found.tasks[own], found.entropy()
    better = [b for b in range(len(found.tasks)) if b != own and _better(found, b, own)]
    like = _looks_like(found, own)
    if not better and not (like is not None and _weaker_than_on(found, own, like)):
        return None
    who = f"the expert of task {task!r} ({files.get(task, 'given')})"
    other = min(better, key=lambda b: float(entropy[1 + b, own])) if better else 0
    rival = f"the expert of {found.tasks[other]!r}" if better else "the pretrained model"
    against = _cell(found, 1 + other if better else 0, own)
    on_own = f"on the images of {task!r} {rival} has {against}, it has {_cell(found, 1 + own, own)}"
    if like is None:
        text = f"{who} does not seem to solve its task: {on_own}; is its path right?"
        return Finding("problem", "not-the-best", (task,), text)
    name = found.tasks[like]
    text = (
        f"{who} looks like the expert of task {name!r}: {on_own}, and on those of {name!r} it has "
        f"{_cell(found, 1 + own, like)}; did you exchange the paths?"
    )
    return Finding("problem", "exchanged", (task, name), text)


def _better(found: Solving, other: int, own: int) -> bool:
    """Whether another expert is clearly better on a task than the task's own."""
    gain = _gain(found, 1 + other, 1 + own, own)
    if _clear(gain, CLEAR_ACCURACY, ERRORS):
        return True
    values, told = found.entropies[own], found.information()[:, own]
    lower = _clear(values[1 + own] - values[1 + other], CLEAR, ERRORS)
    overruled = gain is not None and float(gain.mean()) < 0
    return lower and bool(told[1 + other] > told[1 + own] + CLEAR / 2) and not overruled


def _weaker_than_on(found: Solving, own: int, like: int) -> bool:
    """Whether an expert helps little on its own task, and more on another one."""
    entropy, told = found.entropy(), found.information()
    gain = told[1 + own] - told[0]
    little = bool(entropy[1 + own, own] > LITTLE * entropy[0, own]) and bool(gain[like] > gain[own])
    return little and not _clear(_gain(found, 1 + own, 0, own), CLEAR_ACCURACY, ERRORS)


def _looks_like(found: Solving, own: int) -> int | None:
    """The other task that an expert solves: clearly above pretrained and near the best there."""
    told = found.information()
    gain, regret = told[1 + own] - told[0], told.amax(0) - told[1 + own]
    solved = [
        t
        for t in range(len(found.tasks))
        if t != own and bool(gain[t] > CLEAR) and bool(regret[t] < CLEAR)
    ]
    return max(solved, key=lambda t: float(gain[t] - regret[t]), default=None)


def _idle(found: Solving, own: int, files: Mapping[str, str]) -> Finding | None:
    task = found.tasks[own]
    gain = _gain(found, 1 + own, 0, own)
    if not _improvement(found, own) <= 0 or (gain is not None and float(gain.mean()) > 0):
        return None
    text = (
        f"the expert of task {task!r} ({files.get(task, 'given')}) is no surer of its own images "
        f"than the pretrained model: it has {_cell(found, 1 + own, own)}, the pretrained model "
        f"{_cell(found, 0, own)}; is it the right file, with the right images?"
    )
    return Finding("warning", "not-below-pretrained", (task,), text)


def _collapsed(found: Solving, own: int, files: Mapping[str, str]) -> Iterator[Finding]:
    task = found.tasks[own]
    gain = found.accuracy()[1 + own, own]
    if found.marginal[1 + own, own] < COLLAPSED and not gain > 0.9:  # then they are of one class
        text = (
            f"the expert of task {task!r} ({files.get(task, 'given')}) predicts one class for "
            "nearly all images of its task: is it the right file, and are the images of all "
            "classes?"
        )
        yield Finding("warning", "collapsed", (task,), text)


def _at_chance(found: Solving, own: int, files: Mapping[str, str]) -> Iterator[Finding]:
    right, chance, task = found.right[own], 1 / found.classes[own], found.tasks[own]
    if right is None or found.classes[own] < 2:
        return
    accuracy = right.double().mean(1)
    spread = (chance * (1 - chance) / right.shape[1]) ** 0.5
    if accuracy[1 + own] <= chance + spread and accuracy[1 + own] <= accuracy[0] + spread:
        text = (
            f"the expert of task {task!r} ({files.get(task, 'given')}) classifies "
            f"{100 * float(accuracy[1 + own]):.0f} % of its task's images right, which is chance "
            f"for {found.classes[own]} classes: is it the right file, and do classes: come in the "
            "order of the labels?"
        )
        yield Finding("problem", "at-chance", (task,), text)


def _improvement(found: Solving, own: int) -> float:
    """By how much the expert's mean entropy is below 98 % of the pretrained model's."""
    values = found.entropies[own]
    return float(0.98 * values[0].mean() - values[1 + own].mean())


def _gain(found: Solving, row: int, than: int, task: int) -> Tensor | None:
    """Per image: 1 right where the other is wrong, −1 the reverse; None without labels."""
    right = found.right[task]
    return None if right is None else right[row].double() - right[than].double()


def _clear(difference: Tensor | None, least: float, errors: float) -> bool:
    """Whether a mean over images exceeds `least` and that many of its standard errors."""
    if difference is None:
        return False
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) > max(least, errors * error)


def _cell(found: Solving, row: int, task: int) -> str:
    text = f"entropy {float(found.entropy()[row, task]):.3f} of log C"
    if found.right[task] is not None:
        text += f" (accuracy {100 * float(found.accuracy()[row, task]):.0f} %)"
    return text
