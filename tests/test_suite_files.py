"""What a suite of one's own may leave to others: task files, a root, variables; its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adamerge import AdamergeError
from adamerge.cli import main
from adamerge.config import inputs
from adamerge.config import settings as config
from adamerge.config.suite import require_root
from tests import tiny
from tests.test_suites import load as load_suite
from tests.test_suites import task_file


def write(folder: Path, tasks: str, more: str = "") -> Path:
    path = folder / "own.yaml"
    path.write_text(f"architecture: ViT-B-32-quickgelu\npretrained: openai\n{more}tasks:\n{tasks}")
    return path


def test_an_entry_goes_over_its_task_file(tmp_path: Path) -> None:
    svhn = task_file("svhn")
    path = write(
        tmp_path,
        "  one: {task: svhn, expert: a.pt}\n"
        "  two: {task: svhn, expert: a.pt, data: {split: extra, label: null}}\n"
        "  three: {task: svhn, expert: a.pt, templates: ['{}'], data: images}\n"
        "  four:\n    task: svhn\n    expert: a.pt\n"
        "    data: {_target_: adamerge.images.demo.dataset, task: digits, split: test}\n",
    )
    tasks = load_suite(f"suite={path}", "suite.tasks.one.data.split=train")["tasks"]
    assert tasks["one"] == {
        "expert": "a.pt", **svhn, "data": {**svhn["data"], "split": "train"}
    }  # fmt: skip
    assert tasks["two"]["data"] == {**svhn["data"], "split": "extra", "label": None}
    assert tasks["three"]["data"] == {"path": "images"}
    assert tasks["three"]["templates"] == ["{}"] and tasks["three"]["classes"] == svhn["classes"]
    assert tasks["four"]["data"] == {
        "_target_": "adamerge.images.demo.dataset", "task": "digits", "split": "test"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("svhn", {"path": "own"}),
        ("mnist", {"path": "own", "label": None}),
        ("food101", {"path": "own.parquet", "label": "kind"}),
    ],
)
def test_another_place_takes_nothing_of_the_task_files(
    tmp_path: Path, task: str, data: dict[str, str | None]
) -> None:
    path = write(tmp_path, f"  one: {{task: {task}, expert: a.pt, data: {json.dumps(data)}}}\n")
    found = load_suite(f"suite={path}")["tasks"]["one"]
    assert found["data"] == data and found["classes"] == task_file(task)["classes"]
    path = write(tmp_path, f"  one: {{task: {task}, expert: a.pt}}\n")
    word = "suite.tasks.one.data.path=own"
    assert load_suite(f"suite={path}", word)["tasks"]["one"]["data"] == {"path": "own"}
    below = task_file(task)["data"]
    same = load_suite(f"suite={path}", f"suite.tasks.one.data.path={below['path']}")
    assert same["tasks"]["one"]["data"] == below


def test_a_path_below_a_folder_that_is_there_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    for given, expected in (
        ("data/eurosta", str(tmp_path / "data" / "eurosta")),
        ("owner/name", "owner/name"),
        ("~/images", str(tmp_path / "home" / "images")),
    ):
        path = write(tmp_path, f"  one: {{task: svhn, expert: a.pt, data: {given}}}\n")
        assert load_suite(f"suite={path}")["tasks"]["one"]["data"] == {"path": expected}


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "sub" / "images").mkdir(parents=True)
    own = tmp_path / "sub" / "mine.yaml"
    own.write_text('data: {path: images}\nclasses: [a, "no"]\ntemplates: ["{}"]\n')
    path = write(tmp_path, "  mine: {task: sub/mine.yaml, expert: a.pt}\n")
    task = load_suite(f"suite={path}")["tasks"]["mine"]
    assert task["data"]["path"] == str(tmp_path / "sub" / "images")
    assert task["classes"] == ["a", "no"]
    own.write_text("clases: [a]\n")
    with pytest.raises(AdamergeError, match=r"unknown key 'clases' \(did you mean 'classes'\?\)"):
        load_suite(f"suite={path}")


def test_root_comes_first_and_the_command_line_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("one", "two", "."):
        (tmp_path / place / "x").mkdir(parents=True)
        for name in ("a.pt", "x/model.pt"):
            (tmp_path / place / name).touch()
    (tmp_path / "b.pt").touch()
    entries = "".join(f"  {n}: {{task: svhn, expert: {n}.pt}}\n" for n in "abc")
    entries += "  hub: {task: svhn, expert: 'hf://owner/repository@v1/file.pt'}\n"
    path = write(tmp_path, entries, "root: one\n")
    words = (f"suite={path}", "suite.pretrained=x/model.pt")

    def found(*more: str) -> tuple[str, list[str]]:
        suite = load_suite(*words, *more)
        return suite["pretrained"], [task["expert"] for task in suite["tasks"].values()]

    for root, more in (("one", []), ("two", ["suite.root=two"])):
        pretrained, experts = found(*more)
        assert pretrained == str(tmp_path / root / "x" / "model.pt")
        here = [
            str(tmp_path / root / "a.pt"),
            str(tmp_path / "b.pt"),
            str(tmp_path / root / "c.pt"),
        ]
        assert experts == [*here, "hf://owner/repository@v1/file.pt"]
    assert found("suite.root=gone")[1][:3] == [
        str(tmp_path / "a.pt"),
        str(tmp_path / "b.pt"),
        "c.pt",
    ]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("gone", r"suite\.root is 'gone', which is no folder: a\.pt .*set suite\.root="),
        ("null", r"suite\.root is not set: a\.pt and the other checkpoints of suite own"),
    ],
)
def test_a_root_that_is_missing_is_named(tmp_path: Path, root: str, message: str) -> None:
    path = write(tmp_path, "  one: {task: svhn, expert: a.pt}\n", "root: somewhere\n")
    settings = config.load([f"suite={path}", f"suite.root={root}"])
    with pytest.raises(AdamergeError, match=message):
        inputs.load_suite(settings)
    (tmp_path / "a.pt").touch()  # found beside the suite: no root is needed
    require_root(config.load([f"suite={path}", f"suite.root={root}"])["suite"])


def test_variables_are_resolved_after_the_command_line(tmp_path: Path) -> None:
    entry = "  one: {task: svhn, expert: '${vars.who}.pt', data: {split: '${vars.split}'}}\n"
    path = write(tmp_path, entry, "vars: {who: a, split: test}\n")
    assert load_suite(f"suite={path}")["tasks"]["one"]["expert"] == "a.pt"
    task = load_suite("suite.vars.split=train", f"suite={path}", "suite.vars.who=b")["tasks"]["one"]
    assert (task["expert"], task["data"]["split"]) == ("b.pt", "train")


MISTAKES = [
    ("a: {task: svnh, expert: a.pt}", "", r"suite\.tasks\.a\.task=svnh: no such task \(did you "
     r"mean 'svhn'\?\); expected a file or one of cifar10, "),
    ("svhn: {expert: a.pt}", "", r"suite\.tasks\.svhn\.classes is missing \(add task: svhn\)"),
    ("svhn: {task: svhn}", "", r"suite\.tasks\.svhn\.expert is missing$"),
    ("own: {expert: a.pt}", "", r"suite\.tasks\.own\.classes is missing;"),
    ("a: {tsk: svhn, expert: a.pt}", "", r"a\.tsk is unknown \(did you mean 'task'\?\)"),
    ("a: {task: svhn, expert: '${vars.x}'}", "",
     r"key 'vars\.x' not found \(in suite\.tasks\.a\.expert\): write another value there, or "),
    ("a: {task: svhn, expert: a.pt, classes: [yes, no]}", "",
     r"suite\.tasks\.a\.classes: True is no text to YAML .*: quote it; .*False is no text"),
    ("a: {task: svhn, expert: a.pt, classes: [a, null]}", "", r"classes: None is no text .*quote"),
    ("a: {task: svhn, expert: a.pt, classes: [a, [b]]}", "", r"classes: \['b'\] is no text .*: q"),
    ("a: {task: svhn, expert: a.pt, classes: [a, ' ']}", "", r"classes: ' ' is empty: name that"),
    ("a: {task: svhn, expert: a.pt, classes: [a]}", "",
     r"suite\.tasks\.a\.classes has 'a' alone: expected at least two classes"),
    ("a: {task: svhn, expert: a.pt, templates: [off]}", "",
     r"suite\.tasks\.a\.templates: False is no text to YAML: quote it"),
    ("a: {task: svhn, expert: a.pt, templates: ['']}", "", r"templates: '' has no single \{\} for"),
    ("no: {task: svhn, expert: a.pt}", "", r"suite\.tasks: the task name False is no text .*: q"),
    ("101: {task: svhn, expert: a.pt}\n  '101': {task: svhn, expert: a.pt}", "",
     r"Conflicting integer and string keys: 101 and '101'|suite\.tasks has '101' twice, as a nu"),
    *((f"{name}: {{task: svhn, expert: a.pt}}", "", r"suite\.tasks: .* cannot name a task, as")
      for name in ("a/b", "'a\\b'", "v1.5", "1.5", "'..'", "' a'", '"a\\n"', '"a\\tb"', "''")),
    ("a: {task: svhn, expert: a.pt}", "unseen: {a/b: {task: svhn}}\n",
     r"suite\.unseen: 'a/b' cannot name a task"),
    ("a: {task: svhn, expert: a.pt}", "vars: 5\n", r"suite\.vars is 5: expected names and values"),
    ("a: {task: svhn, expert: a.pt}", "vars: {b: [1]}\n", r"suite\.vars\.b is \[1\]: expected a s"),
    ("a: {task: svhn, expert: a.pt}", "root: 5\n", r"suite\.root is 5: expected a name or a path"),
    ("a: {task: svhn, expert: a.pt}", "rooot: 5\n", r"suite\.rooot is unknown \(did you mean"),
    ("a: {task: svhn, expert: a.pt}", "unseen: 5\n", r"suite\.unseen is 5: expected tasks by name"),
    ("a: {task: svhn, expert: a.pt}", "unseen: {a: {task: svhn}}\n",
     r"suite\.unseen\.a is in suite\.tasks too: a task is merged or unseen"),
    ("a: {task: svhn, expert: a.pt}", "unseen: {b: {task: svhn, expert: a.pt}}\n",
     r"suite\.unseen\.b\.expert: an unseen task is only scored; move it to suite\.tasks"),
    ("a: {task: svhn, expert: a.pt}", "unseen: {mnist: {}}\n",
     r"suite\.unseen\.mnist\.data is missing \(add task: mnist\)"),
    ("a: {task: svhn, expert: a.pt}", "unseen: {b: {task: svhn, data: {pth: x}}}\n",
     r"suite\.unseen\.b\.data\.pth is unknown \(did you mean 'path'\?\)"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "more", "message"), MISTAKES)
def test_mistakes_are_named(tmp_path: Path, task: str, more: str, message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        load_suite(f"suite={write(tmp_path, f'  {task}', more)}")


def test_tasks_and_classes_that_are_numbers_are_texts(tmp_path: Path) -> None:
    entry = "  101: {task: svhn, expert: a.pt, classes: [0, 1, 1.5]}\n"
    path = write(tmp_path, entry, "unseen: {7: {task: svhn}}\n")
    words = [f"suite={path}", "suite.tasks.101.data.split=train", "suite.unseen.7.data.split=extra"]
    suite = load_suite(*words)
    assert list(suite["tasks"]) == ["101"] and list(suite["unseen"]) == ["7"]
    assert suite["tasks"]["101"]["data"]["split"] == "train"
    assert suite["unseen"]["7"]["data"]["split"] == "extra"
    prompts = inputs.prompts({"suite": suite})
    assert prompts["101"].classes == ("0", "1", "1.5")
    config.save(config.load(words), tmp_path / "config.yaml")
    assert list(config.load_run(tmp_path)["suite"]["tasks"]) == ["101"]


def test_a_run_keeps_its_root_and_variables(suite: Path, tmp_path: Path) -> None:
    config.save(config.load([f"suite={suite}"]), tmp_path / "config.yaml")
    for word in ("suite.root=elsewhere", "suite.vars.corruption=spatter"):
        with pytest.raises(
            AdamergeError, match=rf"{word.split('=')[0]} cannot be changed in a run"
        ):
            config.load_run(tmp_path, [word])


def test_the_template_runs_once_it_is_filled(suite: Path, tmp_path: Path) -> None:
    text = (config.config_root() / "my_suite.yaml").read_text()
    assert "my_suite" not in config.names("suite")
    load_suite(f"suite={config.config_root() / 'my_suite.yaml'}")  # binds as it stands
    here = suite.parent
    for given, real in (
        ("architecture: ViT-B-32-quickgelu", f"architecture: {here / 'model'}"),
        ("pretrained: openai", f"pretrained: {here / 'model'}"),
        ("expert: eurosat.safetensors", f"expert: {here / 'stripes.safetensors'}"),
        ("expert: mine.safetensors", f"expert: {here / 'dots.safetensors'}"),
        (
            "# data: {path: images/eurosat, label: null}",
            f"data: {{path: {here / 'stripes-images'}, label: null}}",
        ),
        ("data: {path: images/mine}", f"data: {{path: {here / 'dots-images'}}}"),
        ("classes: [cat, dog]", f"classes: {tiny.CLASSES['dots']}"),
    ):
        assert text.count(given) == 1
        text = text.replace(given, real)
    own = tmp_path / "my_suite.yaml"
    own.write_text(text)
    words = [f"suite={own}", f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    words += ["wandb=off", "trainer.max_steps=1", "trainer.accelerator=cpu", "batch_size=2"]
    assert main(["train", *words]) == 0
    assert (tmp_path / "run" / "merged" / "open_clip_model.safetensors").is_file()
