"""Every shipped method and objective is built from its configuration and takes a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adamerge import TaskVectors, transforms
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.learn.objectives import ExpertKL, ExpertL1
from adamerge.methods import Surgery, WEMoE


@pytest.fixture(scope="module")
def parts(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> inputs.Inputs:
    cache = f"cache_dir={tmp_path_factory.mktemp('cache')}"
    return inputs.load(config.load([f"suite={suite}", cache]))


def step(words: list[str], parts: inputs.Inputs, suite: Path) -> build.Adaptation:
    """An adaptation after one step, or as it is built where there is nothing to learn."""
    cache = f"cache_dir={parts.settings['cache_dir']}"
    settings = config.load([f"suite={suite}", cache, "statistics.images=4", *words])
    build.check(settings)
    method = build.build_method(settings, parts.suite, parts.data)
    adaptation = build.build_adaptation(settings, parts.suite, method)
    if not method.has_learnables:
        return adaptation
    generator = torch.Generator().manual_seed(0)
    batch = {
        task: torch.randint(0, 256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
        for task in parts.suite.heads.tasks
    }
    loss = adaptation.training_step(batch, 8)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(p.grad is not None for p in adaptation.method.parameters())
    return adaptation


@pytest.mark.parametrize("name", config.names("method"))
def test_methods(name: str, parts: inputs.Inputs, suite: Path) -> None:
    method = step([f"method={name}", "log_every=100"], parts, suite).method
    assert isinstance(method, Surgery) == name.startswith("surgery")
    assert isinstance(method, WEMoE) == name.endswith("wemoe")


# Batches of these steps have no labels.
@pytest.mark.parametrize("name", [n for n in config.names("objective") if n != "labels"])
def test_objectives(name: str, parts: inputs.Inputs, suite: Path) -> None:
    method = "surgery_v2" if name == "surgery_v2" else "layer_wise"
    words = [f"method={method}", f"objective={name}", "log_every=100"]
    objective = step(words, parts, suite).objective
    assert isinstance(objective, ExpertKL) == (name == "expert_kl")
    assert isinstance(objective, ExpertL1) == name.startswith("surgery")


def test_surgery_is_taught_by_the_experts_features_unless_told_otherwise() -> None:
    assert config.load(["method=surgery"])["objective"]["name"] == "surgery"
    assert config.load(["method=surgery_v2"])["objective"]["blocks"] is True
    chosen = config.load(["method=surgery", "objective=expert_kl"])
    assert chosen["objective"]["name"] == "expert_kl"


def test_transforms_are_told_where_the_run_computes(
    parts: inputs.Inputs, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(task_vectors: TaskVectors, layers: str, device: torch.device) -> TaskVectors:
        seen.append((layers, device))
        return task_vectors

    monkeypatch.setattr(transforms, "tsv_m", noted)
    monkeypatch.setattr(build, "run_device", lambda trainer: torch.device("meta"))
    build.build_method(config.load([f"suite={suite}", "method=tsv_m"]), parts.suite)
    assert seen == [("matrices", torch.device("meta"))]
