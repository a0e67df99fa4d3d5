"""What pyproject.toml, CITATION.cff and tests/oldest.txt say, they say alike."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"ruff", "mypy", "types-PyYAML"}  # of the developers, not of the tests
MODULES = {  # a package's name where it is not that of its module
    "open_clip": "open_clip_torch",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "sklearn": "scikit-learn",
}
# Brought by lightning, by torch on a GPU, and by scikit-learn.
WITH_ANOTHER = {"lightning_utilities", "triton", "scipy"}
OPTIONAL = {"ot"}  # imported where it is needed, and an error says what to install


def floors(requirements: list[str]) -> dict[str, str]:
    """The oldest version of every package; a requirement without one does not match."""
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", word) for word in requirements]
    assert all(found), requirements
    return {match[1]: match[2] for match in found if match}


def test_the_oldest_versions_allowed_are_those_that_are_tested() -> None:
    allowed = floors(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert tested == {name: v for name, v in allowed.items() if name not in TOOLS}


def test_every_import_is_of_a_declared_package() -> None:
    used = set()
    for path in (ROOT / "adamerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used.add(node.module.partition(".")[0])
    used -= set(sys.stdlib_module_names) | WITH_ANOTHER | OPTIONAL | {"adamerge"}
    assert {MODULES.get(name, name) for name in used} <= set(floors(PROJECT["dependencies"]))


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    for key in ("version", "license"):
        assert citation[key] == PROJECT[key]
    assert citation["title"] == PROJECT["name"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]
    assert "MIT License" in (ROOT / "LICENSE").read_text()
