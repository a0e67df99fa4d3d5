"""Numbers of logged steps: none waits for the device, none is lost, each under its own step."""

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
from adamerge.learn import readings
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.callbacks import Checkpoints, Progress
from adamerge.learn.objectives import Entropy
from adamerge.learn.readings import Readings
from tests import golden_data as golden
from tests.test_contract import make

Rows = list[tuple[int | None, dict[str, float]]]


class Event:
    """A copy that is under way until it is waited for, or asked for often enough."""

    def __init__(self, asked: int) -> None:
        self.left, self.waited = asked, False

    def query(self) -> bool:
        self.left -= 1
        return self.waited or self.left < 0

    def synchronize(self) -> None:
        self.waited = True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """A device whose copies arrive two questions late."""
    events: list[Event] = []

    def send(values: Tensor) -> Any:
        events.append(Event(2))
        return values.clone(), events[-1]

    monkeypatch.setattr(readings, "send", send)
    return events


def test_numbers_of_the_cpu_are_there_at_once() -> None:
    found = Readings()
    found.add({"lost": 1.0})
    found.put(3, {"a": torch.tensor(0.1), "b": torch.tensor(0.2, dtype=torch.float64)})
    found.add({"c": 2.5})
    assert found.take() == [(3, {"a": torch.tensor(0.1).item(), "b": 0.2, "c": 2.5})]
    assert found.take(wait=True) == []


def test_numbers_on_their_way_keep_their_order_and_step(slow: list[Event]) -> None:
    found = Readings()
    for step in (1, 2, 2):
        found.put(step, {"a": torch.tensor(float(step))}, lambda values: values * 10)
    found.add({"b": 1.0})
    assert found.take() == [] and found.take() == []
    slow[2].waited = True
    assert found.take() == [(1, {"a": 10.0}), (2, {"a": 20.0, "b": 1.0})]
    found.put(4, {"a": torch.tensor(0.0)})
    assert found.take() == []
    assert found.take(wait=True) == [(4, {"a": 0.0})] and slow[3].waited


class Recorder(Logger):
    """What a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows = []

    name = version = "recorder"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, {k: v for k, v in metrics.items() if "_per_" not in k}))

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


def fit(adapt: Adaptation, folder: Path, steps: int = 7, **options: Any) -> Rows:
    """Trains with every callback of a run that logs or saves; what was logged."""
    logger = Recorder()
    callbacks = [Progress(adapt.log_every, show=False), Checkpoints(folder / "last.ckpt", 4, {})]
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "max_steps": steps, "logger": logger, "devices": 1} | options,
        callbacks=callbacks,
        log_every_n_steps=adapt.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(adapt, DataLoader(batches(steps), batch_size=None))
    last = {k: v for k, v in logger.rows[-1][1].items() if k != "epoch"}
    for key, value in last.items():
        assert float(trainer.callback_metrics[key]) == pytest.approx(value)
    return logger.rows


quiet = pytest.mark.filterwarnings("ignore")  # what Lightning warns of, as in adamerge.cli


@quiet
def test_late_numbers_are_those_of_a_device_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = fit(module(), tmp_path)
    assert [step for step, _ in at_once] == [1, 3, 5]
    assert all(row["loss"] == pytest.approx(3 * row["loss_mean"]) for _, row in at_once)
    assert all(row["gradient_norm"] > 0 and row["epoch"] == 0 for _, row in at_once)
    waiting = []
    save = pl.Trainer.save_checkpoint

    def watched(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        assert isinstance(trainer.lightning_module, Adaptation)
        waiting.append(len(trainer.lightning_module._readings._waiting))
        save(trainer, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", watched)
    events: list[Event] = []

    def send(values: Tensor) -> Any:
        events.append(Event(10**6))  # arrives only when it is waited for
        return values.clone(), events[-1]

    monkeypatch.setattr(readings, "send", send)
    late = fit(module(), tmp_path)
    for (step, row), (expected, other) in zip(late, at_once, strict=True):
        assert step == expected and list(row) == list(other)
        known = {name: value for name, value in other.items() if name != "peak_memory_mib"}
        assert {name: row[name] for name in known} == pytest.approx(known, rel=1e-5)
    assert len(events) == 3 and waiting == [0, 0], "all are handed over before a checkpoint"


@quiet
def test_a_failure_that_is_read_late_stops_before_a_checkpoint(
    slow: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adaptation, "_asks_at_once", False)  # as on a GPU
    adapt = module(every=2)
    measure = adapt.objective.term
    calls = []

    def broken(logits: Tensor) -> Tensor:
        calls.append(1)
        return measure(logits) * (float("nan") if len(calls) > 3 * len(golden.TASKS) else 1)

    adapt.objective.term = broken  # type: ignore[method-assign]
    with pytest.raises(AdamergeError, match="became NaN or infinite by step 4"):
        fit(adapt, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.isfinite(saved["state_dict"]["method.coefficients"]).all()


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *(("layer_wise", 1), ("block_wise", 1), ("layer_wise_clamped", 1)),
        *(("wemoe", 1), ("wemoe_constant", 1), ("surgery", 1), ("surgery_v2", 1)),
    ],
)
def test_no_step_looks_at_a_value(name: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, whoever asks for one fails: so nothing waits for a device."""
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nothing)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    sent, losses = [], []
    monkeypatch.setattr(readings, "send", lambda values: (sent.append(values), None))
    adapt = module(name, every)
    monkeypatch.setattr(adapt, "hand_over", lambda **_: False)
    monkeypatch.setattr(adapt, "_average", lambda values: values)
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
    assert {loss.device.type for loss in losses} == {"meta"} and len(sent) == (
        2 if every == 1 else 0
    )


def test_a_value_that_is_looked_at_would_be_found() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(nn.Parameter(torch.zeros(1, device="meta")).sum() > 0)


@quiet
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["layer_wise", "wemoe", "surgery"])
def test_no_step_on_a_gpu_waits_for_it(name: str, tmp_path: Path) -> None:
    class Strict(Adaptation):
        def on_train_batch_start(self, *_: Any) -> None:
            if self.global_step > 1:  # the first steps set things up
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            torch.cuda.set_sync_debug_mode("default")

    adapt = module(name)
    adapt.__class__ = Strict
    try:
        rows = fit(adapt, tmp_path, accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step for step, _ in rows] == [1, 3, 5]
