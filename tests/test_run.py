"""The main job from end to end on a tiny suite of real files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adamerge.cli import main, results
from adamerge.cli import train as run
from adamerge.cli.job import load_job
from adamerge.config import settings as config
from adamerge.encoders.clip import Normalizer
from adamerge.encoders.tower import Tower
from adamerge.report import tracking
from tests import tiny
from tests.processes import started, train_on_ranks

ROOT = Path(__file__).parent.parent
FILES = [
    *("config.yaml", "metrics.csv", "coefficients.csv", "coefficients.png", "accuracy.png"),
    *("results.json", "results.md", "checkpoints/last.ckpt", "merged/open_clip_config.json"),
    *("merged/open_clip_model.safetensors", "merged/heads.safetensors", "merged/README.md"),
    *("merged/coefficients.csv", "merged/merge.json"),
]


@pytest.fixture(scope="session")
def base(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that every run here shares."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        f"suite={suite}", f"cache_dir={cache}", "wandb=off", "batch_size=4", "log_every=2",
        "trainer.max_steps=6", "trainer.accelerator=cpu", "evaluate.oracle=false",
        "preflight=off",
    ]  # fmt: skip


def train(*words: str) -> int:
    return main(["train", *words])


def coefficients(run: Path) -> list[float]:
    with (run / "coefficients.csv").open(newline="") as file:
        return [float(row["coefficient"]) for row in csv.DictReader(file)]


def losses(run: Path) -> list[dict[str, str]]:
    """The logged losses and entropies of a run, as written."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {key: row[key] for key in row if key.startswith(("step", "loss", "entropy"))}
            for row in csv.DictReader(file)
            if row["loss"]
        ]


@pytest.fixture(scope="session")
def done(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything on."""
    run = tmp_path_factory.mktemp("runs") / "done"
    assert train(*base, "evaluate.oracle=true", "eval_every=3", f"run_dir={run}") == 0
    return run


def test_run_folder(done: Path) -> None:
    for name in FILES:
        assert (done / name).stat().st_size > 0, name
    assert not list(done.rglob("*.tmp")) and not list(done.rglob("*.old"))
    assert (done / "checkpoints" / "last.ckpt").stat().st_size < 1_000_000
    assert (done / "coefficients.png").read_bytes().startswith(b"\x89PNG")
    assert (done / "merged" / "heads.safetensors").stat().st_mode & 0o077 == (
        done / "config.yaml"
    ).stat().st_mode & 0o077


def test_results(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    assert {k: results[k] for k in ("suite", "method", "protocol", "seed")} == {
        "suite": "tiny", "method": "layer_wise", "protocol": "paper", "seed": 0,
    }  # fmt: skip
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "pretrained", "expert", "weight_average", "task_arithmetic", "task_arithmetic_best",
        "layer_wise",
    ]  # fmt: skip
    for row in rows.values():
        accuracy = row["accuracy"]
        assert list(accuracy) == list(tiny.CLASSES)
        assert row["average"] == pytest.approx(sum(accuracy.values()) / 2)
        ratios = [accuracy[task] / rows["expert"]["accuracy"][task] for task in accuracy]
        assert row["normalized"] == pytest.approx(sum(ratios) / 2)
    assert rows["task_arithmetic_best"]["oracle"] is True
    assert rows["task_arithmetic_best"]["average"] >= rows["task_arithmetic"]["average"]
    assert "oracle" in (done / "results.md").read_text()


def test_accuracies_equal_open_clip_on_the_experts_own_files(done: Path, suite: Path) -> None:
    """An independent path: open_clip's model, transform and classifier, image by image."""
    rows = {r["name"]: r for r in json.loads((done / "results.json").read_text())["rows"]}
    name = f"local-dir:{suite.parent / 'model'}"
    tokenizer = open_clip.get_tokenizer(name)
    for task, classes in tiny.CLASSES.items():
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained_image_path=str(suite.parent / f"{task}.safetensors")
        )
        model.eval()
        head = open_clip.build_zero_shot_classifier(
            model, tokenizer, classes, ["a photo of {}.", "{}"]
        )
        dataset = tiny.images(task)
        right = 0
        for image, label in zip(dataset["image"], dataset["label"], strict=True):
            features = model.encode_image(preprocess(image)[None], normalize=True)
            right += int((features @ head).argmax()) == label
        assert rows["expert"]["accuracy"][task] == pytest.approx(right / len(dataset))


def test_metrics(done: Path) -> None:
    with (done / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["loss"]] == [1, 3, 5]
    for row in (row for row in rows if row["loss"]):
        parts = [float(row[f"entropy/{task}"]) for task in tiny.CLASSES]
        assert float(row["loss"]) == pytest.approx(sum(parts), rel=1e-5)
        for task, classes in tiny.CLASSES.items():
            low, mean, high = (
                float(row[f"coefficient_{kind}/{task}"]) for kind in ("min", "mean", "max")
            )
            assert low <= mean <= high
            marginal = float(row[f"marginal_entropy/{task}"])  # nats, as the entropy
            assert float(row[f"entropy/{task}"]) < marginal <= math.log(len(classes)) + 1e-6
        for name in ("gradient_norm", "images_per_second", "peak_memory_mib"):
            assert float(row[name]) > 0
    assert [int(r["step"]) for r in rows if r.get("accuracy/dots")] == [2, 5]


def test_exported_model_is_the_merge_by_plain_arithmetic(done: Path, suite: Path) -> None:
    """From the inputs and `coefficients.csv` alone, with open_clip and nothing of ours."""
    merged, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{done / 'merged'}")
    original, _, before = open_clip.create_model_and_transforms(
        f"local-dir:{suite.parent / 'model'}"
    )
    assert repr(preprocess) == repr(before)
    weights = {name: t.clone() for name, t in original.visual.state_dict().items()}
    with (done / "coefficients.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            with safe_open(suite.parent / f"{row['task']}.safetensors", "pt") as expert:
                delta = expert.get_tensor(row["layer"]) - original.visual.state_dict()[row["layer"]]
            weights[row["layer"]] += float(row["coefficient"]) * delta
    for name, tensor in merged.visual.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)
    for name, tensor in merged.state_dict().items():
        if not name.startswith("visual."):
            assert torch.equal(tensor, original.state_dict()[name])


def test_provenance(done: Path, suite: Path) -> None:
    record = json.loads((done / "merged" / "merge.json").read_text())
    assert record["config"]["optim"]["lr"] == 1e-3 and record["protocol"] == "paper"
    digest = subprocess.run(
        ["sha256sum", suite.parent / "dots.safetensors"], capture_output=True, text=True
    )
    assert record["inputs"]["dots"]["sha256"] == digest.stdout.split()[0]
    assert set(record["versions"]) >= {"adamerge", "torch", "open_clip_torch"}
    assert record["largest_relative_difference"] <= 1e-5
    assert record["metrics"] == json.loads((done / "results.json").read_text())
    with safe_open(done / "merged" / "heads.safetensors", "pt") as heads:
        assert json.loads(heads.metadata()["classes"]) == tiny.CLASSES
        assert heads.get_tensor("dots").shape == (4, 16)


def test_evaluate_gives_the_runs_accuracies(
    done: Path, base: list[str], tmp_path: Path, capsys: Capture
) -> None:
    row = json.loads((done / "results.json").read_text())["rows"][-1]
    for target, words in ((done, []), (done / "merged", base)):
        to = tmp_path / target.name
        assert main(["evaluate", "--to", str(to), str(target), *words]) == 0
        found = json.loads((to / "results.json").read_text())["rows"]
        assert found[-1] == {**row, "name": target.name} and found[0]["name"] == "pretrained"
        assert f"**{target.name}**" in (to / "results.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(done / "merged")]) == 2
    assert "was merged from suite tiny, and no suite is given" in capsys.readouterr().err
    assert main(["evaluate", str(done / "nothing"), *base]) == 2
    assert "is no exported model" in capsys.readouterr().err
    assert main(["evaluate", str(ROOT / "checkpoints" / "demo"), *base]) == 2
    assert "is of another architecture than suite tiny" in capsys.readouterr().err


def test_evaluating_a_heldout_merge_scores_what_it_has_not_seen(
    base: list[str], tmp_path: Path
) -> None:
    words = [*base, "evaluate.baselines=false"]
    assert train(*words, "protocol=heldout", f"run_dir={tmp_path / 'run'}") == 0
    assert main(["evaluate", str(tmp_path / "run" / "merged"), *words]) == 0
    written = tmp_path / "run" / "merged" / "evaluation" / "results.json"
    own = json.loads((tmp_path / "run" / "results.json").read_text())
    again = json.loads(written.read_text())
    assert again["protocol"] == "heldout"
    assert again["rows"][0]["accuracy"] == own["rows"][0]["accuracy"]


def test_export_again(done: Path, tmp_path: Path) -> None:
    assert main(["export", str(done), "--to", str(tmp_path / "again")]) == 0
    one = (done / "merged" / "open_clip_model.safetensors").read_bytes()
    assert (tmp_path / "again" / "open_clip_model.safetensors").read_bytes() == one


@pytest.mark.parametrize("method", ["layer_wise", "task_wise", "block_wise", "layer_wise_pp"])
def test_resuming_changes_nothing(base: list[str], tmp_path: Path, method: str) -> None:
    extra = [
        f"method={method}",
        "scheduler={_target_: torch.optim.lr_scheduler.StepLR, step_size: 2}",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(*base, *extra, f"run_dir={whole}") == 0
    assert train(*base, *extra, "trainer.max_steps=3", f"run_dir={cut}") == 0
    assert train(f"resume={cut}", "trainer.max_steps=6") == 0
    assert coefficients(cut) == coefficients(whole)
    assert any(abs(value - 0.3) > 1e-4 for value in coefficients(whole))
    columns = [losses(run) for run in (whole, cut)]
    assert columns[0] == columns[1]


def test_resuming_with_something_else_is_refused(
    base: list[str], tmp_path: Path, suite: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert train(*base, "evaluate.baselines=false", f"run_dir={run}") == 0
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    for word, message in (
        ("seed=5", "seed was 0, is 5"),
        ("batch_size=2", "batch_size was 4, is 2"),
        ("trainer.gradient_clip_val=0.1", "trainer.gradient_clip_val was None, is 0.1"),
        (f"run_dir={tmp_path / 'x'}", "leave run_dir= out"),
        ("method.init=0.1", r"method.init was 0.3, is 0.1"),
        ("method=task_wise", "method=task_wise cannot be changed on resuming"),
    ):
        assert train(f"resume={run}", word) == 2
        assert message in capsys.readouterr().err
    other = suite.parent / "stripes.safetensors"
    assert train(f"resume={run}", f"suite.tasks.dots.expert={other}") == 2
    assert "is identical to expert of task 'stripes'" in capsys.readouterr().err
    changed = {n: 1.01 * t for n, t in load_file(suite.parent / "dots.safetensors").items()}
    save_file(changed, tmp_path / "changed.safetensors")
    assert (
        train(f"resume={run}", f"suite.tasks.dots.expert={tmp_path / 'changed.safetensors'}") == 2
    )
    assert "sha256 of dots was" in capsys.readouterr().err
    assert train(*base, f"run_dir={run}") == 2
    assert "already holds files" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert train(f"resume={tmp_path / 'none'}") == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_pretrained_that_is_neither_file_nor_tag(
    base: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = [*base, "suite.architecture=ViT-B-32", f"run_dir={tmp_path / 'run'}"]
    assert train(*words, "suite.pretrained=opnai") == 2
    assert "neither a file nor a weight tag of ViT-B-32: its tags are" in capsys.readouterr().err
    assert train(*words, "suite.pretrained=openai") == 2
    assert "set suite.architecture to ViT-B-32-quickgelu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_same_seed_same_bits_other_seed_other_images(base: list[str], tmp_path: Path) -> None:
    found = []
    for index, seed in enumerate((1, 1, 2)):
        run = tmp_path / str(index)
        assert train(*base, f"seed={seed}", "evaluate.baselines=false", f"run_dir={run}") == 0
        found.append(coefficients(run))
    assert found[0] == found[1] != found[2]


def test_labels_change_nothing(base: list[str], suite: Path, tmp_path: Path) -> None:
    """Shuffled, or absent: the same coefficients to the bit."""
    words = [word for word in base if not word.startswith("suite=")]
    found = []
    for kind in ("as they are", "shuffled", "absent"):
        folder = tmp_path / kind
        tiny.make_suite(folder)
        for task in tiny.CLASSES:
            dataset = tiny.images(task)
            if kind == "shuffled":
                labels = dataset["label"][:]
                dataset = dataset.remove_columns("label").add_column(
                    "label", labels[::-1], feature=dataset.features["label"]
                )
            elif kind == "absent":
                dataset = dataset.remove_columns("label")
            dataset.save_to_disk(str(folder / f"{task}-other"))
        text = (folder / "tiny.yaml").read_text().replace("-images", "-other")
        (folder / "tiny.yaml").write_text(text)
        run = tmp_path / f"run {kind}"
        assert train(*words, f"suite={folder / 'tiny.yaml'}", f"run_dir={run}") == 0
        found.append(coefficients(run))
        if kind == "absent":
            assert "no task has labels" in (run / "results.md").read_text()
            assert (run / "merged" / "open_clip_model.safetensors").is_file()
    assert found[0] == found[1] == found[2]


def test_heldout_reports_both_halves(base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*base, "protocol=heldout", f"run_dir={run}") == 0
    results = json.loads((run / "results.json").read_text())
    assert results["protocol"] == "heldout"
    for row in results["rows"]:
        assert row["accuracy_adapted"].keys() == row["accuracy"].keys()
    table = (run / "results.md").read_text()
    assert "one half of the test images" in table and "average, adapted half" in table


@pytest.mark.parametrize("objective", ["entropy", "infomax"])
def test_micro_batches_give_the_same_run(base: list[str], tmp_path: Path, objective: str) -> None:
    words = [*base, f"objective={objective}", "evaluate.baselines=false"]
    assert train(*words, f"run_dir={tmp_path / 'a'}") == 0
    assert train(*words, "micro_batch=3", f"run_dir={tmp_path / 'b'}") == 0
    assert coefficients(tmp_path / "b") == pytest.approx(coefficients(tmp_path / "a"), abs=1e-5)


@pytest.mark.parametrize("objective", ["entropy", "expert_kl"])
def test_images_on_the_device_give_the_same_run(
    base: list[str], tmp_path: Path, objective: str
) -> None:
    words = [*base, f"objective={objective}", "evaluate.baselines=false"]
    assert train(*words, f"run_dir={tmp_path / 'a'}") == 0
    assert train(*words, "images_on_device=true", f"run_dir={tmp_path / 'b'}") == 0
    assert coefficients(tmp_path / "b") == coefficients(tmp_path / "a")


def test_images_that_the_device_cannot_hold_are_refused(
    base: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*base, "images_on_device=true", "evaluate.baselines=false"]
    words += [f"run_dir={tmp_path / 'run'}"]
    assert train(*words, "num_workers=2") == 2
    assert "images_on_device leaves nothing for num_workers" in capsys.readouterr().err
    monkeypatch.setattr(run, "memory_available", lambda device: 1000)
    assert train(*words) == 2
    assert "and cpu has 0.0 GB free: set images_on_device=false" in capsys.readouterr().err
    assert train(*words, "images_on_device=false") == 0


def test_parts_of_lightnings_trainer(base: list[str], tmp_path: Path, capsys: Capture) -> None:
    monitor = "{_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    words = [*base, "evaluate.baselines=false", f"trainer.callbacks=[{monitor}]"]
    words += ["trainer.num_sanity_val_steps=0", "trainer.deterministic=true"]
    strategy = "{_target_: lightning.pytorch.strategies.SingleDeviceStrategy, device: cpu}"
    words += ["trainer.profiler=simple", f"trainer.strategy={strategy}"]
    assert train(*words, f"run_dir={tmp_path / 'run'}") == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["lr-Adam"]) == 1e-3
    assert train(*words, "trainer.accelerator=gpuu", f"run_dir={tmp_path / 'other'}") == 2
    assert "error: trainer: You selected an invalid accelerator" in capsys.readouterr().err


def test_bf16_mixed(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower computes in bfloat16; the merge, the logits and the loss do not."""
    seen = set()
    forward = Tower.__call__

    def watched(tower: Tower, weights: dict[str, torch.Tensor], images: torch.Tensor) -> Any:
        features = forward(tower, weights, images)
        seen.add((next(iter(weights.values())).dtype, features.dtype))
        return features

    words = [*base, "evaluate.baselines=false"]
    assert train(*words, f"run_dir={tmp_path / 'a'}") == 0
    monkeypatch.setattr(Tower, "__call__", watched)
    assert train(*words, "trainer.precision=bf16-mixed", f"run_dir={tmp_path / 'b'}") == 0
    assert (torch.float32, torch.bfloat16) in seen
    with (tmp_path / "b" / "metrics.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["loss"])
    parts = sum(float(row[f"entropy/{task}"]) for task in tiny.CLASSES)
    assert float(row["loss"]) == pytest.approx(parts, rel=1e-6), "the loss was rounded"
    moves = [torch.tensor(coefficients(tmp_path / run)) - 0.3 for run in "ab"]
    assert torch.corrcoef(torch.stack(moves))[0, 1] > 0.9


@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    base: list[str], tmp_path: Path, capsys: Capture, every: int
) -> None:
    run = tmp_path / "run"
    words = [*base, "trainer.max_steps=50", "optim.lr=1e30", f"run_dir={run}"]
    assert train(*words, f"checkpoint_every={every}") == 2
    error = capsys.readouterr().err
    assert "became NaN or infinite by step" in error and "lower optim.lr" in error
    assert "task stripes" in error or "task dots" in error or "gradient" in error
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = saved["state_dict"]["method.coefficients"]
    assert torch.equal(kept, torch.full_like(kept, 0.3)), "the last one whose loss was finite"
    assert main(["export", str(run)]) == 0


@pytest.fixture
def long_run(base: list[str], tmp_path: Path) -> Iterator[tuple[BaseProcess, Path]]:
    run = tmp_path / "run"
    words = [*base, "trainer.max_steps=100000", "checkpoint_every=100000", f"run_dir={run}"]
    process = started(partial(train, *words, "num_workers=1"), tmp_path / "errors")
    deadline = time.monotonic() + 90
    while not (run / "metrics.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield process, run
    process.kill()
    process.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_cleanly_with_everything_saved(
    long_run: tuple[BaseProcess, Path], number: int
) -> None:
    process, run = long_run
    assert process.pid is not None
    os.killpg(process.pid, number)  # as a terminal does: to the workers too
    process.join(60)
    errors = (run.parent / "errors").read_text()
    assert process.exitcode == 128 + number, errors
    assert f"resume={run}" in errors and "Traceback" not in errors
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 0
    step = saved["global_step"]
    assert train(f"resume={run}", f"trainer.max_steps={step + 1}") == 0
    assert (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step + 1
    )


def train_there(folder: Path, *words: str) -> int:
    """As `python train.py *words` in a folder, by which name Lightning starts more processes."""
    sys.argv = [str(ROOT / "train.py"), *words]
    sys.modules["__main__"].__spec__ = None
    os.environ["PYTHONPATH"] = str(ROOT)
    os.chdir(folder)
    return train(*words)


def start_ranks(words: list[str], ranks: int, folder: Path) -> None:
    """As a user does: the first process starts the others."""
    words = [*words, f"trainer.devices={ranks}", "trainer.strategy=ddp"]
    process = started(partial(train_there, folder, *words), folder / "one" / "errors")
    process.join(200)
    assert process.exitcode == 0, (folder / "one" / "errors").read_text()[-2000:]


@pytest.mark.parametrize(
    ("ranks", "sharded"),
    [(2, ()), (2, ("task_vectors.shard=true",)), (3, ("task_vectors.shard=true",))],
)
def test_ddp_equals_one_process_fed_the_same_images(
    base: list[str], tmp_path: Path, ranks: int, sharded: tuple[str, ...]
) -> None:
    words = [*base, "evaluate.baselines=false", "objective=infomax"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(*words, f"batch_size={2 * ranks}", f"run_dir={one}") == 0
    words += [*sharded, "batch_size=2", f"run_dir={two}", "method._target_=tests.tiny.Recording"]
    if sharded:
        train_on_ranks(words, ranks, tmp_path)
    else:
        start_ranks(words, ranks, tmp_path)
    assert coefficients(two) == pytest.approx(coefficients(one), abs=1e-6)
    for alone, together in zip(losses(one), losses(two), strict=True):
        for name in alone:
            assert float(together[name]) == pytest.approx(float(alone[name]), abs=1e-4), name
    seen = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(ranks)]
    assert len(set(seen)) == 1 and len(seen[0].splitlines()) == 6, "one λ per step, the same"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"one", "two", *(f"rank-{rank}.txt" for rank in range(ranks))}


def train_as_a_new_user(folder: Path, *words: str) -> int:
    """No variable, no credentials, nobody at the keyboard."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["HOME"] = str(folder / "home")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return train_there(folder, *words)


def test_wandb_never_asks(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    words = [word for word in base if word != "wandb=off"]
    words += ["wandb.artifact=true", "evaluate.baselines=false", "wandb=auto", "run_dir=run"]
    process = started(partial(train_as_a_new_user, tmp_path, *words), tmp_path / "errors")
    process.join(200)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()[-2000:]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert not (tmp_path / "wandb").exists()


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    job = load_job(config.load_run(done))
    true_fold = type(job.module.method).fold

    def wrong_fold(method: torch.nn.Module) -> torch.nn.Module:
        encoder = true_fold(method)
        next(encoder.parameters()).mul_(1.01)
        return encoder

    monkeypatch.setattr(type(job.module.method), "fold", wrong_fold)
    before = (done / "merged" / "merge.json").read_bytes()
    assert main(["export", str(done)]) == 2
    assert "differ from the trained one by" in capsys.readouterr().err
    assert (done / "merged" / "merge.json").read_bytes() == before
    assert main(["export", str(done), "--to", str(tmp_path / "new")]) == 2
    assert not list(tmp_path.iterdir())


def test_reading_the_readme_way(done: Path) -> None:
    """The exported folder classifies with open_clip and its own heads."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{done / 'merged'}")
    model.eval()
    with safe_open(done / "merged" / "heads.safetensors", "pt") as file:
        head = file.get_tensor("dots")
    dataset = tiny.images("dots")
    images = torch.stack([preprocess(image) for image in dataset["image"]])
    features = model.encode_image(images, normalize=True)
    right = ((features @ head.T).argmax(1) == torch.tensor(dataset["label"][:])).float().mean()
    results = json.loads((done / "results.json").read_text())
    assert results["rows"][-1]["accuracy"]["dots"] == pytest.approx(right.item())
    assert Normalizer([0.5] * 3, [0.5] * 3)(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).min() == -1


def train_with_small_files(*words: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return train(*words)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(
    base: list[str], tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: the merged model does not fit."""
    words = [*base, "evaluate.baselines=false", f"run_dir={tmp_path / 'run'}"]
    process = started(partial(train_with_small_files, *words), tmp_path / "errors")
    process.join(120)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 2, errors
    assert "error: cannot" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not (tmp_path / "run" / "merged").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_crash_while_saving_keeps_the_checkpoint_before(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def crash_at_four(checkpoint: dict[str, Any], file: io.BytesIO) -> None:
        save(checkpoint, file)
        if checkpoint["global_step"] >= 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", crash_at_four)
    run = tmp_path / "run"
    assert train(*base, "checkpoint_every=2", f"run_dir={run}") == 2
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert not list(run.rglob("*.tmp")), "the half file is gone"
    monkeypatch.undo()
    assert train(f"resume={run}", "evaluate.baselines=false") == 0


def test_an_export_carries_a_tokenizers_own_files(done: Path, tmp_path: Path) -> None:
    job = load_job(config.load_run(done))
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text("{}")
    job.suite.clip.extras = (vocabulary,)
    results.export_merged(job, tmp_path / "merged", {}, "")
    assert (tmp_path / "merged" / "vocab.json").read_text() == "{}"


def test_what_goes_to_wandb(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: list[str]
) -> None:
    logged: dict[str, Any] = {}

    class Run:
        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}

        def log_artifact(self, artifact: Any) -> None:
            logged["artifact"] = sorted(artifact.manifest.entries)

    class Stub:
        experiment = Run()

        def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
            logged[key] = [dict(zip(columns, row, strict=True)) for row in data]

        def log_image(self, key: str, images: list[str]) -> None:
            logged[key] = images

    results = json.loads((done / "results.json").read_text())
    pictures = {"coefficients": done / "coefficients.png", "accuracy": done / "accuracy.png"}
    tracking.log_results(Stub(), results, pictures, done / "merged")  # type: ignore[arg-type]
    assert set(logged) == {"results", "coefficients", "accuracy", "artifact"}
    assert logged["results"][-1]["dots"] == results["rows"][-1]["accuracy"]["dots"]
    assert "open_clip_model.safetensors" in logged["artifact"]
    assert Stub.experiment.summary["accuracy/layer_wise"] == results["rows"][-1]["average"]


def test_no_place_to_write(base: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert train(*base, f"run_dir={tmp_path / 'file' / 'run'}") == 2
    assert "error: cannot use" in capsys.readouterr().err
    full = Path("/dev/full")
    if full.exists():
        words = [word for word in base if not word.startswith("cache_dir")]
        assert train(*words, f"cache_dir={full}", f"run_dir={tmp_path / 'run'}") == 2
        assert "error: cannot use" in capsys.readouterr().err


Capture = pytest.CaptureFixture[str]


def test_a_folder_of_a_run_that_never_started_can_be_used_again(
    base: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = [*base, "evaluate.baselines=false", f"run_dir={tmp_path / 'run'}"]
    assert train(*words, "trainer.accelerator=quantum") == 2
    assert "error: trainer: " in capsys.readouterr().err
    assert train(*words) == 0
