"""Numbers of logged steps: other steps wait for no device, and each is under its own step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adamerge._base.errors import AdamergeError
from adamerge.encoders.clip import Normalizer
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.callbacks import Progress
from adamerge.learn.objectives import Entropy
from adamerge.learn.resume import Checkpoints
from tests import golden_data as golden
from tests.test_contract import make

Rows = list[tuple[int | None, dict[str, float]]]


class Recorder(Logger):
    """What a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows = []

    name = version = "recorder"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """None are given."""


def module(name: str = "layer_wise", every: int = 2) -> Adaptation:
    heads = golden.heads(torch.float32)
    shift = Normalizer([0.5] * 3, [0.5] * 3)
    method = make(name, torch.float32)
    return Adaptation(method, Entropy(heads), heads, shift, torch.optim.Adam, log_every=every)


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    side = golden.tensors("images")["task_a"].shape[-1]
    size = (count, len(golden.TASKS), 4, 3, side, side)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return [dict(zip(golden.TASKS, step, strict=True)) for step in pixels]


class StopAfter(pl.Callback):
    """Ends training after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def fit(adapt: Adaptation, folder: Path, *more: pl.Callback, **options: Any) -> Rows:
    """Trains for seven steps with the callbacks of a run; what was logged."""
    logger = Recorder()
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "max_steps": 7, "logger": logger, "devices": 1} | options,
        callbacks=[Progress(), Checkpoints(folder / "last.ckpt", 4, {}), *more],
        log_every_n_steps=adapt.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(adapt, DataLoader(batches(7), batch_size=None))
    last = logger.rows[-1][1]
    for key, value in trainer.callback_metrics.items():
        assert last[key] == pytest.approx(float(value))
    assert {"loss", "gradient_norm"} <= set(trainer.callback_metrics)
    return logger.rows


quiet = pytest.mark.filterwarnings("ignore")  # what Lightning warns of, as in adamerge.cli


@quiet
def test_logged_steps_and_no_others(tmp_path: Path) -> None:
    rows = fit(module(), tmp_path)
    assert [step for step, _ in rows] == [1, 3, 5]
    assert all(row["loss"] == pytest.approx(3 * row["loss_mean"]) for _, row in rows)
    assert all(row["gradient_norm"] > 0 and row["epoch"] == 0 for _, row in rows)
    assert all(row["images_per_second"] > 0 and row["peak_memory_mib"] > 0 for _, row in rows)
    stopped = fit(module(), tmp_path, StopAfter(5))
    assert [step for step, _ in stopped] == [1, 3], "nothing is logged again where it stops"
    assert [row["loss"] for _, row in stopped] == [row["loss"] for _, row in rows[:2]]


@quiet
def test_a_failure_that_is_read_late_stops_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adaptation, "refuse_at_once", False)  # as on a GPU
    adapt = module(every=100)
    measure = adapt.objective.term
    calls = []

    def broken(logits: Tensor) -> Tensor:
        calls.append(1)
        return measure(logits) * (float("nan") if len(calls) > 2 * len(golden.TASKS) else 1)

    adapt.objective.term = broken  # type: ignore[method-assign]
    with pytest.raises(AdamergeError, match="became NaN or infinite by step 4"):
        fit(adapt, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.isfinite(saved["state_dict"]["method.coefficients"]).all()


@quiet
def test_a_logged_step_reads_a_failure_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adaptation, "refuse_at_once", False)
    adapt = module(every=3)
    adapt.objective.term = lambda logits: logits.sum() * float("inf")  # type: ignore[method-assign]
    with pytest.raises(AdamergeError, match="became NaN or infinite by step 2"):
        fit(adapt, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("layer_wise", "block_wise", "layer_wise_clamped"),
        *("wemoe", "wemoe_constant", "surgery", "surgery_v2"),
    ],
)
def test_no_step_looks_at_a_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, whoever asks for one fails: so nothing waits for a device."""
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nothing)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    sent, losses = [], []
    adapt = module(name, 1)
    monkeypatch.setattr(
        adapt, "_send", lambda numbers: sent.append(torch.stack([*numbers.values()]))
    )
    adapt.to("meta")
    for batch in batches(2):
        on_device = {task: pixels.to("meta") for task, pixels in batch.items()}
        optimizer = torch.optim.SGD(adapt.method.parameters(), 0.1)

        def closure(images: Any = on_device, optimizer: Any = optimizer) -> torch.Tensor:
            loss = adapt.training_step(images, 0)
            loss.backward()
            adapt.on_before_optimizer_step(optimizer)
            losses.append(loss)
            return loss

        adapt.optimizer_step(0, 0, optimizer, closure)
    assert {loss.device.type for loss in losses} == {"meta"} and len(sent) == 2


def test_a_value_that_is_looked_at_would_be_found() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(nn.Parameter(torch.zeros(1, device="meta")).sum() > 0)


@quiet
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["layer_wise", "wemoe", "surgery"])
def test_no_step_on_a_gpu_waits_for_it_but_those_that_are_logged(name: str, tmp_path: Path) -> None:
    class Strict(Adaptation):
        """Nothing may wait from a step's beginning to the end of the optimizer's step, nor when
        the module itself ends the step; in between come the callbacks, and a checkpoint may."""

        def on_train_batch_start(self, *_: Any) -> None:
            if self.global_step > 1 and not self._is_logged():  # the first steps set things up
                torch.cuda.set_sync_debug_mode("error")

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    adapt = module(name)
    adapt.__class__ = Strict
    try:
        rows = fit(adapt, tmp_path, accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step for step, _ in rows] == [1, 3, 5]
