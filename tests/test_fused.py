"""Merge and contraction of many layers at once: when, and on a GPU; the kernels' arithmetic on a
CPU is in `interpreted_fused.py`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adamerge.weights import fused, merging
from adamerge.weights.storage import Layer, keep
from adamerge.weights.storage_kinds import DTYPES

ROOT = Path(__file__).parent.parent
USUAL = [(768,), (16,), (64, 768), (16, 3, 8, 8), (50, 768)]
SHAPES = [*USUAL, (3,), (), (100, 77)]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def group(
    stored: str, device: str, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> tuple[list[Tensor], list[Layer], Tensor]:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(shape, generator=generator) for shape in shapes]
    deltas = [torch.randn(8, *shape, generator=generator) * 0.1 for shape in shapes]
    layers = [keep(delta, stored).to(torch.device(device)) for delta in deltas]
    columns = torch.randn(8, len(shapes), generator=generator)
    return [base.to(device) for base in bases], layers, columns.to(device)


def test_the_kernels_compute_what_they_should() -> None:
    """In Triton's interpreter, which must be asked for before Triton is imported."""
    pytest.importorskip("triton")
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts="]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/interpreted_fused.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if "InterpreterError: TypeError('only 0-dimensional arrays" in child.stdout:
        pytest.skip("this Triton's interpreter does not know this NumPy")
    assert child.returncode == 0, child.stdout + child.stderr
    assert " skipped" not in child.stdout


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("width", [1, 16])
def test_the_compiler_takes_the_kernels(
    stored: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU that need not be there; numbers in groups are read 16 bytes at a time."""
    triton = pytest.importorskip("triton", minversion="3.3")
    from adamerge.weights import fused_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    language = triton.language
    kind = getattr(language, stored)
    shared = {"TASKS": 8, "STORED": kind, "SCALED": stored == "int8", "GROUP": width}
    merge = shared | {"BLOCK": 4096}
    strides = {"task_stride": "i32", "layer_stride": "i32"}
    tables = {"layers": "*i64", "blocks": "*i32"}
    merged = _compiled(
        kernels.merge, tables | strides | {"columns": "*fp32", "out": "*bf16"}, merge
    )
    contracted = _compiled(
        kernels.contract,
        tables | {"grads": "*i64", "count": "i32", "parts": "*fp32"},
        merge | {"HALF": language.bfloat16},
    )
    assert "cvt.rn.bf16" in merged  # to the nearest
    assert ("ld.global.v4" in merged) == ("ld.global.v4" in contracted) == (width == 16)
    parts = {"parts": "*fp32", "ranges": "*i32", "out": "*fp32", "count": "i32"}
    assert _compiled(kernels.add_up, parts, {"TASKS": 5, "WIDTH": 8, "ROWS": 128})


def _compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """The PTX of a kernel for a GPU of compute capability 8.0."""
    import triton
    from triton.backends.compiler import GPUTarget

    whole = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, whole, constants)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", 80, 32), options).asm["ptx"]


def test_a_cpu_goes_the_plain_way() -> None:
    bases, layers, columns = group("float32", "cpu")
    assert not fused.usable(bases, layers)
    assert fused.merge(bases, layers, columns, None) is None
    assert fused.contract(bases, bases, layers) is None


def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    bases, layers, columns = group("int8", "cpu")
    assert fused.usable(bases, layers)
    assert fused.merge(bases, layers, columns, torch.float64) is None
    assert fused.merge(bases, layers, columns.to("meta"), None) is None
    assert fused.merge(bases, layers, columns[:, :2], None) is None
    assert fused.contract([bases[0][:2], *bases[1:]], bases, layers) is None
    for index, base in (
        (0, bases[0].double()),
        (2, bases[2].T.contiguous().T),
        (2, bases[2].to("meta")),
    ):
        others = [*bases]
        others[index] = base
        assert not fused.usable(others, layers)
    scales = layers[2].scales
    assert scales is not None
    for layer in (
        Layer(layers[2].values[:2], scales[:2]),  # of two tasks
        Layer(layers[2].values),
        Layer(layers[2].values, scales.double()),
        Layer(layers[2].values.to("meta"), scales),
        Layer(layers[2].values.mT.contiguous().mT, scales),
        Layer(layers[2].values.double()),
    ):
        assert not fused.usable(bases, [*layers[:2], layer, *layers[3:]])
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    assert not fused.usable(bases, layers)


def test_a_kernel_that_fails_is_said_once_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    bases, layers, columns = group("bfloat16", "cpu")
    plain = merging.merge_all(bases, layers, columns, None), bases
    contracted = merging.contract_all(bases, bases, layers)
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})  # which no kernel runs on
    monkeypatch.setattr(fused, "_failed", False)
    with caplog.at_level(logging.WARNING, "adamerge"):
        for _ in range(2):
            merged = merging.merge_all(bases, layers, columns, None)
            assert all(map(torch.equal, merged, plain[0]))
            assert torch.equal(merging.contract_all(bases, bases, layers), contracted)
    assert len(caplog.records) == 1
    assert "kernels do not run here, so layers are merged one by one" in caplog.text


def test_too_little_memory_is_not_taken_for_a_kernel_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    bases, layers, columns = group("float32", "cpu")
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(fused, "_merge", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fused.merge(bases, layers, columns, None)
    assert not fused._failed


@on_cuda
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_is_the_plain_way(
    stored: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, layers, columns = group(stored, "cuda")
    assert fused.usable(bases, layers)
    ours, again = both(bases, layers, columns, dtype), both(bases, layers, columns, dtype)
    assert not fused._failed
    assert all(map(torch.equal, ours[0], again[0])) and torch.equal(ours[1], again[1])
    monkeypatch.setattr(fused, "DEVICES", set())
    exact = merging.merge_all(
        [base.double() for base in bases],
        [Layer(layer.dense(base.double())) for base, layer in zip(bases, layers, strict=True)],
        columns,
        None,
    )
    for merged, wanted in zip(ours[0], exact, strict=True):
        rounding = 2**-8 if merged.dtype == torch.bfloat16 else 0
        assert bool(((merged - wanted).abs() <= wanted.abs() * rounding + 4e-6).all())
    contracted = merging.contract_all(ours[0], bases, layers)
    torch.testing.assert_close(ours[1], contracted, rtol=1e-4, atol=1e-3)


def both(
    bases: list[Tensor], layers: list[Layer], columns: Tensor, dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor]:
    merged = merging.merge_all(bases, layers, columns, dtype)
    return merged, merging.contract_all(merged, bases, layers)


@on_cuda
@pytest.mark.parametrize("stored", DTYPES)
def test_cuda_launches_a_handful_and_waits_for_nothing(stored: str) -> None:
    given = *group(stored, "cuda", USUAL * 20), torch.bfloat16
    both(*given)  # compiles, and makes the tables
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about itself
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.cuda.set_sync_debug_mode("error")
            try:
                both(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        done = [event.name for event in profile.events() if event.device_type == on_gpu]
    assert 0 < len(done) <= 6, done
