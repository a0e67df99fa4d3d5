"""Code and addresses planted wherever a file could bring them: none runs, none is looked up."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import socket
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import yaml
from omegaconf import OmegaConf
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file

import adamerge
from adamerge import AdamergeError
from adamerge._base.files import parse_json, read_json
from adamerge.cli import main
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.encoders.clip import build_clip
from adamerge.encoders.model_check import check_model_config
from adamerge.images.cache import cache_images
from adamerge.images.sources import open_dataset
from adamerge.learn.resume import read_checkpoint
from adamerge.weights.formats.read import read
from tests.tiny import MODEL, PREPROCESS

pytestmark = pytest.mark.filterwarnings("default")  # of libraries, on what is broken by intent


class Canary:
    """A file that planted code would make, and the addresses that would be looked up."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, f"import os\nos.system('touch {path}')\n"
        self.addresses: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)

    def module(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{self.code}from transformers import T5Tokenizer as Own\nfind = print\n")


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails the test if any planted code has run, or any address was looked up."""
    found = Canary(tmp_path / "canary")

    def refuse(*address: Any, **_: Any) -> None:
        found.addresses.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for constants in (huggingface_hub.constants, datasets.config):  # else nothing would be tried
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` in a downloaded folder does
    yield found
    assert not found.path.exists(), "planted code was executed"
    assert not found.addresses, f"the network was asked for {found.addresses}"


def model_folder(folder: Path, **changes: Any) -> Path:
    """An open_clip folder whose parts are changed by `vision_cfg={…}`, `text_cfg={…}` or others."""
    model: dict[str, Any] = json.loads(json.dumps(MODEL))
    for key, value in changes.items():
        model[key] = {**model[key], **value} if key in ("vision_cfg", "text_cfg") else value
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": model, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    save_file({"x": torch.ones(1)}, folder / "open_clip_model.safetensors")
    return folder


TOKENIZERS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"trust_remote_code": True}, {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, {}),
    ({"trust_remote_code": True}, {"auto_map": {"AutoTokenizer": ["o/r--own.Own", None]}}, {}),
    ({}, {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, {}),
    ({}, {"auto_map": ["own.Own", None], "trust_remote_code": True}, {}),
    ({}, {"tokenizer_class": "AutoModel"}, {"auto_map": {"AutoModel": "own.Own"}}),
    ({}, {}, {"model_type": "odd", "auto_map": {"AutoConfig": "own.Own"}}),
    ({"_from_auto": True, "code_revision": "main"}, {}, {}),
    ({"proxies": {"https": "http://example.invalid"}}, {}, {}),
]


@pytest.mark.parametrize(("arguments", "tokenizer", "transformer"), TOKENIZERS)
def test_a_tokenizer_of_its_own(
    canary: Canary, tmp_path: Path, arguments: Any, tokenizer: Any, transformer: Any
) -> None:
    text = {"hf_tokenizer_name": "any", "tokenizer_kwargs": arguments}
    folder = model_folder(tmp_path / "model", text_cfg=text)
    canary.module(folder / "own.py")
    canary.module(tmp_path / "own.py")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(transformer))
    with pytest.raises(AdamergeError):
        build_clip(str(folder))


def test_a_tokenizer_of_transformers_own(canary: Canary, tmp_path: Path) -> None:
    """The right use keeps working, from the files in the folder alone."""
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "cat": 2, "dog": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = {"hf_tokenizer_name": "owner/name", "tokenizer_kwargs": {"clean": "canonicalize"}}
    folder = model_folder(tmp_path / "model", text_cfg=text)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    auto = {"model_type": "clip", "auto_map": {"AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(auto))
    canary.module(folder / "own.py")
    clip = build_clip(str(folder))
    assert clip.tokenizer(["Dog, cat!"])[0, :3].tolist() == [3, 2, 1]


@pytest.mark.parametrize("command", ["check", "train", "convert"])
def test_no_command_runs_a_tokenizer(
    canary: Canary, tmp_path: Path, suite: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, tokenizer, _ = TOKENIZERS[0]
    text = {"hf_tokenizer_name": "any", "tokenizer_kwargs": arguments}
    shutil.copytree(suite.parent / "model", tmp_path / "model")
    weights = (tmp_path / "model" / "open_clip_model.safetensors").read_bytes()
    folder = model_folder(tmp_path / "model", text_cfg=text)
    (folder / "open_clip_model.safetensors").write_bytes(weights)
    canary.module(folder / "own.py")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    words = [f"suite={suite}", f"suite.pretrained={folder}", f"suite.architecture={folder}"]
    words = [str(folder), str(tmp_path / "to")] if command == "convert" else words
    assert main([command, *words]) == 2
    assert "trust_remote_code" in capsys.readouterr().err


PLACES: list[tuple[str, dict[str, Any]]] = [
    ("vision_cfg", {"timm_model_name": "hf-hub:owner/name"}),
    ("vision_cfg", {"timm_model_name": "hf_hub:owner/name"}),
    ("vision_cfg", {"timm_model_name": "local-dir:planted"}),
    ("vision_cfg", {"timm_model_name": "https://example.invalid/x"}),
    ("vision_cfg", {"timm_model_name": "../planted"}),
    ("vision_cfg", {"timm_model_name": "resnet18", "timm_model_pretrained": "hf-hub:a/b"}),
    ("text_cfg", {"hf_model_name": "planted"}),
    ("text_cfg", {"hf_model_name": "owner/name"}),
    ("text_cfg", {"hf_model_pretrained": True, "hf_model_name": "roberta-base"}),
    ("text_cfg", {"hf_tokenizer_name": "hf-hub:owner/name"}),
    ("text_cfg", {"hf_tokenizer_name": "/etc/../planted"}),
    ("text_cfg", {"tokenizer_kwargs": {"tokenizer_file": "https://example.invalid/x"}}),
]


@pytest.mark.parametrize(("part", "names"), PLACES)
def test_names_of_other_places(canary: Canary, tmp_path: Path, part: str, names: Any) -> None:
    canary.module(tmp_path / "planted" / "own.py")
    auto = {"auto_map": {"AutoConfig": "own.Own"}, "architecture": "hf-hub:owner/name"}
    (tmp_path / "planted" / "config.json").write_text(json.dumps(auto))
    folder = model_folder(tmp_path / "model", **{part: names})
    for architecture in (folder, folder / "open_clip_config.json"):
        with pytest.raises(AdamergeError, match=list(names)[-1]):
            build_clip(str(architecture))
    if part == "vision_cfg":  # which an exported folder is read by
        (folder / "merge.json").write_text(json.dumps({"kind": "static", "tasks": ["a"]}))
        with pytest.raises(AdamergeError, match="timm_model"):
            adamerge.load(folder)


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "hf-hub:planted", "local-dir:planted"])
def test_schemes_of_open_clip_are_no_architecture(canary: Canary, name: str) -> None:
    with pytest.raises(AdamergeError, match="is neither an open_clip model name nor a folder"):
        build_clip(name)


def test_a_folder_in_place_of_the_hub(canary: Canary, tmp_path: Path) -> None:
    canary.module(tmp_path / "roberta-base" / "own.py")
    with pytest.raises(AdamergeError, match="a folder of that name lies here"):
        build_clip("roberta-ViT-B-32")


TAGS = [
    "!!python/object/apply:os.system ['touch {path}']",
    "!!python/object/new:os.system ['touch {path}']",
    "!!python/name:os.system",
    "!!python/module:planted",
    "!!python/object:planted.Own {{}}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags(canary: Canary, tmp_path: Path, tag: str) -> None:
    canary.module(tmp_path / "planted.py")
    tagged = tag.format(path=canary.path)
    (tmp_path / "config.yaml").write_text(f"suite: {tagged}\n")
    (tmp_path / "own.yaml").write_text(f"tasks: {tagged}\n_target_: {tagged}\n")
    (tmp_path / "task.yaml").write_text(f"data: {tagged}\n")
    (tmp_path / "suite.yaml").write_text("tasks: {a: {task: task.yaml}}\n")
    for words in ("suite=own.yaml", "method=own.yaml", "objective=own.yaml", "suite=suite.yaml"):
        with pytest.raises(AdamergeError, match="is not valid YAML"):
            config.load([words])
    with pytest.raises(AdamergeError, match="is not valid YAML"):
        config.load([f"optim={tagged}"])
    with pytest.raises(AdamergeError, match="is not valid YAML"):
        config.load_run(tmp_path)


@pytest.mark.parametrize("target", ["planted.find", "down.planted.find", "down.inner.planted.find"])
@pytest.mark.parametrize("place", ["suite", "task", "method", "nested", "run"])
def test_code_that_lies_with_a_file(
    canary: Canary, tmp_path: Path, suite: Path, target: str, place: str
) -> None:
    folder = tmp_path / "down" if target.startswith("down") else tmp_path
    canary.module(tmp_path.joinpath(*target.split(".")[:-1]).with_suffix(".py"))
    here = folder / "configs" if place == "nested" and folder != tmp_path else folder
    here.mkdir(exist_ok=True)
    entry = {"expert": "x", "data": {"_target_": target}, "classes": ["a", "b"]}
    words = [f"suite={here / 'own.yaml'}"]
    written: dict[str, Any] = {"pretrained": "x", "tasks": {"a": entry}}
    if place == "task":
        (here / "task.yaml").write_text(yaml.safe_dump({"data": entry["data"]}))
        written["tasks"] = {"a": {"expert": "x", "task": "task.yaml"}}
    elif place == "method":
        words, written = [f"method={here / 'own.yaml'}"], {"_target_": target}
    (here / "own.yaml").write_text(yaml.safe_dump(written))
    if place == "run":
        whole = {**config.load(), "optim": {"_target_": target}}
        config.save(whole, here / "config.yaml")
    with pytest.raises(AdamergeError, match="which lies with that file"):
        build.check(config.load_run(here) if place == "run" else config.load(words))
    assert target.split(".")[0] not in sys.modules


def test_code_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module on the path keeps working, if it does not lie with the suite; so does a folder that
    PYTHONPATH names."""
    text = "import datasets\ndef images(count: int) -> datasets.Dataset: ...\n"
    for folder, name in ((tmp_path / "code", "own_images"), (tmp_path / "suites", "beside_images")):
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "suites"))
    for target in ("own_images.images", "beside_images.images"):
        entry = {"expert": "x", "classes": ["a", "b"], "templates": ["{}"]}
        entry["data"] = {"_target_": target, "count": 3}
        path = tmp_path / "suites" / "suite.yaml"
        path.write_text(yaml.safe_dump({"pretrained": "x", "tasks": {"a": entry}}))
        build.check(config.load([f"suite={path}"]))


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "subprocess.run", "builtins.exec", "runpy.run_path", "pickle.load"),
        *("antigravity.webbrowser", "idlelib.idle.x", "torch.hub.load", "torch.load"),
        *("pip.__main__.main", "datasets.load_dataset", "datasets.load_from_disk"),
        *("transformers.AutoModel.from_pretrained", "omegaconf.OmegaConf.load", "", ".", "a..b"),
    ],
)
def test_targets_that_are_no_part_of_a_run(canary: Canary, target: str) -> None:
    part = f"{{_target_: '{target}', args: 'touch {canary.path}'}}"
    words = [f"{key}={part}" for key in ("optim", "scheduler")]
    words += [f"trainer.callbacks=[{part}]", f"trainer.strategy={part}"]
    words += [f"transform=[{part}]", f"suite.tasks.digits.data={part}"]
    words.append(f"optim={{_target_: torch.optim.Adam, lr: 0.1, betas: {part}}}")
    for word in words:
        with pytest.raises(AdamergeError):
            build.check(config.load([word]))
    assert not {"antigravity", "idlelib.idle", "pip.__main__"} & set(sys.modules)


LOOKUPS = [
    "${oc.env:CANARY}",
    "x${oc.env:CANARY}y",
    "${oc.env:NOTHING,${oc.env:CANARY}}",
    "${${suite.vars.a}:CANARY}",
    "\\${oc.env:CANARY}",
    "${oc.decode:${oc.env:CANARY}}",
    "${planted:1}",
    "${suite.vars.dollar}${suite.vars.rest}",
]


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("place", ["suite", "task", "defaults", "method", "word", "run"])
def test_no_value_comes_from_outside(
    canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lookup: str, place: str
) -> None:
    monkeypatch.setenv("CANARY", "secret")
    run: Callable[..., int] = lambda *_: os.system(f"touch {canary.path}")  # noqa: E731
    OmegaConf.register_new_resolver("planted", run, replace=True)
    known = {"a": "oc.env", "dollar": "$", "rest": "{oc.env:CANARY}"}
    own = {"vars": known, "pretrained": "x", "name": "own"}
    inner = lookup.replace("suite.vars", "vars")
    if place == "suite":
        own["root"] = inner
    elif place == "defaults":
        own["defaults"] = {"wandb": {"project": inner}}
    elif place == "task":
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({"classes": [lookup, "b"]}))
        own["tasks"] = {"a": {"task": "task.yaml"}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(own))
    words = ["suite=suite.yaml"]
    if place == "method":
        method = {"_target_": "adamerge.methods.AdaMerging", "granularity": lookup}
        (tmp_path / "method.yaml").write_text(yaml.safe_dump(method))
        words.append("method=method.yaml")
    elif place == "word":
        words.append(f"wandb.project='{lookup}'")
    try:
        if place == "run":
            saved = {**config.load(), "cache_dir": lookup}
            saved["suite"]["vars"] = known
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
            config.load_run(tmp_path)
        else:
            config.load(words)
    except AdamergeError as error:
        assert "secret" not in str(error)
    else:
        pytest.fail("taken")
    finally:
        OmegaConf.clear_resolver("planted")


def folder_with_script(canary: Canary, folder: Path) -> dict[str, Any]:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for name in (f"{folder.name}.py", "dataset.py", "__init__.py", "conftest.py"):
        canary.module(folder / name)
    return {"path": str(folder)}


def script(canary: Canary, folder: Path) -> dict[str, Any]:
    canary.module(folder / "images.py")
    return {"path": str(folder / "images.py")}


def readme(canary: Canary, folder: Path) -> dict[str, Any]:
    files = "data_files: https://example.invalid/x.parquet"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  {files}\n---\n")
    return {"path": str(folder), "name": "x"}


def addresses(canary: Canary, folder: Path) -> dict[str, Any]:
    schema = datasets.Features(image=datasets.Image()).arrow_schema
    paths = pa.array(["https://example.invalid/a.png", "hf://datasets/a/b/c.png"])
    column = pa.StructArray.from_arrays([pa.nulls(2, pa.binary()), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": column}, schema=schema), folder / "a.parquet")
    return {"path": str(folder / "a.parquet")}


def metadata(canary: Canary, folder: Path) -> dict[str, Any]:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    rows = "file_name,x\na.png,1\nhttps://example.invalid/b.png,2\n"
    (folder / "metadata.csv").write_text(rows)
    return {"path": str(folder)}


def objects(canary: Canary, folder: Path) -> dict[str, Any]:
    np.save(folder / "a.npy", np.array([canary], dtype=object), allow_pickle=True)
    return {"path": str(folder / "a.npy")}


def packed_objects(canary: Canary, folder: Path) -> dict[str, Any]:
    with (folder / "a.npz").open("wb") as file:
        np.savez(file, images=np.array([canary], dtype=object), allow_pickle=True)
    return {"path": str(folder / "a.npz")}


def shard(kind: str) -> Callable[[Canary, Path], dict[str, Any]]:
    def planted(canary: Canary, folder: Path) -> dict[str, Any]:
        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "PNG")
        packed = io.BytesIO()
        torch.save(canary, packed)
        content = packed.getvalue() if kind == "pth" else pickle.dumps(canary)
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, data in (("1.png", picture.getvalue()), (f"1.{kind}", content)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return {"path": str(folder / "a.tar")}

    return planted


DATA = [
    *(folder_with_script, script, readme, addresses, metadata, objects, packed_objects),
    *(shard(kind) for kind in ("pyd", "pickle", "pth", "npy")),
]


@pytest.mark.parametrize("plant", DATA)
def test_data(canary: Canary, tmp_path: Path, plant: Any) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    data = plant(canary, folder)
    cfg, cache = PreprocessCfg(size=8), tmp_path / "cache"
    with contextlib.suppress(AdamergeError):  # refused is as good as read
        found = open_dataset("t", data)
        cache_images("t", found, ("a", "b"), cfg, cache, "skip", "image", None, False)


MEDIA: dict[str, Any] = {
    "image": datasets.Image(),
    "audio": datasets.Audio(),
    "video": datasets.Video(),
    "list": datasets.List(datasets.Image()),
    "struct": {"kind": datasets.Value("int64"), "picture": datasets.Image()},
}


@pytest.mark.parametrize("feature", MEDIA)
def test_columns_that_are_fetched_when_they_are_read(
    canary: Canary, tmp_path: Path, feature: str
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    address = {"bytes": None, "path": "https://example.invalid/b"}
    values = {"list": [address], "struct": {"kind": 0, "picture": address}}
    rows = {"image": [{"bytes": picture.getvalue(), "path": None}]}
    rows["label"] = [values.get(feature, address)]
    schema = datasets.Features(image=datasets.Image(), label=MEDIA[feature]).arrow_schema
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "a.parquet")
    found = open_dataset("t", {"path": str(tmp_path / "a.parquet")})
    cfg, cache = PreprocessCfg(size=8), tmp_path / "cache"
    for label in ("label.kind" if feature == "struct" else "label", "label"):
        with pytest.raises(AdamergeError, match="label"):
            cache_images("t", found, ("a", "b"), cfg, cache, "skip", "image", label, True)
    assert cache_images("t", found, ("a", "b"), cfg, cache, "skip", "image", None).labels is None


def test_images_in_lists_are_not_fetched(canary: Canary, tmp_path: Path) -> None:
    feature = datasets.List(datasets.List(datasets.Image()))
    rows = {"image": [[[{"bytes": None, "path": "https://example.invalid/b"}]]]}
    schema = datasets.Features(image=feature).arrow_schema
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "a.parquet")
    with pytest.raises(AdamergeError, match="image"):
        found = open_dataset("t", {"path": str(tmp_path / "a.parquet")})
        cache = tmp_path / "cache"
        cache_images("t", found, ("a",), PreprocessCfg(size=8), cache, "skip", "image", None)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "raw", "inside"])
def test_checkpoints(canary: Canary, tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "raw":
        path.write_bytes(pickle.dumps({"visual.proj": canary}))
    else:
        content = {"state_dict": {"visual.proj": canary if kind == "inside" else torch.ones(2)}}
        content["hyper_parameters"] = {"x": canary}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with contextlib.suppress(AdamergeError):
        dict(read(path).tensors)
    with pytest.raises(AdamergeError):
        read_checkpoint(path)


def test_an_adapter_does_not_fetch_its_base(canary: Canary, tmp_path: Path) -> None:
    base = {"base_model_name_or_path": "owner/name", "peft_type": "LORA", "auto_mapping": {"x": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    save_file({"x.lora_A.weight": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    assert read(tmp_path).lora is not None


LARGE: list[tuple[str, dict[str, Any] | Any]] = [
    ("vision_cfg", {"layers": 10**9}),
    ("vision_cfg", {"layers": [3, 4, 10**9, 3]}),
    ("vision_cfg", {"width": 10**9}),
    ("vision_cfg", {"layers": 500, "width": 16384}),
    ("vision_cfg", {"image_size": [10**9, 1]}),
    ("vision_cfg", {"image_size": 8192, "patch_size": 1, "width": 16384}),
    ("vision_cfg", {"mlp_ratio": 1e9}),
    ("vision_cfg", {"mlp_ratio": float("nan")}),
    ("vision_cfg", {"layers": -1}),
    ("vision_cfg", {"layers": "12"}),
    ("vision_cfg", {"layers": True}),
    ("vision_cfg", {"layers": 1.5}),
    ("vision_cfg", {"norm_kwargs": {"dtype": "x"}}),
    ("vision_cfg", {"act_kwargs": {"inplace": True}}),
    ("vision_cfg", {"attn_pooler_queries": 10**9}),
    ("text_cfg", {"vocab_size": 10**9}),
    ("text_cfg", {"context_length": 10**9}),
    ("text_cfg", {"vocab_size": 2_000_000, "width": 16384}),
    ("text_cfg", {"proj_type": ["linear"]}),
    ("embed_dim", 10**9),
    ("embed_dim", "512"),
    ("cast_dtype", "float16"),
    ("multimodal_cfg", 5),
    ("multimodal_cfg", {"layers": 10**9}),
]


@pytest.mark.parametrize(("key", "value"), LARGE)
def test_sizes_are_refused_before_anything_is_made(tmp_path: Path, key: str, value: Any) -> None:
    folder, start = model_folder(tmp_path, **{key: value}), time.process_time()
    with pytest.raises(AdamergeError, match="is not a model open_clip can build"):
        build_clip(str(folder))
    assert time.process_time() - start < 1


def test_every_architecture_of_open_clip_is_accepted() -> None:
    for name in open_clip.list_models():
        model = open_clip.get_model_config(name)
        if "hf_model_name" not in model["text_cfg"]:
            check_model_config(model, name)


def test_json_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, message in (
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than"),
        ("[]", "a list where an object is expected"),
        ("{", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("", "is not valid JSON"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(AdamergeError, match=message):
            read_json(path)
    path.unlink()
    with pytest.raises(AdamergeError, match="No such file"):
        read_json(path)
    assert parse_json('{"a": [{"b": "c"}, 1]}') == {"a": [{"b": "c"}, 1]} and parse_json("5") == 5
