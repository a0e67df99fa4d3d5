"""Merges without data give the second set's reference numbers; every label of it is accounted for.

The other families stand in `test_golden_more_*.py`, each with its own `CHECKS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from adamerge import transforms
from tests import golden_data as golden
from tests import golden_more_data as more


def metagpt(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    found = transforms.metagpt(vectors)
    plain = torch.stack([d.double().flatten(1).square().sum(1) for d in vectors.deltas.values()])
    more.agrees((plain.sum(0) / plain.sum()).to(dtype), "metagpt/coefficients")
    more.check_merge("metagpt", found)


CHECKS: dict[str, more.Check] = {"metagpt": metagpt}

# Keys of those labels that are not compared, and why.
NOT_COMPARED: dict[str, str] = {}

# Labels without a check, and why.
NOT_CHECKED: dict[str, str] = {
    **dict.fromkeys(("adarank_ta", "adarank_cart"), "AdaRank: not here yet"),
    **dict.fromkeys(("concrete_adam", "concrete_sgd"), "Concrete: not here yet"),
    "atlas": "coefficients per partition: not here yet",
    "prodistill": "ProDistill: not here yet",
    "symerge": "SyMerge: not here yet",
    "fixmatch": "an objective of two views: not here yet",
    **dict.fromkeys(("expert_labels", "expert_labels_sure"), "an objective: not here yet"),
    **dict.fromkeys(("sam", "sam_adaptive"), "an update: not here yet"),
    **dict.fromkeys(("featcal", "regmean_pp"), "a calibration: not here yet"),
    **dict.fromkeys(
        [
            "dare",
            "della",
            "breadcrumbs",
            "breadcrumbs_rows",
            "emr",
            "magmax",
            "tall",
            "consensus",
            "pcb",
            "pcb_readme",
            "model_stock",
            "lines",
            "slerp",
            "multislerp",
            "karcher",
        ],
        "not here yet",
    ),
}


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype) -> None:
    more.run(CHECKS[label], label, dtype, NOT_COMPARED)


def test_every_label_is_checked_or_has_a_reason() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_golden_more*.py"))
    families = [importlib.import_module(f"tests.{name}") for name in names]
    accounted = [label for f in families for label in (*f.CHECKS, *f.NOT_CHECKED)]
    assert sorted(accounted) == list(more.labels())


def test_the_folders_fit_together() -> None:
    assert more.lists("tasks") == golden.TASKS
    assert more.lists("layers") == golden.task_vectors().names
