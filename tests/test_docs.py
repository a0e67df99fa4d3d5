"""The pages' Python: every block parses, and the method that a page writes adapts and folds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import adamerge
from tests import golden_data as golden

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_parses(page: Path) -> None:
    for block in blocks(page):
        ast.parse(block)


def test_the_method_of_the_page_adapts_and_folds() -> None:
    module: dict[str, type] = {"__name__": "page"}
    exec(blocks(ROOT / "docs" / "own_method.md")[0], module)
    method = module["OneCoefficient"](golden.clip().backbone, golden.task_vectors(torch.float64))
    objective = adamerge.objectives.Entropy(golden.heads(torch.float64))
    images, ids = golden.batch(0, torch.float64)
    adamerge.step_loss(method, objective, images, ids)[0].backward()
    assert method.coefficient.grad.abs() > 1e-4
    torch.testing.assert_close(method.fold()(images, ids), method(images, ids))


def test_the_methods_page_has_every_method_with_the_rank_it_was_measured_at() -> None:
    board = (ROOT / "benchmarks" / "results" / "leaderboard.md").read_text()
    ranks = dict(re.findall(r"^\| ([\w, ]+?) +\| (\d+) +\|", board, re.MULTILINE))
    told: dict[str, str] = {}
    for line in (ROOT / "docs" / "methods.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        if line.startswith("|") and names and "method=" not in cells[0]:
            told |= dict(zip(names, cells[-1].split(", "), strict=True))
    assert len(ranks) > 40
    for name, rank in told.items():
        both = [ranks.get(f"{name}, {objective}") for objective in ("entropy", "expert_kl")]
        given = ranks.get(name) or (" / ".join(map(str, both)) if all(both) else "–")
        assert rank == given, name
    shipped = {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")}
    assert {name for name in shipped if not name.startswith("paper_")} == told.keys()
