"""Fixtures: the golden inputs, and a tiny suite on disk."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see adamerge.cli
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports `datasets`: what it prepares is written here, not in the user's home.
_DATASETS_CACHE = tempfile.mkdtemp(prefix="adamerge-tests-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE


gc.disable()  # imports make much that stays, and no garbage that is worth a search


def pytest_collection_finish() -> None:
    """What the libraries have made is not looked through at later collections either."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_leftovers() -> Iterator[None]:
    """The cache of `datasets` lives as long as the tests."""
    yield
    shutil.rmtree(_DATASETS_CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[Callable[..., None]]:
    """Figures are saved blank: drawing them takes half of a tiny run. Gives what draws them."""
    draw = Figure.savefig

    def blank(figure: Figure, path: Path, **_: object) -> None:
        Image.new("RGB", (2, 2)).save(path, "PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        yield draw


@pytest.fixture(scope="session", autouse=True)
def _quick_runs() -> Iterator[None]:
    """What takes half of a tiny run is made once: figures that differ in their numbers alone, and
    open_clip's own tokenizer."""
    if "adamerge.cli" not in sys.modules:  # no test here makes runs
        yield
        return
    import open_clip.factory as factory

    from adamerge.cli import results
    from adamerge.report import pictures

    figures = {n: _once(make) for n, make in vars(pictures).items() if n.endswith("_figure")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "pictures", SimpleNamespace(save=pictures.save, **figures))
        patch.setattr(factory, "SimpleTokenizer", _once(factory.SimpleTokenizer))
        yield


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Gives what `make` gave the first time that it was called with the same names."""
    made: dict[str, Any] = {}

    def found(*given: Any, **named: Any) -> Any:
        key = str(_names([given, named]))
        if key not in made:
            made[key] = make(*given, **named)
        return made[key]

    return found


def _names(value: Any) -> Any:
    """A value without the numbers in it; of a file, whether there are rows in it."""
    if isinstance(value, Mapping):
        return [(name, _names(inner)) for name, inner in value.items()]
    if isinstance(value, list | tuple):
        return [_names(inner) for inner in value]
    if isinstance(value, Path):
        return value.is_file() and value.read_text().count("\n") > 1
    return getattr(value, "shape", None if isinstance(value, float) else value)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a tiny suite's YAML file."""
    from tests.tiny import make_suite

    return make_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def train(words: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Trains a run of that name with the words of the test's module, and more; gives its folder."""
    from adamerge.cli import main

    def run(name: str, *own: str) -> Path:
        assert main(["train", *words, *own, f"run_dir={tmp_path / name}"]) == 0
        return tmp_path / name

    return run
