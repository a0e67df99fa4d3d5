"""Public names, and the dotted paths of configurations, of this version and of earlier ones."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import adamerge
from adamerge._base.binding import find
from tests.processes import forgetting, started

ROOT = Path(__file__).parent.parent
OLD = {  # as `config.yaml` of earlier runs has them -> where they are now
    "adamerge.methods.AdaMerging": "adamerge.methods.adamerging",
    "adamerge.methods.adamerging.AdaMerging": "adamerge.methods.adamerging",
    "adamerge.methods.surgery.Surgery": "adamerge.methods.surgery",
    "adamerge.methods.wemoe.WEMoE": "adamerge.methods.wemoe",
    "adamerge.objectives.Entropy": "adamerge.learn.objectives.unlabeled",
    "adamerge.objectives.ExpertL1": "adamerge.learn.objectives.taught",
    "adamerge.transforms.ties": "adamerge.transforms.sparse",
    "adamerge.demo_images.dataset": "adamerge.images.demo",
}


def targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["_target_"]] if "_target_" in value else []
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        yield from targets(part)


FILES = (ROOT / "configs").rglob("*.yaml")
SHIPPED = sorted({t for file in FILES for t in targets(yaml.safe_load(file.read_text()))})


@pytest.mark.parametrize("path", sorted({*OLD, *SHIPPED}))
def test_dotted_paths_of_configurations(path: str) -> None:
    found = find(path, "method", lambda _: True, "anything")
    assert found is pkgutil.resolve_name(path) and callable(found)
    if path in OLD:
        assert found.__module__ == OLD[path]


def test_every_public_name_is_there() -> None:
    for name in adamerge.__all__:
        assert getattr(adamerge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'verdicts'"):
        _ = adamerge.verdicts


@pytest.mark.parametrize("name", ["heads", "objectives", "demo_images"])
def test_a_short_name_is_the_module(name: str) -> None:
    short, module = importlib.import_module(f"adamerge.{name}"), getattr(adamerge, name)
    public = [word for word in dir(module) if not word.startswith("_")]
    assert public and all(getattr(short, word) is getattr(module, word) for word in public)
    assert set(public) <= set(dir(short))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = short.nothing_such


def test_ways_to_import(tmp_path: Path) -> None:
    lines = [
        "import sys, adamerge.methods",
        "assert 'open_clip' not in sys.modules",  # towers and methods do without
        "import adamerge.heads; assert adamerge.heads.zero_shot_heads",
        "from adamerge.heads import Heads",
        "from adamerge.objectives import Entropy, Objective",
        "from adamerge.encoders import build_clip; assert adamerge.encoders.Normalizer",
        "from adamerge import heads, objectives; assert objectives.entropy",
        "from adamerge import Adaptation, TaskVectors, adapt, load, step_loss",
        "from adamerge.transforms import ties; assert adamerge.transforms.ties is ties",
    ]
    fresh = partial(forgetting, ("adamerge", "open_clip"), "\n".join(lines))
    process = started(fresh, tmp_path / "errors")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()


def test_the_command_as_a_module() -> None:
    command = [sys.executable, "-m", "adamerge.cli", "show", "objectives"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0 and "entropy" in answer.stdout, answer.stderr
