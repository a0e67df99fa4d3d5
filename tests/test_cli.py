"""The command line: help without torch, lists, one sentence for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamerge.cli import main


@pytest.mark.parametrize("command", ["", "train", "check", "evaluate", "export", "show"])
def test_help_does_not_import_torch(command: str) -> None:
    code = (
        "import sys; from adamerge.cli.command import parser\n"
        f"try: parser().parse_args([*{command.split()!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'omegaconf' not in sys.modules"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "usage: adamerge" in answer.stdout


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import adamerge", "torch"),
        ("from adamerge import cli; assert cli.main(['show', 'suites']) == 0", "torch"),
    ],
)
def test_what_starts_without(code: str, absent: str) -> None:
    code = f"import sys; {code}; assert {absent!r} not in sys.modules"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_scikit_learn_is_imported_by_nothing_but_the_demo_when_it_runs() -> None:
    """It takes a second. Some libraries import it all the same where they find it."""
    for path in (Path(__file__).parent.parent / "adamerge").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import sklearn", "from sklearn")), path


def test_show_lists_and_resolves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    listed = capsys.readouterr().out
    for name in ("demo", "layer_wise_pp", "task_wise", "infomax"):
        assert name in listed
    assert main(["show", "methods"]) == 0
    assert "infomax" not in capsys.readouterr().out
    assert main(["show", "config", "method=task_wise", "optim.lr=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "granularity: task" in shown and "lr: 0.5" in shown


def test_a_mistake_is_one_sentence_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "config", "optm.lr=0.5"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: optm is unknown (did you mean 'optim'?)\n"


def test_public_names_load_lazily() -> None:
    import adamerge

    for name in adamerge.__all__:
        assert getattr(adamerge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = adamerge.nonsense


def test_nothing_that_a_terminal_obeys_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "a\x1b]0;x\x07\nerror: fine"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "\x1b" not in told and r"a\x1b]0;x\x07\nerror: fine" in told


def test_logging_that_is_set_up_already_stays() -> None:
    code = (
        "import logging; logging.basicConfig(format='mine %(message)s')\n"
        "from adamerge._base.terminal import set_up_logging; set_up_logging()\n"
        "logging.getLogger('adamerge').warning('told')"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stderr == "mine told\n"


def test_a_terminal_that_cannot_write_every_letter() -> None:
    code = "from adamerge.cli import main; import sys; sys.exit(main(['show', 'config']))"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}},
    )
    assert answer.returncode == 0, answer.stderr
