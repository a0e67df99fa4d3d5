"""`adamerge init`: what a folder of checkpoints tells, written; what it does not, named."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from adamerge import AdamergeError
from adamerge.cli import main
from adamerge.cli.convert import convert
from adamerge.cli.init import init
from adamerge.cli.task_hints import agree, local_data, shipped_task, task_name, without_common_start
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.encoders.clip import Clip, build_clip
from adamerge.encoders.pretrained import load_pretrained
from adamerge.images.sources import open_dataset
from adamerge.weights.formats.read import read, tower_state
from tests import tiny
from tests.test_formats import as_tower, theirs, trained, vanishing

TASKS = config.names("task")


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|peft|huggingface_hub)\b")
        warnings.filterwarnings("ignore", message=".*(deprecated|peft).*")
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An open_clip folder with the whole of a tiny CLIP, in a folder of its own."""
    tiny.make_suite(tmp_path / "made")
    shutil.copytree(tmp_path / "made" / "model", tmp_path / "all" / "pretrained")
    return tmp_path / "all" / "pretrained"


def clip_of(model: Path) -> Clip:
    clip = build_clip(str(model))
    load_pretrained(clip, read(model))
    return clip


def tower(model: Path, seed: str = "x") -> dict[str, Tensor]:
    return tiny.expert(clip_of(model).backbone.state_dict(), seed)


def load(path: Path) -> dict[str, Any]:
    """A suite that was written, checked as a run would."""
    loaded = config.load([f"suite={path}"])
    build.check(loaded)
    return loaded


def problems(path: Path) -> list[str]:
    with pytest.raises(AdamergeError) as caught:
        load(path)
    return str(caught.value).split("; ")


def pictures(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 24), (40 * i, 9, 9)).save(folder / f"{i}.png")


def pickled(model: Path, path: Path) -> None:
    """An ImageEncoder as the papers save it: without the blocks of its text tower."""
    encoder, _ = vanishing(clip := clip_of(model))
    clip.backbone.load_state_dict(tower(model, "seed"))
    del encoder.model.transformer  # type: ignore[union-attr]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder, path)
    for name in ("src_of_a_paper", "src_of_a_paper.modeling"):
        del sys.modules[name]


def test_every_format_at_once_runs_as_written(model: Path, tmp_path: Path) -> None:
    folder, data = model.parent, tmp_path / "images"
    as_tower(theirs(1), folder / "clip-vit-base-patch32_eurosat")
    shutil.rmtree(folder / "clip-vit-base-patch32_eurosat" / "whole")
    convert(str(model), tmp_path / "hf", "transformers")
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf")
    trained(vision, folder / "mnist_lora", r=2, target_modules=["q_proj"])
    pickled(model, folder / "SVHNVal" / "finetuned.pt")
    state = {f"state.model.visual.{k}": v for k, v in tower(model).items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "KMNIST.ckpt")
    names = config.load(["suite=clip-vit-b-32_ta8"])["suite"]["tasks"]["eurosat"]["classes"]
    for name in names:
        pictures(data / "EuroSAT" / name, 1)
    pictures(data / "mnist")
    pictures(data / "SVHN")
    tiny.images("dots").save_to_disk(str(data / "kmnist"))
    to = tmp_path / "mine.yaml"
    lines = init(folder, to, data=data)
    assert not [line for line in lines if line.startswith(("fill in", "skipped"))]
    loaded = {**load(to), "cache_dir": str(tmp_path / "cache")}
    suite = inputs.load_suite(loaded)
    own = suite.clip.backbone.state_dict()
    assert [*loaded["suite"]["tasks"]] == ["eurosat", "kmnist", "mnist", "svhn"]
    for task, name in (
        ("eurosat", "clip-vit-base-patch32_eurosat"), ("mnist", "mnist_lora"),
        ("svhn", "SVHNVal/finetuned.pt"), ("kmnist", "KMNIST.ckpt"),
    ):  # fmt: skip
        wanted = tower_state(read(folder / name), suite.clip.backbone)
        found = suite.task_vectors.expert(task)
        assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in own)
    tasks = loaded["suite"]["tasks"]
    assert tasks["eurosat"]["data"]["label"] == "label" and tasks["eurosat"]["classes"] == names
    assert tasks["mnist"]["data"]["label"] is None  # no class folders: no labels
    assert tasks["kmnist"]["data"]["label"] is None  # four classes, where the task has ten
    images = inputs.load_data(loaded, suite.clip)
    sizes = {task: len(found.images) for task, found in images.tasks.items()}
    assert sizes == {"eurosat": 10, "mnist": 2, "svhn": 2, "kmnist": 40}
    assert images.tasks["eurosat"].labels is not None and images.tasks["mnist"].labels is None


def test_a_task_of_ones_own_lacks_only_its_templates(model: Path, tmp_path: Path) -> None:
    save_file(tower(model), model.parent / "my.birds-finetuned.safetensors")
    for name in ("no", "1e3", "crow"):
        pictures(tmp_path / "images" / "test" / "my.birds" / "test" / name)
    data = tmp_path / "images" / "test"
    lines = init(model.parent, tmp_path / "own.yaml", data=data)
    assert [line.split(":")[0] for line in lines if line.startswith("fill in")] == [
        "fill in suite.tasks.my_birds.templates"
    ]
    assert problems(tmp_path / "own.yaml") == ["suite.tasks.my_birds.templates is missing"]
    text = (tmp_path / "own.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("templates: null", "templates: ['a {}']"))
    task = load(tmp_path / "own.yaml")["suite"]["tasks"]["my_birds"]
    assert task["classes"] == ["1e3", "crow", "no"]
    assert task["data"] == {"path": str(data / "my.birds")}


def test_what_cannot_be_told_is_named_and_nothing_else(model: Path, tmp_path: Path) -> None:
    save_file(tower(model), model.parent / "one.safetensors")
    save_file(tower(model, "yy"), model.parent / "svhn.safetensors")
    shutil.rmtree(model)
    to = tmp_path / "own.yaml"
    lines = init(tmp_path / "all", to)
    keys = [
        "suite.architecture",
        *("suite.pretrained", *(f"suite.tasks.one.{k}" for k in ("data", "classes", "templates"))),
    ]
    filled = [line.removeprefix("fill in ") for line in lines if line.startswith("fill in")]
    assert [line.split(":")[0] for line in filled] == keys
    assert to.read_text().count("FILL IN") == 5
    assert sorted(problems(to)) == sorted(f"{key} is missing" for key in keys)


def as_b32(path: Path, prefix: str = "", patch: int = 32, **more: Tensor) -> None:
    """A file with the names and shapes that tell a ViT-B of open_clip, in one byte per number."""
    places = (224 // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (768, 3, patch, patch), "positional_embedding": (places, 768),
        "class_embedding": (768,), "proj": (768, 512),
        **{f"transformer.resblocks.{i}.ln_1.weight": (768,) for i in range(12)},
    }  # fmt: skip
    state = {f"{prefix}{k}": torch.zeros(s, dtype=torch.int8) for k, s in shapes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, **more}, path)


def test_a_copy_of_the_papers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ViT-B-32"
    rest = {"model.token_embedding.weight": torch.zeros(9, 4)}
    as_b32(folder / "zeroshot.pt", "visual.", **{"token_embedding.weight": torch.zeros(9, 4)})
    for name in ("SUN397/finetuned", "Cars/finetuned", "Cars/nonlinear_finetuned"):
        as_b32(folder / f"{name}.pt", "model.visual.", **rest)
    for name, rows in (("SUN397", 397), ("Cars", 190), ("Pets", 37)):
        head = {"weight": torch.zeros(rows, 512), "bias": torch.zeros(rows)}
        torch.save(head, folder / f"head_{name}.pt")
    to = tmp_path / "suite.yaml"
    assert main(["init", str(folder), "--to", str(to)]) == 0
    said = capsys.readouterr().out
    suite = load(to)["suite"]
    assert (suite["architecture"], suite["pretrained"]) == ("ViT-B-32-quickgelu", "openai")
    assert suite["root"] == str(folder) and "root: ViT-B-32 #" in to.read_text()
    assert {name: task["expert"] for name, task in suite["tasks"].items()} == {
        "stanford-cars": str(folder / "Cars" / "finetuned.pt"),
        "sun397": str(folder / "SUN397" / "finetuned.pt"),
    }
    assert suite["tasks"]["sun397"]["head"] == str(folder / "head_SUN397.pt")
    assert "head" not in suite["tasks"]["stanford-cars"]
    for line in (
        "head_Cars.pt is a head of 190 classes and 512 features, where stanford-cars has 196",
        "head_Pets.pt is a head, of no task here",
        "nonlinear_finetuned.pt is of stanford-cars too: set suite.tasks.stanford-cars.expert to",
        "zeroshot.pt is an image tower alone, and the heads are made by a text tower",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("given", "architecture"),
    [
        ("openai", "ViT-B-32-quickgelu"),
        ("laion2b_s34b_b79k", "ViT-B-32"),
        ("hf://openai/clip-vit-base-patch32", "ViT-B-32-quickgelu"),
        ("hf://someone/a-clip", "ViT-B-32"),
    ],
)
def test_the_activation_follows_the_pretrained(
    tmp_path: Path, given: str, architecture: str
) -> None:
    as_b32(tmp_path / "all" / "svhn.pt")
    to = tmp_path / "own.yaml"
    lines = init(tmp_path / "all", to, pretrained=given)
    suite = load(to)["suite"]
    assert (suite["architecture"], suite["pretrained"]) == (architecture, given)
    assert ("a guess; ViT-B-32-quickgelu for" in "".join(lines)) == ("someone" in given)


def test_an_expert_says_its_activation_and_base(tmp_path: Path) -> None:
    as_b32(tmp_path / "all" / "svhn" / "model.pt")
    (tmp_path / "all" / "svhn" / "model.pt").rename(tmp_path / "all" / "svhn" / "pytorch_model.bin")
    stated = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    stated["_name_or_path"] = "openai/clip-vit-base-patch32"
    (tmp_path / "all" / "svhn" / "config.json").write_text(json.dumps(stated))
    init(tmp_path / "all", tmp_path / "own.yaml")
    suite = load(tmp_path / "own.yaml")["suite"]
    assert suite["architecture"] == "ViT-B-32-quickgelu"
    assert suite["pretrained"] == "hf://openai/clip-vit-base-patch32"


@pytest.mark.parametrize("base", ["openai/clip-vit-base-patch32", "/gone/clip"])
def test_adapters_say_what_they_were_trained_on(tmp_path: Path, base: str) -> None:
    folder = tmp_path / "all" / "clip_vit-b-32_mnist_lora"
    folder.mkdir(parents=True)
    said = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    init(tmp_path / "all", tmp_path / "own.yaml")
    if base.startswith("/"):
        lacks = [f"suite.{key} is missing" for key in ("architecture", "pretrained")]
        assert sorted(problems(tmp_path / "own.yaml")) == lacks
    else:
        suite = load(tmp_path / "own.yaml")["suite"]
        assert suite["pretrained"] == f"hf://{base}" and [*suite["tasks"]] == ["mnist"]


def test_several_architectures(tmp_path: Path) -> None:
    as_b32(tmp_path / "all" / "svhn.pt")
    as_b32(tmp_path / "all" / "mnist.pt", patch=16)
    with pytest.raises(
        AdamergeError,
        match=r"2 architectures \(ViT-B-16: mnist\.pt; ViT-B-32: svhn\.pt\): .* --architecture",
    ):
        init(tmp_path / "all", tmp_path / "own.yaml", "openai")
    assert not (tmp_path / "own.yaml").exists()
    lines = init(tmp_path / "all", tmp_path / "own.yaml", "openai", "ViT-B-16-quickgelu")
    assert "skipped: svhn.pt is not of ViT-B-16-quickgelu, left out" in lines
    assert [*load(tmp_path / "own.yaml")["suite"]["tasks"]] == ["mnist"]


def test_damaged_files_are_named_and_left_out(model: Path, tmp_path: Path) -> None:
    folder = model.parent
    save_file(tower(model), folder / "svhn.safetensors")
    whole = (folder / "svhn.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:2000])
    (folder / "page.pt").write_text("<!DOCTYPE html><html>sign in</html>")
    (folder / "empty.bin").touch()
    (folder / "mnist").mkdir()
    (folder / "mnist" / "finetuned.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "weights.h5").write_bytes(b"\x89HDF")
    torch.save({"state": {0: {"step": torch.ones(1)}}}, folder / "optimizer.pt")
    save_file({"a": torch.ones(2, 3, 4), "b": torch.ones(1)}, folder / "other.safetensors")
    lines = init(folder, tmp_path / "own.yaml")
    for line in (
        r"cut.safetensors is truncated", "page.pt is a web page saved under", "empty.bin is empty",
        "finetuned.pt is a Git LFS pointer", "optimizer.pt holds no tensors by name",
        "weights.h5: not a kind of checkpoint", "other.safetensors holds neither an image tower",
    ):  # fmt: skip
        assert len([said for said in lines if line in said and said.startswith("skipped")]) == 1
    assert [*load(tmp_path / "own.yaml")["suite"]["tasks"]] == ["svhn"]


def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, to = model.parent, tmp_path / "own.yaml"
    (tmp_path / "nothing").mkdir()
    for arguments, message in (
        ([str(tmp_path / "gone")], "gone is not a folder: name the one that holds the checkpoints"),
        ([str(tmp_path / "nothing")], "nothing holds no experts: expected weight files (.safe"),
        ([str(folder)], "all holds no experts, but the pretrained model pretrained: expected"),
    ):
        assert main(["init", *arguments, "--to", str(to)]) == 2
        assert message in capsys.readouterr().err
    save_file(tower(model), folder / "svhn.safetensors")
    expert = str(folder / "svhn.safetensors")
    with pytest.raises(AdamergeError, match=r"--pretrained .*svhn\.safetensors is not a whole CLI"):
        init(folder, to, pretrained=expert)
    with pytest.raises(AdamergeError, match="images is not a folder: name the one that holds the"):
        init(folder, to, data=tmp_path / "images")
    assert not to.exists()
    with pytest.raises(AdamergeError, match=r"own\.yaml lies in no folder that exists: name anoth"):
        init(folder, tmp_path / "gone" / "own.yaml")
    to.write_text("mine")
    with pytest.raises(AdamergeError, match=r"own\.yaml exists already: name another file with --"):
        init(folder, to)
    assert to.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "made", "nothing", "own.yaml"]


def test_experts_beside_the_pretrained_weights(model: Path, tmp_path: Path) -> None:
    """One open_clip folder with the experts in it, and the suite written there too."""
    save_file(tower(model), model / "svhn.safetensors")
    init(model, model / "suite.yaml")
    suite = load(model / "suite.yaml")["suite"]
    assert suite["pretrained"] == str(model / "open_clip_model.safetensors")
    assert "root" not in suite and "architecture:" not in (model / "suite.yaml").read_text()[300:]
    assert [*inputs.load_suite(load(model / "suite.yaml")).task_vectors.tasks] == ["svhn"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("clip-vit-base-patch32_sun397", "sun397"), ("clip-vit-large-patch14_oxford-iiit-pet",
         "oxford-iiit-pet"), ("Cars", "stanford-cars"), ("SUN397Val", "sun397"),
        ("OxfordIIITPet", "oxford-iiit-pet"), ("Flowers102", "oxford_flowers102"),
        ("FashionMNIST", "fashion_mnist"), ("STL10", "stl10"), ("PCAM", "pcam"),
        ("RenderedSST2", "rendered-sst2"), ("ViT-B-32-quickgelu_dtd_finetuned", "dtd"),
        ("vit_b_16_gtsrb-ft", "gtsrb"), ("emnist_letters", "emnist_letters"), ("EMNIST", None),
        ("race-cars", None), ("mnist-m", None), ("cifar", None), ("festival", None),
    ],
)  # fmt: skip
def test_names_of_public_tasks(name: str, task: str | None) -> None:
    assert shipped_task(task_name(name), TASKS) == task


def test_what_all_names_begin_with_is_no_task() -> None:
    names = ["proj_x-eurosat", "proj_x-cars", "proj_x-a_b"]
    assert without_common_start(names) == ["eurosat", "cars", "a_b"]
    assert shipped_task("eurosat", TASKS, cut=True) == "eurosat"
    assert shipped_task("cars", TASKS, cut=True) is None  # race-cars and race-bikes
    assert without_common_start(["one"]) == ["one"]
    assert without_common_start(["a_b", "a_b_c"]) == ["b", "b_c"]


def test_folders_of_other_words_are_no_classes_of_the_task(tmp_path: Path) -> None:
    for names, wanted in ((["zero", "one"], False), (["0", "1"], True), (["Cat", "dog"], True)):
        root = tmp_path / names[0]
        for name in names:
            (root / "task" / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(root / "task" / name / "a.png")
        found = local_data(root, lambda name: name == "task")
        assert found is not None and agree(found, ["cat", "dog"]) is wanted


@pytest.mark.parametrize("ending", [".avif", ".jp2", ".JPG", ".webp"])
@pytest.mark.parametrize("split", [None, "test", "val", "valid"])
def test_folders_of_images_of_every_ending(tmp_path: Path, ending: str, split: str | None) -> None:
    for name in ("cat", "dog"):
        inner = tmp_path / "task" / (split or "") / name
        inner.mkdir(parents=True)
        (inner / f"a{ending}").touch()
    found = local_data(tmp_path, lambda name: name == "task")
    assert found is not None and found.classes == ["cat", "dog"]
    assert found.keys["split"] == ("validation" if split and split != "test" else None)
    assert len(open_dataset("t", {"path": str(found.path), **found.keys})) == 2


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "{", '{"features": [1]}', '{"features": {"label": {}}}',
                '{"features": {"label": {"_type": "ClassLabel", "names": 5}}}', '{"splits": 5}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_dict.json"])
def test_damage_to_what_is_said_of_a_data_set(tmp_path: Path, name: str, content: str) -> None:
    for folder in ("task", "task/test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "state.json").write_text("{}")
        (tmp_path / folder / name).write_text(content)
    found = local_data(tmp_path, lambda name: name == "task")
    assert found is not None and found.classes is None
