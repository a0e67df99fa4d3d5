"""What a method forgot, in one sentence, found the first time that its weights are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError


def check(method: nn.Module, weights: Any) -> None:
    """Raises AdamergeError unless a method and the weights it gives keep the contract."""
    name = type(method).__name__
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise AdamergeError(
            f"{name}.weights() gives a {type(weights).__name__}: expected a dictionary of tensors "
            "by name, such as task_vectors.combine(…) gives"
        )
    wrong = _of_learnables(method) or _of_places(method) or _of_weights(method, weights)
    if wrong is not None:
        raise AdamergeError(f"{name} {wrong}")


def misplaced(method: nn.Module) -> str | None:
    """What a method forgot, if that may be why its `weights` failed."""
    wrong = _of_places(method) or _of_learnables(method)
    return None if wrong is None else f"{type(method).__name__} {wrong}"


def lacks(method: nn.Module, name: str, what: str) -> AdamergeError:
    """What is said of a method without one of its parts."""
    return AdamergeError(
        f"{type(method).__name__} has no {name}(): give one that returns {what}, or pass backbone "
        "and task_vectors to MergeMethod.__init__ and leave encode and fold as they are"
    )


def plain(method: nn.Module) -> dict[str, Any]:
    """The attributes of a method that are not registered in it."""
    return {
        n: v for n, v in vars(method).items() if n not in ("_parameters", "_buffers", "_modules")
    }


def _of_learnables(method: nn.Module) -> str | None:
    for name, value in _plain_tensors(method):
        if value.requires_grad and value.is_leaf:
            return (
                f"keeps {name}, which requires a gradient, as a plain tensor that no optimizer "
                "sees and no checkpoint holds: make it an nn.Parameter attribute"
            )
    vectors: Any = vars(method).get("task_vectors")
    for name, child in method.named_children() if vectors is not None else ():
        held = {key for key, _ in child.named_parameters()}
        if held and held >= set(vectors.names):
            return (
                f"holds a whole network as its module {name}, whose weights would all be learned: "
                "keep it as a Tower(network), which has none"
            )
    if not any(parameter.requires_grad for parameter in method.parameters()):
        return "has nothing to learn: make what is learned an nn.Parameter attribute in __init__"
    return None


def _of_places(method: nn.Module) -> str | None:
    vectors: Any = vars(method).get("task_vectors")
    parameters: dict[str, Tensor] = dict(method.named_parameters())
    if vectors is not None:
        place, whose = vectors.device, "its task vectors are"
    elif parameters:
        first, tensor = next(iter(parameters.items()))
        place, whose = tensor.device, f"{first} is"
    else:
        return None
    for name, tensor in [*parameters.items(), *method.named_buffers(), *_plain_tensors(method)]:
        if tensor.device != place:
            return (
                f"has {name} on {tensor.device}, and {whose} on {place}: make it on their device, "
                "and move the whole method by method.to(…)"
            )
    return None


def _of_weights(method: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    known = {id(parameter): name for name, parameter in method.named_parameters()}
    leaves = list(_leaves(weights.values()))
    for leaf in leaves:
        if id(leaf) not in known:
            return (
                f"gives weights that depend on a tensor of shape {list(leaf.shape)} which requires "
                "a gradient and is none of its parameters: make it an nn.Parameter attribute"
            )
    if not leaves:
        return (
            f"gives weights that depend on none of its parameters ({', '.join(known.values())}): "
            "return functions of them that are not detached"
        )
    vectors: Any = vars(method).get("task_vectors")
    own = {} if vectors is None else {n: w for n, w in weights.items() if n in vectors.pretrained}
    for name, weight in own.items():
        base = vectors.pretrained[name]
        if weight.shape != base.shape or weight.device != base.device:
            return (
                f"gives {name!r} with shape {list(weight.shape)} on {weight.device}: expected "
                f"{list(base.shape)} on {base.device}, as in its task vectors"
            )
        device = weight.device.type
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        if weight.dtype not in (base.dtype, low):
            return (
                f"gives {name!r} in {weight.dtype}, but its task vectors are {base.dtype}: make "
                "what is learned in their type, or cast the weights to it"
            )
    return None


def _plain_tensors(method: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are attributes, or in a list or dictionary that is one, and not registered."""
    for name, value in plain(method).items():
        parts = value.values() if isinstance(value, dict) else value
        for part in parts if isinstance(value, dict | list | tuple) else [value]:
            if isinstance(part, Tensor):
                yield name, part


def _leaves(tensors: Any) -> Iterator[Tensor]:
    """The tensors that requires-grad ones are computed from, each once."""
    seen: set[Any] = set()
    nodes = []
    for tensor in tensors:
        if tensor.requires_grad and tensor.grad_fn is None:
            nodes.append(tensor)
        elif tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        elif not isinstance(node, Tensor):
            nodes += [parent for parent, _ in node.next_functions if parent is not None]


def numbers_of(method: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The readings of a method as numbers `[]` by name; one for each task as `name/task`.

    Raises:
        AdamergeError: a reading that is neither `[]` nor `[T]`.
    """
    found: dict[str, Tensor] = {}
    for name, value in method.readings().items():
        if value.ndim > 1 or (value.ndim == 1 and len(value) != len(tasks)):
            raise AdamergeError(
                f"{type(method).__name__}.readings() gives {name!r} of shape {list(value.shape)}: "
                f"expected one number [] or one per task [{len(tasks)}]"
            )
        parts = value.detach().unbind() if value.ndim else (value.detach(),)
        names = [f"{name}/{task}" for task in tasks] if value.ndim else [name]
        found |= dict(zip(names, parts, strict=True))
    return found
