"""200 mutations of a file per format: equal tensors or one sentence; no crash, hang, execution.

Neither .safetensors nor torch's legacy format has checksums: a bit flipped among the numbers
themselves cannot be seen in them, so there the names, types and shapes must still be right and only
the numbers that were hit may differ. In zip files every flip is found.
"""

from __future__ import annotations

import json
import random
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adamerge import AdamergeError
from adamerge.weights.formats.layouts import tower_to_transformers
from adamerge.weights.formats.read import read, tower_state
from tests import golden_data as golden

COUNT = 200
State = dict[str, Tensor]


def write_safetensors(state: State, folder: Path) -> list[Path]:
    save_file(state, folder / "a.safetensors")
    return [folder / "a.safetensors"]


def write_zip(state: State, folder: Path) -> list[Path]:
    torch.save({"state_dict": state, "epoch": 3}, folder / "a.pt")
    return [folder / "a.pt"]


def write_legacy(state: State, folder: Path) -> list[Path]:
    torch.save(state, folder / "a.pt", _use_new_zipfile_serialization=False)
    return [folder / "a.pt"]


def write_module(state: State, folder: Path) -> list[Path]:
    torch.save(golden.clip().backbone, folder / "a.pt")
    return [folder / "a.pt"]


def write_transformers(state: State, folder: Path) -> list[Path]:
    theirs = tower_to_transformers(state)
    names = sorted(theirs)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: theirs[name].contiguous() for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in (*parts, "model.safetensors.index.json")]


def write_lora(state: State, folder: Path) -> list[Path]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.transformer.resblocks.0.mlp.c_fc"
    out, width = state["transformer.resblocks.0.mlp.c_fc.weight"].shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
    adapter = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(adapter, folder / "adapter_model.safetensors")
    return [folder / "adapter_model.safetensors", folder / "adapter_config.json"]


FORMATS: dict[str, tuple[Callable[[State, Path], list[Path]], bool]] = {
    "safetensors": (write_safetensors, False),
    "torch zip": (write_zip, True),
    "torch legacy": (write_legacy, False),
    "pickled module": (write_module, True),
    "transformers shards": (write_transformers, False),
    "lora": (write_lora, False),
}


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a truncation, a lie about a length, a block of zeros, or a repeated block."""
    kind, data = rng.choice(["flip", "flip", "flips", "cut", "length", "zeros", "twice"]), None
    # Headers are small beside the numbers: half of all blows go where structure is.
    place = rng.randrange(min(len(raw), 2000) if rng.random() < 0.5 else len(raw))
    if kind == "length" and len(raw) > 9:
        place = rng.choice(
            [0, *range(max(0, len(raw) - 400), len(raw) - 8), place % (len(raw) - 8)]
        )
        lie = rng.choice([2**63 - 1, 2**31 - 1, 2**32 - 1, 0, 10**9, len(raw)])
        data = raw[:place] + lie.to_bytes(8, "little") + raw[place + 8 :]
    elif kind == "cut":
        data = raw[:place]
    elif kind == "zeros":
        data = raw[:place] + bytes(len(raw[place : place + 64])) + raw[place + 64 :]
    elif kind == "twice":
        data = raw[:place] + raw[place : place + 32] + raw[place:]
    else:
        changed = bytearray(raw)
        for _ in range(1 if kind == "flip" else 8):
            changed[place] ^= 1 << rng.randrange(8)
            place = rng.randrange(len(raw))
        data = bytes(changed)
    return data


@pytest.mark.parametrize("name", FORMATS)
def test_mutated(name: str, tmp_path: Path) -> None:
    write, checksums = FORMATS[name]
    backbone = golden.clip().backbone
    state = {key: tensor.contiguous() for key, tensor in backbone.state_dict().items()}
    files = write(state, tmp_path)
    target = files[0] if len(files) == 1 else tmp_path
    wanted = dict(tower_state(read(target), backbone))
    rng = random.Random(f"mutations of {name}")
    refused = 0
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for count in range(COUNT):
            path = files[count % len(files)]
            whole = path.read_bytes()
            path.write_bytes(mutated(whole, rng))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                found = {k: t.clone() for k, t in tower_state(read(target), backbone).items()}
            except AdamergeError as error:
                refused += 1
                assert "\n" not in str(error).strip() and len(str(error)) < 1000
            else:
                refused += judge(found, wanted, checksums)
            grown = tracemalloc.get_traced_memory()[1] - before
            assert grown < 4 * len(whole) + 2**20, (count, grown)
            path.write_bytes(whole)
    finally:
        tracemalloc.stop()
    assert refused > COUNT // 10  # the mutations do hit something
    # The process as a whole: far below one lie of 2 GB or more that was believed.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 200_000
    assert {k: t.sum() for k, t in wanted.items()} == {
        k: t.sum() for k, t in tower_state(read(target), backbone).items()
    }


def judge(found: State, wanted: State, checksums: bool) -> bool:
    """True where names or shapes changed, which building task vectors refuses."""
    if list(found) != list(wanted) or any(found[k].shape != wanted[k].shape for k in wanted):
        return True
    if checksums:
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    return False
