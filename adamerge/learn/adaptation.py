"""The LightningModule around one adaptation step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.encoders.clip import Normalizer
from adamerge.encoders.heads import Heads
from adamerge.learn.classifiers import LearnedHeads
from adamerge.learn.graphs import ReplayedSteps
from adamerge.learn.losses import marginal_entropy, sample_entropy
from adamerge.learn.objectives import Objective
from adamerge.learn.step import learnables, step_loss
from adamerge.learn.updates import Joint, Part, Step, Update
from adamerge.methods.base import MergeMethod
from adamerge.methods.contract import numbers_of

# task -> uint8 images [B_t, 3, H, W]; or what is known of them: `images` or stored `features`,
# `targets` and `image_ids` (see adamerge.learn.features). No labels.
Batch = Mapping[str, Tensor | Mapping[str, Tensor]]
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

_LOSSES = ("loss", "loss_mean")
_FAILED = "failed"  # among the numbers of a step: whether this one or one before was not finite


class Adaptation(pl.LightningModule):
    """Learns a method's parameters by minimising a label-free objective.

    Its checkpoints hold what was learned and nothing else: task vectors, heads and the tower are
    inputs, not state.

    Args:
        method: what is learned.
        objective: the loss per task.
        heads: the zero-shot heads (the same the objective uses).
        normalizer: uint8 images -> what the backbone takes.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning-rate scheduler stepped every step, or None.
        micro_batch: images encoded at a time, see `step_loss`.
        log_every: steps between two log entries.
        cuda_graph: record the step on a GPU and replay it, see `graphs.ReplayedSteps`.
        update: how a step moves what is learned, see `updates`.
    """

    def __init__(
        self,
        method: MergeMethod,
        objective: Objective,
        heads: Heads | LearnedHeads,
        normalizer: Normalizer,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        micro_batch: int | None = None,
        log_every: int = 10,
        cuda_graph: bool = False,
        update: Update | None = None,
    ) -> None:
        super().__init__()
        self.method, self.objective, self.heads = method, objective, heads
        self.normalizer = normalizer
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.micro_batch, self.log_every = micro_batch, log_every
        learned = learnables(method, objective)
        self._step = ReplayedSteps(self._compute, learned) if cuda_graph else self._compute
        self.update = Joint() if update is None else update
        self._only = Part()  # those of the step that the loss is of
        self._values: Tensor | None = None
        self._numbers: dict[str, Tensor] = {}  # of the last logged step
        self._since, self._images = time.perf_counter(), 0  # since the last logged step
        self._good: list[Tensor] | None = None  # parameters whose loss was finite
        self._failed = self._bad = torch.zeros((), dtype=torch.bool)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss over all tasks' images together."""
        images, targets, image_ids, task_ids = self._collect(batch)
        if image_ids is None:
            loss, self._values, features = self._step(images, task_ids, targets)
        else:  # what is kept of every image is no part of a recording
            loss, self._values, features = self._compute(images, task_ids, targets, image_ids)
        self._images += len(task_ids)
        if self._is_logged():
            self._note(self._measure(loss.detach(), features, task_ids))
        return loss

    def _note(self, numbers: dict[str, Tensor]) -> None:
        """Adds those of one pass to the step's: a loss to that of other tasks, and nothing else
        that is known from where the step began."""
        losses = {n: t + self._numbers[n] for n, t in numbers.items() if n in self._numbers}
        added = {n: t for n, t in losses.items() if n in _LOSSES and self._only.task is not None}
        self._numbers = {**numbers, **self._numbers, **added}

    def _compute(
        self,
        images: Tensor,
        task_ids: Tensor,
        targets: Tensor | None,
        image_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        known = (self.micro_batch, targets, image_ids)
        return step_loss(self.method, self.objective, images, task_ids, *known)

    @property
    def refuse_at_once(self) -> bool:
        """Whether every step asks if it failed: on a GPU that would wait for the device."""
        return self.device.type == "cpu"

    def _is_logged(self) -> bool:
        """Whether the step under way has an entry in the logs."""
        return (self.global_step + 1) % self.log_every == 0

    def _collect(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """All tasks' inputs, targets and image ids if known, and task ids; a task may have no more
        images."""
        parts: list[Mapping[str, Tensor]] = []
        sizes = []
        for task in self.heads.tasks:
            part = batch.get(task, {}) if self._only.task in (None, len(parts)) else {}
            known = part if isinstance(part, Mapping) else {"images": part}
            parts.append({key: self._only.of(rows) for key, rows in known.items()})
            sizes.append(len(next(iter(parts[-1].values()), ())))
        known = {
            key: torch.cat([part[key] for part in parts if part])
            for key in next(part for part in parts if part)
        }
        images = self.normalizer(known["images"]) if "images" in known else known["features"]
        task_ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        return images, known.get("targets"), known.get("image_ids"), task_ids

    @torch.no_grad()
    def _measure(self, loss: Tensor, features: Tensor, task_ids: Tensor) -> dict[str, Tensor]:
        """What is logged of a step, on the device."""
        metrics = {"loss": loss, "loss_mean": loss / len(self.heads.tasks)}
        sizes = torch.bincount(task_ids, minlength=len(self.heads.tasks)).tolist()
        for task, rows in zip(self.heads.tasks, features.split(sizes), strict=True):
            if len(rows) == 0:
                continue  # its images are over, or come later in the step
            logits = self.heads.logits(rows, task)
            metrics[f"entropy/{task}"] = sample_entropy(logits).mean()
            metrics[f"confidence/{task}"] = logits.float().softmax(-1).amax(-1).mean()
            metrics[f"marginal_entropy/{task}"] = marginal_entropy(logits)
        metrics |= numbers_of(self.method, self.heads.tasks)
        # Copies: what is a view of a parameter would be logged as the step leaves it.
        return {name: value.to(loss.device, copy=True) for name, value in metrics.items()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes whether loss and gradient are finite, and keeps the parameters while they are.

        Unless `refuse_at_once`, the note is read at logged steps and before every checkpoint.
        """
        assert self._values is not None
        learned = learnables(self.method, self.objective)
        grads = [tensor.grad.norm() for tensor in learned if tensor.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(grads))
        finite = torch.isfinite(norm) & torch.isfinite(self._values).all()
        now = [tensor.detach() for tensor in learned]
        if self._good is None:
            self._good = [tensor.clone() for tensor in now]
            self._failed, self._bad = torch.zeros_like(finite), self._values
        self._bad = torch.where(self._failed, self._bad, self._values)  # of the first failure
        self._failed = self._failed | ~finite
        for kept, tensor in zip(self._good, now, strict=True):
            kept.copy_(torch.where(self._failed, kept, tensor))
        if self.refuse_at_once:
            self.refuse_failure()
        if self._is_logged():
            self._numbers["gradient_norm"] = norm

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One step of the update, which may move the optimizer several times."""
        assert optimizer_closure is not None
        run, step = optimizer_closure, self.global_step

        def compute(part: Part) -> Any:
            self._only = part
            try:
                return run()
            finally:
                self._only = Part()

        def move(closure: Callable[[], Any]) -> Any:
            return optimizer.step(closure=closure)

        self._numbers = {}
        self.objective.begin_step(step)
        self.method.begin_step(step)
        learned = learnables(self.method, self.objective)
        self.update(Step(compute, move, learned, len(self.heads.tasks), step, self.method))
        if self._is_logged():
            self._send({**self._numbers, _FAILED: self._failed})

    def _send(self, numbers: Mapping[str, Tensor]) -> None:
        """Gives the numbers of a logged step to the loggers, as means over the processes.

        The loggers are called here: Lightning, when it stops, would log the last numbers once more
        under a later step.
        """
        values = torch.stack(list(numbers.values()))
        if self.trainer.world_size > 1:
            gathered = self.all_gather(values)
            assert isinstance(gathered, Tensor)
            values = gathered.mean(0)
        logged = dict(zip(numbers, values.tolist(), strict=True))
        if logged.pop(_FAILED):  # on any process: all stop together
            self._failed = torch.ones_like(self._failed)
            self.refuse_failure()
        latest = dict(zip(logged, values, strict=False))
        self.trainer.callback_metrics.update(latest)
        self.trainer.logged_metrics.update(latest)
        logged |= self._usage() | {"epoch": self.current_epoch}
        for logger in self.trainer.loggers:
            logger.log_metrics(logged, self.global_step)

    def _usage(self) -> dict[str, float]:
        """Images per second since the last logged step, of all processes, and peak memory."""
        now, images = time.perf_counter(), self._images * self.trainer.world_size
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        rate, self._since, self._images = images / (now - self._since), now, 0
        return {"images_per_second": rate, "peak_memory_mib": peak}

    def on_train_start(self) -> None:
        """The rate of images counts from here."""
        self._since, self._images = time.perf_counter(), 0

    def on_train_end(self) -> None:
        """No step is under way any more."""
        self.method.begin_step(None)

    def refuse_failure(self) -> None:
        """Puts the last good parameters back and raises, if a step was not finite.

        Raises:
            AdamergeError: naming the tasks whose loss it was.
        """
        if self._good is None or not bool(self._failed):
            return
        for tensor, kept in zip(learnables(self.method, self.objective), self._good, strict=True):
            tensor.detach().copy_(kept)
        self._failed = torch.zeros_like(self._failed)
        flags = torch.isfinite(self._bad).tolist()
        bad = [task for task, fine in zip(self.heads.tasks, flags, strict=True) if not fine]
        what = f"the loss of task {', '.join(bad)}" if bad else "the gradient of the coefficients"
        raise AdamergeError(
            f"{what} became NaN or infinite by step {self.global_step}; stopped, and the last "
            "parameters with a finite loss are kept: lower optim.lr in a new run, or look at that "
            "task's expert and images"
        )

    def configure_optimizers(self) -> Any:
        """The optimizer over all that is learned, with its scheduler if there is one."""
        optimizer = self.make_optimizer(learnables(self.method, self.objective))
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
