"""Before training: exchanged experts are named, right ones are left alone, training is the same."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.cli import check, main
from adamerge.cli.job import load_job
from adamerge.config import inputs
from adamerge.config import settings as config
from adamerge.config.inputs import normalizer
from adamerge.config.trainer import run_device
from adamerge.encoders.clip import build_clip, with_other_activation
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower
from adamerge.report import estimate as estimates
from adamerge.report import findings, preflight, tables
from adamerge.report.estimate import Estimate, _held
from adamerge.report.findings import Finding, of_memory
from adamerge.report.preflight import Matrix
from tests import tiny

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
DEMO = Path(__file__).parent.parent / "configs" / "suite" / "demo.yaml"
TASKS = ("digits", "letters", "numbers", "shapes", "textures")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def demo(cache: str) -> Matrix:
    """The demo's five experts on 160 images per task."""
    job = load_job(config.load(["suite=demo", cache, "preflight.images=160"]))
    suite, images = job.suite, preflight.choose(job.data, 160)
    tower, scale = Tower(suite.clip.backbone), normalizer(suite.clip)
    return Matrix(**preflight.measure(tower, suite.task_vectors, suite.heads, scale, images, CPU))


def demo_suite(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """The demo suite with something changed, as `suite=…`."""
    suite = yaml.safe_load(DEMO.read_text())
    shipped = DEMO.parent / suite["architecture"]
    suite["architecture"] = str(shipped)
    suite["pretrained"] = str(shipped / "open_clip_model.safetensors")
    for task, entry in suite["tasks"].items():
        entry["expert"] = str(shipped / f"{task}.safetensors")
    change(suite)
    (folder / "changed.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return f"suite={folder / 'changed.yaml'}"


def view(found: Matrix, rows: list[int], images: Tensor, labels: bool) -> Matrix:
    """The same models in other rows, on some of the images, with or without labels.

    The marginal entropies stay those of all images.
    """
    right = tuple(r[rows][:, images] if labels and r is not None else None for r in found.right)
    entropies = tuple(values[rows][:, images] for values in found.entropies)
    return Matrix(found.tasks, found.classes, entropies, found.marginal[rows], right)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("count", [16, 32, 64])
def test_right_experts_are_left_alone_and_every_exchange_is_named(
    demo: Matrix, count: int, labels: bool
) -> None:
    for seed in range(4):
        picked = torch.randperm(160, generator=torch.Generator().manual_seed(seed))[:count]
        assert not list(findings.of_experts(view(demo, list(range(6)), picked, labels), {}))
        for a, b in itertools.combinations(range(5), 2):
            rows = list(range(6))
            rows[1 + a], rows[1 + b] = rows[1 + b], rows[1 + a]
            found = list(findings.of_experts(view(demo, rows, picked, labels), {}))
            names = {(TASKS[a], TASKS[b]), (TASKS[b], TASKS[a])}
            assert {f.tasks for f in found if f.kind == "exchanged"} == names
            assert all(f.severity == "problem" for f in found if f.kind == "exchanged")


def test_another_checkpoint_of_a_task_in_a_tasks_place_is_named(demo: Matrix) -> None:
    """As once published: one task pointed at another one's expert."""
    for task, other in itertools.permutations(range(5), 2):
        rows = list(range(6))
        rows[1 + task] = 1 + other
        found = list(findings.of_experts(view(demo, rows, torch.arange(64), False), {}))
        assert [f.tasks for f in found] == [(TASKS[task], TASKS[other])]


def test_check_names_exchanged_paths_and_fails(cache: str, tmp_path: Path, capsys: Capture) -> None:
    def exchange(suite: dict[str, Any]) -> None:
        digits, shapes = suite["tasks"]["digits"], suite["tasks"]["shapes"]
        digits["expert"], shapes["expert"] = shapes["expert"], digits["expert"]
        for task in ("letters", "numbers", "textures"):
            del suite["tasks"][task]

    suite, to = demo_suite(tmp_path, exchange), tmp_path / "report"
    assert main(["check", suite, cache, "preflight.images=16", "--to", str(to)]) == 1
    out = capsys.readouterr().out
    for task, other in (("digits", "shapes"), ("shapes", "digits")):
        assert f"the expert of task {task!r} (" in out
        assert f"{other}.safetensors) looks like the expert of task {other!r}: on the im" in out
    assert "did you exchange the paths?" in out
    written = json.loads((to / "preflight.json").read_text())
    assert [f["tasks"] for f in written["findings"]] == [["digits", "shapes"], ["shapes", "digits"]]
    assert written["entropy"]["digits"]["shapes"] < 0.1 < written["entropy"]["digits"]["digits"]
    assert (to / "preflight.md").read_text() == out


def test_check_of_the_demo_finds_nothing(cache: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["check", "suite=demo", cache, "preflight.images=16"]) == 0
    out = capsys.readouterr().out
    assert "0 problems, 0 warnings" in out and "estimated on " in out and "60 steps ≈ " in out
    assert "56 layers, 0.83 M parameters, float32; bfloat16: digits, letters" in out
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def base(suite: Path, cache: str) -> list[str]:
    return [
        f"suite={suite}", cache, "wandb=off", "batch_size=4", "log_every=2",
        "trainer.max_steps=4", "trainer.accelerator=cpu", "evaluate.baselines=false",
    ]  # fmt: skip


def test_tables_equal_open_clip_image_by_image(
    base: list[str], suite: Path, tmp_path: Path
) -> None:
    main(["check", *base, "preflight.images=12", "--to", str(tmp_path)])
    found = json.loads((tmp_path / "preflight.json").read_text())
    images = preflight.choose(load_job(config.load(base)).data, 12)
    name = f"local-dir:{suite.parent / 'model'}"
    tokenizer, scale = open_clip.get_tokenizer(name), tiny.PREPROCESS
    deltas = {}
    for row in ("pretrained", *tiny.CLASSES):
        file = {} if row == "pretrained" else {
            "pretrained_image_path": str(suite.parent / f"{row}.safetensors")
        }  # fmt: skip
        model, *_ = open_clip.create_model_and_transforms(name, **file)
        model.eval()
        deltas[row] = torch.cat([p.detach().double().flatten() for p in model.visual.parameters()])
        for task, classes in tiny.CLASSES.items():
            head = open_clip.build_zero_shot_classifier(
                open_clip.create_model_and_transforms(name)[0].eval(),
                tokenizer,
                classes,
                ["a photo of {}.", "{}"],
            )
            entropies, right = [], 0
            for image, label in zip(images.pixels[task], images.labels[task], strict=True):
                pixels = image / 255 - torch.tensor(scale["mean"]).view(3, 1, 1)
                pixels = pixels / torch.tensor(scale["std"]).view(3, 1, 1)
                with torch.no_grad():
                    features = model.encode_image(pixels[None], normalize=True)
                    p = (features @ head * model.logit_scale.exp()).softmax(-1)[0].double()
                entropies.append(float(-(p * p.log()).sum()) / math.log(len(classes)))
                right += int(p.argmax() == label)
            assert found["entropy"][row][task] == pytest.approx(sum(entropies) / 12, rel=1e-4)
            assert found["accuracy"][row][task] == pytest.approx(right / 12)
    a, b = (deltas[task] - deltas["pretrained"] for task in tiny.CLASSES)
    cosine = float(a @ b / a.norm() / b.norm())
    assert found["task_vector_cosines"]["stripes"]["dots"] == pytest.approx(cosine, abs=1e-6)
    assert found["task_vector_norms"]["dots"] == pytest.approx(float(b.norm()), rel=1e-6)
    assert found["pretrained_norm"] == pytest.approx(float(deltas["pretrained"].norm()), rel=1e-6)


def read(run: Path) -> list[list[str]]:
    """Coefficients and losses of a run, as written."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [[row["loss"], row["gradient_norm"]] for row in csv.DictReader(file)]
    with (run / "coefficients.csv").open(newline="") as file:
        return rows + list(csv.reader(file))


@pytest.mark.parametrize("words", [[], ["objective=infomax", "micro_batch=3"]])
def test_training_is_the_same_to_the_bit_with_and_without(
    base: list[str], tmp_path: Path, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    on, off = tmp_path / "on", tmp_path / "off"
    assert main(["train", *base, *words, "preflight.images=8", f"run_dir={on}"]) == 0
    assert (on / "preflight.json").is_file() and "pre-flight of suite tiny: " in caplog.text
    caplog.clear()
    assert main(["train", *base, *words, "preflight=off", f"run_dir={off}"]) == 0
    assert not (off / "preflight.json").exists() and "pre-flight" not in caplog.text
    assert read(on) == read(off)
    saved = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (on, off)]
    for key in ("torch", "python", "numpy"):
        first, second = (str(checkpoint["adamerge"]["rng"][key]) for checkpoint in saved)
        assert first == second, key


def test_a_resumed_run_is_not_looked_at_again(base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *base, "preflight.images=4", f"run_dir={run}"]) == 0
    for name in ("preflight.json", "preflight.md"):
        (run / name).unlink()
    assert main(["train", f"resume={run}", "trainer.max_steps=5"]) == 0
    assert not (run / "preflight.json").exists()


def test_look_changes_nothing_in_a_job(base: list[str]) -> None:
    job = load_job(config.load([*base, "preflight.images=4"]))
    method = job.module.method
    before, mode = method.coefficients.detach().clone(), method.training
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = check.report_of(job)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(method.coefficients, before) and method.coefficients.grad is None
    assert method.training is mode
    cost = Estimate(**report["estimate"])
    assert cost.steps == 4
    weights = sum(t.numel() for t in job.suite.task_vectors.pretrained.values()) * 4
    assert cost.memory > 5 * weights, "pretrained, two task vectors, W and gradient"
    assert cost.seconds is not None and cost.seconds > 0


@dataclasses.dataclass
class Holder:
    anything: Any


@pytest.mark.parametrize(
    ("keep", "whole"),
    [
        (lambda vectors: {"other_name": vectors}, True),
        (lambda vectors: {"holder": Holder((vectors,))}, True),
        (lambda vectors: {"one": vectors, "task_vectors": vectors, "all": [vectors]}, True),
        (lambda vectors: {"stack": list(vectors.deltas.values())}, False),
        (lambda vectors: {"by_name": {"deltas": dict(vectors.deltas)}}, False),
    ],
)
def test_memory_counts_task_vectors_wherever_a_method_keeps_them(
    base: list[str], keep: Callable[[Any], dict[str, Any]], whole: bool
) -> None:
    vectors = inputs.load_suite(config.load(base)).task_vectors
    bases = vectors.pretrained.values() if whole else ()

    def held(attributes: dict[str, Any]) -> int:
        module: Any = torch.nn.ModuleDict({"method": torch.nn.Linear(2, 2)})
        for name, value in attributes.items():
            setattr(module["method"], name, value)
        return _held(module)

    wanted = vectors.nbytes() + sum(tensor.nbytes for tensor in bases)
    assert held(keep(vectors)) - held({}) == wanted


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_activations_are_counted_for_the_images_encoded_together(
    base: list[str], micro_batch: int | None
) -> None:
    def memory(batch_size: int) -> int:
        words = [*base, f"batch_size={batch_size}", f"micro_batch={micro_batch or 'null'}"]
        report = check.report_of(load_job(config.load([*words, "preflight.images=2"])))
        return int(report["estimate"]["memory"])

    small, large = memory(4), memory(8)
    assert large == small if micro_batch else large > small


def wrong_activation(x: Tensor) -> Tensor:
    return x / 2


@pytest.mark.parametrize("flag", [True, False])
def test_a_confused_activation_is_suspected(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: bool
) -> None:
    """The demo, trained with GELU, hardly reacts to QuickGELU: another function stands for it."""
    quick = open_clip.transformer.QuickGELU
    monkeypatch.setattr(quick, "forward", lambda self, x: wrong_activation(x))
    folder = tmp_path / "model"
    shutil.copytree(DEMO.parent.parent.parent / "checkpoints" / "demo", folder)
    written = json.loads((folder / "open_clip_config.json").read_text())
    written["model_cfg"]["quick_gelu"] = flag
    (folder / "open_clip_config.json").write_text(json.dumps(written))

    def use(suite: dict[str, Any]) -> None:
        suite["architecture"] = str(folder)

    words = [demo_suite(tmp_path, use), cache, "preflight.images=16"]
    report = check.report_of(load_job(config.load(words)))
    texts = [f["text"] for f in report["findings"] if f["kind"] == "activation"]
    assert len(texts) == flag
    if flag:
        assert "set model_cfg.quick_gelu to false in the model config at" in texts[0]


def test_the_mend_of_a_built_in_architecture(base: list[str]) -> None:
    job = load_job(config.load(base))
    for name, quick, other in (
        ("ViT-B-32", False, "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", True, "ViT-B-32"),
    ):
        job.settings["suite"]["architecture"] = name
        job.suite.clip.config["model_cfg"]["quick_gelu"] = quick
        assert check._mend(job) == f"set suite.architecture to {other}"
        assert other in open_clip.list_models()


def test_the_other_activation_is_what_open_clip_builds(suite: Path, tmp_path: Path) -> None:
    own = build_clip(str(suite.parent / "model"))
    quick = {"model_cfg": {**tiny.MODEL, "quick_gelu": True}, "preprocess_cfg": tiny.PREPROCESS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(quick))
    other = build_clip(str(tmp_path))
    other.model.load_state_dict(own.model.state_dict())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for clip, expected in ((own, other), (other, own)):
        tower = with_other_activation(clip.backbone)
        assert tower is not None
        features = tower(clip.backbone.state_dict(), images)
        wanted = expected.backbone(images)
        off = (features - wanted).abs().max()
        assert off < 1e-3 * (wanted - clip.backbone(images)).abs().max(), "rounding, no more"
        assert not torch.equal(features, clip.backbone(images))
    assert with_other_activation(torch.nn.Linear(2, 2)) is None


def table(entropies: list[list[float]], right: list[list[float]] | None = None) -> Matrix:
    """Two tasks of ten classes, 20 images that are all alike; rows: pretrained, a, b."""
    values = torch.tensor(entropies, dtype=torch.float64)
    each = tuple(values[:, t, None].expand(-1, 20) for t in range(2))
    places = torch.arange(20) / 20
    hits = [
        None if right is None else places < torch.tensor([r[t] for r in right])[:, None]
        for t in range(2)
    ]
    return Matrix(("a", "b"), (10, 10), each, torch.ones(3, 2, dtype=torch.float64), tuple(hits))


def kinds(found: Matrix) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(f.severity, f.kind, f.tasks) for f in findings.of_experts(found, {"a": "a.pt"})]


FINE = [[0.5, 0.5], [0.1, 0.5], [0.5, 0.1]]


def test_labels_overrule_the_entropy() -> None:
    surer_but_wrong = [[0.5, 0.5], [0.3, 0.5], [0.1, 0.1]]
    assert kinds(table(surer_but_wrong))[0] == ("problem", "not-the-best", ("a",))
    assert not kinds(table(surer_but_wrong, [[0.5, 0.5], [0.9, 0.5], [0.6, 0.9]]))
    by_labels = kinds(table(FINE, [[0.5, 0.5], [0.5, 0.5], [1.0, 0.9]]))
    assert by_labels == [("problem", "not-the-best", ("a",))]


def test_an_expert_that_does_not_lower_the_entropy_is_a_warning() -> None:
    idle = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.1]]
    assert kinds(table(FINE)) == []
    assert kinds(table(idle)) == [("warning", "not-below-pretrained", ("a",))]
    assert not kinds(table(idle, [[0.5, 0.5], [0.9, 0.5], [0.5, 0.9]])), "but more are right"
    (finding,) = findings.of_experts(table(idle), {"a": "a.pt"})
    assert "(a.pt) is no surer of its own images than the pretrained model" in finding.text


def test_collapse_chance_and_nan() -> None:
    collapsed = table(FINE)
    collapsed.marginal[1, 0] = 0.05
    assert ("warning", "collapsed", ("a",)) in kinds(collapsed)
    chance = table(FINE, [[0.1, 0.5], [0.1, 0.5], [0.1, 0.9]])
    assert kinds(chance) == [("problem", "at-chance", ("a",))]
    nan = table([[0.5, 0.5], [float("nan"), 0.5], [0.5, 0.1]])
    assert kinds(nan) == [("problem", "not-finite", ("a",))]


def test_a_lower_entropy_by_collapse_is_no_better_expert() -> None:
    found = table([[0.5, 0.5], [0.3, 0.5], [0.1, 0.1]])
    found.marginal[2, 0] = 0.2
    assert kinds(found) == []


def test_task_vectors_that_are_alike_or_odd() -> None:
    cosines = torch.tensor([[1.0, 0.97, 0.1], [0.97, 1.0, 0.2], [0.1, 0.2, 1.0]])
    (found,) = findings.of_directions("abc", cosines)
    assert found.severity == "problem" and found.tasks == ("a", "b")
    assert (
        "tasks 'a' and 'b' are nearly the same (cosine of their task vectors 0.970)" in found.text
    )
    (found,) = findings.of_lengths("abc", torch.tensor([1.0, 1.5, 40.0]))
    assert found.severity == "warning" and found.tasks == ("c",)
    assert "'c' is 27 times as long as the median one" in found.text
    (found,) = findings.of_lengths("abc", torch.tensor([1.0, 1.5, 0.01]))
    assert "'c' is 0.01 times as long" in found.text
    assert not list(findings.of_lengths("a", torch.tensor([1.0])))


def test_classes_with_one_embedding_are_named() -> None:
    rows = torch.eye(4)[[0, 1, 1, 2]] * 50 + 0.1
    names = {"a": ["one", "two", "zwei", "three"], "b": ["one", "two", "three", "four"]}
    heads = Heads({"a": rows, "b": torch.eye(4) + 0.2}, names)
    (finding,) = findings.of_heads(heads)
    assert finding.tasks == ("a",) and finding.severity == "warning"
    assert "'zwei' and 'two': their" in finding.text and "more pairs" not in finding.text
    (finding,) = findings.of_heads(Heads({"a": torch.ones(4, 2)}, names))
    assert "and 3 more pairs" in finding.text


def test_few_images_doubt_no_expert() -> None:
    idle = table([[0.5, 0.5], [0.5, 0.5], [0.5, 0.1]])
    some = torch.arange(16)
    assert kinds(view(idle, [0, 1, 2], some, False)) == kinds(idle) != []
    assert kinds(view(idle, [0, 1, 2], some[1:], False)) == []


def test_estimates_in_words() -> None:
    estimate = Estimate(1_900_000_000, 23_000_000_000, 0.21, 300, "cpu")
    assert estimate.text() == (
        "estimated on cpu: 1.9 GB of memory (23 GB here), 0.21 s per step, 300 steps ≈ 1 min 3 s"
    )
    assert not list(of_memory(estimate))
    (found,) = of_memory(Estimate(30_000_000_000, 23_000_000_000, 40.0, 300, "cpu"))
    assert isinstance(found, Finding) and found.severity == "problem"
    assert "needs about 30 GB of memory and there are 23 GB: set micro_batch" in found.text
    assert Estimate(2_000_000, None, 40.0, 300, "mps").text().endswith("300 steps ≈ 3 h 20 min")


def test_a_gpu_that_is_too_small_is_said(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    job = load_job(config.load([*base, "preflight.images=2"]))
    monkeypatch.setattr("adamerge.report.estimate.step_loss", too_much)
    report = check.report_of(job)
    assert report["estimate"] is None and "estimated" not in tables.as_markdown(report)
    (found,) = (f for f in tables.problems(report) if f["kind"] == "memory")
    assert "two images per task are more than the GPU's memory holds" in found["text"]


@pytest.mark.parametrize("available", [10**12, 1000])
def test_a_step_is_taken_where_memory_does(
    base: list[str], available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there: a CPU's memory that does not do ends the process."""
    taken, step = [], estimates.step_loss

    def counted(method: Any, objective: Any, images: Tensor, *more: Any) -> Any:
        taken.append(len(images))
        return step(method, objective, images, *more)

    monkeypatch.setattr(estimates, "step_loss", counted)
    monkeypatch.setattr(estimates, "memory_available", lambda device: available)
    monkeypatch.setattr(estimates, "_held", lambda module: 0)
    report = check.report_of(load_job(config.load([*base, "preflight.images=3"])))
    wrong, seconds = tables.problems(report), report["estimate"]["seconds"]
    if available > 1000:
        assert taken == [2, 4, 8] and seconds > 0 and not wrong
    else:
        assert taken == [2, 4] and seconds is None
        assert "per step" not in tables.as_markdown(report)
        assert [finding["kind"] for finding in wrong] == ["memory"]


def test_the_switch_and_its_mistakes(base: list[str]) -> None:
    assert config.load(["preflight=off"])["preflight"] == {"enabled": False, "images": 64}
    assert config.load(["preflight=true"])["preflight"]["enabled"] is True
    for word, message in (
        ("preflight.images=0", "preflight.images is 0: expected at least 1"),
        ("preflight=7", "preflight.enabled is 7: expected bool"),
        ("preflight.image=4", r"preflight.image is unknown \(did you mean 'images'\?\)"),
    ):
        with pytest.raises(AdamergeError, match=message):
            check.check([*base, word])


def test_the_device_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for settings, device in (
        ({"accelerator": "auto", "devices": 1}, "cuda:0"),
        ({"accelerator": "gpu", "devices": [2]}, "cuda:2"),
        ({"accelerator": "gpu", "devices": "1,"}, "cuda:1"),
        ({"accelerator": "gpu", "devices": "3, 1"}, "cuda:3"),
        ({"accelerator": "gpu", "devices": "2"}, "cuda:0"),
        ({"accelerator": "gpu", "devices": -1}, "cuda:0"),
        ({"accelerator": "cpu", "devices": 1}, "cpu"),
        ({"accelerator": "gpu", "devices": 2, "strategy": "ddp_fork"}, "cpu"),
    ):
        assert run_device(settings) == torch.device(device)
