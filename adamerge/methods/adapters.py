"""Adapters: `z − up(act(down(z)))` per task, on features or on the tokens after every block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.tower import equal_runs, resblocks, tapped

Change = Callable[[int, Tensor], Tensor]  # (position, hidden [B, …, width]) -> adapted
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "identity": lambda x: x}


class Adapter(nn.Module):
    """The weights of one adapter: `down [rank, width]` and `up [width, rank]`."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    @classmethod
    def start(cls, rank: int, width: int) -> Adapter:
        """One that changes nothing yet: `down` drawn as a linear layer's (Kaiming), `up` zero."""
        down = nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5))
        return cls(down, torch.zeros(width, rank))


def changer(
    adapter: Callable[[int, int], tuple[Tensor, Tensor]],
    tasks: int,
    task_ids: Tensor,
    activation: str,
) -> Change:
    """The adapters of one batch, as a function of position and hidden states `[B, …, width]`.

    Only adapters of tasks that are in the batch are touched, and get a gradient.

    Args:
        adapter: `(task, position) -> down, up`.
        tasks: T; task ids are within `[0, T)`.
        task_ids: `[B]`, best on the CPU.

    Raises:
        AdamergeError: an id without a task; on a call, hidden states of another width.
    """
    ids = task_ids.cpu()
    present: list[int] = ids.unique().tolist()
    if present and not 0 <= present[0] <= present[-1] < tasks:
        raise AdamergeError(
            f"task_ids has the values {present}: expected 0 to {tasks - 1}, one per task"
        )
    runs = equal_runs(ids)
    place = torch.searchsorted(torch.tensor(present), ids) if runs is None else None
    act = activation_of(activation)

    def change(position: int, hidden: Tensor) -> Tensor:
        pairs = [adapter(task, position) for task in (present if runs is None else runs)]
        down, up = (torch.stack(part) for part in zip(*pairs, strict=True))
        if hidden.shape[-1] != down.shape[-1]:
            raise AdamergeError(
                f"the encoder gives features of size {hidden.shape[-1]}: expected dim "
                f"{down.shape[-1]}, the size the adapters were made for"
            )
        if place is not None:  # weights for every image, instead of images for every weight
            down, up = down[place.to(down.device)], up[place.to(up.device)]
        rows = hidden.reshape(len(down), -1, hidden.shape[-1])
        return hidden - torch.bmm(act(torch.bmm(rows, down.mT)), up.mT).view(hidden.shape)

    return change


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """`relu` or `identity`. Raises AdamergeError for another name."""
    if name not in _ACTIVATIONS:
        raise AdamergeError(
            f"activation is {name!r}: expected 'relu' or 'identity' (method.activation)"
        )
    return _ACTIVATIONS[name]


class AdaptedEncoder(nn.Module):
    """A frozen encoder with frozen adapters of every task.

    Args:
        encoder: a folded encoder; held, not copied.
        adapters: task, in the order of `task_ids` -> `(down, up)` by position: one pair for the
            features, or one for each block and one for the features last.
        activation: `relu` or `identity`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        adapters: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
        activation: str = "relu",
    ) -> None:
        super().__init__()
        activation_of(activation)
        self.encoder, self.tasks, self.activation = encoder, tuple(adapters), activation
        self.by_task = nn.ModuleList(
            nn.ModuleList(Adapter(down, up) for down, up in own) for own in adapters.values()
        )
        self.requires_grad_(False)

    def forward(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """Adapted features, `[B, 3, H, W], [B] -> [B, D]`."""
        change = changer(self._adapter, len(self.tasks), task_ids, self.activation)
        final = len(cast(Any, self.by_task[0])) - 1
        with tapped(resblocks(self.encoder) if final else [], change):
            return change(final, self.encoder(images, task_ids))

    def _adapter(self, task: int, position: int) -> tuple[Tensor, Tensor]:
        own = cast(Any, self.by_task[task])[position]
        return own.down, own.up
