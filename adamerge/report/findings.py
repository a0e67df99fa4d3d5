"""What is said of a suite before training: findings, and those on its task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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


def of_lengths(tasks: Sequence[str], norms: Tensor) -> Iterator[Finding]:
    """Task vectors much longer or shorter than the median one, by `norms` `[T]`."""
    for task, ratio in zip(tasks, (norms / norms.median()).tolist(), strict=True):
        if not 1 / ODD_LENGTH <= ratio <= ODD_LENGTH:
            yield Finding(
                "warning",
                "length",
                (task,),
                f"the task vector of {task!r} is {ratio:.2g} times as long as the median one: an "
                "expert of another pretrained model, or hardly trained, looks like this",
            )


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
            yield Finding(
                "problem",
                "another-base",
                (task,),
                f"the expert of task {task!r} does not come from this pretrained model: its "
                f"weights have cosine {cosine:.2f} with the pretrained ones, and its task vector "
                f"is {length:.2g} times as long as they are; name the model it was fine-tuned from "
                "as suite.pretrained, or leave it out",
            )


def of_directions(tasks: Sequence[str], cosines: Tensor) -> Iterator[Finding]:
    """Pairs of task vectors that point the same way, by `cosines` `[T, T]`."""
    for row, task in enumerate(tasks):
        for column in range(row):
            if cosines[row, column] > NEAR_DUPLICATE:
                yield Finding(
                    "problem",
                    "near-duplicate",
                    (tasks[column], task),
                    f"the experts of tasks {tasks[column]!r} and {task!r} are nearly the same "
                    f"(cosine of their task vectors {float(cosines[row, column]):.3f}): give every "
                    "task its own fine-tuned checkpoint",
                )


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
        yield Finding(
            "warning",
            "activation",
            (),
            "the experts are surer of their own images with the other activation (GELU or "
            f"QuickGELU): mean entropy lower by {float(change.mean()):.3f} of log C; if they were "
            f"trained with that one, {mend}",
        )
