"""The examples run as they are, and the merge that is learned is better than where it started."""

from __future__ import annotations

import json
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


def test_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES[0].parent / "quickstart.ipynb"
    assert path.stat().st_size < 100_000  # its pictures are small
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "notebook"}
    with torch.random.fork_rng():
        for cell in cells:
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    table = re.findall(r"^(\w+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    *tasks, (_, before, after) = table
    assert len(tasks) == 5 and float(after) > float(before) + 3
    of_open_clip = dict(re.findall(r"^(\w+) +([\d.]+) %$", printed, re.MULTILINE))
    assert of_open_clip == {task: learned for task, _, learned in tasks}
