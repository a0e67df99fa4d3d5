"""The examples run as they are, and the merge that is learned is better than where it started."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) <= 80
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    if path.stem == "soup":
        found = dict(re.findall(r"^(\w+).*?([\d.]+) %$", printed, re.MULTILINE))
        assert float(found["greedy"]) >= float(found["best"]) > float(found["pretrained"])
        return
    found = re.findall(r"(task|layer)-wise: ([\d.]+) % before, ([\d.]+) % after", printed)
    assert [name for name, *_ in found] == ["task", "layer"]
    assert all(float(after) > float(before) + 1 for _, before, after in found), found
