"""A method is one file, one yaml and one row of a table; an objective likewise: shown by adding."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adamerge
from adamerge.cli import main
from tests import test_contract as contract
from tests import tiny

METHOD = '''
"""Coefficients of rank one."""

from torch import Tensor, nn

from adamerge import TaskVectors
from adamerge.methods import MergeMethod


class RankOne(MergeMethod):
    """`W_l = θ0_l + Σ_t a_t b_l τ_t,l` with learnable a `[T]` and b `[L]`."""

    combines = True

    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors, init: float = 0.3) -> None:
        super().__init__(backbone, task_vectors)
        like = task_vectors.pretrained[task_vectors.names[0]]
        self.of_task = nn.Parameter(like.new_full((len(task_vectors.tasks),), init))
        self.of_layer = nn.Parameter(like.new_ones(len(task_vectors.names)))

    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(self.of_task[:, None] * self.of_layer)

    def coefficient_table(self) -> tuple[list[str], Tensor]:
        return list(self.task_vectors.names), (self.of_task[:, None] * self.of_layer).detach()

    def readings(self) -> dict[str, Tensor]:
        return super().readings() | {"spread": self.of_layer.std(), "factor": self.of_task}
'''
OBJECTIVE = '''
"""Predictions that stay what they were."""

import torch
from torch import nn

from adamerge.objectives import Objective, entropy


class Calm(Objective):
    """Entropy with a learned temperature, less for images seen before."""

    sees_image_ids = True

    def __init__(self, heads, images: int = 100):
        super().__init__(heads)
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(len(heads.tasks), images))

    def value(self, features, task, targets, image_ids):
        seen = self.seen[self.heads.tasks.index(task)]
        weight = 1 / (1 + seen[image_ids].mean())
        seen[image_ids] += 1
        return weight * entropy(self.heads.logits(features, task) / self.temperature)
'''


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of settings; the code is in another one, that Python knows."""
    folder = tmp_path_factory.mktemp("added")
    for name in ("code", "settings"):
        (folder / name).mkdir()
    (folder / "code" / "rank_one.py").write_text(METHOD)
    (folder / "code" / "calm.py").write_text(OBJECTIVE)
    (folder / "settings" / "rank_one.yaml").write_text("_target_: rank_one.RankOne\ninit: 0.4\n")
    (folder / "settings" / "calm.yaml").write_text("_target_: calm.Calm\nimages: 60\n")
    sys.path.insert(0, str(folder / "code"))
    yield folder / "settings"
    sys.path.remove(str(folder / "code"))
    for name in ("rank_one", "calm"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def base(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "trainer.max_steps=4", "trainer.accelerator=cpu", "log_every=1",
        "evaluate.baselines=false", "preflight.images=2",
    ]  # fmt: skip


def lines(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_one_row(added: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rank_one

    monkeypatch.setitem(contract.METHODS, "rank_one", lambda b, tv: rank_one.RankOne(b, tv))
    for test in (
        contract.test_fold_keeps_features,
        contract.test_folding_twice_gives_the_same_and_nothing_to_learn,
        contract.test_exactly_the_learnables_get_gradients,
        contract.test_inputs_are_left_unchanged,
        contract.test_a_few_steps_lower_the_objective,
        contract.test_dtype_moves_take_the_task_vectors_along,
        contract.test_same_steps_same_bits,
    ):
        test("rank_one")
    contract.test_micro_batches_do_not_change_the_gradient("rank_one", "InfoMax", 4)
    contract.test_learned_state_round_trips_and_is_small("rank_one", tmp_path)


def test_one_file_and_one_yaml(added: Path, base: list[str], tmp_path: Path) -> None:
    """Training, resuming, the metrics and pictures, and the export come with it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = [*base, f"method={added}/rank_one.yaml"]
    assert main(["train", *words, f"run_dir={whole}"]) == 0
    assert main(["train", *words, "trainer.max_steps=2", f"run_dir={cut}"]) == 0
    assert main(["train", f"resume={cut}", "trainer.max_steps=4"]) == 0
    one, two = tiny.learned(whole), tiny.learned(cut)
    assert set(one) == {"method.of_task", "method.of_layer"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = lines(whole / "metrics.csv")
    tasks = list(tiny.CLASSES)
    assert {"spread", *(f"factor/{task}" for task in tasks)} <= set(rows[0])
    assert [float(rows[0][f"factor/{task}"]) for task in tasks] == pytest.approx([0.4, 0.4])
    assert float(rows[1]["spread"]) > float(rows[0]["spread"]) == 0
    assert {"coefficients.png", "readings.png"} <= {path.name for path in whole.iterdir()}
    table = lines(whole / "merged" / "coefficients.csv")
    expected = one["method.of_task"][0] * one["method.of_layer"][0]
    assert float(table[0]["coefficient"]) == pytest.approx(float(expected))
    assert adamerge.load(whole / "merged").tasks == tuple(tasks)


def test_an_objective_with_learnables_and_a_memory(
    added: Path, base: list[str], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = [*base, f"objective={added}/calm.yaml"]
    assert main(["train", *words, f"run_dir={whole}"]) == 0
    assert main(["train", *words, "trainer.max_steps=3", f"run_dir={cut}"]) == 0
    half = tiny.learned(cut)
    assert main(["train", f"resume={cut}", "trainer.max_steps=4"]) == 0
    one, two = tiny.learned(whole), tiny.learned(cut)
    assert set(one) == {"method.coefficients", "objective.temperature", "objective.seen"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["objective.temperature"], half["objective.temperature"])
    assert one["objective.seen"].sum(1).tolist() == [16.0] * len(tiny.CLASSES), "4 steps of 4"


def test_pictures_of_readings(
    tmp_path: Path, blank_pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from adamerge.report import pictures

    monkeypatch.setattr(Figure, "savefig", blank_pictures)
    path = tmp_path / "metrics.csv"
    path.write_text("step,spread,factor/a,factor/b\n0,1.0,2.0,3.0\n1,1.5,,3.5\n")
    figure = pictures.readings_figure(path, ["spread", "factor", "absent"], ["a", "b"])
    lines = [[line.get_label() for line in axis.lines] for axis in figure.axes]
    assert lines == [["spread"], ["a", "b"], []]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[0, 2.0]]
    pictures.save(figure, tmp_path / "readings.png")
    assert (tmp_path / "readings.png").stat().st_size > 1000
