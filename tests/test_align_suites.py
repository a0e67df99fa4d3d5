"""Suites of experts without a common start: `align:` with `pretrained: null`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from adamerge import align
from adamerge._base.errors import AdamergeError
from adamerge.cli import main
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.encoders.clip import build_clip
from tests.tiny import CLASSES, make_suite

QUICK = ["evaluate.oracle=false", "preflight=off", "wandb=off", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny suite with whole CLIPs as experts: the first, and a permuted copy of the second."""
    folder = tmp_path_factory.mktemp("apart")
    suite = yaml.safe_load(make_suite(folder).read_text())
    clip = build_clip(str(folder / "model"))
    spec = align.spec(clip.backbone)
    whole = load_file(folder / "model" / "open_clip_model.safetensors")
    for seed, task in enumerate(CLASSES):
        tower: dict[str, Tensor] = load_file(folder / f"{task}.safetensors")
        if seed:
            tower = align.apply(spec, align.drawn(spec, seed=seed), tower)
        state = whole | {f"visual.{name}": tensor for name, tensor in tower.items()}
        save_file(
            {n: t.contiguous() for n, t in state.items()}, folder / f"{task}-whole.safetensors"
        )
        suite["tasks"][task]["expert"] = f"{task}-whole.safetensors"
    suite |= {"pretrained": None, "align": {"_target_": "adamerge.align.weight_matching"}}
    (folder / "apart.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return folder


@pytest.fixture
def words(folder: Path) -> list[str]:
    """For the fixture that trains."""
    return [f"suite={folder / 'apart.yaml'}", f"cache_dir={folder / 'cache'}", *QUICK]


def loaded(words: list[str], *more: str) -> inputs.Suite:
    settings = config.load([*words, *more])
    build.check(settings)
    return inputs.load_suite(settings)


def test_permuted_experts_are_found_again(folder: Path, words: list[str]) -> None:
    suite = loaded(words)
    first, second = (load_file(folder / f"{task}.safetensors") for task in CLASSES)
    vectors = suite.task_vectors
    assert vectors.norms()[0] == 0 and set(vectors.names) == set(first)
    for name in vectors.names:
        torch.testing.assert_close(vectors.pretrained[name], first[name])
        difference = second[name] - first[name]
        torch.testing.assert_close(vectors.deltas[name][1], difference, rtol=0, atol=1e-6)
    assert suite.files["pretrained"]["reference"] == "first of the experts, aligned"


def test_experts_are_aligned_by_their_outputs(folder: Path, words: list[str]) -> None:
    target = "suite.align._target_=adamerge.align.activation_matching"
    suite = loaded(words, target, "statistics.images=20")
    expert, pixels = suite.task_vectors.expert("dots"), torch.randn(4, 3, 16, 16)
    tower = suite.clip.backbone
    first, second = (load_file(folder / f"{task}-whole.safetensors") for task in CLASSES)
    given = {name: second[f"visual.{name}"] for name in expert}
    found, wanted = (functional_call(tower, state, (pixels,)) for state in (expert, given))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    before = sum(float((given[n] - first[f"visual.{n}"]).square().sum()) for n in expert)
    assert float(suite.task_vectors.norms()[1]) < 0.9 * before**0.5


def test_the_mean_is_a_start_too(folder: Path, words: list[str]) -> None:
    vectors = loaded(words, "suite.align.to=mean").task_vectors
    first, second = (load_file(folder / f"{task}.safetensors") for task in CLASSES)
    for name in vectors.names:
        torch.testing.assert_close(vectors.pretrained[name], (first[name] + second[name]) / 2)
        torch.testing.assert_close(vectors.deltas[name].sum(0), torch.zeros_like(first[name]))


def test_heads_are_made_by_the_experts_own_text_towers(folder: Path, words: list[str]) -> None:
    before = loaded(words).heads
    other = load_file(folder / "dots-whole.safetensors")
    other["text_projection"] = -other["text_projection"]
    save_file(other, folder / "other.safetensors")
    after = loaded(words, f"suite.tasks.dots.expert={folder / 'other.safetensors'}").heads
    torch.testing.assert_close(after.weight("dots"), -before.weight("dots"))
    assert torch.equal(after.weight("stripes"), before.weight("stripes"))


@pytest.mark.parametrize("to", ["first", "mean"])
def test_a_run_learns_resumes_and_exports(train: Callable[..., Path], to: str) -> None:
    given = [f"suite.align.to={to}", "trainer.max_steps=2", "checkpoint_every=1"]
    run = train(to, *given)
    assert main(["train", f"resume={run}", "trainer.max_steps=3"]) == 0
    record: dict[str, Any] = json.loads((run / "merged" / "merge.json").read_text())
    assert record["config"]["suite"]["align"]["_target_"].endswith("weight_matching")
    assert record["inputs"]["pretrained"]["reference"] == f"{to} of the experts, aligned"
    assert "aligned" in (run / "merged" / "README.md").read_text()
    assert record["largest_relative_difference"] < 1e-5


def test_check_finds_no_fault_in_aligned_experts(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", *words, "preflight.enabled=true"])
    said = capsys.readouterr().out
    for fault in ("does not come from this pretrained", "times as long", "no surer of its own"):
        assert fault not in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["suite.align._target_=adamerge.align.repair"], "expected|is not a function annotated"),
        (["suite.align.sed=1"], "suite.align.sed is unknown .did you mean 'seed'"),
        (["suite.align.to=last"], "suite.align.to is 'last': expected first or mean"),
        (["suite.align=yes"], "suite.align is True: expected a _target_"),
        (["suite.pretrained=model"], "without a common start, and suite.pretrained names one"),
        (["suite.missing=pretrained"], "suite.missing: with suite.align there is no pretrained"),
        (["suite.align=null"], "suite.pretrained is missing"),
    ],
)
def test_mistakes_are_named(words: list[str], given: list[str], said: str) -> None:
    with pytest.raises(AdamergeError, match=said):
        loaded(words, *given)


def test_towers_that_cannot_be_aligned_are_named(folder: Path, words: list[str]) -> None:
    state = load_file(folder / "dots-whole.safetensors")
    del state["visual.proj"]
    save_file(state, folder / "lacking.safetensors")
    with pytest.raises(AdamergeError, match="lacks"):
        loaded(words, f"suite.tasks.dots.expert={folder / 'lacking.safetensors'}")
    raises = pytest.MonkeyPatch()
    with raises.context() as patch:
        patch.setattr(align, "spec", refuse)
        with pytest.raises(AdamergeError, match=r"may be permuted is not known .*one pretrained"):
            loaded(words)


def refuse(module: torch.nn.Module) -> align.Spec:
    raise AdamergeError("the forward pass cannot be recorded")
