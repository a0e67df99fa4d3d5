"""What releases of torch, Lightning and datasets name differently, or have no public name for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def all_gather(output: Tensor, part: Tensor) -> None:
    """`output` becomes all processes' `part`, one behind the other."""
    _collective("all_gather_single", "all_gather_into_tensor")(output, part)


def reduce_scatter(output: Tensor, everything: Tensor) -> None:
    """`output` becomes this process's share of the sum of all processes' `everything`."""
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(output, everything)


def _collective(new: str, old: str) -> Any:
    """A collective under its name of torch 2.14, which deprecates the one before."""
    return getattr(dist, new, None) or getattr(dist, old)


def undo_compile(module: nn.Module) -> None:
    """Takes back `module.compile()`."""
    module._compiled_call_impl = None


def is_failed_compilation(error: Exception) -> bool:
    """Whether torch.compile raised this because its backend failed."""
    return isinstance(error, torch._dynamo.exc.BackendCompilerFailed)


def fingerprint(dataset: Any) -> str:
    """What the package datasets knows a data set and all that was done to it by."""
    return str(dataset._fingerprint)


def forget_sigterm(trainer: Any) -> None:
    """Takes from Lightning that it was told to end, of which it would make an error."""
    trainer._signal_connector.received_sigterm = False
