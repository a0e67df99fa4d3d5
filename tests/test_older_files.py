"""Run folders and exports written by an earlier version are read, resumed and scored as then.

`older/run_and_exports.tar.xz` was written by commit 6e1d619: a tiny suite (`tiny.py`), a run of six
steps that ended (`whole/`), the same run killed after its fourth (`half/`), the exports of three
methods, and what their encoders said of three images (`features.safetensors`).
"""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adamerge
from adamerge.cli.command import main

ARCHIVE = Path(__file__).parent / "older" / "run_and_exports.tar.xz"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for path in (path for path in folder.rglob("*") if path.suffix in {".yaml", ".json"}):
        path.write_text(path.read_text().replace("@FOLDER@", str(folder)))
    return folder


def coefficients(path: Path) -> dict[tuple[str, str], float]:
    with path.open(newline="") as file:
        return {
            (row["task"], row["layer"]): float(row["coefficient"]) for row in csv.DictReader(file)
        }


def test_a_killed_run_goes_on_to_the_coefficients_of_then(older: Path) -> None:
    assert main(["train", f"resume={older / 'half'}", "wandb=off", "preflight=off"]) == 0
    found, expected = (coefficients(older / run / "coefficients.csv") for run in ("half", "whole"))
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-6)
    rows = [json.loads((older / run / "results.json").read_text()) for run in ("half", "whole")]
    assert accuracies(rows[0]) == accuracies(rows[1])


def accuracies(results: dict[str, Any]) -> dict[str, list[float]]:
    return {row["name"]: row["accuracy"] for row in results["rows"]}


@pytest.mark.parametrize("run", ["whole", "wemoe", "surgery"])
def test_an_export_computes_what_it_did(older: Path, run: str) -> None:
    merged = adamerge.load(older / run / "merged")
    features = load_file(older / "features.safetensors")
    for row, task in enumerate(("stripes", "dots")):
        with torch.no_grad():
            found = merged.encoder(features["images"], torch.full((3,), row))
        torch.testing.assert_close(found, features[f"{run}/{task}"], rtol=1e-5, atol=1e-6)


def test_a_run_that_ended_is_scored_and_exported_again(older: Path) -> None:
    before = (older / "whole/merged/open_clip_model.safetensors").read_bytes()
    assert main(["export", str(older / "whole")]) == 0
    assert (older / "whole/merged/open_clip_model.safetensors").read_bytes() == before
