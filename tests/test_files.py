"""Files and folders whole or not at all; a run's folder for one process at a time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adamerge import AdamergeError
from adamerge._base import files
from adamerge._base.files import alone_in, clear_left, locked, replacing, replacing_folder

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def child(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process with the functions of `files`, and `folder`."""
    start = "import os, signal, sys, time; from pathlib import Path\n"
    start += "from adamerge._base.files import *\n"
    start += f"folder = Path({str(folder)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def killed(code: str, folder: Path) -> None:
    with child(code, folder) as process:
        process.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_threads_that_replace_one_file_do_not_meet(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text(text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, ["x" * 10_000, "y" * 10_000] * 100))
    assert set((tmp_path / "a").read_text()) in ({"x"}, {"y"})
    assert names(tmp_path) == ["a"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = f"with replacing(folder / 'a[1]') as file: file.write_text('half'); {KILLED}"
    killed(code, tmp_path)
    (tmp_path / "a1.12345678.tmp").write_text("of another name")
    (tmp_path / "a[1].tmp").write_text("a user's")
    assert len(names(tmp_path)) == 3
    with replacing(tmp_path / "a[1]") as temporary:
        clear_left(tmp_path, "a[1]")
        temporary.write_text("whole")  # one in use stays
    assert names(tmp_path) == ["a1.12345678.tmp", "a[1]", "a[1].tmp"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_swapped", lambda *_: False)
    for text in ("one", "two"):
        with replacing_folder(tmp_path / "merged") as temporary:
            (temporary / "file").write_text(text)
        assert (tmp_path / "merged" / "file").read_text() == text
        assert names(tmp_path) == ["merged"]
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "merged") as temporary:
        (temporary / "file").write_text(str(1 / 0))
    assert (tmp_path / "merged" / "file").read_text() == "two" and names(tmp_path) == ["merged"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("at", range(4))
def test_a_kill_at_any_change_of_names_leaves_one_of_the_two_folders(
    tmp_path: Path, exchange: bool, at: int
) -> None:
    """Under the name, or, where two names cannot be exchanged, put back by the next start."""
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").write_text("old")
    code = f"""
import adamerge._base.files as files, shutil
count = 0
def counted(function):
    def call(*arguments, **options):
        global count
        count += 1
        if count > {at}: {KILLED}
        return function(*arguments, **options)
    return call
Path.mkdir, Path.rename = counted(Path.mkdir), counted(Path.rename)
shutil.rmtree = counted(shutil.rmtree)
swap = counted(files._swapped)
files._swapped = lambda *names: swap(*names) if {exchange} else False
with replacing_folder(folder / "merged") as temporary:
    (temporary / "file").write_text("new")
"""
    killed(code, tmp_path)
    if exchange:
        assert (tmp_path / "merged" / "file").read_text() in ("old", "new")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "merged"):
        1 / 0  # noqa: B018
    assert (tmp_path / "merged" / "file").read_text() in ("old", "new")
    assert names(tmp_path) == ["merged"]


def test_a_run_folder_is_for_one_process(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    code = "with alone_in(folder): print('in', flush=True); time.sleep(60)"
    with child(code, run) as other:
        assert other.stdout and other.stdout.readline() == "in\n"
        message = rf"in use by process {other.pid} on .*run_dir"
        with pytest.raises(AdamergeError, match=message), alone_in(run):
            pass
        other.kill()
        other.wait()
        with alone_in(run):
            assert names(run) == [files.LOCK]
    assert names(run) == []
    with alone_in(tmp_path / "others" / "b"):
        pass
    assert names(tmp_path) == ["runs"], "nothing was written"
    with alone_in(run):
        (run / "config.yaml").write_text("")
    assert names(run) == ["config.yaml"]


def test_processes_that_a_run_starts_do_not_hold_its_folder(tmp_path: Path) -> None:
    code = f"""
with alone_in(folder):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    {KILLED}
"""
    killed(code, tmp_path / "run")
    with alone_in(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with alone_in(tmp_path / "run"), replacing(tmp_path / "run" / "a") as temporary:
        temporary.write_text("x")
    with locked(tmp_path / "lock"):
        pass
    assert names(tmp_path / "run") == ["a"]
