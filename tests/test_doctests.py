"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import adamerge

PACKAGE = Path(adamerge.__file__).parent
KNOWN = {"adamerge": adamerge, "torch": torch, "nn": torch.nn}  # what an example need not import
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


def test_public_names_have_examples() -> None:
    names = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES}
    wanted = {"learn/adapt", "learn/losses", "learn/step", "methods/adamerging"}
    assert wanted | {"encoders/tower", "weights/task_vectors"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = importlib.import_module(name.removesuffix(".__init__"))
        failed, tried = doctest.testmod(module, extraglobs=KNOWN)
    assert tried and not failed
