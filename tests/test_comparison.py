"""Runs compared: read from their folders, grouped by recipe, as a page that loads nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from adamerge import AdamergeError
from adamerge.report.comparison.page import write_report
from adamerge.report.comparison.runs import Run, rank_correlation, read_run, recipes
from adamerge.report.comparison.tables import correlations, table


def a_run(folder: Path, method: str, seed: int, accuracy: float | None, **more: Any) -> Path:
    """A run folder as `train.py` leaves it; one without results where there is no accuracy."""
    folder.mkdir()
    suite = {"name": "s", "tasks": {"a": {"expert": "x"}, "b": {"expert": "y"}}}
    settings = {"suite": suite, "batch_size": 8, "method": {"name": method}, "seed": seed, **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if accuracy is None:
        return folder
    rows = [
        {"name": "expert", "accuracy": {"a": 1.0, "b": 1.0}, "average": 1.0, "normalized": 1.0},
        {
            "name": method,
            "accuracy": {"a": accuracy, "b": accuracy - 0.2},
            "average": accuracy - 0.1,
            "normalized": accuracy - 0.1,
        },
    ]
    signs = {"after": {"agreement": {"a": accuracy, "b": accuracy}}}
    key = "signals" if seed else "signs"  # as runs of earlier versions call them
    course = {"step": 4, "last_step": 9, "state": "best", "value": 0.9, "start": 0.5, "last": 0.8}
    results = {"suite": "s", "method": method, "rows": rows, key: signs, "kept": course}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.csv").write_text(
        "step,loss,entropy/a,entropy/b,images_per_second\n0,2,1,2,16\n10,1,0.5,1.5,32\n"
    )
    (folder / "coefficients.csv").write_text("task,layer,coefficient\na,w,0.1\nb,w,0.5\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    values = [("one", 0, 0.8), ("one", 1, 0.9), ("two<b>", 0, 0.7), ("bad", 0, None)]
    *read, bad = [read_run(a_run(tmp_path / f"{m[:3]}-{s}", m, s, v)) for m, s, v in values]
    assert bad.failed == "no results yet"
    return [*read, dataclasses.replace(bad, failed="task <a> has no images")]


def test_a_merge_may_be_called_as_a_baseline(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path / "run", "task_arithmetic", 0, 0.5))
    assert run.row()["average"] == 0.4 and run.baselines() == ["expert"]


def test_seeds_make_a_recipe_and_methods_do_not(runs: list[Run]) -> None:
    groups, differing = recipes(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("one", 2), ("two<b>", 1), ("bad", 1)]
    assert differing == ["method.name"]
    mean, deviation = groups[0].accuracy("a") or (0.0, 0.0)
    assert mean == pytest.approx(0.85) and deviation == pytest.approx(0.05 * 2**0.5)
    assert groups[0].signal("entropy") == (pytest.approx(1.25), 0.0)


def test_table_has_baselines_then_recipes_best_first(runs: list[Run]) -> None:
    titles, lines = table(recipes(runs)[0])
    assert titles[:4] == ["a", "b", "average", "normalized"] and titles[-1] == "seeds"
    assert [name for name, _ in lines] == ["experts, each on its own task", "one", "two<b>", "bad"]
    assert lines[1][1][:3] == ["85.0 ± 7.1", "65.0 ± 7.1", "75.0 ± 7.1"]
    assert lines[3][1][0] == "–" and lines[3][1][-1] == "0 of 1"


def test_other_settings_name_a_recipe(tmp_path: Path) -> None:
    settings = [{"optim": {"lr": rate}} for rate in (0.1, 0.2)]
    found = [a_run(tmp_path / f"r{i}", "m", 0, 0.5, **more) for i, more in enumerate(settings)]
    found += [a_run(tmp_path / f"n{seed}", "n", seed, 0.5, batch_size=9) for seed in (0, 1)]
    groups, differing = recipes([read_run(path) for path in found])
    assert differing == ["batch_size", "method.name", "optim.lr"]
    assert [group.label for group in groups] == ["m · optim.lr=0.1", "m · optim.lr=0.2", "n"]


def test_what_learns_nothing_has_no_objective(tmp_path: Path) -> None:
    found = [
        a_run(
            tmp_path / f"{steps}-{name}",
            "m",
            0,
            0.5,
            **{"objective": {"name": name}, "trainer": {"max_steps": steps}},
        )
        for steps in (0, 5)
        for name in ("x", "y")
    ]
    groups, _ = recipes([read_run(path) for path in found])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("m", 2),
        ("m · x", 1),
        ("m · y", 1),
    ]


class _Page(HTMLParser):
    """Every address and tag of a page, and whether tags are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(runs: list[Run], tmp_path: Path) -> None:
    text = write_report(runs, tmp_path / "out", "adamerge compare", ["x & y fit not"]).read_text()
    page = _Page(text)
    assert not page.open and {"svg", "table", "h1", "button", "main"} <= set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "one, seed 0: step 4 of 9, where" in text
    assert "two&lt;b&gt;" in text and "two<b>" not in text
    assert "task &lt;a&gt; has no images" in text and "x &amp; y fit not" in text


def test_csv_and_markdown_say_the_same(runs: list[Run], tmp_path: Path) -> None:
    write_report(runs, tmp_path, "adamerge compare")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["recipe"], r["seed"], r["average"]) for r in rows][:2] == [
        ("one", "0", "0.7000000000000001"),
        ("one", "1", "0.8"),
    ]
    assert rows[3]["failed"] == "task <a> has no images"
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| one +\| 85\.0 ± 7\.1 +\|", report, re.MULTILINE)
    assert "- one, seed 1: step 4 of 9, where merge and experts agree on 90.0 %" in report


def test_costs_are_worked_out_from_what_was_logged(runs: list[Run]) -> None:
    costs = runs[0].costs()  # 16 images a step: one at 16 a second, ten at 32
    assert costs == {"seconds": 6.0, "images": 176.0}


def test_rank_correlation_shares_ties() -> None:
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_signals_are_correlated_over_runs(runs: list[Run]) -> None:
    assert correlations(recipes(runs)[0])["agreement"] == (pytest.approx(1.0), 3)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.yaml", None, "is no run folder"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "[1]", "config.yaml is damaged"),
        ("results.json", '{"rows": [3]}', "results.json is not results of a run"),
        ("results.json", '{"rows": [{}]}', "results.json is not results of a run"),
        ("results.json", "{", "results.json"),
        ("metrics.csv", "step,loss\n0,abc\n", "metrics.csv is damaged"),
        ("coefficients.csv", "task,layer\na,b\n", "coefficients.csv is damaged"),
    ],
)
def test_a_damaged_folder_is_a_sentence(
    tmp_path: Path, name: str, content: str | None, sentence: str
) -> None:
    folder = a_run(tmp_path / "run", "m", 0, 0.5)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(AdamergeError, match=sentence):
        read_run(folder)
