"""The `adamerge` command. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from adamerge._base.errors import AdamergeError
from adamerge._base.terminal import printable, set_up_logging

_SETTINGS = "settings as key=value (see `adamerge show config`), like optim.lr=1e-3"
_SHOWN = ("all", "suites", "methods", "objectives", "tasks", "config")


def parser() -> argparse.ArgumentParser:
    """The command line, with all its commands."""
    top = argparse.ArgumentParser(
        prog="adamerge",
        description="Merge fine-tuned experts into one model by learning how to merge, "
        "without labels.",
    )
    add = top.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    train = add(
        "train",
        help="learn a merge and export it",
        description="Learn merging coefficients on unlabeled images, score the merged model and "
        "export it to runs/<suite>-<method>-<time>/. The same as `python train.py`.",
        epilog="examples: adamerge train suite=demo method=layer_wise_pp objective=infomax "
        "optim.lr=3e-3 | adamerge train resume=runs/demo-layer_wise-20260101-120000",
    )
    check = add(
        "check",
        help="look at a suite before training: does every expert solve its own task?",
        description="Load everything the settings name, score every expert on every task on a few "
        "images, estimate memory and time, and say what looks wrong. Status 1 if there is a "
        "problem.",
    )
    check.add_argument("--to", type=Path, help="also write preflight.json, .md here")
    evaluate = add(
        "evaluate",
        help="score a run or an exported folder",
        description="Score an exported folder on a suite, beside the suite's own baselines.",
    )
    evaluate.add_argument("--to", type=Path, help="default: TARGET/evaluation")
    evaluate.add_argument("target", type=Path, help="a run folder, or an exported folder")
    export = add(
        "export",
        help="export a run's last checkpoint",
        description="Fold the last checkpoint of a run and export it, verified. fold=per_task or "
        "fold=single choose another fold of methods that have one.",
    )
    export.add_argument("run", type=Path, help="a run folder")
    export.add_argument("--to", type=Path, help="default: RUN/merged")
    compare = add(
        "compare",
        help="run a grid of settings, and report them side by side",
        description="Run every combination of the values that commas separate (or a grid's YAML), "
        "a few at a time (jobs=2), in one folder (to=FOLDER), and write report.html there. The "
        "same command goes on with what was stopped.",
        epilog="example: adamerge compare suite=demo method=layer_wise,wemoe "
        "objective=entropy,expert_kl seed=0,1,2 jobs=2 to=compare/first",
    )
    compare.add_argument("grid", nargs="+", metavar="key=value,value", help=_SETTINGS)
    auto = add(
        "auto",
        help="try a short list of recipes, and export the best, chosen without labels",
        description="Try merges that learn nothing, layer-wise merging with three objectives, and "
        "a calibration, in one folder (to=FOLDER); export the one with which the experts agree on "
        "most unlabeled images, and say why. The same as train method=auto. The same command goes "
        "on with what was stopped. Status 3 if the experts agree with it on less than half of the "
        "images of a task.",
        epilog="example: adamerge auto suite=demo minutes=10 jobs=2 also=wemoe to=auto/first",
    )
    auto.add_argument("settings", nargs="+", metavar="key=value", help=_SETTINGS)
    report = add(
        "report",
        help="report runs that exist side by side",
        description="Write report.html, report.md and report.csv of run folders, or of folders "
        "that hold run folders.",
    )
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--to", type=Path, default=Path("report"), help="default: report")
    convert = add(
        "convert",
        help="write any checkpoint as an open_clip or transformers folder",
        description="Write a checkpoint of any format that can be read (open_clip, transformers, "
        "pickled module, LoRA adapter; a path or hf://owner/repo) as a folder of another layout, "
        "exactly, without executing anything in it.",
    )
    convert.add_argument("source", help="file, folder, or hf://owner/repo[@revision][/file]")
    convert.add_argument("folder", type=Path, help="a new folder")
    convert.add_argument("--to", default="open_clip", choices=["open_clip", "transformers"])
    convert.add_argument("--pretrained", help="the CLIP a tower or adapter was fine-tuned from")
    init = add(
        "init",
        help="write a suite by looking at a folder of checkpoints",
        description="Look at the checkpoints in a folder and one level below, and write a suite of "
        "them: architecture, pretrained model and tasks as far as files, shapes and names tell, "
        "and FILL IN where they do not. Nothing is asked, and nothing in a checkpoint is executed.",
    )
    init.add_argument("folder", type=Path, help="weight files, or a folder per checkpoint")
    init.add_argument("--to", type=Path, default=Path("my_suite.yaml"), help="a new file")
    init.add_argument("--pretrained", help="an open_clip tag, path or hf://…, if not told")
    init.add_argument("--data", type=Path, help="a folder with images per task, named like them")
    for command in (convert, init):
        command.add_argument("--architecture", help="an open_clip name or folder, if not told")
    show = add(
        "show",
        help="list suites, methods, objectives, tasks; print a resolved config",
        description="List what can be named on the command line, or print the resolved "
        "configuration of a set of settings.",
    )
    show.add_argument("what", nargs="?", default="all", choices=_SHOWN)
    for command in (train, check, evaluate, export, show):
        command.add_argument("settings", nargs="*", metavar="key=value", help=_SETTINGS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake prints one sentence and gives status 2."""
    options = _parsed(arguments)
    # Must be set before torch loads OpenMP: threads that spin while they wait make a run many
    # times slower as soon as another program wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_up_logging()
    from safetensors import SafetensorError

    try:
        with _ended_by_sigterm():
            return _run(options)
    except AdamergeError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or "a file of the run or the cache"
        mend = "free space," if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that,"
        print(
            f"error: cannot use {where} ({error.strerror or error}): {mend} or choose another "
            "place (run_dir=, cache_dir=, or what --to names)",
            file=sys.stderr,
        )
    except SafetensorError as error:
        print(f"error: cannot write a weight file ({error}): free space there", file=sys.stderr)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, _Terminated)
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    return 2


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `_Terminated`, once; a second one has its usual effect."""
    before, owner = signal.getsignal(signal.SIGTERM), os.getpid()
    if before != signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield  # whoever calls us has a way of its own
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a process that was forked from this one
            os.kill(os.getpid(), number)
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, with settings also after options: `export RUN --to FOLDER fold=single`."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and (not hasattr(options, "settings") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings += rest
    for name, value in vars(options).items():
        if isinstance(value, str | Path):  # a shell replaces ~ only where it begins a word
            setattr(options, name, type(value)(os.path.expanduser(value)))
    return options


def _run(options: argparse.Namespace) -> int:
    if options.command == "show":
        return _show(options.what, options.settings)
    if options.command == "init":
        from adamerge.cli.init import init

        told = (options.pretrained, options.architecture, options.data)
        print("\n".join(init(options.folder, options.to, *told)))
        return 0
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker and DDP processes
    warnings.filterwarnings("ignore", module=r"(lightning|torch|open_clip|timm)\b")
    if options.command == "convert":
        from adamerge.cli.convert import convert

        given = (options.to, options.pretrained, options.architecture)
        convert(options.source, options.folder, *given)
        print(f"converted, and read back with equal weights: {options.folder}")
        return 0
    if options.command in ("compare", "report"):
        with _uncollected():
            from adamerge.cli import compare

        if options.command == "compare":
            return compare.compare(options.grid, main)
        print(f"report: {compare.report(options.runs, options.to)}")
        return 0
    automatic = options.command == "train" and "method=auto" in options.settings
    if options.command == "auto" or automatic:
        with _uncollected():
            from adamerge.cli import auto

        words = [word for word in options.settings if word != "method=auto"]
        return auto.auto([re.sub("^run_dir=", "to=", word) for word in words], main)
    with _uncollected():
        from adamerge.cli import check, results, train

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it sets its own on import
    if options.command == "train":
        return train.train(options.settings)
    if options.command == "check":
        return check.check(options.settings, options.to)
    if options.command == "evaluate":
        return results.evaluate(options.target, options.settings, options.to)
    return results.export_run(options.run, options.to, options.settings)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """For imports, whose objects live on: no search for garbage among them, now or later.

    The search takes a fifth of the time of the first import. Where torch is there already, most
    objects are not of these imports, and stay as they are. W&B, whose classes look through all
    loaded modules as they are made, comes first.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        from adamerge.report import tracking  # noqa: F401

        yield
        gc.freeze()
    finally:
        gc.enable()


def _show(what: str, settings: Sequence[str]) -> int:
    from adamerge.config import settings as config

    if what == "config":
        loaded = config.load(settings)
        from adamerge.config import build

        build.check(loaded)
        print(config.text(loaded))
        return 0
    for group in (*config.GROUPS, "task"):
        if what in ("all", f"{group}s"):
            folder, names = config.config_root() / group, config.names(group)
            print(f"{group}s ({folder}):")
            width = max(map(len, names)) + 2
            for name in names:
                with (folder / f"{name}.yaml").open(encoding="utf-8") as file:
                    first = file.readline().rstrip()
                print(f"  {name:<{width}}{first[1:].strip() if first[:1] == '#' else ''}")
    return 0
