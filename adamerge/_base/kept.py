"""Values that depend on inputs alone, made once and kept as JSON; what files hash to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adamerge._base.files import locked, parse_json, replacing, sha256, stamp

log = logging.getLogger("adamerge")

Digest = Callable[[Path], str]  # a file -> its SHA-256, hexadecimal

_SETTLED = 2.0  # seconds: a file changed later than that could change again within one time stamp


class Kept:
    """JSON values by name in one file, which carries their checksum.

    A damaged file is removed with a log line. Where the file cannot be written nothing is kept,
    and nothing else happens.

    Args:
        path: of the file, whose name tells all inputs that the values depend on; made if needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = self._read()

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name, made if it is not there; as JSON has it, tuples are lists."""
        if name not in self._values:
            with contextlib.ExitStack() as alone:
                # Where nothing can be kept, nobody is waited for.
                with contextlib.suppress(OSError):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    alone.enter_context(locked(self.path.with_suffix(".lock")))
                    self._values = self._read() | self._values  # what another made meanwhile
                if name not in self._values:
                    self.put(name, json.loads(json.dumps(make())))
        return self._values[name]

    def get(self, name: str) -> Any:
        """The value of that name, or None."""
        return self._values.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keeps a value beside those that others have kept meanwhile."""
        self._values = self._read() | self._values | {name: value}
        content = {"sha256": _checksum(self._values), "values": self._values}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(content))
        except OSError as error:
            log.debug("%s is not kept: %s", self.path, error)

    def _read(self) -> dict[str, Any]:
        try:
            content = parse_json(self.path.read_bytes())
            if content["sha256"] == _checksum(content["values"]):
                return dict(content["values"])
        except OSError:  # not there yet, or out of reach
            return {}
        except (ValueError, KeyError, TypeError):
            pass
        log.warning("%s is damaged: what it kept is worked out again", self.path)
        with contextlib.suppress(OSError):
            self.path.unlink()
        return {}


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def remembered(folder: Path) -> Digest:
    """`files.sha256` that reads a file once as long as its place, size and times stay the same."""
    known = Kept(folder / "sha256.json")

    def digest(path: Path) -> str:
        place, now = str(path.resolve()), list(stamp(path))
        before = known.get(place)
        if before is not None and before[0] == now:
            return str(before[1])
        made = sha256(path)
        if now == list(stamp(path)) and time.time() - path.stat().st_ctime > _SETTLED:
            known.put(place, [now, made])
        return made

    return digest
