"""Which state of a run is kept: the one with the best label-free signal, or the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from adamerge.learn.adaptation import Adaptation
from adamerge.report.signals import ByTask, mean

SIGNAL = "agreement"  # with the experts; it ranks merges as accuracy does
IMAGES = 64  # of each task, out of those adapted on
_TIMES = 10  # a run is measured, beside its start
_SHARE = 20  # of a run's time, one such part at most is spent on measuring
KEPT = "kept"  # in a checkpoint


def interval(steps: int, batch_size: int) -> int:
    """Steps between two measurements of a run that does not say.

    A measurement encodes `IMAGES` images of a task twice, a step `batch_size` of them, forward and
    (for twice as long) backward.
    """
    step, measurement = 3 * batch_size, 2 * IMAGES
    return max(math.ceil(steps / _TIMES), math.ceil(_SHARE * measurement / step), 1)


class Keep(Callback):
    """Measures signals at the start, every few steps and at the end, and keeps the best state.

    Of two states with the same signal the later is kept. What is kept is in every checkpoint. With
    several processes the main one measures, and all keep the same.

    Args:
        measure: signals of the merge as it is.
        every: steps between measurements.
        best: keep states; else only signals.
        patience: measurements in a row without a better state after which training stops.
        stopped: whether a signal is about to stop the run, whose end is then none.
        record: what a checkpoint of the run holds, see `record`.

    Attributes:
        record: `signals` (step -> what was measured), and of the best state its `step` and `state`.
    """

    def __init__(
        self,
        measure: Callable[[], ByTask],
        every: int,
        best: bool = True,
        patience: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.measure, self.every, self.best, self.patience = measure, every, best, patience
        self.stopped = stopped
        self.record: dict[str, Any] = {"signals": {}, **(record or {})}

    @property
    def exhausted(self) -> bool:
        """Whether the patience is over."""
        steps = list(self.record["signals"])
        after = steps[steps.index(best_step(self.record["signals"])) + 1 :] if steps else []
        return self.patience is not None and len(after) >= self.patience

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.record["signals"] and trainer.global_step == 0:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self._look(trainer, pl_module)
            trainer.should_stop = trainer.should_stop or self.exhausted

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Of a run that ends before its last step, by time or when its images are over."""
        if trainer.global_step not in self.record["signals"]:
            ends = trainer.strategy.reduce_boolean_decision(not self.stopped())
            if ends:
                self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures; keeps the state if none was better."""
        if isinstance(pl_module, Adaptation):
            pl_module.refuse_failure()
        found = self.measure() if trainer.is_global_zero else None
        found = trainer.strategy.broadcast(found)
        assert found is not None
        step, seen = trainer.global_step, self.record["signals"]
        seen[step] = found
        if best_step(seen) == step and self.best:
            state = pl_module.state_dict()
            self.record |= {
                "step": step,
                "state": {name: tensor.detach().cpu().clone() for name, tensor in state.items()},
            }
        if trainer.is_global_zero:
            numbers = {f"signals/{n}/{t}": v for n, by in found.items() for t, v in by.items()}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=max(step - 1, 0))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEPT] = self.record

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.record |= checkpoint.get(KEPT, {})


def best_step(seen: Mapping[int, ByTask]) -> int:
    """The step with the greatest signal, the last of several."""
    return max(seen, key=lambda step: (mean(seen[step][SIGNAL]), step))


def restore(module: nn.Module, record: Mapping[str, Any]) -> None:
    """Puts the best state back exactly, where one was kept."""
    if "state" in record:
        module.load_state_dict(record["state"])


def outcome(record: Mapping[str, Any], best: bool) -> dict[str, Any]:
    """What was kept of a run and why, for its results; empty where nothing was measured."""
    seen: Mapping[int, ByTask] = record.get("signals", {})
    if len(seen) < 2:
        return {}
    values = {step: mean(signals[SIGNAL]) for step, signals in seen.items()}
    last, kept = max(values), best_step(seen)
    step = record.get("step", last) if best else last
    return {
        "state": "best" if best else "last",
        "signal": SIGNAL,
        "step": step,
        "last_step": last,
        "value": values[step],
        "start": values[min(values)],
        "best": values[kept],
        "last": values[last],
    }


def sentence(kept: Mapping[str, Any]) -> str:
    """The outcome in words."""
    value, start, last = (f"{100 * kept[key]:.1f} %" for key in ("value", "start", "last"))
    of = f"step {kept['step']} of {kept['last_step']}"
    why = (
        f"the best measured (start {start}, last {last})"
        if kept["state"] == "best"
        else f"and the start {start}"
    )
    return f"{of}, where merge and experts agree on {value} of the images, {why}"


def never_better(kept: Mapping[str, Any]) -> str:
    """A sentence, if no state after the start had a better signal than the start."""
    if not kept or kept["best"] > kept["start"]:
        return ""
    values = f"start {100 * kept['start']:.1f} %, end {100 * kept['last']:.1f} %"
    exported = f"step {kept['step']} is exported"
    mend = "; keep=best exports the best state" if kept["value"] < kept["best"] else ""
    return (
        f"the merge never beat its start (agreement with the experts: {values}): {exported}{mend}"
    )
