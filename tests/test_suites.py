"""Shipped tasks, suites and methods, and what a suite's file may leave to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adamerge import AdamergeError, build, config
from adamerge.cli import main
from adamerge.suite_files import require_root
from tests import tiny

# The public tasks, in the order of the papers: classes, templates, data set, split, first and last
# class. Counts and data sets as FusionBench and task arithmetic document them.
TABLE: dict[str, tuple[int, int, str, str, str, str]] = {
    "sun397": (397, 2, "tanganke/sun397", "test", "abbey", "youth hostel"),
    "stanford-cars": (
        196, 8, "tanganke/stanford_cars", "test",
        "AM General Hummer SUV 2000", "smart fortwo Convertible 2012",
    ),
    "resisc45": (45, 18, "tanganke/resisc45", "test", "airplane", "wetland"),
    "eurosat": (10, 3, "tanganke/eurosat", "test", "annual crop land", "lake or sea"),
    "svhn": (10, 1, "ufldl-stanford/svhn", "test", "0", "9"),
    "gtsrb": (
        43, 3, "tanganke/gtsrb", "test", "red and white circle 20 kph speed limit",
        "white circle with gray strike bar indicating no passing for trucks has ended",
    ),
    "mnist": (10, 1, "ylecun/mnist", "test", "0", "9"),
    "dtd": (47, 8, "tanganke/dtd", "test", "banded", "zigzagged"),
    "oxford_flowers102": (
        102, 1, "dpdl-benchmark/oxford_flowers102", "test", "pink primrose", "blackberry lily",
    ),
    "pcam": (
        2, 1, "1aurent/PatchCamelyon", "test",
        "lymph node", "lymph node containing metastatic tumor tissue",
    ),
    "fer2013": (7, 6, "clip-benchmark/wds_fer2013", "test", "angry", "surprised"),
    "oxford-iiit-pet": (37, 1, "timm/oxford-iiit-pet", "test", "abyssinian", "yorkshire_terrier"),
    "stl10": (10, 2, "tanganke/stl10", "test", "airplane", "truck"),
    "cifar100": (100, 18, "tanganke/cifar100", "test", "apple", "worm"),
    "cifar10": (10, 18, "tanganke/cifar10", "test", "airplane", "truck"),
    "food101": (101, 1, "ethz/food101", "validation", "apple pie", "waffles"),
    "fashion_mnist": (
        10, 2, "zalando-datasets/fashion_mnist", "test", "T - shirt / top", "Ankle boot",
    ),
    "emnist_letters": (26, 1, "tanganke/emnist_letters", "test", "A", "Z"),
    "kmnist": (10, 1, "tanganke/kmnist", "test", "お", "を"),
    "rendered-sst2": (2, 1, "nateraw/rendered-sst2", "test", "negative", "positive"),
}  # fmt: skip
KEYS = list(TABLE)
# Data sets whose labels are numbered by their sorted class names.
ALPHABETICAL = ("dtd", "resisc45", "food101", "cifar100", "stl10", "fer2013", "oxford-iiit-pet")
ALPHABETICAL += ("cifar10", "emnist_letters", "rendered-sst2")
CORRUPTIONS = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur")
CORRUPTIONS += ("pixelate", "spatter")


def load(*words: str) -> dict[str, Any]:
    """A suite, loaded and checked, without a look at weights or images."""
    settings = config.load(words)
    build.check(settings)
    suite: dict[str, Any] = settings["suite"]
    return suite


def task_file(name: str) -> dict[str, Any]:
    """A shipped task by plain YAML, past our own reader."""
    path = config.config_root() / "task" / f"{name}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_the_tasks_are_the_public_ones() -> None:
    assert config.names("task") == sorted(KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_a_task_has_the_published_classes_templates_and_data(name: str) -> None:
    classes, templates, path, split, first, last = TABLE[name]
    found = task_file(name)
    assert set(found) == {"data", "classes", "templates"}
    assert all(isinstance(text, str) for text in found["classes"] + found["templates"])
    assert (len(found["classes"]), len(found["templates"])) == (classes, templates)
    assert len(set(found["classes"])) == classes and len(set(found["templates"])) == templates
    assert (found["classes"][0], found["classes"][-1]) == (first, last)
    assert (found["data"]["path"], found["data"]["split"]) == (path, split)
    assert all(template.count("{}") == 1 for template in found["templates"])
    columns = ("jpg", "cls") if name == "fer2013" else ("image", "label")
    assert (found["data"]["image"], found["data"]["label"]) == columns
    assert found["data"].get("name") == ("cropped_digits" if name == "svhn" else None)


@pytest.mark.parametrize("name", ALPHABETICAL)
def test_classes_are_in_the_order_of_the_labels(name: str) -> None:
    classes = [text.replace("_", " ") for text in task_file(name)["classes"]]
    assert classes == sorted(classes)


def test_the_order_of_eurosat_and_gtsrb_is_that_of_the_data_sets() -> None:
    """CLIP lists EuroSAT in another order; GTSRB's is that of the signs' official numbers."""
    keys = ("crop", "forest", "shrub", "highway", "industrial", "pasture", "permanent")
    keys += ("residential", "river", "sea")
    for key, text in zip(keys, task_file("eurosat")["classes"], strict=True):
        assert key in text
    signs = task_file("gtsrb")["classes"]
    limits = {0: "20", 1: "30", 2: "50", 3: "60", 4: "70", 5: "80", 7: "100", 8: "120"}
    for number, limit in limits.items():
        assert signs[number] == f"red and white circle {limit} kph speed limit"
    assert (signs[13], signs[14]) == (
        "red and white upside down triangle yield right-of-way", "stop"
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["b-32", "b-16", "l-14"])
@pytest.mark.parametrize("count", [8, 14, 20])
def test_suites_of_the_hub(arch: str, count: int) -> None:
    suite = load(f"suite=clip-vit-{arch}_ta{count}")
    model = {"b-32": "base-patch32", "b-16": "base-patch16", "l-14": "large-patch14"}[arch]
    assert suite["architecture"].lower() == f"vit-{arch}-quickgelu"
    assert suite["pretrained"] == f"hf://openai/clip-vit-{model}"
    assert list(suite["tasks"]) == KEYS[:count]
    for key, task in suite["tasks"].items():
        assert task == {"expert": f"hf://tanganke/clip-vit-{model}_{key}", **task_file(key)}


@pytest.mark.parametrize("arch", ["b-32", "b-16", "l-14"])
def test_suites_of_the_papers_pickles(arch: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "Cars").mkdir(parents=True)
    (folder / "Cars" / "finetuned.pt").touch()
    suite = load(f"suite=openclip-vit-{arch}_ta8", f"suite.root={folder}")
    assert suite["pretrained"] == "openai" and list(suite["tasks"]) == KEYS[:8]
    names = ("SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD")
    for task, name in zip(suite["tasks"].values(), names, strict=True):
        assert task["expert"] == str(folder / name / "finetuned.pt")  # there, or missed there
    assert load(f"suite=openclip-vit-{arch}_ta8")["root"].lower() == f"checkpoints/vit-{arch}"


@pytest.mark.parametrize(
    ("name", "merged", "unseen"),
    [
        ("mnist_eurosat", "sun397 stanford-cars resisc45 dtd gtsrb svhn", "mnist eurosat"),
        ("resisc45_svhn", "sun397 stanford-cars gtsrb dtd mnist eurosat", "resisc45 svhn"),
    ],
)
def test_held_out_suites(name: str, merged: str, unseen: str) -> None:
    suite = load(f"suite=clip-vit-b-32_heldout_{name}")
    assert list(suite["tasks"]) == merged.split() and list(suite["unseen"]) == unseen.split()
    assert all(suite["unseen"][key] == task_file(key) for key in unseen.split())


def test_the_corrupted_suite_scores_the_split_that_is_named() -> None:
    for corruption in CORRUPTIONS:
        suite = load("suite=clip-vit-b-32_corrupted", f"suite.vars.corruption={corruption}")
        assert list(suite["tasks"]) == ["stanford-cars", "eurosat", "resisc45", "gtsrb"]
        for key, task in suite["tasks"].items():
            assert task["data"] == {**task_file(key)["data"], "split": corruption}
    said = (config.config_root() / "suite" / "clip-vit-b-32_corrupted.yaml").read_text()
    assert all(corruption in said.split("architecture:")[0] for corruption in CORRUPTIONS)


def test_checkpoints_that_leak_are_told_of() -> None:
    for path in (config.config_root() / "suite").glob("clip-vit-*_ta*.yaml"):
        assert ("fine-tuned on images of the DTD test split" in path.read_text()) == (
            not path.stem.endswith("_ta8")
        )


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("plus", ["", "_pp"])
def test_methods_with_the_papers_settings(granularity: str, plus: str) -> None:
    settings = config.load([f"method=paper_adamerging_{granularity}{plus}"])
    build.check(settings)
    method = settings["method"]
    assert (method["granularity"], method["init"], method["clamp"]) == (granularity, 0.3, True)
    assert settings["optim"] == {"_target_": "torch.optim.Adam", "lr": 1e-3}
    assert settings["batch_size"] == 2 * 16 and settings["trainer"]["max_steps"] == 500
    ties = [{"_target_": "adamerge.transforms.ties", "density": 0.2}]
    assert settings["transform"] == (ties if plus else [])


# What follows is of suites that a user writes.


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
        "    data: {_target_: adamerge.demo_images.dataset, task: digits, split: test}\n",
    )
    tasks = load(f"suite={path}", "suite.tasks.one.data.split=train")["tasks"]
    assert tasks["one"] == {
        "expert": "a.pt", **svhn, "data": {**svhn["data"], "split": "train"}
    }  # fmt: skip
    assert tasks["two"]["data"] == {**svhn["data"], "split": "extra", "label": None}
    assert tasks["three"]["data"] == {**svhn["data"], "path": "images"}
    assert tasks["three"]["templates"] == ["{}"] and tasks["three"]["classes"] == svhn["classes"]
    assert tasks["four"]["data"] == {
        "_target_": "adamerge.demo_images.dataset", "task": "digits", "split": "test"
    }  # fmt: skip


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "sub" / "images").mkdir(parents=True)
    own = tmp_path / "sub" / "mine.yaml"
    own.write_text('data: {path: images}\nclasses: [a, "no"]\ntemplates: ["{}"]\n')
    path = write(tmp_path, "  mine: {task: sub/mine.yaml, expert: a.pt}\n")
    task = load(f"suite={path}")["tasks"]["mine"]
    assert task["data"]["path"] == str(tmp_path / "sub" / "images")
    assert task["classes"] == ["a", "no"]
    own.write_text("clases: [a]\n")
    with pytest.raises(AdamergeError, match=r"unknown key 'clases' \(did you mean 'classes'\?\)"):
        load(f"suite={path}")


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
        suite = load(*words, *more)
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
        build.load_suite(settings)
    (tmp_path / "a.pt").touch()  # found beside the suite: no root is needed
    require_root(config.load([f"suite={path}", f"suite.root={root}"])["suite"])


def test_variables_are_resolved_after_the_command_line(tmp_path: Path) -> None:
    entry = "  one: {task: svhn, expert: '${vars.who}.pt', data: {split: '${vars.split}'}}\n"
    path = write(tmp_path, entry, "vars: {who: a, split: test}\n")
    assert load(f"suite={path}")["tasks"]["one"]["expert"] == "a.pt"
    task = load("suite.vars.split=train", f"suite={path}", "suite.vars.who=b")["tasks"]["one"]
    assert (task["expert"], task["data"]["split"]) == ("b.pt", "train")


MISTAKES = [
    ("a: {task: svnh, expert: a.pt}", "", r"suite\.tasks\.a\.task: no such task 'svnh' \(did you "
     r"mean 'svhn'\?\); expected a file or one of cifar10, "),
    ("svhn: {expert: a.pt}", "", r"suite\.tasks\.svhn\.classes is missing \(add task: svhn\)"),
    ("svhn: {task: svhn}", "", r"suite\.tasks\.svhn\.expert is missing$"),
    ("own: {expert: a.pt}", "", r"suite\.tasks\.own\.classes is missing;"),
    ("a: {tsk: svhn, expert: a.pt}", "", r"a\.tsk is unknown \(did you mean 'task'\?\)"),
    ("a: {task: svhn, expert: '${vars.x}'}", "",
     r"key 'vars\.x' not found \(in tasks\.a\.expert\): write another value there, or set what"),
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
        load(f"suite={write(tmp_path, f'  {task}', more)}")


def test_a_run_keeps_its_root_and_variables(suite: Path, tmp_path: Path) -> None:
    config.save(config.load([f"suite={suite}"]), tmp_path / "config.yaml")
    for word in ("suite.root=elsewhere", "suite.vars.corruption=spatter"):
        with pytest.raises(
            AdamergeError, match=rf"{word.split('=')[0]} cannot be changed in a run"
        ):
            config.load_run(tmp_path, [word])


def test_show_lists_tasks_and_prints_a_suite_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "tasks"]) == 0
    listed = capsys.readouterr().out
    for name in KEYS:
        assert f"  {name} " in listed
    assert "SVHN: cropped street-view house numbers" in listed and "infomax" not in listed
    word = "suite.vars.corruption=spatter"
    assert main(["show", "config", "suite=clip-vit-b-32_corrupted", word]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["suite"]["tasks"]["eurosat"]["data"]["split"] == "spatter"
    assert "${" not in shown


def test_the_template_runs_once_it_is_filled(suite: Path, tmp_path: Path) -> None:
    text = (config.config_root() / "my_suite.yaml").read_text()
    assert "my_suite" not in config.names("suite")
    load(f"suite={config.config_root() / 'my_suite.yaml'}")  # as it stands it says what it means
    here = suite.parent
    for given, real in (
        ("architecture: ViT-B-32-quickgelu", f"architecture: {here / 'model'}"),
        ("pretrained: openai", f"pretrained: {here / 'model'}"),
        ("expert: eurosat.safetensors", f"expert: {here / 'stripes.safetensors'}"),
        ("expert: mine.safetensors", f"expert: {here / 'dots.safetensors'}"),
        (
            "# data: {path: images/eurosat, split: null, label: null}",
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


def test_the_page_on_suites_has_all_of_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "suites.md").read_text()
    for name in (*config.names("suite"), *config.names("task")):
        assert f"`{name}`" in page, name
    for name, (classes, templates, path, split, *_) in TABLE.items():
        (row,) = [line for line in page.splitlines() if f"| `{name}` |" in line]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3].split(" ")[0] == path
        assert cells[4:7] == [split, str(classes), str(templates)]
