"""What is said of a suite before training: findings on its experts, task vectors and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from adamerge.encoders.heads import Heads
from adamerge.report.estimate import Estimate, in_bytes
from adamerge.report.preflight import Matrix

CLEAR = 0.05  # of log C: a difference of mean entropies that counts
CLEAR_ACCURACY = 0.1
ERRORS = 3.0  # and that many standard errors of the difference, image by image
LITTLE = 0.6  # of the pretrained model's entropy: an expert leaves less of it on its own task
COLLAPSED = 0.1  # of log C: entropy of the mean prediction
FEWEST = 16  # images below which nothing is concluded
SAME_CLASS = 0.999  # cosine of the embeddings of two classes
NEAR_DUPLICATE = 0.95  # cosine of two task vectors; experts of different tasks stay far below
ODD_LENGTH = 10.0  # times the median length
OTHER_BASE = 0.3  # cosine of an expert's matrices with the pretrained ones
ACTIVATION = 0.02  # of log C


@dataclass(frozen=True)
class Finding:
    """Something to look at before training.

    Attributes:
        severity: `problem` (the suite is probably wrong) or `warning` (unusual, may be intended).
        kind: a short name of what was found, the same in every version.
        tasks: the tasks it is about.
        text: one sentence for the user.
    """

    severity: Literal["problem", "warning"]
    kind: str
    tasks: tuple[str, ...]
    text: str


def of_experts(matrix: Matrix, files: Mapping[str, str]) -> Iterator[Finding]:
    """Whether every expert solves its own task, and which other one it solves if not.

    An expert is doubted where another expert has a clearly lower entropy on its task's images
    (`CLEAR`, and `ERRORS` standard errors of the paired difference) without telling less about
    them, or classifies clearly more of them right; labels, where there are any, overrule the
    entropy. Doubted too is one that leaves most of the pretrained model's entropy there (`LITTLE`),
    but is the best or near-best on another task and does more for it. An expert that just does not
    lower the entropy is a warning.

    On seven sets of small photographs, over 30 choices of images, sound experts were doubted in 14
    with 4 images per task, in one with 8, and in none from 16 on. On the demo suite, over 50, with
    labels and without, none was; with 16, 32 and 64 images all 500 trials of the ten exchanges of
    two experts were named both ways, and at least 998 of 1000 trials of one task's expert in
    another's place.

    Args:
        files: task -> where its expert came from.
    """
    for task, values in zip(matrix.tasks, matrix.entropies, strict=True):
        for row in (~values.isfinite().all(1)).nonzero().flatten().tolist():
            who = f"the expert of task {matrix.tasks[row - 1]!r}" if row else "the pretrained model"
            text = f"{who} gives NaN or infinite values on the images of {task!r}: use another one"
            yield Finding("problem", "not-finite", (task,), text)
    for t, task in enumerate(matrix.tasks):
        # NaN fails every comparison below, and is named above.
        if matrix.entropies[t].shape[1] >= FEWEST:
            who = f"the expert of task {task!r} ({files.get(task, 'given')})"
            doubt = _exchanged(matrix, t, who) or _idle(matrix, t, who)
            yield from filter(None, [doubt, _collapsed(matrix, t, who), _at_chance(matrix, t, who)])


def _exchanged(matrix: Matrix, t: int, who: str) -> Finding | None:
    tasks, entropy = matrix.tasks, matrix.entropy()
    better = [b for b in range(len(tasks)) if b != t and _better(matrix, b, t)]
    like = _looks_like(matrix, t)
    if not better and (like is None or not _weaker_than_on(matrix, t, like)):
        return None
    row = min((1 + b for b in better), key=lambda b: float(entropy[b, t]), default=0)
    rival = f"the expert of {tasks[row - 1]!r}" if row else "the pretrained model"
    there = (
        f"on the images of {tasks[t]!r} {rival} has {_cell(matrix, row, t)}, it has "
        f"{_cell(matrix, 1 + t, t)}"
    )
    if like is None:
        text = f"{who} does not seem to solve its task: {there}; is its path right?"
        return Finding("problem", "not-the-best", (tasks[t],), text)
    text = (
        f"{who} looks like the expert of task {tasks[like]!r}: {there}, and on those of "
        f"{tasks[like]!r} it has {_cell(matrix, 1 + t, like)}; did you exchange the paths?"
    )
    return Finding("problem", "exchanged", (tasks[t], tasks[like]), text)


def _better(matrix: Matrix, other: int, t: int) -> bool:
    """Whether another expert is clearly better on a task than the task's own."""
    gain = _gain(matrix, 1 + other, 1 + t, t)
    if _clear(gain, CLEAR_ACCURACY):
        return True
    values, told = matrix.entropies[t], matrix.information()[:, t]
    lower = _clear(values[1 + t] - values[1 + other], CLEAR)
    overruled = gain is not None and float(gain.mean()) < 0
    return lower and bool(told[1 + other] > told[1 + t] + CLEAR / 2) and not overruled


def _weaker_than_on(matrix: Matrix, t: int, like: int) -> bool:
    """Whether an expert helps little on its own task, and more on another one."""
    entropy, told = matrix.entropy(), matrix.information()
    gain = told[1 + t] - told[0]
    little = bool(entropy[1 + t, t] > LITTLE * entropy[0, t]) and bool(gain[like] > gain[t])
    return little and not _clear(_gain(matrix, 1 + t, 0, t), CLEAR_ACCURACY)


def _looks_like(matrix: Matrix, t: int) -> int | None:
    """The other task that an expert solves: clearly above pretrained and near the best there."""
    told = matrix.information()
    gain, regret = told[1 + t] - told[0], told.amax(0) - told[1 + t]
    solved = ((gain > CLEAR) & (regret < CLEAR)).nonzero().flatten().tolist()
    others = [other for other in solved if other != t]
    return max(others, key=lambda other: float(gain[other] - regret[other]), default=None)


def _idle(matrix: Matrix, t: int, who: str) -> Finding | None:
    """The expert's mean entropy is above 98 % of the pretrained model's, and no more are right."""
    values, gain = matrix.entropies[t], _gain(matrix, 1 + t, 0, t)
    idle = bool(values[1 + t].mean() >= 0.98 * values[0].mean())
    if not idle or (gain is not None and float(gain.mean()) > 0):
        return None
    text = (
        f"{who} is no surer of its own images than the pretrained model: it has "
        f"{_cell(matrix, 1 + t, t)}, the pretrained model {_cell(matrix, 0, t)}; is it the right "
        "file, with the right images?"
    )
    return Finding("warning", "not-below-pretrained", (matrix.tasks[t],), text)


def _collapsed(matrix: Matrix, t: int, who: str) -> Finding | None:
    one_class = bool(matrix.accuracy()[1 + t, t] > 0.9)  # that all images are of, too
    if one_class or not matrix.marginal[1 + t, t] < COLLAPSED:
        return None
    text = (
        f"{who} predicts one class for nearly all images of its task: is it the right file, and "
        "are the images of all classes?"
    )
    return Finding("warning", "collapsed", (matrix.tasks[t],), text)


def _at_chance(matrix: Matrix, t: int, who: str) -> Finding | None:
    right, classes = matrix.right[t], matrix.classes[t]
    if right is None or classes < 2:
        return None
    pretrained, expert = right.double().mean(1)[[0, 1 + t]].tolist()
    spread = float((1 / classes * (1 - 1 / classes) / right.shape[1]) ** 0.5)
    if expert > min(1 / classes, pretrained) + spread:
        return None
    text = (
        f"{who} classifies {100 * expert:.0f} % of its task's images right, which is chance for "
        f"{classes} classes: is it the right file, and do classes: come in the order of the labels?"
    )
    return Finding("problem", "at-chance", (matrix.tasks[t],), text)


def _gain(matrix: Matrix, row: int, than: int, t: int) -> Tensor | None:
    """Per image: 1 right where the other is wrong, −1 the reverse; None without labels."""
    right = matrix.right[t]
    return None if right is None else right[row].double() - right[than].double()


def _clear(difference: Tensor | None, least: float) -> bool:
    """Whether a mean over images exceeds `least` and `ERRORS` of its standard errors."""
    if difference is None:
        return False
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) > max(least, ERRORS * error)


def _cell(matrix: Matrix, row: int, t: int) -> str:
    text = f"entropy {float(matrix.entropy()[row, t]):.3f} of log C"
    if matrix.right[t] is not None:
        text += f" (accuracy {100 * float(matrix.accuracy()[row, t]):.0f} %)"
    return text


def of_lengths(tasks: Sequence[str], norms: Tensor) -> Iterator[Finding]:
    """Task vectors much longer or shorter than the median one, by `norms` `[T]`."""
    for task, ratio in zip(tasks, (norms / norms.median()).tolist(), strict=True):
        if not 1 / ODD_LENGTH <= ratio <= ODD_LENGTH:
            text = (
                f"the task vector of {task!r} is {ratio:.2g} times as long as the median one: an "
                "expert of another pretrained model, or hardly trained, looks like this"
            )
            yield Finding("warning", "length", (task,), text)


def of_bases(tasks: Sequence[str], lengths: Tensor, cosines: Tensor) -> Iterator[Finding]:
    """Experts that share nothing with the pretrained model.

    Fine-tuning moves weights by a small part of their length, so an expert points where its
    pretrained model does; one of another training points anywhere.

    Args:
        lengths: of the task vectors relative to the pretrained weights, `[T]`.
        cosines: between each expert's matrices and the pretrained model's, `[T]`.
    """
    for task, length, cosine in zip(tasks, lengths.tolist(), cosines.tolist(), strict=True):
        if cosine < OTHER_BASE:
            text = (
                f"the expert of task {task!r} does not come from this pretrained model: its "
                f"weights have cosine {cosine:.2f} with the pretrained ones, and its task vector "
                f"is {length:.2g} times as long as they are; name the model it was fine-tuned from "
                "as suite.pretrained, or leave it out"
            )
            yield Finding("problem", "another-base", (task,), text)


def of_directions(tasks: Sequence[str], cosines: Tensor) -> Iterator[Finding]:
    """Pairs of task vectors that point the same way, by `cosines` `[T, T]`."""
    for row, column in (cosines.tril(-1) > NEAR_DUPLICATE).nonzero().tolist():
        one, other = tasks[column], tasks[row]
        text = (
            f"the experts of tasks {one!r} and {other!r} are nearly the same (cosine of their task "
            f"vectors {float(cosines[row, column]):.3f}): give every task its own fine-tuned "
            "checkpoint"
        )
        yield Finding("problem", "near-duplicate", (one, other), text)


def of_heads(heads: Heads) -> Iterator[Finding]:
    """Classes of one task whose embeddings in its head are practically equal."""
    for task in heads.tasks:
        rows = nn.functional.normalize(heads.weight(task).double(), dim=1)
        pairs = ((rows @ rows.T).tril(-1) >= SAME_CLASS).nonzero().tolist()
        if pairs:
            named = [" and ".join(repr(heads.classes[task][c]) for c in pair) for pair in pairs]
            more = f" and {len(pairs) - 3} more pairs" if len(pairs) > 3 else ""
            text = (
                f"the head of task {task!r} cannot tell apart {', '.join(named[:3])}{more}: their "
                f"embeddings have a cosine of at least {SAME_CLASS}; give these classes names that "
                "differ, or templates that the text tower understands"
            )
            yield Finding("warning", "same-classes", (task,), text)


def of_activation(change: Tensor, mend: str) -> Iterator[Finding]:
    """Whether GELU and QuickGELU seem to be confused, by `preflight.activation_change` `[T]`.

    An expert was trained to be sure of its own images, so any other activation than its own makes
    it less sure of them. Suspected where the other one lowers the experts' mean entropy by
    `ACTIVATION` of log C, and that of three quarters of them.

    Measured on the demo suite (four blocks, trained with GELU; 16 images per task): with cruder
    functions in place of GELU (x/2, a sigmoid, a mirrored GELU) the entropy of every expert on its
    own task rose, by 0.09 to 0.67 of log C, while the pretrained model's went either way, which is
    why it is not asked. QuickGELU itself moves the experts by at most 0.0005 there, so on towers
    this shallow the flag neither matters nor shows. Not measured on large models.

    Args:
        mend: what to set instead.
    """
    if change.mean() >= ACTIVATION and (change > 0).double().mean() >= 0.75:
        text = (
            "the experts are surer of their own images with the other activation (GELU or "
            f"QuickGELU): mean entropy lower by {float(change.mean()):.3f} of log C; if they were "
            f"trained with that one, {mend}"
        )
        yield Finding("warning", "activation", (), text)


def of_memory(cost: Estimate | None) -> Iterator[Finding]:
    """That memory will not do, if so."""
    mend = "set micro_batch, lower batch_size, or use a device with more"
    if cost is None:
        text = f"two images per task are more than the GPU's memory holds: {mend}"
        yield Finding("problem", "memory", (), text)
    elif cost.available is not None and cost.memory > cost.available:
        text = (
            f"adapting needs about {in_bytes(cost.memory)} of memory and there are "
            f"{in_bytes(cost.available)}: {mend}"
        )
        yield Finding("problem", "memory", (), text)
