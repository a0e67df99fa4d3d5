"""Numbers of a step on their way from the device to the loggers, without waiting for them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Reading:
    """What is known of one step.

    Attributes:
        values: on the host, `[len(names)]`; filled once `event` is done.
        event: None where the values are there already.
        more: numbers that never were on the device.
    """

    step: int
    names: tuple[str, ...]
    values: Tensor
    event: torch.cuda.Event | None
    more: dict[str, float] = field(default_factory=dict)

    def arrived(self, wait: bool) -> bool:
        if self.event is None or self.event.query():
            return True
        if wait:
            self.event.synchronize()
        return wait

    def numbers(self) -> dict[str, float]:
        return dict(zip(self.names, self.values.tolist(), strict=True)) | self.more


class Readings:
    """Numbers by step: put in while they are computed, taken out when they have arrived.

    On a GPU all numbers of a step are one tensor, copied to pinned memory behind the step's own
    work; nothing waits for it. On other devices they have arrived when they are put in.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Reading] = deque()

    def put(
        self,
        step: int,
        numbers: Mapping[str, Tensor],
        average: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """Adds a step's numbers; a second call for the same step replaces the first.

        Args:
            numbers: tensors `[]` of floats.
            average: of `[len(numbers)]` over processes, on the device.
        """
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in numbers.values()))
        values = torch.stack([value.detach().to(dtype) for value in numbers.values()])
        if self._waiting and self._waiting[-1].step == step:
            self._waiting.pop()
        self._waiting.append(_Reading(step, tuple(numbers), *send(average(values))))

    def add(self, numbers: Mapping[str, float]) -> None:
        """Adds numbers of the host to the step that was put in last; if it is gone, drops them."""
        if self._waiting:
            self._waiting[-1].more |= numbers

    def take(self, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Steps and their numbers, in order, of all that have arrived; each is given once.

        Args:
            wait: for those that have not.
        """
        found = []
        while self._waiting and self._waiting[0].arrived(wait):
            reading = self._waiting.popleft()
            found.append((reading.step, reading.numbers()))
        return found


def send(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what tells when it is complete; None: it is."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event
