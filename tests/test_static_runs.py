"""Published merges without learning: a yaml each, run by `trainer.max_steps=0`, learned on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

import adamerge
from adamerge import AdamergeError, transforms
from adamerge.cli import main
from adamerge.cli.job import load_job
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.encoders.experts import PerTaskEncoder
from adamerge.methods import AdaMerging, Surgery, WEMoE
from adamerge.report.advice import before
from adamerge.weights.storage import Storage
from tests import golden_data as golden
from tests.tiny import learned

Train = Callable[..., Path]
CALIBRATIONS = (
    "featcal",
    "esm_featcal",
    "prodistill",
    "regmean_pp",
)  # have no coefficients to learn on top of
STATIC = [
    name
    for name in config.names("method")
    if "max_steps: 0" in (config.config_root() / "method" / f"{name}.yaml").read_text()
    and name not in CALIBRATIONS
]


@pytest.fixture(scope="module")
def words(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "trainer.accelerator=cpu", "preflight=off", "evaluate.baselines=false",
        "optim.lr=0.05",
    ]  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_every_static_method_merges_by_its_init(name: str, words: list[str]) -> None:
    settings = config.load([*words, f"method={name}"])
    build.check(settings)
    assert settings["trainer"]["max_steps"] == 0
    job = load_job(settings)
    method = job.module.method
    assert isinstance(method, AdaMerging)
    assert (method.coefficients == settings["method"]["init"]).all()
    images = torch.randn(4, 3, 16, 16)
    ids = torch.tensor([0, 0, 1, 1])
    found = method.fold()(images, ids)
    torch.testing.assert_close(found, method(images, ids))
    assert found.isfinite().all()
    with torch.no_grad():
        method.coefficients[0].zero_()  # without the first task
    assert not torch.allclose(found, method(images, ids), atol=1e-3)


def test_no_steps_leave_a_whole_run_to_learn_on(train: Train, words: list[str]) -> None:
    run = train("static", "method=dare")
    results = json.loads((run / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["dare"]
    assert (learned(run)["method.coefficients"] == 0.3).all()
    model = adamerge.load(run / "merged")
    settings = config.load([*words, "method=dare"])
    images = torch.randn(2, 3, 16, 16)
    method = load_job(settings).module.method
    torch.testing.assert_close(model.encoder(images), method.fold()(images), rtol=1e-4, atol=1e-5)
    assert main(["export", str(run), "--to", str(run.parent / "again")]) == 0
    again = adamerge.load(run.parent / "again").encoder(images)
    assert torch.equal(again, model.encoder(images))
    assert main(["train", f"resume={run}"]) == 0  # nothing to do: scored and exported again
    assert main(["train", f"resume={run}", "trainer.max_steps=3"]) == 0
    on_top = train("layer_wise", "method=layer_wise", "trainer.max_steps=3",
                   "transform=[{_target_: adamerge.transforms.dare, density: 0.5}]")  # fmt: skip
    assert not (learned(run)["method.coefficients"] == 0.3).any()
    assert torch.equal(learned(run)["method.coefficients"], learned(on_top)["method.coefficients"])
    assert main(["train", f"resume={run}", "trainer.max_steps=0"]) == 0
    assert torch.equal(learned(run)["method.coefficients"], learned(on_top)["method.coefficients"])


def test_an_encoder_per_task_has_one_row_whichever_way_it_is_asked_for(train: Train) -> None:
    for fold in ("null", "per_task"):
        run = train(f"fold {fold}", "method=emr", f"fold={fold}")
        results = json.loads((run / "results.json").read_text())
        assert [row["name"] for row in results["rows"]] == ["emr"]
        assert adamerge.load(run / "merged").kind == "per_task"
        assert json.loads((run / "merged" / "merge.json").read_text())["fold_is_exact"]


def test_lines_gets_the_experts_own_task_vectors(words: list[str]) -> None:
    steps = "[{_target_: adamerge.transforms.ties}, {_target_: adamerge.transforms.lines}]"
    job = load_job(config.load([*words, "method=lines", f"transform={steps}"]))
    own = job.suite.task_vectors
    wanted = transforms.lines(transforms.ties(own), experts=own).deltas
    method = job.module.method
    assert isinstance(method, AdaMerging)
    for name, tau in method.task_vectors.deltas.items():
        torch.testing.assert_close(tau, wanted[name])


def test_a_task_of_its_own_encoder_gets_its_own_gradient_alone() -> None:
    vectors = transforms.emr(golden.task_vectors())
    method = AdaMerging(golden.clip().backbone, vectors, init=1.0)
    images, ids = golden.batch(0)
    adamerge.objectives.entropy(method(images[ids == 1], ids[ids == 1])).backward()
    grad = method.coefficients.grad
    assert grad is not None and not grad[[0, 2]].any() and grad[1].any()
    weights = cast(PerTaskEncoder, method.fold()).encoders[1].backbone.state_dict()
    for name, tau in vectors.deltas.items():
        torch.testing.assert_close(weights[name], vectors.pretrained[name] + tau[1])


def test_methods_that_add_tasks_up_refuse_an_encoder_per_task(words: list[str]) -> None:
    vectors = transforms.emr(golden.task_vectors())
    with pytest.raises(AdamergeError, match="an encoder of its own for every task, which this"):
        WEMoE(golden.clip().backbone, vectors)
    steps = "transform=[{_target_: adamerge.transforms.tall}]"
    settings = config.load([*words, "method=surgery", steps])
    with pytest.raises(AdamergeError, match="give the finished run"):
        load_job(settings)


def test_nothing_is_made_of_an_encoder_for_each_task_but_other_storage(words: list[str]) -> None:
    own = transforms.twin(golden.task_vectors(torch.float32))
    with pytest.raises(AdamergeError, match=r"\(emr, tall, twin\) makes an encoder of its own"):
        transforms.tsv_m(own)
    assert own.stored(Storage(dtype="bfloat16")).per_task
    steps = "{_target_: adamerge.transforms.emr}, {_target_: adamerge.transforms.tsv_m}"
    settings = config.load([*words, "method=emr", f"transform=[{steps}]"])
    with pytest.raises(AdamergeError, match=r"transform\[0\] \(emr\) makes .*let it be the last"):
        load_job(settings)


def test_surgery_goes_on_a_run_with_an_encoder_per_task(train: Train) -> None:
    base = train("base", "method=emr")
    run = train("surgery", "method=surgery", f"method.base={base}", "trainer.max_steps=2")
    assert adamerge.load(run / "merged").kind == "adapters"
    method = load_job(config.load_run(run)).module.method
    assert isinstance(method, Surgery)


def test_no_objective_is_advised_on_where_none_was_used(train: Train) -> None:
    run = train("advice", "method=task_arithmetic", "method.init=-1", "preflight=on")
    results = json.loads((run / "results.json").read_text())
    assert results["advice"] == [] and "kept" not in results
    start = results["signals"]["before"]
    assert start == results["signals"]["after"]
    assert before("entropy", False, start), "else nothing is shown here"
