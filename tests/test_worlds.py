"""`train.py` on the same experts and images in other formats: the same merging coefficients."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from adamerge import AdamergeError
from adamerge.cli import main
from adamerge.cli.convert import convert
from adamerge.config import settings as config
from adamerge.config.inputs import load_clip, load_suite
from adamerge.encoders.clip import build_clip
from adamerge.encoders.model_configs import to_transformers
from adamerge.encoders.pretrained import load_pretrained
from adamerge.weights.formats.layouts import tower_to_transformers
from adamerge.weights.formats.read import read
from tests.tiny import CLASSES, images, make_suite

QUICK = ["trainer.max_steps=4", "trainer.accelerator=cpu", "batch_size=4", "wandb=off",
         "evaluate.baselines=false", "log_every=2"]  # fmt: skip


def coefficients(path: Path, run: Path, cache: Path, *words: str) -> list[float]:
    words = (f"suite={path}", f"run_dir={run}", f"cache_dir={cache}", *QUICK, *words)
    assert main(["train", *words]) == 0
    with (run / "coefficients.csv").open() as file:
        return [float(row["coefficient"]) for row in csv.DictReader(file)]


def to_transformers_expert(folder: Path, task: str) -> str:
    """A folder as transformers saves a CLIPVisionModelWithProjection."""
    target = folder / f"{task}-hf"
    target.mkdir()
    theirs = tower_to_transformers(load_file(folder / f"{task}.safetensors"))
    save_file({k: t.contiguous() for k, t in theirs.items()}, target / "model.safetensors")
    config, _ = to_transformers(json.loads((folder / "model/open_clip_config.json").read_text()))
    vision = {**config["vision_config"], "architectures": ["CLIPVisionModelWithProjection"]}
    (target / "config.json").write_text(json.dumps(vision))
    return target.name


def to_pickled_expert(folder: Path, task: str) -> str:
    """A whole pickled module of a package that is gone afterwards, as the papers save them."""
    clip = build_clip(str(folder / "model"))
    load_pretrained(clip, read(folder / "model"))
    clip.backbone.load_state_dict(load_file(folder / f"{task}.safetensors"))
    module = types.ModuleType("vanished_paper")
    module.ImageEncoder = type("ImageEncoder", (nn.Module,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    encoder = module.ImageEncoder()
    encoder.model = clip.model
    torch.save(encoder, folder / f"{task}.pt")
    del sys.modules[module.__name__]
    return f"{task}.pt"


def to_parquet(folder: Path, task: str) -> dict[str, object]:
    images(task).to_parquet(str(folder / f"{task}.parquet"))
    return {"path": f"{task}.parquet"}


def to_unlabeled_folder(folder: Path, task: str) -> dict[str, object]:
    (folder / f"{task}-pictures").mkdir()
    for row, example in enumerate(images(task)):
        example["image"].save(folder / f"{task}-pictures" / f"{row:04d}.png")
    return {"path": f"{task}-pictures"}


def to_arrays(folder: Path, task: str) -> dict[str, object]:
    data: datasets.Dataset = images(task)
    pixels = np.stack([np.asarray(example["image"]) for example in data])
    np.savez(folder / f"{task}.npz", images=pixels, labels=np.asarray(data["label"][:]))
    return {"path": f"{task}.npz"}


Make = Callable[[Path, str], object]
WORLDS: dict[str, dict[str, tuple[Make, Make]]] = {
    "transformers and parquet": dict.fromkeys(CLASSES, (to_transformers_expert, to_parquet)),
    "pickles and unlabeled folders": dict.fromkeys(
        CLASSES, (to_pickled_expert, to_unlabeled_folder)
    ),
    "mixed": {
        "stripes": (to_transformers_expert, to_arrays),
        "dots": (to_pickled_expert, to_parquet),
    },
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_same_coefficients_in_every_world(name: str, tmp_path: Path) -> None:
    plain = make_suite(tmp_path / "suite")
    wanted = coefficients(plain, tmp_path / "plain", tmp_path / "cache", "preflight=off")
    suite = yaml.safe_load(plain.read_text())
    if name == "transformers and parquet":  # the pretrained too; it tells its architecture
        convert(str(tmp_path / "suite/model"), tmp_path / "suite/model-hf", "transformers")
        suite["pretrained"] = "model-hf"
        del suite["architecture"]
    for task, (expert, data) in WORLDS[name].items():
        suite["tasks"][task]["expert"] = expert(tmp_path / "suite", task)
        suite["tasks"][task]["data"] = data(tmp_path / "suite", task)
    path = tmp_path / "suite" / "other.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    found = coefficients(path, tmp_path / "other", tmp_path / "cache")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(found) - 0.3).max() > 1e-3  # something was learned
    labelled = name != "pickles and unlabeled folders"
    results = json.loads((tmp_path / "other" / "results.json").read_text())
    assert bool(results["rows"][-1]["accuracy"]) == labelled
    record = json.loads((tmp_path / "other" / "merged" / "merge.json").read_text())
    assert set(record["inputs"]) == {"pretrained", *CLASSES}


def test_a_stored_head_takes_the_place_of_the_text_tower(tmp_path: Path) -> None:
    plain = make_suite(tmp_path / "suite")
    wanted = coefficients(plain, tmp_path / "plain", tmp_path / "cache", "preflight=off")
    heads = load_file(tmp_path / "plain" / "merged" / "heads.safetensors")
    suite = yaml.safe_load(plain.read_text())
    for task, weight in heads.items():
        head = nn.Linear(16, len(weight))
        head.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight))})
        torch.save(head, tmp_path / "suite" / f"head_{task}.pt")
        suite["tasks"][task]["head"] = f"head_{task}.pt"
    path = tmp_path / "suite" / "heads.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    found = coefficients(path, tmp_path / "run", tmp_path / "cache", "preflight=off")
    assert found == wanted
    suite["tasks"]["dots"]["head"] = "head_stripes.pt"  # of 3 classes, not 4
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    assert main(["train", f"suite={path}", f"cache_dir={tmp_path / 'cache'}", *QUICK]) == 2


def test_an_activation_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    make_suite(tmp_path / "suite")
    convert(str(tmp_path / "suite/model"), tmp_path / "hf", "transformers")
    other = json.loads((tmp_path / "suite/model/open_clip_config.json").read_text())
    other["model_cfg"]["quick_gelu"] = True
    (tmp_path / "other.json").write_text(json.dumps(other))
    suite = {"architecture": str(tmp_path / "other.json"), "pretrained": str(tmp_path / "hf")}
    with pytest.raises(
        AdamergeError, match=r"another activation than .*one with quick_gelu: false"
    ):
        load_clip(suite)
    assert load_clip({"pretrained": str(tmp_path / "hf")})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_attention_heads", 4, "trained with heads = 4 in its image tower, .* has 2, though"),
        ("layer_norm_eps", 1e-3, r"trained with layer_norm_eps = 0\.001"),
        ("hidden_act", "quick_gelu", "another activation"),
    ],
)
def test_what_an_expert_states_and_its_shapes_do_not_show(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    path = make_suite(tmp_path / "suite")
    suite = yaml.safe_load(path.read_text())
    suite["tasks"]["dots"]["expert"] = to_transformers_expert(tmp_path / "suite", "dots")
    stated = tmp_path / "suite" / "dots-hf" / "config.json"
    stated.write_text(json.dumps({**json.loads(stated.read_text()), key: value}))
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    with pytest.raises(AdamergeError, match=message):
        load_suite(config.load([f"suite={path}"]))
