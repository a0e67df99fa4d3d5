"""What label-free signals say of an adaptation, before and after, and what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

from adamerge.report.signals import ByTask

AGREEING = 0.5  # below, the merged model is more often wrong than right, by the experts
COLLAPSED = 0.7  # of the entropy of the experts' own mean prediction
FALL = 0.05  # of agreement: four of 64 images


def before(objective: str, taught: bool, start: ByTask) -> list[str]:
    """Sentences on an objective that trusts the merge's own predictions (entropy, infomax), before
    anything is learned; none where all is well, or the experts teach.

    Args:
        objective: the name of the one that will be used.
        taught: whether the experts teach.
        start: signals of the merge as it starts.
    """
    low = {} if taught else {t: v for t, v in start["agreement"].items() if v < AGREEING}
    if not low:
        return []
    shares = ", ".join(f"{100 * value:.0f} % ({task})" for task, value in low.items())
    found = f"before adapting, the merge names the expert's class for {shares} of the images: "
    if objective == "infomax":
        return [f"{found}objective=expert_kl, which learns from the experts, gains more there"]
    return [
        f"{found}where it is more often wrong than right, {objective} confirms its mistakes; "
        "objective=expert_kl is the better choice"
    ]


def after(objective: str, taught: bool, signals: Mapping[str, ByTask]) -> list[str]:
    """Sentences on what an adaptation did; none where all is well.

    A task on which merge and experts agree less than before has most probably lost accuracy, and a
    mean prediction that narrows while the merge learns is a task collapsing onto few of its
    classes. The experts' predictions as targets (`expert_kl`) suffer from neither.

    Args:
        signals: those of the merge as it started (`before`) and of its last state (`last`), and of
            the `experts`.
    """
    start, last = (signals[part]["agreement"] for part in ("before", "last"))
    fallen = [task for task in start if start[task] - last[task] >= FALL]
    better = [n for n in ("infomax", "expert_kl") if n != objective]
    instead = f"objective={' or objective='.join(better)}"
    instead = "a lower optim.lr, or fewer steps" if taught else instead
    said = []
    if fallen:
        falls = ", ".join(f"{t} {100 * start[t]:.0f} → {100 * last[t]:.0f} %" for t in fallen)
        said.append(f"while adapting, agreement with the experts fell ({falls}): try {instead}")
    now, own = (signals[part]["marginal_entropy"] for part in ("last", "experts"))
    narrow = [task for task in now if now[task] < COLLAPSED * own[task]]
    if narrow and not taught:
        values = ", ".join(f"{task} {now[task]:.2f} of {own[task]:.2f} nats" for task in narrow)
        said.append(
            "while adapting, predictions have collapsed onto few classes (entropy of the mean "
            f"prediction, and the expert's: {values}): try {instead}"
        )
    return said
