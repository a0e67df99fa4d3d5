"""Results of a run or an evaluation, as files and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json
from adamerge.report import keep
from adamerge.report.evaluation import TITLES, Row, average, normalized
from adamerge.report.tables import markdown, number, write_both


def as_json(
    rows: Sequence[Row], suite: str, method: str, protocol: str, seed: int, labels: bool = False
) -> dict[str, Any]:
    """The content of `results.json`; accuracies are fractions.

    Args:
        labels: whether the method learned from true labels.
    """
    experts = next((row for row in rows if row.name == "expert"), Row("expert", {}))
    lines = []
    for row in rows:
        line: dict[str, Any] = {"name": row.name, "accuracy": row.accuracy}
        line["average"] = average(row.accuracy)
        line["normalized"] = normalized(row.accuracy, experts.accuracy)
        if row.adapted is not None:
            line |= {"accuracy_adapted": row.adapted, "average_adapted": average(row.adapted)}
        if row.unseen is not None:
            line |= {"unseen": row.unseen, "average_unseen": average(row.unseen)}
        lines.append(line | row.notes)
    head = {"suite": suite, "method": method, "protocol": protocol, "seed": seed}
    return {**head, **({"labels": True} if labels else {}), "rows": lines}


_PROTOCOL = {
    "paper": "adapted, without labels, on the test images that are scored",
    "heldout": "adapted, without labels, on one half of the test images; the other half is scored",
}


def as_markdown(results: Mapping[str, Any]) -> str:
    """`results.json` as tables in percent: the merged tasks, then the unseen ones if there are."""
    rows = results["rows"]
    tasks, unseen = (list(rows[0].get(key, ())) if rows else [] for key in ("accuracy", "unseen"))
    said = [f"Kept: {keep.sentence(results['kept'])}."] if results.get("kept") else []
    said += [f"Advice: {sentence}." for sentence in results.get("advice", ())]
    if not tasks and not unseen:
        none = f"Suite {results['suite']}: no task has labels, so no accuracy was measured."
        return "\n\n".join([none, *said]) + "\n"
    setting = _PROTOCOL.get(results["protocol"], results["protocol"])
    if results.get("labels"):
        setting = setting.replace("without labels", "with their labels")
    blocks = [
        f"Suite {results['suite']}, accuracy in %; protocol {results['protocol']}: {setting}; "
        f"seed {results['seed']}."
    ]
    if tasks:
        heads = {"average": "average", "normalized": "normalized"}
        if any("average_adapted" in row for row in rows):
            heads["average_adapted"] = "average, adapted half"
        blocks.append(_table(rows, "accuracy", tasks, heads))
    if "exported" in results:
        blocks.append(f"Exported: {results['exported']}.")
    if unseen:
        blocks.append("Unseen tasks: neither merged nor adapted on, all of their images scored.")
        blocks.append(_table(rows, "unseen", unseen, {"average_unseen": "average"}))
    return "\n\n".join([*blocks, *said]) + "\n"


def _table(
    rows: Sequence[Mapping[str, Any]], key: str, tasks: Sequence[str], heads: Mapping[str, str]
) -> str:
    """Accuracies of `row[key]` per task, then the values of `heads` under their titles."""
    lines = [["", *tasks, *heads.values()]]
    for row in rows:
        title = TITLES.get(row["name"], f"**{row['name']}**")
        if "coefficient" in row:
            title = title.replace("best λ", f"best λ = {row['coefficient']}")
        values = [*(row[key].get(task) for task in tasks), *(row.get(head) for head in heads)]
        lines.append([title, *(number(v if v is None else 100 * v, 1) for v in values)])
    return "\n".join(markdown(lines[0], lines[1:]))


def write_results(results: Mapping[str, Any], folder: Path) -> str:
    """Writes `results.json` and `results.md`; returns the table."""
    table = as_markdown(results)
    write_both(folder / "results", results, table)
    return table


def read_results(path: Path, exported: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """A written `results.json` and its table, with another `exported` row, or none."""
    mend = "delete it to export without results, or score the run again by resume="
    written = read_json(path, "results of a run", mend)
    results = {key: value for key, value in written.items() if key != "exported"} | dict(exported)
    try:
        return results, as_markdown(results)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise AdamergeError(f"{path} is not results of a run ({error!r}): {mend}") from error
