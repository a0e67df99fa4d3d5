"""Every kind of export: written, verified, read back by `adamerge.load`, scored, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adamerge
from adamerge import AdamergeError, methods
from adamerge.cli import main
from adamerge.cli.job import Job, load_job
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.export import folds, kinds, load, read, write
from adamerge.learn.resume import read_checkpoint
from adamerge.methods.mixtures import DynamicEncoder
from tests import tiny
from tests.processes import forgetting, started

Capture = pytest.CaptureFixture[str]
LINEAR = ["method=surgery", "method.activation=identity"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "layer_wise": ("static", ["method=layer_wise"]),
    "depth_0": ("static", ["method=wemoe", "method.router_layers=0"]),
    "single": ("static", ["method=wemoe", "fold=single"]),
    "wemoe": ("dynamic", ["method=wemoe"]),
    "shared": ("dynamic", ["method=wemoe", "method.shared_router=true", "fold=dynamic"]),
    "e_wemoe": ("dynamic", ["method=e_wemoe"]),
    "per_task": ("per_task", ["method=wemoe", "fold=per_task"]),
    "emr": ("per_task", ["method=emr"]),
    "linear_per_task": ("per_task", [*LINEAR, "fold=per_task"]),
    "linear": ("adapters", LINEAR),
    "surgery": ("adapters", ["method=surgery"]),
    "surgery_v2": ("adapters", ["method=surgery_v2"]),
}
Run = Callable[[str], Path]
ONE_OF_EACH = ["layer_wise", "wemoe", "e_wemoe", "per_task", "surgery_v2"]


@pytest.fixture(scope="session")
def words(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "trainer.max_steps=3", "trainer.accelerator=cpu", "preflight=off",
        "evaluate.baselines=false", "optim.lr=0.05",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The finished run of a name in `RUNS`, trained when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(name: str) -> Path:
        if name not in done:
            assert main(["train", *words, *RUNS[name][1], f"run_dir={folder / name}"]) == 0
            done[name] = folder / name
        return done[name]

    return run


@pytest.fixture(params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def job_of(run: Path) -> Job:
    job = load_job(config.load_run(run))
    job.module.load_state_dict(read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"])
    job.module.method.eval()
    return job


def samples(job: Job) -> tuple[Tensor, Tensor]:
    """All images of all tasks, normalised, with their task ids, tasks mixed."""
    normalizer = inputs.normalizer(job.suite.clip)
    parts = [normalizer(job.data.sample(task, 40)) for task in job.suite.heads.tasks]
    ids = torch.arange(len(parts)).repeat_interleave(40)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return torch.cat(parts)[order], ids[order]


def gates_by_hand(job: Job, images: Tensor, ids: Tensor) -> Tensor:
    """Mean gates `[tasks, blocks, T]`, an image at a time."""
    method: Any = job.module.method
    means = []
    for task in range(len(method.tasks)):
        own = [method.gates(image[None])[0] for image in images[ids == task]]
        means.append(sum(own) / len(own))
    return torch.stack(means)


@torch.no_grad()
def test_features_come_back(name: str, trained: Run) -> None:
    """Bit for bit those of the fold; and of the trained method, or of gates averaged by hand."""
    run, job = trained(name), job_of(trained(name))
    images, ids = samples(job)
    model = adamerge.load(run / "merged")
    assert model.kind == RUNS[name][0] and model.tasks == tuple(tiny.CLASSES)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    found = model.encoder(images, ids)
    method: Any = job.module.method
    if name in ("single", "per_task"):
        gates = gates_by_hand(job, images, ids)
        if name == "single":
            wanted = method.fold_static(gates.mean(0))(images, ids)
        else:
            wanted = method.fold_per_task(gates)(images, ids)
        assert not torch.allclose(found, method(images, ids), rtol=1e-4), "routers have moved"
    else:
        wanted = method(images, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert model.record["largest_relative_difference"] <= 1e-5
    fold = job.settings["fold"]
    statistics = folds.statistics(
        method, job.data, inputs.normalizer(job.suite.clip), torch.device("cpu"), 256
    )
    encoder, exact = folds.encoder(method, fold, statistics)
    assert torch.equal(found, encoder(images, ids)) and exact == (
        name not in ("single", "per_task")
    )
    by_task = not torch.equal(found, model.encoder(images, 1 - ids))
    assert by_task == (model.kind in ("per_task", "adapters"))


def test_evaluate_gives_the_runs_accuracies(
    name: str, trained: Run, words: list[str], tmp_path: Path, suite: Path
) -> None:
    """Also on a suite with its tasks in another order."""
    run = trained(name)
    results = json.loads((run / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    row = rows[results.get("exported", results["method"])]
    assert main(["evaluate", "--to", str(tmp_path / "own"), str(run)]) == 0
    tree = yaml.safe_load(suite.read_text())
    tree["tasks"] = dict(reversed(tree["tasks"].items()))
    (other := suite.parent / "reversed.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    given = [*[w for w in words if not w.startswith("suite=")], f"suite={other}"]
    assert main(["evaluate", "--to", str(tmp_path / "other"), str(run / "merged"), *given]) == 0
    for place in ("own", "other"):
        found = json.loads((tmp_path / place / "results.json").read_text())["rows"][-1]
        assert found["accuracy"] == row["accuracy"] and found["average"] == row["average"]


@pytest.mark.parametrize("name", ["per_task", "emr", "linear_per_task"])
@torch.no_grad()
def test_open_clip_loads_the_folder_of_every_task(name: str, trained: Run) -> None:
    merged, job = trained(name) / "merged", job_of(trained(name))
    images, ids = samples(job)
    model = adamerge.load(merged)
    for index, task in enumerate(tiny.CLASSES):
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{merged / task}")
        assert repr(transform) == repr(model.preprocess)
        torch.testing.assert_close(
            theirs.eval().encode_image(images[ids == index]),
            model.encoder(images, ids)[ids == index],
        )
        text = {k: t for k, t in theirs.state_dict().items() if not k.startswith("visual.")}
        assert text and all(
            torch.equal(t, job.suite.clip.model.state_dict()[k]) for k, t in text.items()
        )
    assert not (merged / "open_clip_config.json").exists()


@torch.no_grad()
def test_open_clip_loads_the_encoder_under_adapters(trained: Run) -> None:
    model, job = adamerge.load(trained("surgery_v2")), job_of(trained("surgery_v2"))
    images, _ = samples(job)
    theirs, _, _ = open_clip.create_model_and_transforms(
        f"local-dir:{trained('surgery_v2') / 'merged'}"
    )
    bare: Any = model.encoder
    torch.testing.assert_close(theirs.eval().encode_image(images), bare.encoder(images))
    with safe_open(trained("surgery_v2") / "merged" / "adapters.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["adapters"])
        assert notes == {"activation": "relu", "tasks": list(tiny.CLASSES)}
        assert set(file.keys()) == {
            f"{task}/{place}/{part}"
            for task in tiny.CLASSES
            for place in range(3)
            for part in ("down", "up")
        }


def test_a_dynamic_export_carries_what_it_needs_and_nothing_else(trained: Run) -> None:
    for name in ("wemoe", "shared", "e_wemoe"):
        merged, method = trained(name) / "merged", job_of(trained(name)).module.method
        encoder = method.fold()
        assert isinstance(encoder, DynamicEncoder)
        tensors = load_file(merged / "encoder.safetensors")
        assert set(tensors) == set(encoder.state())
        assert not [key for key in tensors if "token_embedding" in key or "text" in key]
        routers = {key.partition(".mlp.router.")[0] for key in tensors if ".router." in key}
        assert len(routers) == (2 if name == "wemoe" else 1)
        files = {path.name for path in merged.rglob("*")}
        assert files == {
            "encoder.safetensors", "heads.safetensors", "adamerge_config.json", "merge.json",
            "README.md",
        }  # fmt: skip
        size = (merged / "encoder.safetensors").stat().st_size
        assert size < 1.1 * sum(t.numel() * t.element_size() for t in tensors.values()) + 4096
        with pytest.raises(Exception, match=r"open_clip_config\.json"):
            open_clip.create_model_and_transforms(f"local-dir:{merged}")


def test_bytes_are_stated_and_sparse_task_vectors_are_fewer(trained: Run) -> None:
    def matrices(name: str) -> int:
        tensors = load_file(trained(name) / "merged" / "encoder.safetensors")
        kept = ("weight_deltas", "weight_values", "weight_places", "weight_starts")
        return sum(t.numel() * t.element_size() for k, t in tensors.items() if k.endswith(kept))

    assert matrices("e_wemoe") < 0.22 * matrices("shared")  # a tenth, twice as large, and starts
    for name in ONE_OF_EACH:
        merged = trained(name) / "merged"
        record = json.loads((merged / "merge.json").read_text())
        assert record["bytes"] == {
            path.relative_to(merged).as_posix(): path.stat().st_size
            for path in merged.rglob("*.safetensors")
        }
        card = (merged / "README.md").read_text()
        assert f"| all | {sum(record['bytes'].values()):,} |" in card
        assert "adamerge.load" in card and ("open_clip.create" in card) == (
            record["kind"] != "dynamic"
        )


def test_the_report_says_what_folding_costs(trained: Run, capsys: Capture) -> None:
    """The rows are accuracies of the folds, as measured here image by image."""
    results = json.loads((trained("per_task") / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["wemoe", "wemoe, folded per task", "wemoe, folded to one"]
    assert results["exported"] == "wemoe, folded per task"
    table = (trained("per_task") / "results.md").read_text()
    assert "**wemoe, folded to one**" in table and "Exported: wemoe, folded per task." in table
    for run, row in (("wemoe", "wemoe"), ("single", "wemoe, folded to one")):
        model = adamerge.load(trained(run))
        for task in tiny.CLASSES:
            dataset = tiny.images(task)
            found = [model.classify(image, task)[0].name for image in dataset["image"]]
            right = [tiny.CLASSES[task][label] for label in dataset["label"]]
            same = np.mean([a == b for a, b in zip(found, right, strict=True)])
            assert rows[row]["accuracy"][task] == pytest.approx(same)
    surgery = json.loads((trained("surgery") / "results.json").read_text())
    assert [row["name"] for row in surgery["rows"]] == ["surgery"] and "exported" not in surgery
    linear = json.loads((trained("linear") / "results.json").read_text())["rows"]
    assert [row["name"] for row in linear] == ["surgery", "surgery, folded per task"]
    assert linear[0]["accuracy"] == linear[1]["accuracy"]


def test_folds_look_at_a_bounded_number_of_the_images_adapted_on(
    trained: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    settings = config.load([*words, "method=wemoe", "protocol=heldout", "seed=3"])
    job = load_job(settings)
    monkeypatch.setattr(folds, "IMAGES", 7)
    method, normalizer, seen = (
        build.build_method(settings, job.suite),
        inputs.normalizer(job.suite.clip),
        [],
    )
    monkeypatch.setattr(type(method), "statistics", lambda _, batches: list(batches))
    for _ in range(2):
        batches = folds.statistics(method, job.data, normalizer, torch.device("cpu"), 5)
        seen.append(torch.cat([images for images, _ in batches]))
        assert torch.cat([ids for _, ids in batches]).tolist() == [0] * 7 + [1] * 7
    assert torch.equal(seen[0], seen[1])
    task = next(iter(job.data.tasks))
    allowed = job.data.tasks[task].images[job.data.adapt_rows[task]]
    allowed = normalizer(torch.from_numpy(allowed))
    for image in seen[0][:7]:
        assert (allowed == image).flatten(1).all(1).any()


def test_exporting_a_run_in_another_fold(trained: Run, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(trained("wemoe")), "--to", str(tmp_path / "x"), "fold=single"]) == 0
    assert "(static, " in capsys.readouterr().out
    one = (tmp_path / "x" / "open_clip_model.safetensors").read_bytes()
    assert one == (trained("single") / "merged" / "open_clip_model.safetensors").read_bytes()
    assert "Exported: wemoe, folded to one." in (tmp_path / "x" / "README.md").read_text()
    assert main(["export", str(trained("wemoe")), "fold=twice"]) == 2
    assert "fold is 'twice': expected dynamic or per_task or single" in capsys.readouterr().err


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exporting_again_gives_the_same_bytes(name: str, trained: Run, tmp_path: Path) -> None:
    assert main(["export", str(trained(name)), "--to", str(tmp_path / "x")]) == 0
    merged = trained(name) / "merged"
    files = {path.relative_to(merged) for path in merged.rglob("*") if path.is_file()}
    assert files == {p.relative_to(tmp_path / "x") for p in tmp_path.rglob("*") if p.is_file()}
    for file in files - {Path("merge.json")}:  # has the time
        assert (tmp_path / "x" / file).read_bytes() == (merged / file).read_bytes(), file


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["method=layer_wise", "fold=per_task"], "expected null (its exact fold)\n"),
        (["method=emr", "fold=single"], "expected null (its exact fold) or per_task"),
        (["method=wemoe", "method.router_layers=0", "fold=single"], "fold is 'single', which"),
        (["method=surgery", "fold=per_task"], "method surgery with these settings does not have"),
        ([*LINEAR, "fold=single"], "expected null (its exact fold) or per_task"),
        (["method=wemoe", "fold=per-task"], "did you mean 'per_task'?"),
    ],
)
def test_a_fold_that_a_method_lacks_is_refused_before_training(
    given: list[str], message: str, words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main(["train", *words, *given, f"run_dir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["layer_wise", "wemoe", "per_task", "surgery_v2"])
@torch.no_grad()
def test_classify(name: str, trained: Run) -> None:
    """PIL images, uint8 and floats give the same, as features and heads do by hand."""
    model = adamerge.load(str(trained(name)))
    pictures = list(tiny.images("dots")["image"])[:9]
    floats = torch.stack([model.preprocess(picture) for picture in pictures])
    cfg = read._config(
        next((trained(name) / "merged").rglob("*config.json"))
    )["preprocess_cfg"]  # fmt: skip
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((floats * std + mean) * 255).round().to(torch.uint8)
    features = model.encoder(floats, torch.full((9,), 1))
    weight = load_file(trained(name) / "merged" / "heads.safetensors")["dots"]
    scores = features / features.norm(dim=1, keepdim=True) @ weight.T
    wanted = scores.softmax(1)
    for images in (pictures, tuple(pictures), floats, pixels, floats.double()):
        found = model.classify(images, task="dots", batch_size=4)
        assert [one.name for one in found] == [tiny.CLASSES["dots"][i] for i in wanted.argmax(1)]
        torch.testing.assert_close(
            torch.tensor([one.probability for one in found]), wanted.max(1).values,
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    torch.testing.assert_close(model.probabilities(pictures, "dots"), wanted, rtol=1e-4, atol=1e-5)
    assert model.classify(pictures[0], "dots") == model.classify(pictures[:1], "dots")
    assert model.classify([], "dots") == [] == model.classify(floats[:0], "dots")


def test_classify_says_what_is_wrong(trained: Run) -> None:
    model = adamerge.load(trained("surgery"))
    with pytest.raises(adamerge.AdamergeError, match=r"task 'dot' is not in .*mean 'dots'"):
        model.classify([], "dot")
    for wrong in (
        torch.zeros(2, 3, 8, 16),
        torch.zeros(3, 16, 16),
        torch.zeros(1, 3, 16, 16).int(),
    ):
        with pytest.raises(
            adamerge.AdamergeError, match=r"images are .*: expected \[B, 3, 16, 16\]"
        ):
            model.classify(wrong, "dots")
    with pytest.raises(adamerge.AdamergeError, match=r"an image is a str: expected PIL images"):
        model.classify(["picture.png"], "dots")  # type: ignore[list-item]


def test_loading_needs_no_training_code(trained: Run, tmp_path: Path) -> None:
    folders = [str(trained(name) / "merged") for name in ("e_wemoe", "surgery", "per_task")]
    heavy = ("lightning", "pytorch_lightning", "omegaconf", "wandb", "datasets", "torchmetrics")
    code = f"""
import sys
for heavy in {heavy}:
    sys.modules[heavy] = None  # as if it were not installed
import adamerge
from PIL import Image
for folder in {folders}:
    model = adamerge.load(folder)
    assert model.classify(Image.new("RGB", (30, 20)), "dots")[0].name in {tiny.CLASSES["dots"]}
assert callable(adamerge.load)
"""
    process = started(partial(forgetting, ("adamerge", *heavy), code), tmp_path / "errors")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_on_a_gpu(name: str, trained: Run) -> None:
    pictures = list(tiny.images("dots")["image"])
    here, there = (adamerge.load(trained(name), device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(
        there.probabilities(pictures, "dots"), here.probabilities(pictures, "dots"),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_exports_from_before_there_were_kinds(trained: Run, tmp_path: Path) -> None:
    shutil.copytree(trained("layer_wise") / "merged", tmp_path / "old")
    record = json.loads((tmp_path / "old" / "merge.json").read_text())
    for key in ("kind", "tasks", "bytes", "fold", "fold_is_exact"):
        del record[key]
    (tmp_path / "old" / "merge.json").write_text(json.dumps(record))
    model = adamerge.load(tmp_path / "old")
    assert model.kind == "static" and model.tasks == tuple(tiny.CLASSES)
    picture = Image.new("RGB", (20, 20), "red")
    new = adamerge.load(trained("layer_wise"))
    assert model.classify(picture, "dots") == new.classify(picture, "dots")


def test_a_run_from_before_there_were_folds(trained: Run, tmp_path: Path) -> None:
    settings = yaml.safe_load((trained("layer_wise") / "config.yaml").read_text())
    del settings["fold"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    loaded = config.load_run(tmp_path)
    assert loaded["fold"] is None
    build.check(loaded)


def spoil_record(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        record = json.loads((folder / "merge.json").read_text())
        (folder / "merge.json").write_text(json.dumps(record | changes))

    return spoil


def cut(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def unlink(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def other_shape(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        save_file({k: t for k, t in tensors.items() if "ln_pre" not in k}, folder / file)
        spoil_record(sha256={})(folder)  # as of an export that wrote none

    return spoil


def spoil_config(group: str, key: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = next(folder.glob("*_config.json"))
        config = json.loads(path.read_text())
        config[group][key] = value
        path.write_text(json.dumps(config))

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("wemoe", shutil.rmtree, r"is no exported model \(no merge.json or open_clip_config"),
        ("wemoe", spoil_record(kind="quantum"), r"kind is 'quantum', .*install that"),
        ("wemoe", unlink("encoder.safetensors"), r"encoder.safetensors is missing: copy"),
        ("wemoe", unlink("heads.safetensors"), r"heads.safetensors is missing"),
        ("wemoe", unlink("adamerge_config.json"), r"adamerge_config.json is missing"),
        ("wemoe", cut("encoder.safetensors"), r"encoder.safetensors is damaged \("),
        ("wemoe", cut("merge.json"), r"merge.json is damaged"),
        ("wemoe", cut("adamerge_config.json"), r"adamerge_config.json is damaged"),
        ("wemoe", spoil_config("preprocess_cfg", "mean", 1), r"preprocess_cfg.mean is 1: exp"),
        ("wemoe", spoil_config("preprocess_cfg", "size", [8]), r"preprocess_cfg.size is \[8\]"),
        ("wemoe", spoil_config("preprocess_cfg", "x", 1), r"preprocess_cfg.x is unknown"),
        ("wemoe", spoil_config("model_cfg", "vision_cfg", "x"), r"is not a model open_clip can b"),
        ("wemoe", spoil_config("model_cfg", "embed_dim", 8), r"not hold the encoder of adamerge"),
        ("wemoe", other_shape("encoder.safetensors"), r"does not hold the encoder of adamerge_c"),
        ("layer_wise", other_shape("open_clip_model.safetensors"), r"not hold the encoder of open"),
        ("per_task", lambda f: shutil.rmtree(f / "dots"), r"dots/open_clip_\w+.\w+ is missing"),
        ("per_task", spoil_record(tasks=[]), r"merge.json is damaged \(tasks is \[\]\)"),
        ("surgery", unlink("adapters.safetensors"), r"adapters.safetensors is missing"),
        ("surgery", cut("adapters.safetensors"), r"adapters.safetensors is damaged"),
        ("surgery", spoil_record(tasks=["dots", "x"]), r"adapters.safetensors is damaged"),
        ("per_task", spoil_record(tasks=["dots"]), r"has heads for stripes, dots, merge.json na"),
        ("wemoe", spoil_record(tasks=["a"]), r"merge.json names a: files of different exports"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_one_sentence(
    name: str, spoil: Callable[[Path], None], message: str, trained: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(trained(name) / "merged", folder)
    adamerge.load(folder)
    spoil(folder)
    with pytest.raises(adamerge.AdamergeError, match=message) as caught:
        adamerge.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("layer_wise", "visual.proj"),
        ("wemoe", "resblocks.1.mlp.router.fc2.bias"),
        ("e_wemoe", "mlp.c_fc.weight_values"),
        ("per_task", "visual.proj"),
        ("surgery_v2", "dots/1/down"),
    ],
)
def test_verification_finds_what_was_written_wrong(
    name: str,
    part: str,
    trained: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def spoilt(tensors: dict[str, Tensor], *rest: Any, **more: Any) -> None:
        save_file(
            {k: t + 0.01 if k.endswith(part) else t for k, t in tensors.items()}, *rest, **more
        )

    run = trained(name)
    monkeypatch.setattr(kinds, "save_file", spoilt)
    assert main(["export", str(run), "--to", str(tmp_path / "new")]) == 2
    assert "differ from the trained one by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_needs_the_task_has_no_accuracy_on_unseen_tasks(
    suite: Path, words: list[str], tmp_path: Path
) -> None:
    tree = yaml.safe_load(suite.read_text())
    dots = tree["tasks"].pop("dots")
    del dots["expert"]
    path = suite.parent / "some-unseen.yaml"
    path.write_text(yaml.safe_dump({**tree, "unseen": {"dots": dots}}, sort_keys=False))
    given = [*[w for w in words if not w.startswith("suite=")], f"suite={path}"]
    for method, able in (("surgery", []), ("wemoe", ["wemoe", "wemoe, folded to one"])):
        run = tmp_path / method
        assert main(["train", *given, f"method={method}", f"run_dir={run}"]) == 0
        rows = json.loads((run / "results.json").read_text())["rows"]
        assert [row["name"] for row in rows if row["unseen"]] == able


def test_adapters_on_a_dynamic_encoder(trained: Run, tmp_path: Path) -> None:
    job = job_of(trained("e_wemoe"))
    torch.manual_seed(0)
    tasks = job.suite.heads.tasks
    method = methods.Surgery(job.module.method.fold(), tasks, dim=16, rank=2, positions="blocks")
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.3)
    images, ids = samples(job)
    done = write.export(
        tmp_path / "x", method.fold(), method, job.suite.clip, job.suite.heads, (images, ids), {}
    )
    model = adamerge.load(tmp_path / "x")
    assert done["kind"] == model.kind == "adapters" and model.record["base"] == "dynamic"
    torch.testing.assert_close(model.encoder(images, ids), method(images, ids).detach())
    with pytest.raises(adamerge.AdamergeError, match=r"a AdaMerging cannot be exported: expected"):
        wrong: Any = methods.AdaMerging(job.suite.clip.backbone, job.suite.task_vectors)
        write.export(
            tmp_path / "y", wrong, wrong, job.suite.clip, job.suite.heads, (images, ids), {}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_tasks_that_an_encoder_lacks(trained: Run) -> None:
    folder = trained("surgery") / "merged"
    layout = read.read_layout(folder)
    encoder, _ = read.read_encoder(folder, layout)
    with pytest.raises(adamerge.AdamergeError, match=r"of stripes, dots alone: leave out task 'x'"):
        load.for_tasks(encoder, layout, ["x", "dots"])


def test_names_of_task_folders_stay_inside() -> None:
    for task in ("..", ".", "a/b", "../x", "stanford cars", "a\\b", "%2E"):
        name = read.task_folder(task)
        assert name not in (".", "..") and "/" not in name and "\\" not in name
    assert read.task_folder("..") != read.task_folder("%2E%2E")


def test_files_that_are_not_those_of_the_export(
    trained: Run, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits flipped among the numbers, another run's file, adapters that nothing speaks of."""
    whole = trained("surgery") / "merged"
    for spoil, message in (
        (lambda folder: flip(folder / "adapters.safetensors"), "its sha256 is not that of merge"),
        (lambda folder: flip(folder / "open_clip_model.safetensors"), "its sha256 is not that"),
        (lambda folder: (folder / "merge.json").unlink(), "does not say what adapters"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        spoil(copy)
        with pytest.raises(adamerge.AdamergeError, match=message):
            adamerge.load(copy)
        shutil.rmtree(copy)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    assert main(["export", str(whole.parent), "--to", str(tmp_path / "precious")]) == 2
    assert "holds files that are no export" in capsys.readouterr().err
    thesis = tmp_path / "precious" / "thesis.txt"
    assert main(["export", str(whole.parent), "--to", str(thesis)]) == 2
    assert "is a file, which stays as it is" in capsys.readouterr().err
    assert thesis.read_text() == "years"
    with pytest.raises(adamerge.AdamergeError, match="batch_size is 0: expected at least 1"):
        adamerge.load(whole).classify([], task="dots", batch_size=0)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def test_classify_sees_pictures_as_training_does(trained: Run) -> None:
    model = adamerge.load(trained("per_task"))
    drawn = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    plain, low = Image.fromarray(drawn), drawn.astype(np.uint16)
    wanted = model.probabilities(plain, "dots")
    deep = Image.fromarray(low << 8 | 7)
    assert deep.mode.startswith("I")
    torch.testing.assert_close(model.probabilities(deep, "dots"), wanted)
    lying = plain.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6  # to be turned back
    torch.testing.assert_close(model.probabilities(lying, "dots"), wanted)
    with pytest.raises(AdamergeError, match="mode F"):
        model.classify(Image.fromarray(drawn.astype(np.float32)), "dots")
