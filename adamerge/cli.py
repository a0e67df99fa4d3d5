"""The `adamerge` command. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

_SETTINGS = "settings as key=value (see `adamerge show config`), like optim.lr=1e-3"


def parser() -> argparse.ArgumentParser:
    """The command line: train, check, evaluate, export, show."""
    top = argparse.ArgumentParser(
        prog="adamerge",
        description="Merge fine-tuned experts into one model by learning how to merge, "
        "without labels.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="learn a merge and export it",
        description="Learn merging coefficients on unlabeled images, score the merged model and "
        "export it to runs/<suite>-<method>-<time>/. The same as `python train.py`.",
        epilog="examples: adamerge train suite=demo method=layer_wise_pp objective=infomax "
        "optim.lr=3e-3 | adamerge train resume=runs/demo-layer_wise-20260101-120000",
    )
    train.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
    check = commands.add_parser(
        "check",
        help="look at a suite before training: does every expert solve its own task?",
        description="Load everything the settings name, score every expert on every task on a few "
        "images, estimate memory and time, and say what looks wrong. Status 1 if there is a "
        "problem.",
    )
    check.add_argument("--to", type=Path, default=None, help="also write preflight.json, .md here")
    check.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
    evaluate = commands.add_parser(
        "evaluate",
        help="score a run or an exported folder",
        description="Score an exported folder on a suite, beside the suite's own baselines.",
    )
    evaluate.add_argument("--to", type=Path, default=None, help="default: TARGET/evaluation")
    evaluate.add_argument("target", type=Path, help="a run folder, or an exported folder")
    evaluate.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
    export = commands.add_parser(
        "export",
        help="export a run's last checkpoint",
        description="Fold the last checkpoint of a run and export it, verified, as an open_clip "
        "folder.",
    )
    export.add_argument("run", type=Path, help="a run folder")
    export.add_argument("--to", type=Path, default=None, help="default: RUN/merged")
    show = commands.add_parser(
        "show",
        help="list suites, methods, objectives; print a resolved config",
        description="List what can be named on the command line, or print the resolved "
        "configuration of a set of settings.",
    )
    show.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=["all", "suites", "methods", "objectives", "config"],
    )
    show.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake prints one sentence and gives status 2."""
    options = parser().parse_args(arguments)
    # Must be set before torch loads OpenMP: threads that spin while they wait make a run many
    # times slower as soon as another program wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("adamerge").setLevel(logging.INFO)
    from safetensors import SafetensorError

    from adamerge.errors import AdamergeError

    try:
        return _run(options)
    except AdamergeError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or "a file of the run or the cache"
        print(
            f"error: cannot use {where} ({error.strerror or error}): free space, or choose another "
            "place with run_dir= or cache_dir=",
            file=sys.stderr,
        )
    except SafetensorError as error:
        print(f"error: cannot write a weight file ({error}): free space there", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "show":
        return _show(options.what, options.settings)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker and DDP processes
    warnings.filterwarnings("ignore", module=r"(lightning|torch|open_clip|timm)\b")
    from adamerge import check, deliver, run

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it sets its own on import

    if options.command == "train":
        return run.train(options.settings)
    if options.command == "check":
        return check.check(options.settings, options.to)
    if options.command == "evaluate":
        return deliver.evaluate(options.target, options.settings, options.to)
    return deliver.export_run(options.run, options.to)


def _show(what: str, settings: Sequence[str]) -> int:
    from adamerge import config

    if what == "config":
        loaded = config.load(settings)
        from adamerge import build

        build.check(loaded)
        print(config.text(loaded))
        return 0
    for group in config.GROUPS:
        if what in ("all", f"{group}s"):
            print(f"{group}s ({config.config_root() / group}):")
            for name in config.names(group):
                first = (config.config_root() / group / f"{name}.yaml").read_text().split("\n")[0]
                print(f"  {name:<16}{first.removeprefix('#').strip() if first[:1] == '#' else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
