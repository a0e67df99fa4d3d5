"""`adamerge compare`: a grid of runs in one folder, each as if it had been run alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from adamerge import AdamergeError
from adamerge.cli.command import main
from adamerge.cli.compare import _end_after, compare, report
from adamerge.config.grid import Recipe, folder_names, left_static, read_grid

QUICK = [
    "trainer.max_steps=2", "batch_size=4", "wandb=off", "preflight=off", "evaluate.oracle=false",
    "trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture
def words(suite: Path, tmp_path: Path) -> list[str]:
    return [f"suite={suite}", f"cache_dir={tmp_path / 'cache'}", *QUICK]


def test_commas_make_a_grid_and_brackets_do_not() -> None:
    grid = read_grid(["a=1,2", "b=[1,2]", "c={x: 1, y: 2}", 'd="p,q"', "e=3, 4"])
    assert [recipe.words for recipe in grid] == [
        [f"a={a}", "b=[1,2]", "c={x: 1, y: 2}", 'd="p,q"', f"e={e}"] for a in "12" for e in "34"
    ]


def test_a_yaml_names_recipes_and_words_go_over_it(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    content = {
        "suite": "demo",
        "seed": [0, 1],
        "recipes": {"low": {"optim.lr": 1e-3}, "on_it": {"method": "surgery", "base": "low"}},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert [recipe[:3] for recipe in read_grid([str(path), "seed=5"])] == [
        ("low", ["suite=demo", "seed=5", "optim.lr=0.001"], ""),
        ("on_it", ["suite=demo", "seed=5", "method=surgery"], "low"),
    ]
    assert len(read_grid([str(path)])) == 4


def test_values_that_say_the_same_are_one_run(tmp_path: Path) -> None:
    assert [r.words for r in read_grid(["seed=4", "lr=1e-3,0.001,1e-4", "seed=0,0"])] == [
        ["seed=0", "lr=0.001"],
        ["seed=0", "lr=1e-4"],
    ]


def test_a_yaml_may_nest_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    own = {"trainer": {"max_steps": [3, 6]}, "optim": {"_target_": "torch.optim.SGD", "lr": 1}}
    path.write_text(yaml.safe_dump({"wandb": {"mode": "off"}, "recipes": {"a": own}}))
    optim = 'optim={"_target_": "torch.optim.SGD", "lr": 1}'
    assert [sorted(recipe.words) for recipe in read_grid([str(path)])] == [
        [optim, f"trainer.max_steps={steps}", "wandb.mode=off"] for steps in (3, 6)
    ]


def test_no_folder_is_above_or_hidden() -> None:
    grid = [
        Recipe(name, ["a=1"], "") for name in ("..", ".", "../../x", ".git", "a/b", "report.md")
    ]
    assert folder_names(grid) == ["run-1", "run-2", "-..-x", "git", "a-b", "report.md-run"]


def test_folders_are_called_by_what_differs() -> None:
    grid = read_grid(["method=one,my/two x.yaml", "suite=demo", "optim.lr=0.1,0.2", "seed=0,1"])
    assert folder_names(grid) == [
        f"{method}-lr={rate}-seed{seed}"
        for method in ("one", "two-x")
        for rate in ("0.1", "0.2")
        for seed in (0, 1)
    ]
    assert folder_names([grid[0], grid[0]]) == ["run-1", "run-2"]


def test_what_learns_nothing_stays_static_beside_what_learns(tmp_path: Path) -> None:
    shared = ["objective=entropy,expert_kl", "trainer.max_steps=5"]
    words = ["method=task_wise,tsv_m", *shared]
    grid, said = left_static(read_grid(words))
    assert folder_names(grid) == ["task_wise-entropy", "task_wise-expert_kl", "tsv_m"]
    assert [recipe.values.get("trainer.max_steps") for recipe in grid] == ["5", "5", None]
    assert "(tsv_m) run without the grid's objective and trainer.max_steps;" in said
    for alone in ("method=tsv_m,iso_c", "method=task_wise"):  # nobody else the steps could be for
        assert left_static(read_grid([alone, *shared])) == (read_grid([alone, *shared]), "")
    recipes = {"a": {"method": "task_wise"}, "b": {"method": "tsv_m", "trainer.max_steps": 7}}
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({"objective": "infomax", "recipes": recipes})
    )
    named = read_grid([str(tmp_path / "grid.yaml"), "trainer.max_steps=5"])
    assert left_static(named) == (named, "")
    assert [recipe.values["trainer.max_steps"] for recipe in named] == ["5", "7"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "expected keys and values"),
        ("notes: !!bool maybe", "is not valid YAML"),
        ("notes: !!int abc", "is not valid YAML"),
        ("notes: !!timestamp x", "is not valid YAML"),
        ("notes: !!binary aGk=\nrecipes: {a: {}}", "is no setting"),
        ("a: &a [*a]\nrecipes: {a: {}}", "aliases stand for more"),
        (
            "a: &a [0,0,0,0,0,0,0,0,0,0]\n"
            + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 10)}]\n" for x, y in pairwise("abcdefg"))
            + "recipes: {a: {}}",
            "aliases stand for more",
        ),
        (
            "recipes: {a: {" + ", ".join(f"k{i}: {list(range(10))}" for i in range(9)) + "}}",
            "recipe a of .* stands for 1000000000 runs",
        ),
        ("recipes: [1]", "is no grid"),
        ("recipes: {a: 1}", "is no grid"),
        ("recipes: {a: {base: b}, b: {}}", "base: b, which is no recipe above it"),
    ],
)
def test_a_grid_that_cannot_be_read(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(AdamergeError, match=sentence):
        read_grid([str(tmp_path / "grid.yaml")])


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("method=a,,b", "empty value"),
        ("jobs=0", "jobs=0"),
        ("jobs=x", "jobs=x"),
        ("seed='[", "not valid YAML"),
    ],
)
def test_words_that_make_no_grid(word: str, sentence: str) -> None:
    with pytest.raises(AdamergeError, match=sentence):
        compare([word, "suite=demo"], main)


def test_words_beside_a_grids_yaml_are_settings() -> None:
    with pytest.raises(AdamergeError, match="'typo' is no setting"):
        compare(["grid.yaml", "typo"], main)


def test_cells_equal_single_runs_and_go_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    to = tmp_path / "grid"
    grid = [*words, "method=layer_wise,task_wise", "seed=0,1", "jobs=2", f"to={to}"]
    assert main(["compare", *grid]) == 0
    alone = tmp_path / "alone"
    assert main(["train", *words, "method=layer_wise", "seed=1", f"run_dir={alone}"]) == 0
    cell = to / "layer_wise-seed1"
    for name in ("coefficients.csv", "merged/open_clip_model.safetensors"):
        assert (cell / name).read_bytes() == (alone / name).read_bytes()
    assert yaml.safe_load((cell / "config.yaml").read_text())["wandb"]["group"] == "grid"
    page = (to / "report.html").read_text()
    assert "layer_wise" in page and "task_wise" in page
    kept = (to / "task_wise-seed0/results.json").stat().st_mtime_ns
    (cell / "results.json").unlink()  # as if killed before it was scored
    shutil.rmtree(to / "layer_wise-seed0")  # as if killed before it was begun
    assert main(["compare", *grid]) == 0
    assert (to / "task_wise-seed0/results.json").stat().st_mtime_ns == kept
    assert (cell / "coefficients.csv").read_bytes() == (alone / "coefficients.csv").read_bytes()
    assert (to / "layer_wise-seed0/merged/merge.json").is_file()
    with pytest.raises(AdamergeError, match=r"other settings \(batch_size is 4, not 3\)"):
        compare([*grid, "batch_size=3"], main)
    assert report([to], tmp_path / "again").is_file()
    assert "4 merges" in (tmp_path / "again/report.md").read_text()


def test_a_run_stops_after_its_parent_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    ours, of_parent = os.pipe()
    watch = threading.Thread(target=_end_after, args=(ours,))
    watch.start()
    watch.join(0.05)
    assert not sent
    os.close(of_parent)  # as the end of a process does
    watch.join(5)
    os.close(ours)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_failed_cell_stops_nothing(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, to = tmp_path / "grid.yaml", tmp_path / "grid"
    recipes = {
        "bad": {"method": "surgery", "method.base": str(tmp_path / "nowhere")},
        "good": {"method": "task_wise"},
        "on_bad": {"method": "surgery", "base": "bad"},
        "on_good": {"method": "surgery", "base": "good"},
    }
    path.write_text(yaml.safe_dump({"recipes": recipes}))
    assert main(["compare", str(path), *words, f"to={to}"]) == 0
    text = (to / "report.md").read_text()
    assert "nowhere" in text and "its base bad failed" in text
    record = json.loads((to / "on_good/merged/merge.json").read_text())
    assert record["config"]["method"]["base"] == os.fspath(to / "good")
