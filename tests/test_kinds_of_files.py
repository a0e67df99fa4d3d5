"""Files that people have: raw pickles, training checkpoints with anything in them, sharded ones."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import decimal
import enum
import json
import os
import pathlib
import pickle
import random
import re
import time
import types
import typing
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from adamerge import AdamergeError, TaskVectors
from adamerge.config.inputs import load_clip
from adamerge.encoders.clip import build_clip
from adamerge.encoders.heads import Prompts, zero_shot_heads
from adamerge.report import preflight
from adamerge.report.findings import of_bases
from adamerge.weights.formats.read import read, read_head, tower_state
from tests import golden_data as golden

State = dict[str, Tensor]


def tower() -> State:
    return {name: tensor.clone() for name, tensor in golden.clip().backbone.state_dict().items()}


def same(path: Path, state: State | None = None) -> None:
    state = tower() if state is None else state
    found = tower_state(read(path), golden.clip().backbone)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


class Encoder(nn.Module):
    """As the papers' scripts save one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = golden.clip().model
        self.cache_dir = None


class Settings(enum.Enum):
    FAST = 1


class Outer:
    class Inner(enum.Enum):
        DEEP = 2


# ---- raw pickles ------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("what", ["module", "state dict", "half"])
def test_raw_pickles(tmp_path: Path, protocol: int, what: str) -> None:
    path, state = tmp_path / "finetuned.pt", tower()
    if what == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps(Encoder() if what == "module" else {"model": state}, protocol))
    same(path, state)


def test_raw_pickles_share_and_turn(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    state = {"a.whole": base, "a.turned": base.T, "a.slice": base[1:3], "a.none": torch.empty(0)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
    found = read(tmp_path / "a.pkl").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("protocol", [2, 4])
def test_damaged_raw_pickles(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps(tower(), protocol)
    rng, refused = random.Random(0), 0
    for _ in range(100):
        changed = bytearray(whole)
        changed[rng.randrange(min(2000, len(whole)))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.pt").write_bytes(changed[: rng.choice([len(whole), rng.randrange(50_000)])])
        try:
            dict(tower_state(read(tmp_path / "a.pt"), golden.clip().backbone))
        except AdamergeError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize("function", [os.system, eval, exec, torch.load, torch.hub.load])
@pytest.mark.parametrize("place", ["beside", "within"])
def test_raw_pickles_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, place: str
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    monkeypatch.setenv("ADAMERGE_TEST_MARK", str(mark))
    evil = Runs(function, f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')")
    path.write_bytes(pickle.dumps({"x": evil, **tower()} if place == "beside" else {"m": [evil]}))
    with pytest.raises(AdamergeError, match="cannot be read safely"):
        read(path)
    nested = Runs(torch.storage._load_from_bytes, pickle.dumps(evil))
    path.write_bytes(pickle.dumps({"x": nested, **tower()}))
    with pytest.raises(AdamergeError, match="cannot be read safely"):
        read(path)
    assert not mark.exists()


def test_a_tensor_made_by_a_call_is_named(tmp_path: Path) -> None:
    torch.save({**tower(), "proj": Runs(np.frombuffer, b"1234")}, tmp_path / "a.pt")
    with pytest.raises(AdamergeError, match=r"'proj' in its state dict is made by numpy.frombuff"):
        read(tmp_path / "a.pt")


# ---- training checkpoints ---------------------------------------------------------------------

HARMLESS: dict[str, Any] = {
    "date": datetime.datetime(2024, 1, 2, 3, tzinfo=datetime.UTC),
    "delta": datetime.timedelta(seconds=3),
    "deque": collections.deque([1, 2], 3),
    "counter": collections.Counter("aab"),
    "generator": np.random.default_rng(0),
    "state of numpy": np.random.RandomState(0),
    "array": np.arange(3),
    "number": np.float64(3),
    "optional": typing.Optional[int],  # noqa: UP045
    "union": int | None,
    "generic": list[int],
    "regex": re.compile("a"),
    "range": range(3),
    "slice": slice(1, 2),
    "complex": 1 + 2j,
    "path": pathlib.PurePosixPath("/a"),
    "uuid": uuid.UUID(int=3),
    "decimal": decimal.Decimal("1.5"),
    "random": random.Random(0),
    "member": Settings.FAST,
    "inner member": Outer.Inner.DEEP,
    "error": ValueError("x"),
    "type": type(None),
    "namespace": types.SimpleNamespace(a=1),
    "arguments": argparse.Namespace(lr=1e-3),
    "dtype": torch.bfloat16,
    "by member": {Settings.FAST: 1, datetime.date(2024, 1, 2): 2},
    "function": torch.nn.functional.relu,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_anything_in_the_hyper_parameters(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "last.ckpt"
    state = {f"model.{n}": t for n, t in tower().items()}
    content = {"epoch": 1, "hyper_parameters": {"x": HARMLESS[name]}, "state_dict": state}
    if kind == "raw":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    same(path)


@pytest.mark.parametrize(
    "key", ["ema", "clip", "weights", "network", "backbone", "encoder", "visual", "mine", "params"]
)
def test_a_sole_state_dict_under_any_key(tmp_path: Path, key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    named = {"conv1.weight": {"exp_avg": torch.ones(2)}}
    content = {"optimizer": optimizer, key: tower(), "step": torch.tensor(3), "epoch": 1}
    for outer in (content, {"checkpoint": content}, {"optim_state": named, **content}):
        torch.save(outer, tmp_path / "a.pt")
        same(tmp_path / "a.pt")


def test_two_state_dicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {name: tensor + 1 for name, tensor in tower().items()}
    for taken, left in (("model", "model_ema"), ("state_dict", "ema"), ("student", "teacher")):
        for content in ({taken: tower(), left: other}, {left: other, taken: tower()}):
            torch.save(content, tmp_path / "a.pt")
            caplog.clear()
            same(tmp_path / "a.pt")
            assert left in caplog.text and f"{taken} is taken" in caplog.text
    torch.save({"mine": tower(), "yours": other}, tmp_path / "a.pt")
    with pytest.raises(AdamergeError, match=r"several state dicts \(mine, yours\), none under a k"):
        read(tmp_path / "a.pt")
    torch.save({"ema": 0.9, "step": 3}, tmp_path / "a.pt")
    with pytest.raises(AdamergeError, match=r"no tensors by name \(its keys: ema, step\).*state_d"):
        read(tmp_path / "a.pt")


def test_one_dictionary_under_many_names_is_looked_at_once(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"x": 1}
    for _ in range(5):
        inner = {f"k{index}": inner for index in range(500)}
    torch.save(inner, tmp_path / "a.pt")
    start = time.perf_counter()
    with pytest.raises(AdamergeError, match="holds no tensors by name"):
        read(tmp_path / "a.pt")
    assert time.perf_counter() - start < 20


EIGHT_BITS = [name for name in dir(torch) if name.startswith("float8_e") and "8m0" not in name]


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_eight_bit_floats_are_read_exactly(tmp_path: Path, kind: str) -> None:
    small = {name: tensor.to(getattr(torch, kind)) for name, tensor in tower().items()}
    for legacy in (False, True):
        torch.save(small, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        expert = tower_state(read(tmp_path / "a.pt"), golden.clip().backbone)
        vectors = TaskVectors(tower(), {"a": expert})
        assert vectors.promoted == {kind: ["a"]}
        for name, tensor in vectors.expert("a").items():
            torch.testing.assert_close(tensor, small[name].float(), atol=1e-6, rtol=0)


# ---- what a pickled module says of itself -----------------------------------------------------


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    config = json.loads((golden.FOLDER / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**config.get("model_cfg", config), **changes}))
    return tmp_path / "model.json"


@pytest.mark.parametrize("legacy", [False, True])
def test_another_activation_is_refused(tmp_path: Path, legacy: bool) -> None:
    plain, quick = (tmp_path / name for name in ("plain", "quick"))
    plain.mkdir()
    quick.mkdir()
    paths = {plain: folder_of(plain, quick_gelu=False), quick: folder_of(quick, quick_gelu=True)}
    for folder, path in paths.items():
        module = Encoder()
        module.model = build_clip(str(path)).model
        torch.save(module, folder / "clip.pt", _use_new_zipfile_serialization=not legacy)
        suite = {"architecture": str(path), "pretrained": str(folder / "clip.pt")}
        load_clip(suite)
        other = next(str(found) for found in paths.values() if found != path)
        with pytest.raises(AdamergeError, match="trained with another activation"):
            load_clip({**suite, "architecture": other})
    for block in module.model.visual.transformer.resblocks:
        block.mlp.gelu = nn.SiLU()
    torch.save(module, quick / "clip.pt")
    with pytest.raises(AdamergeError, match="trained with the activation SiLU, which"):
        load_clip(suite)


def test_other_heads_are_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    module = Encoder()
    module.model = copy.deepcopy(build_clip(str(path)).model)
    for block in module.model.visual.transformer.resblocks:
        block.attn.num_heads *= 2
    torch.save(module, tmp_path / "clip.pt")
    with pytest.raises(AdamergeError, match="was trained with heads = "):
        load_clip({"architecture": str(path), "pretrained": str(tmp_path / "clip.pt")})


def test_settings_of_any_type_are_read(tmp_path: Path) -> None:
    module = copy.deepcopy(golden.clip())
    for block in module.backbone.transformer.resblocks:
        block.ln_1.eps = block.ln_2.eps = [1e-5]
    torch.save(module.backbone, tmp_path / "tower.pt")
    assert read(tmp_path / "tower.pt").stated()["layer_norm_eps"] == [1e-5]


class ClassificationHead(nn.Linear):
    def __init__(self, normalize: bool) -> None:
        super().__init__(16, 4, bias=False)
        self.normalize = normalize


def test_a_head_for_features_as_they_come(tmp_path: Path) -> None:
    torch.save(ClassificationHead(True), tmp_path / "head.pt")
    assert read_head(tmp_path / "head.pt").shape == (4, 16)
    torch.save(ClassificationHead(False), tmp_path / "head.pt")
    with pytest.raises(AdamergeError, match=r"head\.pt has normalize=False"):
        read_head(tmp_path / "head.pt")


@pytest.mark.parametrize(("factor", "told"), [(0.0, "is zero throughout"), (torch.nan, "its file")])
def test_heads_that_say_nothing(factor: float, told: str) -> None:
    prompts = {"dots": Prompts(("one", "two"), ("{}",))}
    with pytest.raises(AdamergeError, match=f"head of task 'dots' .*{told}"):
        zero_shot_heads(golden.clip(), prompts, None, {"dots": torch.ones(2, 16) * factor})


# ---- folders ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sharded_trainings_are_named(tmp_path: Path) -> None:
    dcp.save({"model": tower()}, checkpoint_id=tmp_path / "fsdp" / "epoch_3")
    shard = next((tmp_path / "fsdp" / "epoch_3").glob("*.distcp"))
    for path in (tmp_path / "fsdp", tmp_path / "fsdp" / "epoch_3", shard):
        with pytest.raises(AdamergeError, match=r"sharded checkpoint.*dcp_to_torch_save") as error:
            read(path)
    command = str(error.value).partition('`python -c "')[2].partition('"`')[0]
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(command, {})  # the command of the message, as a user runs it
    finally:
        os.chdir(here)
    same(tmp_path / "joined.pt")
    step = tmp_path / "ds" / "global_step5"
    step.mkdir(parents=True)
    torch.save({"module": tower()}, step / "mp_rank_00_model_states.pt")
    torch.save({}, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for path in (step.parent, step, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        with pytest.raises(AdamergeError, match=r"folder of DeepSpeed.*zero_to_fp32\.py"):
            read(path)
    same(step / "mp_rank_00_model_states.pt")


def test_an_expert_of_another_base() -> None:
    own = tower()
    tuned = {name: t + 0.2 * t.std(correction=0) * torch.randn_like(t) for name, t in own.items()}
    other = {name: t.std(correction=0) * torch.randn_like(t) for name, t in own.items()}
    vectors = TaskVectors(own, {"tuned": tuned, "other": other})
    likeness = preflight.likeness(preflight.gram(vectors))
    assert likeness[0] > 0.9 and abs(likeness[1]) < 0.2
    (found,) = of_bases(vectors.tasks, torch.tensor([0.2, 1.4]), likeness)
    assert (found.severity, found.kind, found.tasks) == ("problem", "another-base", ("other",))
    assert "1.4 times as long" in found.text and "suite.pretrained" in found.text
