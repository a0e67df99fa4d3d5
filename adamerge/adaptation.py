"""One adaptation step, and the LightningModule around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.encoders import Normalizer
from adamerge.errors import AdamergeError
from adamerge.heads import Heads
from adamerge.methods.base import MergeMethod
from adamerge.objectives import Objective, marginal_entropy, sample_entropy

Batch = Mapping[str, Tensor]  # task -> uint8 images [B_t, 3, H, W]; no labels
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def step_loss(
    method: MergeMethod,
    objective: Objective,
    images: Tensor,
    task_ids: Tensor,
    micro_batch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one step; its `backward()` fills the gradients of the learnables.

    With `micro_batch` the images are encoded that many at a time, with the activations of one
    micro-batch in memory and the weights merged once; the gradient is the same up to rounding. An
    objective that is not additive (infomax) then costs one more forward pass, to know its
    gradient in the features first.

    Args:
        method: the method to learn.
        objective: `(features, task_ids) -> [T]`.
        images: `[B, 3, H, W]`, normalised, of any mix of tasks.
        task_ids: `[B]`, indices into the objective's tasks, best kept on the CPU.
        micro_batch: images at a time; None for all together.

    Returns:
        The weighted loss `[]`, the objective's value per task `[T]` and the features `[B, D]`;
        the last two detached.
    """
    if micro_batch is None or micro_batch >= len(images):
        features = method(images, task_ids)
        values = objective(features, task_ids)
        return objective.weigh(values), values.detach(), features.detach()
    shared = method.weights()
    leaves = {name: w.detach().requires_grad_(w.requires_grad) for name, w in shared.items()}
    chunks = list(zip(images.split(micro_batch), task_ids.split(micro_batch), strict=True))
    backward = _additive_backward if objective.additive else _two_pass_backward
    values, features = backward(method, objective, leaves, chunks, task_ids)
    learned = [name for name, leaf in leaves.items() if leaf.grad is not None]
    loss: Tensor = _Delivered.apply(
        objective.weigh(values),
        [leaves[name].grad for name in learned],
        *[shared[name] for name in learned],
    )
    return loss, values, features


def _additive_backward(
    method: MergeMethod,
    objective: Objective,
    leaves: Mapping[str, Tensor],
    chunks: list[tuple[Tensor, Tensor]],
    task_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Every micro-batch forward and backward in turn; gradients add up in the leaves."""
    counts = dict(enumerate(torch.bincount(task_ids.cpu()).tolist()))
    parts, total = [], None
    for images, ids in chunks:
        features = method.encode(leaves, images, ids)
        values = objective(features, ids, counts)
        torch.autograd.backward(objective.weigh(values))
        parts.append(features.detach())
        total = values.detach() if total is None else total + values.detach()
    assert total is not None  # split never returns an empty tuple
    return total, torch.cat(parts)


def _two_pass_backward(
    method: MergeMethod,
    objective: Objective,
    leaves: Mapping[str, Tensor],
    chunks: list[tuple[Tensor, Tensor]],
    task_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Features without a graph, the objective's gradient in them, then each micro-batch again."""
    with torch.no_grad():
        features = torch.cat([method.encode(leaves, images, ids) for images, ids in chunks])
    features.requires_grad_()
    values = objective(features, task_ids)
    (gradient,) = torch.autograd.grad(objective.weigh(values), features)
    parts = gradient.split([len(images) for images, _ in chunks])
    for (images, ids), part in zip(chunks, parts, strict=True):
        torch.autograd.backward(method.encode(leaves, images, ids), part)
    return values.detach(), features.detach()


class _Delivered(torch.autograd.Function):
    """A loss whose gradients are already known: hands them to the shared weights on backward.

    So a step in micro-batches looks to the optimizer, to gradient hooks and to DDP like any other
    loss: one backward pass, one gradient per learnable.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *shared: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[grad.mul_(outer.to(grad.dtype)) for grad in ctx.grads]


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
    """

    def __init__(
        self,
        method: MergeMethod,
        objective: Objective,
        heads: Heads,
        normalizer: Normalizer,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        micro_batch: int | None = None,
        log_every: int = 10,
    ) -> None:
        super().__init__()
        self.method, self.objective, self.heads = method, objective, heads
        self.normalizer = normalizer
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.micro_batch, self.log_every = micro_batch, log_every
        self._values: Tensor | None = None
        self._good: dict[str, Tensor] | None = None  # parameters whose loss was finite
        self._failed = self._bad = torch.zeros((), dtype=torch.bool)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss over all tasks' images together."""
        tasks = self.heads.tasks
        images = self.normalizer(torch.cat([batch[task] for task in tasks]))
        sizes = torch.tensor([len(batch[task]) for task in tasks])
        task_ids = torch.repeat_interleave(torch.arange(len(tasks)), sizes)
        loss, values, features = step_loss(
            self.method, self.objective, images, task_ids, self.micro_batch
        )
        self._values = values
        if (self.global_step + 1) % self.log_every == 0:
            self._log_step(loss.detach(), features, task_ids)
        return loss

    @torch.no_grad()
    def _log_step(self, loss: Tensor, features: Tensor, task_ids: Tensor) -> None:
        metrics = {"loss": loss, "loss_mean": loss / len(self.heads.tasks)}
        for index, task in enumerate(self.heads.tasks):
            logits = self.heads.logits(features[(task_ids == index).to(features.device)], task)
            classes = max(logits.shape[-1], 2)
            metrics[f"entropy/{task}"] = sample_entropy(logits).mean()
            metrics[f"confidence/{task}"] = logits.float().softmax(-1).amax(-1).mean()
            metrics[f"marginal_entropy/{task}"] = marginal_entropy(logits) / math.log(classes)
        table = self.method.coefficient_table()
        for row, task in enumerate(self.heads.tasks if table is not None else ()):
            assert table is not None
            for reduce in ("mean", "min", "max"):
                value = getattr(table[1][row], reduce)()
                metrics[f"coefficient_{reduce}/{task}"] = value.to(loss.device)
        self.log_dict(metrics, sync_dist=self.trainer.world_size > 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes whether loss and gradient are finite, and keeps the parameters while they are.

        On a CPU a step that is not finite is refused at once. On a GPU asking would wait for the
        device, so the note stays there and is read at log steps and before every checkpoint.
        """
        assert self._values is not None
        parameters = dict(self.method.named_parameters())
        grads = [p.grad.norm() for p in parameters.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(grads))
        log_step = (self.global_step + 1) % self.log_every == 0
        if log_step:
            self.log("gradient_norm", norm)
        finite = torch.isfinite(norm) & torch.isfinite(self._values).all()
        now = {name: parameter.detach() for name, parameter in parameters.items()}
        if self._good is None:
            self._good = {name: tensor.clone() for name, tensor in now.items()}
            self._failed, self._bad = torch.zeros_like(finite), self._values
        self._bad = torch.where(self._failed, self._bad, self._values)  # of the first failure
        self._failed = self._failed | ~finite
        for name, kept in self._good.items():
            kept.copy_(torch.where(self._failed, kept, now[name]))
        if log_step or self.device.type == "cpu":
            self.refuse_failure()

    def refuse_failure(self) -> None:
        """Puts the last good parameters back and raises, if a step was not finite.

        Raises:
            AdamergeError: naming the tasks whose loss it was.
        """
        if self._good is None or not bool(self._failed):
            return
        self.method.load_state_dict(self._good)
        self._failed = torch.zeros_like(self._failed)
        raise AdamergeError(self._describe_failure())

    def _describe_failure(self) -> str:
        flags = torch.isfinite(self._bad).tolist()
        bad = [task for task, fine in zip(self.heads.tasks, flags, strict=True) if not fine]
        what = f"the loss of task {', '.join(bad)}" if bad else "the gradient of the coefficients"
        return (
            f"{what} became NaN or infinite by step {self.global_step}; stopped, and the last "
            "parameters with a finite loss are kept: lower optim.lr in a new run, or look at that "
            "task's expert and images"
        )

    def configure_optimizers(self) -> Any:
        """The optimizer over the method's learnables, with its scheduler if there is one."""
        optimizer = self.make_optimizer(self.method.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
