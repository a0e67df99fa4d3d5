"""Closed-form calibration as methods and as whole runs; runs that ask for statistics."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adamerge
from adamerge import AdamergeError
from adamerge.cli import main
from adamerge.cli.job import Job, load_job
from adamerge.config import settings as config
from adamerge.config.statistics import statistics
from adamerge.encoders import Experts, Tower, merged_encoder, static_encoder
from adamerge.methods import FeatCal, ProDistill, RegMeanPP, WEMoE
from adamerge.methods.calibration.base import Calibration
from tests import golden_data as golden
from tests.processes import train_on_ranks
from tests.test_golden_more_statistics import images
from tests.tiny import learned

Train = Callable[..., Path]
CALIBRATIONS: dict[str, Callable[..., Calibration]] = {
    "featcal": FeatCal,
    "prodistill": functools.partial(ProDistill, epochs=30),
    "regmean_pp": RegMeanPP,
}
RUNS = {name: [f"method={name}"] for name in CALIBRATIONS}
RUNS["prodistill"] += ["method.epochs=2"]
every = pytest.mark.parametrize("name", CALIBRATIONS)


@pytest.fixture(scope="module")
def words(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "trainer.accelerator=cpu", "preflight=off", "evaluate.baselines=false",
        "optim.lr=0.05", "statistics.images=8",
    ]  # fmt: skip


def job_of(words: list[str], *own: str) -> Job:
    return load_job(config.load([*words, *own]))


def make(name: str, dtype: torch.dtype = torch.float64, **settings: float) -> Calibration:
    vectors, backbone = golden.task_vectors(dtype), golden.clip().backbone
    start = merged_encoder(Tower(backbone), vectors, 0.3)
    return CALIBRATIONS[name](start, Experts(backbone, vectors), images(dtype, 1), **settings)


@every
def test_it_has_nothing_to_learn_and_folds_exactly(name: str) -> None:
    method = make(name)
    assert not method.has_learnables and not method.state_dict() and not list(method.parameters())
    batch, ids = golden.batch(0)
    features = method(batch, ids)
    assert torch.equal(method.fold()(batch), features) and not features.requires_grad
    assert torch.equal(make(name)(batch, ids), features)
    moved = method.float()
    assert moved(batch.float(), ids).dtype == torch.float32
    torch.testing.assert_close(moved(batch.float(), ids).double(), features, rtol=1e-4, atol=1e-4)
    before = make(name, torch.float32).double()  # moved before it is calibrated
    torch.testing.assert_close(before(batch, ids), features, rtol=1e-3, atol=1e-3)


@every
def test_it_brings_features_to_the_experts(name: str) -> None:
    method = make(name)
    vectors, tower = golden.task_vectors(), Tower(golden.clip().backbone)
    start, found = merged_encoder(tower, vectors, 0.3), method.fold()
    for task, (batch,) in images(torch.float64, 1).items():
        wanted = static_encoder(tower, vectors, task)(batch)
        assert (found(batch) - wanted).norm() < (start(batch) - wanted).norm()


def test_much_ridge_keeps_the_anchor() -> None:
    """Extrapolated from the pretrained weights through the merge; 1 is the merge itself."""
    start = golden.state("pretrained", torch.float64)
    tower, vectors = Tower(golden.clip().backbone), golden.task_vectors()
    merged = merged_encoder(tower, vectors, 0.3).backbone.state_dict()
    for factor in (1.0, 2.0):
        held = make("featcal", ridge=1e6, extrapolation=factor).weights()
        for key, tensor in merged.items():
            inside = key.startswith("transformer.resblocks")
            anchor = start[key] + (factor if inside else 1.0) * (tensor - start[key])
            torch.testing.assert_close(held[key], anchor, rtol=0, atol=1e-4)


@every
def test_it_is_a_whole_run(name: str, train: Train, words: list[str], tmp_path: Path) -> None:
    run = train("run", *RUNS[name], "preflight.enabled=true", "preflight.images=2")
    results = json.loads((run / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [name] and learned(run) == {}
    model = adamerge.load(run / "merged")
    assert model.kind == "static"
    batch = torch.randn(2, 3, 16, 16)
    method = job_of(words, *RUNS[name]).module.method
    torch.testing.assert_close(model.encoder(batch), method.fold()(batch), rtol=1e-4, atol=1e-5)
    assert main(["export", str(run), "--to", str(tmp_path / "again")]) == 0
    assert torch.equal(adamerge.load(tmp_path / "again").encoder(batch), model.encoder(batch))
    assert main(["train", f"resume={run}"]) == 0


@every
def test_two_processes_give_what_one_gives(name: str, train: Train, words: list[str]) -> None:
    one = train("one", *RUNS[name])
    train_on_ranks([*words, *RUNS[name], f"run_dir={one.parent / 'two'}"], 2, one.parent)
    batch = torch.randn(2, 3, 16, 16)
    one_model, two_model = (adamerge.load(one.parent / run / "merged") for run in ("one", "two"))
    assert torch.equal(one_model.encoder(batch), two_model.encoder(batch))


@every
def test_images_that_end_or_are_not_finite_are_refused(name: str) -> None:
    vectors, backbone = golden.task_vectors(), golden.clip().backbone
    start, given = merged_encoder(Tower(backbone), vectors, 0.3), images(torch.float64, 1)
    made = functools.partial(CALIBRATIONS[name], start, Experts(backbone, vectors))
    ending = {**given, "task_b": iter(given["task_b"])}
    with pytest.raises(AdamergeError, match="images of task 'task_b' are an iterator"):
        made(ending).fold()
    spoilt = {**given, "task_c": [given["task_c"][0] * torch.nan]}
    with pytest.raises(AdamergeError, match="'task_c' give NaN or infinite numbers to block 0"):
        made(spoilt).fold()


def test_directions_that_no_image_gives_stay_those_of_the_encoder() -> None:
    vectors, backbone = golden.task_vectors(), golden.clip().backbone
    start = merged_encoder(Tower(backbone), vectors, 0.3)
    few = {task: [batch[:1]] for task, (batch,) in images(torch.float64, 1).items()}
    method = RegMeanPP(start, Experts(backbone, vectors), few, off_diagonal=1.0)
    before, after = start.backbone.state_dict(), method.weights()
    name = "transformer.resblocks.0.mlp.c_proj.weight"
    seen: list[torch.Tensor] = []
    blocks = method.blocks
    for task in vectors.tasks:
        tokens = blocks.embed(before, few[task][0])
        own = method.experts.weights(task)
        blocks.run(0, own, tokens, lambda n, x: seen.append(x.flatten(0, 1)) if n == name else None)
    rows = torch.cat(seen)
    unseen = torch.linalg.svd(rows).Vh[torch.linalg.matrix_rank(rows) :]
    assert len(unseen)
    torch.testing.assert_close(after[name] @ unseen.T, before[name] @ unseen.T, rtol=0, atol=1e-3)


def test_it_calibrates_the_merge_of_another_run(train: Train, words: list[str]) -> None:
    base = train("base", "method=layer_wise", "trainer.max_steps=2")
    run = train("run", "method=featcal", f"method.base={base}")
    start = adamerge.load(base / "merged").encoder.backbone.state_dict()
    found = adamerge.load(run / "merged").encoder.backbone.state_dict()
    changed = {key for key in start if not torch.equal(start[key], found[key])}
    assert changed == {key for key in start if key.startswith("transformer.resblocks")}
    assert "base" in json.loads((run / "merged" / "merge.json").read_text())["inputs"]


def test_it_calibrates_what_a_transform_merges_towards_the_experts_themselves(
    words: list[str],
) -> None:
    steps = "transform=[{_target_: adamerge.transforms.regmean}]"
    static = job_of(words, "method=regmean").module.method.fold().backbone.state_dict()
    job = job_of(words, "method=featcal", steps, "method.init=1", "method.ridge=1e6",
                 "method.extrapolation=1")  # fmt: skip
    held = job.module.method.weights()  # at the merge
    for key, tensor in static.items():
        torch.testing.assert_close(held[key], tensor, rtol=1e-4, atol=1e-4)
    experts = [job_of(words, "method=featcal", *own).module.method for own in ([], [steps])]
    assert all(isinstance(method, FeatCal) for method in experts)
    first, second = (method.experts.task_vectors.deltas["proj"] for method in experts)
    assert torch.equal(first, second)


def test_it_starts_from_the_mean_where_init_is_null(words: list[str]) -> None:
    job = job_of(words, "method=regmean_pp")
    vectors, weights = job.suite.task_vectors, job.module.method.weights()
    for key, tau in vectors.deltas.items():
        if not key.startswith("transformer.resblocks") or tau.ndim == 2:
            torch.testing.assert_close(weights[key], vectors.pretrained[key] + tau.mean(0))


def test_what_a_run_asked_for_is_in_its_fingerprint(
    train: Train, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("run", "method=regmean")
    assert main(["train", f"resume={run}", "statistics.images=9"]) == 2
    assert "statistics.images was 8, is 9" in capsys.readouterr().err
    assert not any("statistics" in key for key in job_of(words).fingerprint())


def test_regmean_is_a_start_of_learning(train: Train, tmp_path: Path) -> None:
    static = train("static", "method=regmean")
    assert main(["train", f"resume={static}", "trainer.max_steps=2"]) == 0
    steps = "transform=[{_target_: adamerge.transforms.regmean}]"
    whole = train("whole", "method=layer_wise", "method.init=1", "trainer.max_steps=2", steps)
    found, wanted = (learned(run)["method.coefficients"] for run in (static, whole))
    assert torch.equal(found, wanted) and not (wanted == 1).any()


def test_images_are_chosen_by_the_seed_out_of_those_adapted_on(words: list[str]) -> None:
    def chosen(*own: str) -> dict[str, torch.Tensor]:
        job = job_of(words, "method=task_wise", *own)
        found = statistics(job.settings, job.suite, job.data)["images"]()
        rows = {task: list(found[task]) for task in found}
        assert all(
            torch.equal(*pair) for t in found for pair in zip(rows[t], found[t], strict=True)
        )
        return {task: torch.cat(batches) for task, batches in rows.items()}

    first, again, other = chosen(), chosen(), chosen("seed=1")
    assert {len(batch) for batch in first.values()} == {8}
    for task, batch in first.items():
        assert torch.equal(batch, again[task]) and not torch.equal(batch, other[task])
    everything = chosen("statistics.images=1000", "protocol=heldout")
    assert {len(batch) for batch in everything.values()} == {20}  # half of each task's


def test_wrong_settings_get_a_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for own, sentence in (
        ("trainer.max_steps=3", "FeatCal has nothing to learn: set trainer.max_steps=0"),
        ("method.mix=2", "featcal: mix is 2, expected a number in [0, 1]"),
        ("method.init=much", "method.init is 'much': expected a finite number, or null"),
        ("statistics.images=0", "statistics.images is 0: expected"),
        ("method.ridge=-1", "featcal: ridge is -1, expected"),
    ):
        assert main(["train", *words, "method=featcal", own]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(AdamergeError, match=r"epochs is 1\.5, expected a whole number in"):
        make("prodistill", epochs=1.5)
    backbone, vectors = golden.clip().backbone, golden.task_vectors()
    routed = WEMoE(backbone, vectors).fold()
    with pytest.raises(AdamergeError, match="FeatCal starts from one static encoder, not from a"):
        FeatCal(routed, Experts(backbone, vectors), images(torch.float64, 1))
    with pytest.raises(AdamergeError, match="no images of task 'task_a'"):
        FeatCal(
            merged_encoder(Tower(backbone), vectors, 0.3), Experts(backbone, vectors), {}
        ).fold()
