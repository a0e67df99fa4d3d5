"""Rooms import one way (CONTRIBUTING.md, "The house"); a new file never changes this test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import adamerge

PACKAGE = Path(__file__).parent.parent / "adamerge"
BELOW = {  # room -> the rooms that it may import from, beside itself
    "_base": "",
    "weights": "_base",
    "encoders": "_base weights",
    "align": "_base weights encoders",
    "transforms": "_base weights encoders",
    "methods": "_base weights encoders transforms",
    "images": "_base",
    "learn": "_base weights encoders transforms methods images",
    "export": "_base weights encoders transforms methods",
    "report": "_base weights encoders transforms methods images learn export",
    "config": "_base weights encoders transforms methods images learn export report align",
    "cli": "_base weights encoders transforms methods images learn export report align config",
}
USERS = {  # library -> the rooms, or the one module, that know it
    "lightning": "learn report config.trainer cli",
    "omegaconf": "config.settings",
    "wandb": "report.tracking",
    "datasets": "images",
    "open_clip": "encoders images export",
}
MODULES, NAMES, LINES = 14, 13, 300  # at most: modules of a package, names at the top, lines
Import = tuple[str, str]  # a module's name within the package, and that of what it imports


def name_of(path: Path) -> str:
    """`learn.step` of `adamerge/learn/step.py`, and `learn` of a package's `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """What a file imports, anywhere in it; `from a import b` may be of a module, so it is both."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written in full"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {name: imports(path) for name, path in FILES.items()}


def own(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = {other.removeprefix("adamerge.") for other in IMPORTS[name]}
    return (found & set(FILES)) - {name}


def arrows() -> set[Import]:
    return {(name, other) for name in FILES for other in own(name) if name and other}


def wrong_ways(found: set[Import]) -> list[str]:
    """Imports that do not run from a room to one below it."""
    wrong = []
    for name, other in sorted(found):
        room, there = name.partition(".")[0], other.partition(".")[0]
        if room != there and there not in BELOW[room].split():
            wrong.append(f"{name} imports {other}")
    return wrong


def strangers(name: str, libraries: set[str]) -> list[str]:
    """Libraries that a module imports and should not know."""
    room = name.partition(".")[0]
    known = {top for top, users in USERS.items() if not {name, room} & set(users.split())}
    return sorted(known & {library.partition(".")[0] for library in libraries})


def test_every_module_is_in_a_room() -> None:
    assert {name.partition(".")[0] for name in FILES} - {""} == set(BELOW)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_rooms_import_one_way() -> None:
    assert not wrong_ways(arrows())


@pytest.mark.parametrize(
    "arrow",
    [("weights.storage", "encoders.tower"), ("export.write", "learn.step"), ("learn", "report")],
)
def test_an_import_upwards_is_found(arrow: Import) -> None:
    assert wrong_ways({arrow})


def test_no_method_imports_another() -> None:
    family = ("base", "calibration.base", "mixtures", "adapters", "gated")
    methods = {name for name in FILES if name.startswith("methods.")}
    papers = methods - {f"methods.{name}" for name in family}
    assert not [(name, other) for name in papers for other in own(name) & papers]


def test_no_circles() -> None:
    """Among modules; a package's `__init__` only hands names on."""
    inits = {name for name, path in FILES.items() if path.name == "__init__.py"}
    graph = {name: own(name) - inits for name in set(FILES) - inits}
    while graph:
        free = [name for name, needs in graph.items() if not needs & set(graph)]
        assert free, f"circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_every_library_is_known_where_it_belongs() -> None:
    assert not {name: s for name, found in IMPORTS.items() if (s := strangers(name, found))}
    assert strangers("weights.shards", {"lightning.pytorch"}) == ["lightning"]


def test_packages_and_files_are_small() -> None:
    for package in {path.parent for path in FILES.values()}:
        modules = [path for path in package.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MODULES, package
    assert len([*PACKAGE.glob("*.py"), *BELOW]) <= NAMES and len(adamerge.__all__) <= NAMES
    too_long = {name: n for name, path in FILES.items() if (n := lines(path)) > LINES}
    assert not too_long


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())
