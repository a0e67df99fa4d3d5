"""What is wrong with settings beside each other, each of which would do by itself."""

from __future__ import annotations

from adamerge._base.errors import AdamergeError
from adamerge.config.settings import Config
from adamerge.learn.updates import update_of


def side_by_side_problems(config: Config) -> list[str]:
    """Settings that do not go together, and an update's own."""
    found = []
    if config["compile"] is True and config["recompute"] is True:
        found.append(
            "compile and recompute do not go together: set one of them to false (compiled blocks "
            "choose for themselves what to compute again)"
        )
    if config["images_on_device"] is True and config["num_workers"] != 0:
        found.append(
            "images_on_device leaves nothing for num_workers to read ahead: set num_workers=0"
        )
    return found + _update_problems(config)


def _update_problems(config: Config) -> list[str]:
    if not isinstance(config["update"], dict):
        return []  # said elsewhere
    try:
        update_of(config["update"])
    except AdamergeError as error:
        return [str(error)]
    if config["heads"] == "learned" and config["trainer"].get("devices") not in (1, "1", "auto"):
        return ["heads=learned wants one process: set trainer.devices=1"]
    name = config["update"]["name"]
    if config["online"] and name in ("per_task", "bilevel"):
        return [
            f"online lets a task end before others, which update={name} would ask for: set "
            "update=joint"
        ]
    if name == "bilevel" and config["batch_size"] == 1:
        return ["update=bilevel halves every task's images, and batch_size is 1: set at least 2"]
    return []
