"""`${key}` in a configuration: replaced by the value of that setting, once, within bounds.

Not by omegaconf, whose references have no bound (`a: ${b}${b}`, `b: ${c}${c}` … thirty times are
gigabytes) and can call functions that read files and the environment.
"""

from __future__ import annotations

import re
from typing import Any

from adamerge._base.errors import AdamergeError

Path = tuple[str, ...]
_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")  # an innermost one; a colon would call a function
_MOST = 2**22  # letters, and 64 for every value, that all references of a configuration give
_NOWHERE = object()


def resolved(tree: dict[str, Any], where: str = "configuration") -> dict[str, Any]:
    """A copy of a configuration with every reference replaced by what it names.

    `${a.b}` and `${a[0]}` name settings from the top or from the suite, which comes first for what
    stands in it; `${.b}` names a neighbour.

    Args:
        where: what is resolved, for messages.

    Raises:
        AdamergeError: a reference to nothing, to itself, or to something outside the
            configuration; or so many that what they give would not fit into memory.
    """
    try:
        found: dict[str, Any] = _Resolver(tree, where).value(tree, ())
    except RecursionError as error:
        raise AdamergeError(f"{where} is nested too deeply: write it flatter") from error
    return found


class _Resolver:
    """Replaces references; `left` is how much more they may give, `open` what is under way."""

    def __init__(self, tree: dict[str, Any], where: str) -> None:
        self.tree, self.where, self.left = tree, where, _MOST
        self.open: list[Path] = []

    def value(self, value: Any, at: Path) -> Any:
        """What stands at a path, with all references in it replaced."""
        self._count(64 if self.open else 0)
        if isinstance(value, dict):
            keys = [str(self._text(key, at)) if isinstance(key, str) else key for key in value]
            inner = [self.value(part, (*at, str(key))) for key, part in value.items()]
            return dict(zip(keys, inner, strict=True))
        if isinstance(value, list):
            return [self.value(inner, (*at, str(index))) for index, inner in enumerate(value)]
        return self._text(value, at) if isinstance(value, str) else value

    def _text(self, text: str, at: Path) -> Any:
        """A text with what its references name in their place, from the innermost outwards; or
        what the one reference names that it is."""
        before = ""
        while before != text:
            if whole := _REFERENCE.fullmatch(text):
                return self._named(whole[1], at)
            self._count(len(text) if before or self.open else 0)
            before, text = text, _REFERENCE.sub(lambda match: str(self._named(match[1], at)), text)
        if "${" in text:  # a configuration is written to files and to W&B: no place for secrets
            raise AdamergeError(
                f"{self.where}: {'.'.join(at)} takes its value from elsewhere by ${{…}}: expected "
                "a value, or ${key} of another setting; give it on the command line, as "
                "suite.root=$DATA"
            )
        return text

    def _named(self, key: str, at: Path) -> Any:
        """The value of the setting that a reference at a path names."""
        up = len(key) - len(key.lstrip("."))
        near = at[: max(len(at) - up, 0)] if up else at[:1] if at[:1] == ("suite",) else ()
        for base in dict.fromkeys([near, (), ("suite",)]):
            path = (*base, *re.findall(r"[^.\[\]]+", key))
            node: Any = self.tree
            for index, part in enumerate(path):
                if isinstance(node, str):
                    node = self.value(node, path[:index])
                if isinstance(node, list):
                    node = dict(zip(map(str, range(len(node))), node, strict=True))
                node = node.get(part, _NOWHERE) if isinstance(node, dict) else _NOWHERE
            if path in self.open:
                raise self._error(f"Interpolation key {key!r} is recursive", at)
            if node is not _NOWHERE:
                self.open.append(path)
                found = self.value(node, path)
                self.open.pop()
                return found
        raise self._error(f"Interpolation key {key!r} not found", at)

    def _count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise AdamergeError(
                f"{self.where}: what its ${{…}} name is more than {_MOST >> 20} MB in all: let "
                "fewer of them name each other"
            )

    def _error(self, what: str, at: Path) -> AdamergeError:
        return AdamergeError(
            f"{self.where}: {what} (in {'.'.join(at)}): write another value there, or set what it "
            "names"
        )
