"""Fixtures: the golden inputs, and a tiny suite on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see adamerge.cli
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a tiny suite's YAML file."""
    from tests.tiny import make_suite

    return make_suite(tmp_path_factory.mktemp("suite"))
