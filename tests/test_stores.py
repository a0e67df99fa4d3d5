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
from torch import Tensor

from adamerge import AdamergeError, build, config, inputs
from adamerge.cli import main
from adamerge.experts import Experts
from adamerge.methods import Surgery
from tests.tiny import make_suite


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stores")
    suite = make_suite(folder / "suite")
    return [
        f"suite={suite}",
        f"cache_dir={folder / 'cache'}",
        *("trainer.max_steps=6", "trainer.accelerator=cpu", "batch_size=4", "wandb=off"),
        *("evaluate.oracle=false", "preflight=off", "log_every=1", "checkpoint_every=1"),
    ]


def learned(run: Path) -> dict[str, Tensor]:
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, Tensor] = saved["state_dict"]
    return state


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
    assert sum(taught) == sum(merged[:2]) == drawn  # the merge once more to verify its export
    merged.clear()
    # More steps add what they need; another rank needs nothing.
    words = [*words, "trainer.max_steps=30", "method.rank=4", f"run_dir={tmp_path / 'b'}"]
    assert main(["train", *words]) == 0
    assert sum(taught) == 2 * 40 and sum(merged[:2]) == 2 * 40 - drawn


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
        assert array.dtype == np.float32 and array.shape == (40, 16)


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
    assert sum(taught) == 2 * (2 * 6 * 4)
