"""Where a run's numbers go: a CSV file always, Weights & Biases unless it is off."""

from __future__ import annotations

import csv
import inspect
import io
import logging
import math
import os
import re
import uuid
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
import wandb.apis.public  # which `wandb.init` imports: late, among all other modules, it takes 3 s
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import replacing

log = logging.getLogger("adamerge")

ID_FILE = "wandb_id.txt"  # in a run's folder


def is_main_process() -> bool:
    """Whether this process writes: true but for the further processes of DDP."""
    return getattr(rank_zero_only, "rank", 0) in (None, 0)


class CsvMetrics(Logger):
    """`metrics.csv`: one line per logged step, columns added as metrics appear.

    Unlike Lightning's CSV logger it goes on in the same file when a run is resumed, leaving out
    what had been logged beyond the step resumed from.
    """

    name = version = None  # of an experiment: only what writes more than a file needs them

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        rows = read_metrics(path, first_step) if first_step else []
        self.path, self.rows = path, {int(row["step"]): row for row in rows}
        self._columns: list[str] = []  # of the file that this object has written

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds the metrics to the step's line; they may come later than those of a later step.

        A new last line is added to the file; whatever else changes, it is written anew.
        """
        number, last = int(step or 0), max(self.rows, default=-1)
        line = {"step": str(number)} | self.rows.get(number, {})
        line |= {key: repr(float(v)) for key, v in metrics.items() if key != "epoch"}
        self.rows[number] = line
        if number > last and set(line) <= set(self._columns) and self.path.is_file():
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(line)
        else:
            self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the file at the end, also when nothing was logged."""
        self._write()

    def _write(self) -> None:
        rows = [self.rows[number] for number in sorted(self.rows)]
        self._columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The run folder's `config.yaml` holds them."""


def read_metrics(path: Path, before: float = math.inf) -> list[dict[str, str]]:
    """The lines of a `metrics.csv` of steps earlier than `before`, without empty entries.

    A last line that was not written whole is left out.

    Raises:
        AdamergeError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = [
            {k: v for k, v in row.items() if v not in ("", None)}
            for row in csv.DictReader(io.StringIO(whole, newline=""), strict=True)
        ]
        for row in rows:
            int(row["step"]), [float(value) for value in row.values()]
        return [row for row in rows if int(row["step"]) < before]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        reason = one_line(error, 120)
        raise AdamergeError(
            f"{path} is damaged ({reason}): mend that line, or move the file away to go on without "
            "what was logged before"
        ) from error


def wandb_logger(
    settings: Mapping[str, Any], run_dir: Path, config: dict[str, Any]
) -> WandbLogger | None:
    """A WandbLogger, or None when it is off; never asks anything.

    `auto` is online where credentials are found and offline otherwise; `WANDB_MODE` in the
    environment decides where it is set. A resumed run goes on under its own id.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # before wandb first reads its environment
    mode, main = settings["mode"], is_main_process()
    mode = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    if not mode:
        mode = "online" if _logged_in() else "offline"
    elif mode == "online" and main and not _logged_in():
        raise AdamergeError(
            "wandb=online, but Weights & Biases cannot be reached with credentials of yours: run "
            "`wandb login` first, or set wandb=offline"
        )
    if mode in ("off", "disabled"):
        return None
    id_file = run_dir / ID_FILE
    if main:
        log.info("Weights & Biases: %s", mode)
        if _known_id(id_file) is None:
            with replacing(id_file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:8])
    logger = WandbLogger(
        name=run_dir.name,
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        tags=settings["tags"],
        notes=settings["notes"],
        save_dir=run_dir,
        id=_known_id(id_file),
        mode=mode,  # not offline=: that sets a variable which wandb may have read already
        resume="allow",
    )
    logger.log_hyperparams(config)
    return logger


def _known_id(path: Path) -> str | None:
    """The id in a run's folder; None where there is none, or the file is damaged."""
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    return text if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", text, re.ASCII) else None


def _logged_in() -> bool:
    """Whether W&B's server takes the user's key, or identity token; nobody is asked for one."""
    try:
        settings: dict[str, Any] = {"verify": True}
        if "prompt" in inspect.signature(wandb.login).parameters:
            settings["prompt"] = False
        elif not _has_key():  # without one, older versions ask
            return False
        return bool(wandb.login(**settings))
    except Exception as error:  # no network, a wrong key: none of them stops a run
        log.info("Weights & Biases: offline (%s)", one_line(error, 100))
        return False


def _has_key() -> bool:
    settings = wandb.setup().settings
    given = settings.api_key or settings.identity_token_file
    return bool(given or requests.utils.get_netrc_auth(settings.base_url))


def log_results(
    logger: WandbLogger | None,
    results: Mapping[str, Any],
    pictures: Mapping[str, Path],
    artifact: Path | None,
) -> None:
    """The summary table, pictures and (if given) the exported folder to Weights & Biases."""
    if logger is None:
        return
    run, rows = logger.experiment, results["rows"]
    tasks = list(rows[0]["accuracy"]) if rows else []
    unseen = list(rows[0].get("unseen", ())) if rows else []
    columns = ["model", *tasks, "average", "normalized", *(f"unseen {task}" for task in unseen)]
    table = []
    for row in rows:
        accuracy = [row["accuracy"].get(task) for task in tasks]
        others = [row["unseen"].get(task) for task in unseen]
        table.append([row["name"], *accuracy, row["average"], row["normalized"], *others])
        run.summary[f"accuracy/{row['name']}"] = row["average"]
        if unseen:
            run.summary[f"accuracy_unseen/{row['name']}"] = row["average_unseen"]
    logger.log_table("results", columns, table)
    log_pictures(logger, pictures)
    if artifact is not None:
        item = wandb.Artifact(f"{artifact.parent.name}-merged", type="model")
        item.add_dir(str(artifact))
        run.log_artifact(item)


def log_pictures(logger: WandbLogger | None, pictures: Mapping[str, Path]) -> None:
    """Written pictures to Weights & Biases."""
    if logger is not None:
        for key, path in pictures.items():
            logger.log_image(key, [str(path)])
