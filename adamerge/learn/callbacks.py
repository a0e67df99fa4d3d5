"""What happens around the steps: signals, a progress bar, accuracies, shared task vectors."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm

from adamerge._base.compat import forget_sigterm
from adamerge.weights.shards import ShardedTaskVectors


class StopOnSignal(Callback):
    """Ctrl-C, SIGTERM and SIGUSR1 end training after the step under way, with everything saved.

    A second signal is left to its usual effect. SIGUSR1 is SLURM's: Lightning would answer it with
    a checkpoint of its own, from which no run goes on.

    Attributes:
        received: the signal that stopped training, or None.
    """

    def __init__(self, check_every: int) -> None:
        self.received: int | None = None
        self.check_every = check_every
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes signals within the block; the handlers of before are back after it."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.getsignal(number) for number in numbers}
        try:
            self._listen()
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        forget_sigterm(trainer)  # where one came since Lightning listens: we have noted it too
        if self.received is None:
            self._listen()  # in place of Lightning's, which talks to other processes

    def _listen(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        stop = self.received is not None
        if trainer.world_size > 1:  # all ranks must leave at the same step
            if trainer.global_step % self.check_every:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            if stop and self.received is None:
                self.received = int(signal.SIGTERM)
        trainer.should_stop = trainer.should_stop or stop


class Progress(Callback):
    """A bar with steps/s and time left, and the loss and mean entropy of the last logged step."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="adapting",
            unit="step",
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self._bar.update(trainer.global_step - self._bar.n)
        if trainer.global_step % pl_module.log_every == 0:
            logged = trainer.callback_metrics
            entropies = [float(v) for k, v in logged.items() if k.startswith("entropy/")]
            mean = sum(entropies) / max(len(entropies), 1)
            self._bar.set_postfix(loss=f"{float(logged['loss']):.3f}", entropy=f"{mean:.3f}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.teardown(trainer, pl_module, "fit")


class Watch(Callback):
    """Logs what a function of the method gives every few steps, on the main process."""

    def __init__(self, every: int, measure: Callable[[], Mapping[str, float]]) -> None:
        self.every, self.measure = every, measure

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.every and trainer.global_step % self.every == 0 and trainer.is_global_zero:
            measured = dict(self.measure())
            for logger in trainer.loggers:
                logger.log_metrics(measured, step=trainer.global_step - 1)


class Sharding(Callback):
    """Before the method moves to its device, so that no device ever holds more than its part."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Cuts the task vectors; the processes know each other by now."""
        method: Any = pl_module.method
        if trainer.world_size > 1:
            whole = method.task_vectors.whole
            method.task_vectors = ShardedTaskVectors(whole, trainer.global_rank, trainer.world_size)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the whole back: what comes after training is the main process's alone."""
        method: Any = pl_module.method
        method.task_vectors = method.task_vectors.whole
