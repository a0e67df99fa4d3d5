"""Fixtures: the golden inputs, and a tiny suite on disk."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

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


def pytest_collection_finish() -> None:
    """What the libraries have made stays: it is not looked through at every collection again."""
    gc.collect()
    gc.freeze()


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
