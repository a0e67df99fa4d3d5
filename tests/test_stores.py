"""What frozen encoders say is stored: the same run, without computing it at every step."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import adamerge
from adamerge import AdamergeError
from adamerge.cli import main
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.encoders.experts import Experts
from adamerge.methods import Surgery
from tests.tiny import learned, make_suite


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stores")
    suite = make_suite(folder / "suite")
    return [
        f"suite={suite}",
        f"cache_dir={folder / 'cache'}",
        *("trainer.max_steps=6", "trainer.accelerator=cpu", "batch_size=4", "wandb=off"),
        *("evaluate.baselines=false", "preflight=off", "log_every=1", "checkpoint_every=1"),
    ]


RUNS = {
    "surgery": ["method=surgery", "optim.lr=1e-2"],
    "taught": ["method=layer_wise", "objective=expert_kl", "optim.lr=1e-2"],
    "heldout": ["method=surgery", "protocol=heldout", "optim.lr=1e-2"],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_with_and_without(name: str, base: list[str], tmp_path: Path) -> None:
    for store in ("true", "false"):
        words = [*base, *RUNS[name], f"store={store}", f"run_dir={tmp_path / store}"]
        assert main(["train", *words]) == 0
    stored, computed = learned(tmp_path / "true"), learned(tmp_path / "false")
    assert set(stored) == set(computed)
    for key, tensor in computed.items():
        torch.testing.assert_close(stored[key], tensor, rtol=1e-4, atol=1e-5)
    with (tmp_path / "true" / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < losses[0]


SIGNALS = 2 * 40  # images that experts encode once to be compared with their merge


def counted(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[int]:
    seen: list[int] = []
    real: Callable[..., Tensor] = getattr(kind, name)

    def count(self: object, images: Tensor, *more: Tensor) -> Tensor:
        seen.append(len(images))
        return real(self, images, *more)

    monkeypatch.setattr(kind, name, count)
    return seen


def test_every_image_is_encoded_once_and_only_those_that_are_drawn(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = counted(monkeypatch, Experts, "forward")
    merged = counted(monkeypatch, Surgery, "frozen_features")
    words = [*base, "method=surgery", f"cache_dir={tmp_path / 'cache'}"]
    assert main(["train", *words, f"run_dir={tmp_path / 'a'}"]) == 0
    drawn = 2 * 6 * 4  # two tasks, six steps of four images, of 40 images each
    assert sum(taught) - SIGNALS == sum(merged[:2]) == drawn  # the merge once more for its export
    merged.clear()
    # More steps add what they need; another rank needs nothing.
    words = [*words, "trainer.max_steps=30", "method.rank=4", f"run_dir={tmp_path / 'b'}"]
    assert main(["train", *words]) == 0
    assert sum(taught) - SIGNALS == 2 * 40 and sum(merged[:2]) == 2 * 40 - drawn


def test_online_sees_every_image_once(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*base, "method=surgery", "online=true", "batch_size=3", f"run_dir={tmp_path / 'a'}"]
    assert main(["train", *words]) == 0
    with (tmp_path / "a" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert max(steps) == 13  # 14 steps: 40 images, three at a time
    capsys.readouterr()
    words = [*words, "trainer.devices=2", f"run_dir={tmp_path / 'b'}"]
    assert main(["train", *words]) == 2
    assert "online: true lets a task end before others" in capsys.readouterr().err


def test_a_merge_is_adapted_in_a_chain(base: list[str], tmp_path: Path) -> None:
    """merge → AdaMerging → fold → Surgery, by configuration alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *base, "optim.lr=5e-2", f"run_dir={first}"]) == 0
    words = [*base, "method=surgery", f"method.base={first}", f"run_dir={second}"]
    assert main(["train", *words]) == 0
    settings = config.load_run(second)
    suite = inputs.load_suite(settings)
    method = build.build_method(settings, suite)
    assert isinstance(method, Surgery)
    clip, _ = inputs.load_clip({"pretrained": str(first / "merged")})
    for name, tensor in clip.backbone.state_dict().items():
        assert torch.equal(method.frozen_state()[f"backbone.{name}"], tensor)
    assert suite.files["base"]["path"] == str(first / "merged")


def test_a_mixture_takes_its_static_part_from_a_run(base: list[str], tmp_path: Path) -> None:
    assert main(["train", *base, "optim.lr=5e-2", f"run_dir={tmp_path / 'first'}"]) == 0
    given = f"method.base={tmp_path / 'first' / 'merged'}"
    settings = config.load([*base, "method=wemoe", given])
    build.check(settings)
    suite = inputs.load_suite(settings)
    folded = build.build_method(settings, suite).fold()
    clip, _ = inputs.load_clip({"pretrained": str(tmp_path / "first" / "merged")})
    found = folded.state_dict()
    for name, tensor in clip.backbone.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(found[f"backbone.{name}"], tensor)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method.base=7", "method.base is 7: expected a checkpoint, a run's folder, or null"),
        ("method.init=a", "method.init is 'a': expected a finite number"),
        ("method.base=none.pt", r"checkpoint none\.pt does not exist"),
        ("method.base=other.safetensors", r"does not fit the suite's architecture: tensor 'proj'"),
        ("method.bas=null", r"method\.bas is unknown"),
    ],
)
def test_a_base_that_is_none(
    word: str, message: str, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(base[0].removeprefix("suite="))
    suite = yaml.safe_load(path.read_text())
    clip, _ = inputs.load_clip({"pretrained": str(path.parent / suite["pretrained"])})
    state = {**clip.backbone.state_dict(), "proj": torch.ones(3, 2)}
    torch.save(state, tmp_path / "other.safetensors")
    with pytest.raises(AdamergeError, match=message):
        settings = config.load([*base, "method=surgery", word])
        build.check(settings)
        build.build_method(settings, inputs.load_suite(settings))


def test_labels_are_no_part_of_what_is_stored(base: list[str], tmp_path: Path) -> None:
    words = [*base, "method=surgery", f"cache_dir={tmp_path / 'c'}", f"run_dir={tmp_path / 'r'}"]
    assert main(["train", *words]) == 0
    for path in (tmp_path / "c" / "features").glob("*.npy"):
        array = np.load(path)
        assert array.dtype == np.float32 and array.shape == (40, 16 + 1)  # and a checksum


def test_another_activation_is_another_store(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files, images and seed, and yet other features."""
    taught = counted(monkeypatch, Experts, "forward")
    model = Path(base[0].removeprefix("suite=")).parent / "model"
    stated = json.loads((model / "open_clip_config.json").read_text())
    stated["model_cfg"]["quick_gelu"] = True
    (tmp_path / "quick.json").write_text(json.dumps(stated))
    words = [*base, "method=surgery", f"cache_dir={tmp_path / 'cache'}"]
    assert main(["train", *words, f"run_dir={tmp_path / 'a'}"]) == 0
    words += [f"suite.architecture={tmp_path / 'quick.json'}", f"run_dir={tmp_path / 'b'}"]
    assert main(["train", *words]) == 0
    assert sum(taught) == 2 * (SIGNALS + 2 * 6 * 4)


def alpha(folder: Path, value: int) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": value})
    )


def test_another_adapter_setting_is_another_store(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings beside an adapter's weights decide the expert as much as they do."""
    path = Path(base[0].removeprefix("suite="))
    suite = yaml.safe_load(path.read_text())
    (tmp_path / "lora").mkdir()
    name = "base_model.model.transformer.resblocks.0.mlp.c_fc.lora_"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(128, 2, generator=generator)
    adapter = {f"{name}A.weight": a, f"{name}B.weight": b}
    save_file(adapter, tmp_path / "lora" / "adapter_model.safetensors")
    suite["tasks"]["dots"]["expert"] = str(tmp_path / "lora")
    own = path.parent / "lora.yaml"
    own.write_text(yaml.safe_dump(suite, sort_keys=False))
    words = [*base, f"suite={own}", "objective=expert_kl", f"cache_dir={tmp_path / 'cache'}"]
    alpha(tmp_path / "lora", 1)
    assert main(["train", *words, f"run_dir={tmp_path / 'a'}"]) == 0
    alpha(tmp_path / "lora", 8)
    assert main(["train", *words, f"run_dir={tmp_path / 'b'}"]) == 0
    assert main(["train", *words, "store=false", f"run_dir={tmp_path / 'c'}"]) == 0
    b, c = learned(tmp_path / "b"), learned(tmp_path / "c")
    for key, tensor in c.items():
        torch.testing.assert_close(b[key], tensor, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(["train", f"resume={tmp_path / 'a'}", "trainer.max_steps=8"]) == 2
    assert "sha256 of dots" in capsys.readouterr().err


def test_unknown_numbers_of_processes_store_all_images(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = counted(monkeypatch, Experts, "forward")
    words = [*base, "method=surgery", f"cache_dir={tmp_path / 'cache'}", "trainer.devices=auto"]
    assert main(["train", *words, "trainer.max_steps=2", f"run_dir={tmp_path / 'a'}"]) == 0
    assert sum(taught) - SIGNALS == 2 * 40


def test_a_chain_on_each_kind_of_export(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {
        "dynamic": ["method=wemoe"],
        "per_task": ["method=wemoe", "fold=per_task"],
        "adapters": ["method=surgery"],
    }
    for kind, words in kinds.items():
        assert main(["train", *base, *words, f"run_dir={tmp_path / kind}"]) == 0
        merged = adamerge.load(tmp_path / kind)
        assert merged.kind == kind
        on = ["method=surgery", f"method.base={tmp_path / kind}"]
        status = main(["train", *base, *on, "optim.lr=0.0", f"run_dir={tmp_path / kind}-on"])
        if kind == "adapters":  # not silently the merge without them
            assert status == 2
            assert "is an export of kind adapters: expected static, per" in capsys.readouterr().err
            continue
        assert status == 0
        images, ids = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
        above = adamerge.load(tmp_path / f"{kind}-on")
        assert above.kind == "adapters"
        with torch.no_grad():  # adapters that have not learned change nothing
            difference = above.encoder(images, ids) - merged.encoder(images, ids)
        assert difference.abs().max() < 1e-6
        assert main(["train", *base, "method=wemoe", on[1], f"run_dir={tmp_path / 'w'}"]) == 2
        assert f"is an export of kind {kind}: expected static" in capsys.readouterr().err


def test_a_base_that_has_seen_what_is_scored_is_refused(
    base: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *base, "run_dir=first"]) == 0
    on = ["method=surgery", "method.base=first"]
    assert main(["train", *base, *on, "protocol=heldout", "run_dir=refused"]) == 2
    assert "was adapted on all test images (protocol paper)" in capsys.readouterr().err
    assert main(["train", *base, *on, "run_dir=second"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the base is found from anywhere
    assert main(["export", str(tmp_path / "second"), "--to", str(tmp_path / "again")]) == 0
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    on[1] = f"method.base={tmp_path / 'unfinished'}"
    assert main(["train", *base, *on, "run_dir=refused"]) == 2
    assert "is a run that is not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["method=wemoe", "objective=surgery_v2"],
            "which WEMoE with these settings does not learn",
        ),
        (["method=surgery", "objective=surgery_v2"], "which Surgery with these settings does not"),
        (["method=wemoe", "method.batch_gate=true", "micro_batch=3"], "set micro_batch to null"),
        (["method=surgery", "method.rank=10000000000000"], "Surgery: rank is 10000000000000"),
    ],
)
def test_what_cannot_go_together_is_said_before_the_run(
    words: list[str],
    message: str,
    base: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", *base, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
