"""The shipped W&B sweep gives words that `train.py` takes; what `wandb:` says reaches W&B."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from adamerge.cli import train
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.report import tracking

SWEEP: dict[str, Any] = yaml.safe_load((config.config_root() / "sweep.yaml").read_text())


def test_every_run_of_the_sweep_is_a_run() -> None:
    """Of the command that `wandb agent` makes: `${args_no_hyphens}` is `key=value …`."""
    assert SWEEP["program"] == "train.py" and SWEEP["command"][-1] == "${args_no_hyphens}"
    choices = [part.get("values", [part.get("value")]) for part in SWEEP["parameters"].values()]
    runs = list(itertools.product(*choices))
    assert len(runs) == 12
    for values in runs:
        named = dict(zip(SWEEP["parameters"], values, strict=True))
        settings = config.load([f"{key}={value}" for key, value in named.items()])
        build.check(settings)
        assert settings["method"]["name"] == named["method"]
        assert (settings["optim"]["lr"], settings["seed"]) == (named["optim.lr"], named["seed"])


def test_agents_of_one_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    names = []
    for run in ("a1", "b2"):
        monkeypatch.setenv("WANDB_RUN_ID", run)
        names.append(train._open_run(["wandb=off"])[1].name)
    assert names[0].endswith("-a1") and names[1].endswith("-b2")


def test_entity_group_tags_and_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MagicMock()
    monkeypatch.setattr(tracking, "WandbLogger", logger)
    words = ["wandb=offline", "wandb.entity=team", "wandb.group=lr", "wandb.tags=[a, b]"]
    settings = config.load([*words, "wandb.notes='why: because'"])
    build.check(settings)
    tracking.wandb_logger(settings["wandb"], tmp_path, settings)
    given = logger.call_args.kwargs
    assert (given["entity"], given["group"], given["tags"]) == ("team", "lr", ["a", "b"])
    assert given["notes"] == "why: because"
