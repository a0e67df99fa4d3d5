"""A batch of what a network takes, by its rows; the call with it, and what the network gives.

Inputs are a tensor, a mapping of tensors (as a tokenizer gives) or a tuple of tensors, each with
one row per example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError

_OUTPUTS = ("pooler_output", "text_embeds", "image_embeds", "logits")  # the last that is there

Inputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]


def tensors(inputs: Any) -> list[Tensor]:
    """The tensors of a batch. Raises AdamergeError for anything else."""
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    found = list(parts) if isinstance(inputs, Mapping | tuple | list) else []
    if not found or not all(isinstance(part, Tensor) and part.ndim for part in found):
        kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in found))
        raise AdamergeError(
            f"a batch of inputs is a {type(inputs).__name__}{f' of {kinds}' if kinds else ''}: "
            "expected a tensor, or a mapping or tuple of tensors, with a row per example (of a "
            "tokenizer: return_tensors='pt')"
        )
    return found


def count(inputs: Inputs) -> int:
    """B, the number of examples. Raises AdamergeError where tensors differ in it."""
    sizes = list(dict.fromkeys(len(tensor) for tensor in tensors(inputs)))
    if len(sizes) > 1:
        raise AdamergeError(
            f"the tensors of one batch of inputs have {sizes[0]} and {sizes[1]} rows: expected one "
            "row per example in each"
        )
    return sizes[0]


def each(fn: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same inputs with `fn` of every tensor."""
    if isinstance(inputs, Tensor):
        return fn(inputs)
    if isinstance(inputs, Mapping):
        return {name: fn(tensor) for name, tensor in inputs.items()}
    return tuple(fn(tensor) for tensor in inputs)


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """Parts of `size` examples, the last one of what is left."""
    if isinstance(inputs, Tensor):
        return list(inputs.split(size))

    def part(start: int) -> Inputs:
        return each(lambda tensor: tensor[start : start + size], inputs)

    return [part(start) for start in range(0, count(inputs), size)]


def join(parts: Sequence[Inputs]) -> Inputs:
    """One batch of several, in order.

    Raises:
        AdamergeError: they are of different kinds or shapes.
    """
    shapes = [_shapes(part) for part in parts]
    for other in shapes:
        if other != shapes[0]:
            raise AdamergeError(
                f"inputs of different tasks cannot be one batch: an example of one is {shapes[0]}, "
                f"of another {other}; give all tasks the same names and sizes, for texts by "
                "padding to one length"
            )
    if len(parts) == 1:
        return parts[0]
    joined = [torch.cat(column) for column in zip(*map(tensors, parts), strict=True)]
    if isinstance(parts[0], Tensor):
        return joined[0]
    if isinstance(parts[0], Mapping):
        return dict(zip(parts[0], joined, strict=True))
    return tuple(joined)


def _shapes(inputs: Inputs) -> Any:
    """The shape of an example, by name or in order."""
    shapes = [list(tensor.shape[1:]) for tensor in tensors(inputs)]
    if isinstance(inputs, Tensor):
        return shapes[0]
    return dict(zip(inputs, shapes, strict=True)) if isinstance(inputs, Mapping) else shapes


def by_task(inputs: Inputs, ids: Tensor) -> dict[int, Any]:
    """Each task's rows, of task ids `[B]` on the CPU.

    Where tasks are neighbours, as in training, cut in one piece: no index on the device, and one
    pass for all in the backward.
    """
    tasks, counts = torch.unique_consecutive(ids, return_counts=True)
    found, sizes = tasks.tolist(), counts.tolist()
    if len(set(found)) == len(found) and isinstance(inputs, Tensor):
        return dict(zip(found, inputs.split(sizes), strict=True))

    def pick(task: int) -> Inputs:
        own = (ids == task).nonzero().squeeze(1)
        return each(lambda tensor: tensor[own.to(tensor.device)], inputs)

    return {task: pick(task) for task in dict.fromkeys(found)}


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """How a network is called with them: a mapping by name, a tuple one after the other."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def features(found: Any, size: int) -> Tensor:
    """What a method makes of `size` inputs. Raises AdamergeError unless it is `[size, D]`."""
    if isinstance(found, Tensor) and found.ndim == 2 and len(found) == size:
        return found
    what = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise AdamergeError(
        f"the method encodes {size} inputs as {what}: expected features or logits [{size}, D]"
    )


def missing(names: Collection[str]) -> str:
    """What is said of weights without some of a network's tensors."""
    first, *others = sorted(names)
    return (
        f"the weights lack tensor {first!r}{f' and {len(others)} more' if others else ''} of the "
        "network: a method's weights() has to return every tensor that it merges, as "
        "task_vectors.combine(…) does"
    )


def misfit(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    given: Sequence[Any],
    named: Mapping[str, Any],
) -> str | None:
    """What is wrong with weights and inputs that a network failed on; None: nothing known."""
    try:
        inspect.signature(network.forward).bind(*given, **named)
    except TypeError as error:
        return (
            f"the {type(network).__name__} cannot be called with this batch of inputs ({error}): a "
            "tuple is given argument by argument and a mapping by name; leave labels out"
        )
    for name, empty in network.state_dict().items():
        if name in weights and weights[name].shape != empty.shape:
            return (
                f"the weights hold tensor {name!r} of shape {list(weights[name].shape)}: the "
                f"network has {list(empty.shape)}"
            )
    inputs = [part for part in (*given, *named.values()) if isinstance(part, Tensor)]
    tensors = {**dict(network.named_buffers()), **weights}
    devices = {tensor.device: name for name, tensor in tensors.items()}
    if len({*devices, *(part.device for part in inputs[:1])}) > 1:
        return (
            f"inputs are on {inputs[0].device if inputs else 'no device'}, and the weights on "
            f"{', '.join(f'{device} ({name!r})' for device, name in devices.items())}: move all "
            "to one device, the method by method.to(…)"
        )
    types = {t.dtype: name for name, t in tensors.items() if t.is_floating_point()}
    mixed = {*types, *(part.dtype for part in inputs if part.is_floating_point())}
    if len(mixed) > 1 and not torch.is_autocast_enabled(next(iter(devices)).type):
        held = ", ".join(f"{dtype} ({name!r})" for dtype, name in types.items())
        found = ", ".join(str(part.dtype) for part in inputs)
        return (
            f"inputs are {found}, and the weights {held}: give all one type, inputs by "
            "inputs.to(…), what a method learns by making it in the type of its task vectors"
        )
    return None


def pooled(output: Any, network: str = "network") -> Tensor:
    """The features or logits `[B, D]` of what a network gives.

    That itself, its `logits`, `image_embeds`, `text_embeds` or `pooler_output` (of transformers),
    or the first of a pair (of an open_clip tower with `output_tokens`).

    Raises:
        AdamergeError: there are none.
    """
    found = output
    for name in _OUTPUTS if not isinstance(output, Tensor) else ():
        named = getattr(output, name, None)
        found = named if isinstance(named, Tensor) else found
    if isinstance(found, tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = f" of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
        raise AdamergeError(
            f"the {network} gives a {type(output).__name__}{shape}: expected features or logits "
            "[B, D], an output with .logits or .pooler_output, or a pair whose first are they; "
            "wrap it in a module that returns them"
        )
    return found
