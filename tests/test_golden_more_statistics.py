"""Merges by statistics of unlabeled images give the second set's reference numbers."""

from __future__ import annotations

import pytest
import torch

from tests import golden_more_data as more

CHECKS: dict[str, more.Check] = {}

# Keys of those labels that are not compared, and why.
NOT_COMPARED: dict[str, str] = {}

# Labels without a check, and why.
NOT_CHECKED: dict[str, str] = dict.fromkeys(
    [
        "regmean",
        "regmean_full",
        "fisher_exact",
        "fisher_exact_unnormalised",
        "fisher_predicted",
        "fisher_batch_sum",
    ],
    "not here yet",
)


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype) -> None:
    more.run(CHECKS[label], label, dtype, NOT_COMPARED)
