"""What happens around the steps: checkpoints, signals, progress, measures while training."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm

from adamerge._base.errors import AdamergeError
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.resume import CheckpointFiles
from adamerge.weights.shards import ShardedTaskVectors

Fingerprint = Mapping[str, str]


class Checkpoints(Callback):
    """`last.ckpt` every few steps and at any end, written by `resume.CheckpointFiles`.

    It holds the learned state, optimizer, scheduler, step, random state and the fingerprint of
    settings and inputs; nothing that can be read from the inputs again.
    """

    def __init__(self, path: Path, every: int, fingerprint: Fingerprint) -> None:
        self.path, self.every, self.fingerprint = path, every, dict(fingerprint)
        self._saved = -1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["adamerge"] = {"fingerprint": self.fingerprint, "rng": _random_state()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _set_random_state(checkpoint["adamerge"]["rng"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step % self.every == 0:
            _settle(pl_module)
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _settle(pl_module)
        self.save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Saving waits for all processes, so they must all have come here for the same reason.
        together = trainer.world_size == 1 or isinstance(exception, AdamergeError)
        with contextlib.suppress(AdamergeError, OSError, RuntimeError):  # a device that is lost
            _settle(pl_module)
        with contextlib.suppress(OSError):  # the exception under way is the one to report
            if together:
                self.save(trainer, again=isinstance(exception, AdamergeError))

    def save(self, trainer: pl.Trainer, again: bool = False) -> None:
        """Saves now, unless this step is saved already and nothing changed since."""
        if trainer.global_step == self._saved and not again:
            return
        trainer.save_checkpoint(self.path, weights_only=False)  # the main process alone writes
        self._saved = trainer.global_step

    def save_nothing(self) -> None:
        """The checkpoint of a method that has nothing to learn."""
        found = {"fingerprint": self.fingerprint, "rng": _random_state()}
        content = {"adamerge": found, "state_dict": {}, "global_step": 0}
        CheckpointFiles().save_checkpoint(content, self.path)


def _settle(pl_module: pl.LightningModule) -> None:
    """Nothing that is behind a checkpoint may still be under way, least of all a failure."""
    if isinstance(pl_module, Adaptation):
        pl_module.hand_over(wait=True)
        pl_module.refuse_failure()


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - third parties use this one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


class StopOnSignal(Callback):
    """Ctrl-C and SIGTERM end training after the step under way, with everything saved.

    A second signal is left to its usual effect.

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
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.getsignal(number) for number in numbers}
        try:
            self._listen()
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
    """A bar with steps/s, time left, loss and mean entropy; images/s and memory to the log."""

    def __init__(self, log_every: int, show: bool = True) -> None:
        self.log_every, self.show = log_every, show
        self._bar: Any = None
        self._since, self._images = time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.show and trainer.is_global_zero:
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc="adapting",
                unit="step",
                dynamic_ncols=True,
            )
        self._since, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        self._images += sum(map(_count, batch.values())) * trainer.world_size
        assert isinstance(pl_module, Adaptation)
        if trainer.global_step % self.log_every == 0:
            pl_module.add_readings(self._measure(pl_module.device))
        news = pl_module.hand_over()
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            if news:
                logged = trainer.callback_metrics
                entropies = [float(v) for k, v in logged.items() if k.startswith("entropy/")]
                mean = sum(entropies) / max(len(entropies), 1)
                self._bar.set_postfix(loss=f"{float(logged['loss']):.3f}", entropy=f"{mean:.3f}")

    def _measure(self, device: torch.device) -> dict[str, float]:
        now = time.perf_counter()
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        rate = self._images / (now - self._since)
        self._since, self._images = now, 0
        return {"images_per_second": rate, "peak_memory_mib": peak}

    def on_exception(self, *_: Any) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _count(part: Any) -> int:
    """The images of one task in a batch: a tensor of them, or what is stored of them."""
    return len(next(iter(part.values()))) if isinstance(part, Mapping) else len(part)


class Watch(Callback):
    """Calls a function every few steps on the main process: accuracies, pictures."""

    def __init__(self, every: int, look: Callable[[int], Mapping[str, float]]) -> None:
        self.every, self.look = every, look

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.every and trainer.global_step % self.every == 0 and trainer.is_global_zero:
            found = self.look(trainer.global_step)
            for logger in trainer.loggers:
                logger.log_metrics(dict(found), step=trainer.global_step - 1)


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
