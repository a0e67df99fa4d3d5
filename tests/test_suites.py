"""Shipped tasks, suites and methods: loaded, checked, and held against the published facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml

from adamerge.cli import main
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.encoders.architectures import architecture_names

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
    density = {"ViT-B-32": 0.2583, "ViT-B-16": 0.2594, "ViT-L-14": 0.2254, "default": 0.2}
    ties = [{"_target_": "adamerge.transforms.ties", "density": density}]
    assert settings["transform"] == (ties if plus else [])


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_the_papers_densities_are_a_fifth_of_their_files(name: str) -> None:
    """20 % of the image encoder's file, whose leftovers of the text tower no one trained."""
    model = open_clip.get_model_config(name)
    with torch.device("meta"):
        clip = open_clip.CLIP(model["embed_dim"], model["vision_cfg"], model["text_cfg"])
    tower = sum(tensor.numel() for tensor in clip.visual.parameters())
    rest = [p for n, p in clip.named_parameters() if not n.startswith(("visual.", "transformer."))]
    share = 0.2 * (1 + sum(tensor.numel() for tensor in rest) / tower)
    given = config.load(["method=paper_adamerging_task_pp"])["transform"][0]["density"]
    assert given[name] == round(share, 4)
    for known in (name, f"{name}-quickgelu"):
        names = architecture_names({"model_cfg": open_clip.get_model_config(known)})
        assert next(given[n] for n in names if n in given) == given[name]


def test_e_wemoe_with_the_papers_settings() -> None:
    settings = config.load(["method=paper_e_wemoe"])
    build.check(settings)
    method = settings["method"]
    assert (method["batch_gate"], method["shared_router"], method["density"]) == (True, True, 0.1)
    assert settings["optim"] == {"_target_": "torch.optim.Adam", "lr": 1e-4}
    assert (settings["batch_size"], settings["trainer"]["max_steps"]) == (16, 1000)


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


def test_the_page_on_suites_has_all_of_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "suites.md").read_text()
    for name in (*config.names("suite"), *config.names("task")):
        assert f"`{name}`" in page, name
    for name, (classes, templates, path, split, *_) in TABLE.items():
        (row,) = [line for line in page.splitlines() if f"| `{name}` |" in line]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3].split(" ")[0] == path
        assert cells[4:7] == [split, str(classes), str(templates)]
