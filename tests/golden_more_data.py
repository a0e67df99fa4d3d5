"""The second set of reference numbers, `tests/golden_more` (see its README), and the comparing.

The models, images and heads are those of `golden_data`. Every size is read from the files, so that
the folders named by ADAMERGE_GOLDEN and ADAMERGE_GOLDEN_MORE may hold another architecture and
another number of tasks.

Each test file of a family has a table `CHECKS` of label -> function of a type, and runs it with
`run`, which fails where a number of that label was not compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import adamerge
from tests import golden_data as golden

FOLDER = Path(os.environ.get("ADAMERGE_GOLDEN_MORE") or Path(__file__).parent / "golden_more")
DTYPES = (torch.float64, torch.float32)
Check = Callable[[torch.dtype], None]

_COMPARED: set[str] = set()  # keys, since the last `run` began


@cache
def numbers() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected_more.safetensors")


@cache
def lists(name: str) -> tuple[str, ...]:
    """`layers`, `matrices`, `linears` or `full`: names of layers, in the model's order."""
    return tuple(json.loads((FOLDER / "layers.json").read_text())[name])


@cache
def labels() -> tuple[str, ...]:
    return tuple(sorted({key.split("/")[0] for key in numbers()}))


def expected(key: str) -> Tensor:
    """One reference tensor, noted as compared."""
    _COMPARED.add(key)
    return numbers()[key]


def run(check: Check, label: str, dtype: torch.dtype) -> None:
    """Runs the check of a label, which must compare every tensor `label/…` of the file.

    Args:
        check: the function of a type.
        label: the first part of the keys.
        dtype: in which the check computes.
    """
    _COMPARED.clear()
    check(dtype)
    keys = {key for key in numbers() if key.startswith(f"{label}/")}
    assert not keys - _COMPARED, f"not compared: {sorted(keys - _COMPARED)}"


def agrees(found: Tensor, key: str, tolerance: float | None = None) -> None:
    """1e-9 in float64, 1e-4 in float32; relative where a number exceeds 1."""
    wanted = expected(key)
    bound = tolerance or {torch.float64: 1e-9, torch.float32: 1e-4}[found.dtype]
    assert found.shape == wanted.shape, f"{key}: {list(found.shape)}, not {list(wanted.shape)}"
    off = (found.double() - wanted).abs() / wanted.double().abs().clamp_min(1)
    assert off.isfinite().all(), f"{key}: not finite"
    assert off.numel() == 0 or off.max() <= bound, f"{key}: off by {off.max():.2e}"


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum, weighted sum and norm of a layer: `[3]`, in the tensor's type."""
    flat = tensor.double().flatten()
    weights = torch.cos(0.7 + 1.3 * torch.arange(flat.numel(), dtype=torch.float64))
    return torch.stack([flat.sum(), (flat * weights).sum(), flat.norm()]).to(tensor.dtype)


def check_layers(key: str, layers: Mapping[str, Tensor]) -> None:
    """One tensor per layer, held against `key/fingerprint` and, where they are, `key/full/…`."""
    prints = torch.stack([fingerprint(layers[name]) for name in lists("layers")])
    agrees(prints, f"{key}/fingerprint")
    for name in lists("full"):
        if f"{key}/full/{name}" in numbers():
            agrees(layers[name], f"{key}/full/{name}")


def check_layers_per_task(key: str, layers: Mapping[str, Tensor]) -> None:
    """A tensor `[T, *shape]` per layer, likewise."""
    tasks = range(len(golden.TASKS))
    rows = [[fingerprint(layers[name][t]) for name in lists("layers")] for t in tasks]
    agrees(torch.stack([torch.stack(row) for row in rows]), f"{key}/fingerprint")
    for name in lists("full"):
        if f"{key}/full/{name}" in numbers():
            agrees(layers[name], f"{key}/full/{name}")


def per_task(vectors: adamerge.TaskVectors) -> dict[str, Tensor]:
    """Layer -> every task's weights minus the pretrained ones, `[T, *shape]`; constants are 0."""
    layers = {}
    for name, start in golden.state("pretrained", vectors_dtype(vectors)).items():
        if name in vectors.pretrained:
            layers[name] = vectors.pretrained[name] - start + vectors.deltas[name]
        else:
            layers[name] = (vectors.constants[name] - start).expand(
                len(vectors.tasks), *start.shape
            )
    return layers


def merged(vectors: adamerge.TaskVectors, scale: float = 1.0) -> dict[str, Tensor]:
    """Layer -> merged weights minus the pretrained ones, with every coefficient `scale`."""
    layers = {}
    for name, start in golden.state("pretrained", vectors_dtype(vectors)).items():
        if name in vectors.pretrained:
            shift = vectors.pretrained[name] - start
            layers[name] = shift + scale * vectors.deltas[name].sum(0)
        else:
            layers[name] = vectors.constants[name] - start
    return layers


def features(vectors: adamerge.TaskVectors, scale: float, task: str) -> Tensor:
    """Features of the task's first batch in the encoder with every coefficient `scale`."""
    method = adamerge.methods.AdaMerging(golden.clip().backbone, vectors, "task", init=scale)
    images = golden.tensors("images")[task][0].to(vectors_dtype(vectors))
    ids = torch.full((len(images),), golden.TASKS.index(task))
    return method.fold()(images, ids)


def check_merge(
    label: str, vectors: adamerge.TaskVectors, scale: float = 1.0, vector_scale: float = 1.0
) -> None:
    """Transformed task vectors against a label of the set.

    Args:
        label: `label/fingerprint` is of the vectors' sum (`[L, 3]`) or of each (`[T, L, 3]`).
        vectors: what the transform gives.
        scale: every coefficient of the encoder whose features are given, if they are.
        vector_scale: every coefficient of the sum whose fingerprint is given.
    """
    if numbers()[f"{label}/fingerprint"].ndim == 2:
        check_layers(label, merged(vectors, vector_scale))
    else:
        check_layers_per_task(label, per_task(vectors))
    check_features(label, vectors, scale)


def check_features(label: str, vectors: adamerge.TaskVectors, scale: float) -> None:
    """Every `label/features/TASK` there is."""
    for task in golden.TASKS:
        if f"{label}/features/{task}" in numbers():
            agrees(features(vectors, scale, task), f"{label}/features/{task}")


def vectors_dtype(vectors: adamerge.TaskVectors) -> torch.dtype:
    return vectors.pretrained[vectors.names[0]].dtype


def uniform(sample: int, layer: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The set's given random numbers u(k, l, i) in place of drawn ones, `[*shape]`, float64."""
    entries = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + 1
    number = lists("layers").index(layer) + 1
    plain = 0.5 + 0.6180339887498949 * entries
    plain = plain + 0.7548776662466927 * number + 0.5698402909980532 * (sample + 1)
    return plain.frac().view(shape)
