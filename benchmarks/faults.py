"""What a run survives: kills, signals, full disks, flipped bits, other runs, lost processes.

    python benchmarks/faults.py             # every point at which files change their names; minutes
    python benchmarks/faults.py --short     # a few of each kind, drawn with --seed; in .ci/run

A tiny suite is trained and exported undisturbed, and then again and again with one fault. A fault
is *held* if afterwards the same command, `resume=` or `adamerge export` ends with coefficients and
merged weights equal to the undisturbed ones, bit by bit, and until then nothing was lost that had
been there: an earlier `merged/`, or a checkpoint. A flipped bit may also be refused, by one
sentence. Everything else is *lost*, and makes the status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adamerge import cli  # noqa: E402 - once, before every fork
from adamerge.cli import train  # noqa: E402, F401 - once, before every fork
from adamerge.learn.resume import CHECKPOINT  # noqa: E402
from tests import tiny  # noqa: E402

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym")
STEPS = 4
Fault = Callable[[], None]  # is called in the process that it is to befall, before it begins


@dataclasses.dataclass
class World:
    """A folder with a suite, and what an undisturbed run of it ends with."""

    folder: Path
    wanted: tuple[bytes, ...] = ()
    tried: int = 0

    def fresh(self) -> Path:
        """A new folder for a run and its cache."""
        self.tried += 1
        return self.folder / f"try-{self.tried}"

    def train(self, place: Path, *words: str) -> list[str]:
        """The command of every run here: what it keeps lies in caches of every kind."""
        return [
            "train", f"suite={self.folder / 'suite' / 'tiny.yaml'}", f"cache_dir={place / 'cache'}",
            f"run_dir={place / 'run'}", f"trainer.max_steps={STEPS}", "checkpoint_every=1",
            *settings(), *words,
        ]  # fmt: skip


def settings() -> list[str]:
    return [
        "objective=expert_kl", "task_vectors.device=disk", "batch_size=4", "log_every=1",
        "trainer.accelerator=cpu", "evaluate.baselines=false", "wandb=off", "preflight.images=2",
    ]  # fmt: skip


@dataclasses.dataclass
class Ended:
    """How a command ended: its status (negative: a signal's) and what it wrote."""

    status: int
    said: str

    @property
    def is_sentence(self) -> bool:
        """Whether it refused with one sentence."""
        return self.status == 2 and one_sentence(self.said)


def one_sentence(said: str) -> bool:
    """Whether there is one message of an error, and no trace of calls."""
    found = re.findall(r"(?:^|\])error: ", said, re.MULTILINE)  # also behind a bar of progress
    return len(found) == 1 and "Traceback" not in said


def start(words: Sequence[str], fault: Fault = lambda: None) -> tuple[int, Path]:
    """A command in a process of its own, which a fault befalls; its id and its output."""
    handle, name = tempfile.mkstemp()
    child = os.fork()
    if child == 0:
        status = 3  # of an error that nobody caught
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            fault()
            status = cli.main(words)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(handle)
    return child, Path(name)


def finish(started: tuple[int, Path]) -> Ended:
    """Waits for a command."""
    child, output = started
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = output.read_text(errors="replace")
    output.unlink()
    return Ended(status, said)


def command(words: Sequence[str], fault: Fault = lambda: None) -> Ended:
    return finish(start(words, fault))


def at_change(place: Path, number: int, then: Callable[[str], None]) -> Fault:
    """`then` before the number-th change of a name below a folder, and all after it."""

    def fault() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in CHANGES:
                return
            exchange = event == "ctypes.dlsym" and arguments[1] == "renameat2"
            if exchange or str(place) in str(arguments[0]):
                seen += 1
                if seen >= number:
                    then(event)

        sys.addaudithook(hook)

    return fault


def die(number: int) -> Callable[[str], None]:
    """A signal to oneself, the first time."""
    left = [number]

    def then(_: str) -> None:
        if left:
            os.kill(os.getpid(), left.pop())

    return then


def count_changes(place: Path, words: Sequence[str]) -> int:
    """How many changes of names a command makes below a folder."""
    record = place.with_suffix(".count")

    def then(_: str) -> None:
        with open(record, "a") as file:
            file.write("x")

    ended = command(words, at_change(place, 1, then))
    assert ended.status == 0, ended.said
    return len(record.read_text())


def full_from(place: Path, number: int) -> Fault:
    """No file below a folder can be opened for writing any more, from the number-th on."""

    def fault() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
            if writes and str(place) in str(arguments[0]):
                seen += 1
                if seen >= number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

        sys.addaudithook(hook)

    return fault


def small_files(most: int) -> Fault:
    """No file can grow beyond a size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def results(place: Path) -> tuple[bytes, ...]:
    """What two runs are compared by."""
    files = ("coefficients.csv", "merged/open_clip_model.safetensors", "merged/heads.safetensors")
    return tuple((place / "run" / name).read_bytes() for name in files)


def recovered(world: World, place: Path) -> str | None:
    """Whether a run can still be had: None, or why not."""
    ended = command(world.train(place))
    if ended.is_sentence and f"resume={place / 'run'}" in ended.said:
        ended = command(["train", f"resume={place / 'run'}"])
    if ended.status != 0:
        return f"status {ended.status}: {ended.said[-300:]}"
    if results(place) != world.wanted:
        return "other results"
    left = [path.name for path in place.rglob("*") if path.suffix in (".tmp", ".old", ".part")]
    # An empty lock file in a cache is taken up by whoever locks it next, and stays until then.
    left += [path.name for path in (place / "run").rglob("*.lock")]
    return f"left {left[0]}" if left else None


def killed_runs(world: World, chance: random.Random, most: int | None) -> Iterator[str | None]:
    """A run is killed, or told to end, before any of its changes of names."""
    place = world.fresh()
    points = range(1, count_changes(place, world.train(place)) + 1)
    for point in drawn(points, chance, most):
        for number in (signal.SIGKILL, signal.SIGTERM):
            place = world.fresh()
            ended = command(world.train(place), at_change(place, point, die(number)))
            # A checkpoint or a run's end may come before a SIGTERM is looked at.
            wanted = {-number} if number == signal.SIGKILL else {128 + number, 0}
            if ended.status not in wanted or "Traceback" in ended.said:
                yield f"signal {number} at {point}: status {ended.status}: {ended.said[-300:]}"
                continue
            lost = recovered(world, place)
            yield lost and f"signal {number} at {point}: {lost}"


def killed_exports(world: World, chance: random.Random, most: int | None) -> Iterator[str | None]:
    """An export over an earlier one is killed before any of its changes of names."""
    place = world.fresh()
    shutil.copytree(world.folder / "done", place)
    words = ["export", str(place / "run")]
    points = range(1, count_changes(place, words) + 1)
    for point in drawn(points, chance, most):
        ended = command(words, at_change(place, point, die(signal.SIGKILL)))
        at_once = weights(place) == world.wanted[1]
        again = command(words)
        held = ended.status == -signal.SIGKILL and at_once and again.status == 0
        left = [path.name for path in (place / "run").glob("merged?*")]
        held = held and weights(place) == world.wanted[1] and not left
        yield None if held else f"at {point}: merged/ there: {at_once}, left {left}; {again.said}"


def weights(place: Path) -> bytes:
    path = place / "run" / "merged" / "open_clip_model.safetensors"
    return path.read_bytes() if path.is_file() else b""


def full_disks(world: World, chance: random.Random, most: int | None) -> Iterator[str | None]:
    """Ten sizes that no file may exceed; and no new file from the n-th on."""
    largest = max(p.stat().st_size for p in (world.folder / "done").rglob("*") if p.is_file())
    sizes = [round(500 * (largest / 500) ** (n / 10)) for n in range(10)]
    faults = [(f"files of {size} bytes", small_files(size)) for size in sizes]
    for name, fault in drawn(faults, chance, most):
        yield _full(world, world.fresh(), name, fault)
    for number in drawn(range(1, 40, 4), chance, most):
        place = world.fresh()
        yield _full(world, place, f"no file after {number}", full_from(place, number))


def _full(world: World, place: Path, name: str, fault: Fault) -> str | None:
    ended = command(world.train(place), fault)
    if not ended.is_sentence:
        return f"{name}: status {ended.status}: {ended.said[-300:]}"
    steps = (place / "run" / CHECKPOINT).is_file() and "what was learned is kept" in ended.said
    exported = command(["export", str(place / "run")]).status == 0 if steps else True
    lost = recovered(world, place) or (None if exported else "no export of what was learned")
    return lost and f"{name}: {lost}"


def flipped(world: World, chance: random.Random, most: int | None) -> Iterator[str | None]:
    """One bit of every file of a run that is to go on, of its caches, and of an exported folder."""
    half = world.folder / "half"
    if not half.exists():
        assert command(world.train(half, "trainer.max_steps=2")).status == 0
    files = [path.relative_to(half) for path in sorted(half.rglob("*")) if path.is_file()]
    for file in drawn(files, chance, most):
        place = world.fresh()
        shutil.copytree(half, place)
        content = bytearray((place / file).read_bytes())
        bit = chance.randrange(8 * len(content)) if content else 0
        if content:
            content[bit // 8] ^= 1 << bit % 8
        (place / file).write_bytes(content)
        if file.is_relative_to("run/merged"):
            ended = command(["evaluate", str(place / "run"), f"cache_dir={place / 'cache'}"])
            held = ended.is_sentence or ended.status == 0
        else:
            words = [f"cache_dir={place / 'cache'}", f"trainer.max_steps={STEPS}"]
            ended = command(["train", f"resume={place / 'run'}", *words])
            held = ended.is_sentence or (ended.status == 0 and results(place) == world.wanted)
        yield None if held else f"bit {bit} of {file}: status {ended.status}: {ended.said[-300:]}"


def concurrent(world: World, chance: random.Random, most: int | None) -> Iterator[str | None]:
    """Two runs in one folder, a run that is resumed while it runs, two exports to one folder."""
    for _ in range(most or 3):
        place = world.fresh()
        both = [finish(s) for s in [start(world.train(place)), start(world.train(place))]]
        one = sorted(ended.status for ended in both) == [0, 2]
        held = one and results(place) == world.wanted and any(e.is_sentence for e in both)
        yield None if held else f"two runs: {[(e.status, e.said[-200:]) for e in both]}"
        place = world.fresh()
        first = start(world.train(place))
        while not (place / "run" / CHECKPOINT).is_file():
            time.sleep(0.01)
        both = [command(["train", f"resume={place / 'run'}"]), finish(first)]
        held = both[1].status == 0 and (both[0].is_sentence or both[0].status == 0)
        held = held and results(place) == world.wanted
        yield None if held else f"resumed: {[(e.status, e.said[-200:]) for e in both]}"
        words = ["export", str(place / "run")]
        both = [finish(s) for s in [start(words), start(words)]]
        held = [e.status for e in both] == [0, 0] and weights(place) == world.wanted[1]
        yield None if held else f"two exports: {[(e.status, e.said[-200:]) for e in both]}"


def lost_ranks(world: World, chance: random.Random, most: int | None) -> Iterator[str | None]:
    """A process of a DDP run is killed, each in turn, at some time after the first checkpoint."""
    ddp = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=200"]
    words = [sys.executable, str(ROOT / "train.py")]
    calm = world.folder / "calm"
    subprocess.run(words + world.train(calm, *ddp)[1:], check=True, capture_output=True)
    for index in range(most or 4):
        place = world.fresh()
        process = subprocess.Popen(
            words + world.train(place, *ddp)[1:], stderr=subprocess.PIPE, text=True
        )
        while not (place / "run" / CHECKPOINT).is_file() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.random() / 2)
        others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(others[0]) if index % 2 == 0 and others else process.pid, signal.SIGKILL)
        said = process.communicate(timeout=120)[1]
        if process.returncode == 0 or not one_sentence(said):
            yield f"status {process.returncode}: {said[-300:]}"
            continue
        words_again = [*words, f"resume={place / 'run'}"]
        again = subprocess.run(words_again, capture_output=True, text=True)
        held = again.returncode == 0 and results(place) == results(calm)
        yield None if held else f"resumed: status {again.returncode}: {again.stderr[-300:]}"


def drawn(points: Sequence[Any], chance: random.Random, most: int | None) -> list[Any]:
    """All, or a few of them in their order."""
    if most is None or most >= len(points):
        return list(points)
    return [points[index] for index in sorted(chance.sample(range(len(points)), most))]


KINDS = {
    "a run is killed or told to end": (killed_runs, 1),
    "an export is killed": (killed_exports, 2),
    "the disk is full": (full_disks, 1),
    "a bit of a file is flipped": (flipped, 3),
    "two at once": (concurrent, 1),
    "a process of DDP is lost": (lost_ranks, 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few of each kind, without DDP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[kind.__name__ for kind, _ in KINDS.values()])
    options = parser.parse_args()
    tried = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder).resolve())
        tiny.make_suite(world.folder / "suite")
        assert command(world.train(world.folder / "done")).status == 0
        world.wanted = results(world.folder / "done")
        print(f"{'':34}tried  held  lost")
        for name, (kind, few) in KINDS.items():
            if options.kind not in (None, kind.__name__) or (options.short and not few):
                continue
            chance = random.Random(f"{options.seed} {name}")
            found = list(kind(world, chance, few if options.short else None))
            bad = [reason for reason in found if reason is not None]
            print(f"{name:34}{len(found):5} {len(found) - len(bad):5} {len(bad):5}", flush=True)
            for reason in bad:
                print(f"  {json.dumps(reason)}")
            tried, lost = tried + len(found), lost + len(bad)
    print(f"{'all':34}{tried:5} {tried - lost:5} {lost:5}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
