"""Configuration: files and `key=value` words in, one plain dictionary with every value out.

All is merged first and its references are replaced once. The only module that knows omegaconf,
which reads and writes YAML.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge._base.binding import code_beside, nearest
from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import replacing
from adamerge.config.references import resolved
from adamerge.config.settings_check import GROUPS, Config, setting_problems
from adamerge.config.suite import locate, locate_data, name_by_text, suite_problems, take_task_files

__all__ = [
    "GROUPS",
    "Config",
    "config_root",
    "key_and_value",
    "load",
    "load_run",
    "names",
    "problems",
    "read_yaml",
    "save",
]

_MOST_BYTES, _MOST_VALUES = 8 * 2**20, 250_000  # of a YAML file, its aliases written out
_UNREADABLE: tuple[type[Exception], ...] = (yaml.YAMLError, OmegaConfBaseException, ValueError)
_UNREADABLE += (OSError, AttributeError, LookupError, TypeError, ArithmeticError)  # `!!bool maybe`
# `wandb=off`, `preflight=off` and `update=sam` set these.
_SWITCHES = {"wandb": "wandb.mode", "preflight": "preflight.enabled", "update": "update.name"}


def config_root() -> Path:
    """The folder of shipped configs: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names(group: str) -> list[str]:
    """The shipped configs of a group."""
    return sorted(path.stem for path in (config_root() / group).glob("*.yaml"))


def load(words: Sequence[str] = ()) -> Config:
    """`train.yaml` ← its suite, method and objective ← the command line; not checked yet.

    What a suite has under `by_method` goes over the defaults of the method of that name.

    Args:
        words: `key=value`, later ones win; keys are dotted.

    Returns:
        A plain dictionary; `suite`, `method` and `objective` are dictionaries with a `name`. Every
        `${key}` is replaced by the last value of that setting; the suite's task files are read,
        and its paths are absolute where the files exist.

    Raises:
        AdamergeError: a file that is missing or no YAML, a word that is no `key=value`, or a
            reference that leads nowhere.
    """
    config = read_yaml(config_root() / "train.yaml")
    settings = [key_and_value(word) for word in words]
    folder, by_method = Path(), {}
    for group in GROUPS:
        chosen = [value for key, value in settings if key == group]
        name = str([config[group], *chosen][-1])
        path = _named_file(f"{group}={name}", group, name, Path(os.path.expanduser(name)))
        part = {"name": path.stem, **read_yaml(path)}
        defaults = part.pop("defaults", {})
        if not isinstance(defaults, dict) or "suite" in defaults:
            said = "sets suite" if isinstance(defaults, dict) else f"is {defaults!r}"
            raise AdamergeError(
                f"{group}.defaults {said}: expected settings of configs/train.yaml other than "
                "suite; write what belongs to a suite into its file"
            )
        if group == "suite":
            folder = path.resolve().parent
            name_by_text(part)  # before the words, whose keys are texts
            by_method = part.pop("by_method", {})
            _check_by_method(by_method)
        elif group == "method":
            defaults = _merged(defaults, by_method.get(path.stem, {}))
        config = _merged({**config, group: part}, defaults)
    for key, value in settings:
        if key not in GROUPS:
            _set(config, key, value)
    config = resolved(config)
    suite = config["suite"]
    name_by_text(suite)  # what the words have set
    take_task_files(suite, lambda where, source: _task(where, source, folder))
    locate(suite, folder)
    return _at_home(config)


def _check_by_method(given: Any) -> None:
    known = names("method")
    for name in given if isinstance(given, dict) else [None]:
        if name not in known or not isinstance(given[name], dict):
            raise AdamergeError(
                f"suite.by_method has {name!r}{nearest(str(name), known)}: expected names of "
                "shipped methods, each with settings of configs/train.yaml, like layer_wise: "
                "{optim: {lr: 4.0e-2}}"
            )


def load_run(run: Path, words: Sequence[str] = ()) -> Config:
    """The configuration of a run folder, with `key=value` words on top.

    Settings that are younger than the run have their defaults.

    Raises:
        AdamergeError: the folder holds no run, or a word names a group (a resumed run keeps its
            suite, method and objective).
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise AdamergeError(f"{run} holds no run: expected its config.yaml; give a run folder")
    saved, defaults = read_yaml(path), read_yaml(config_root() / "train.yaml")
    for group in GROUPS:
        if not isinstance(saved.get(group), dict):
            raise AdamergeError(
                f"{path} has no settings under {group}: expected a run's own config.yaml; copy the "
                "run again, or start a new one"
            )
    config = _merged(defaults, saved)
    config["optim"] = saved.get("optim", defaults["optim"])  # another optimizer's own arguments
    config["keep"] = saved.get("keep", "last")  # as runs of earlier versions did
    for key, value in map(key_and_value, words):
        if key in GROUPS:
            raise AdamergeError(
                f"{key}={value} cannot be changed on resuming: a run keeps its suite, method and "
                "objective; start a new one"
            )
        if key == "suite.root" or key.startswith("suite.vars"):
            raise AdamergeError(
                f"{key} cannot be changed in a run: its paths and splits are resolved already; "
                f"start a new one, or give suite=… along with {key}="
            )
        _set(config, key, value)
    return _at_home(resolved(config, str(path)))


def problems(config: Config) -> list[str]:
    """Unknown keys, mistyped values and an incomplete suite; arguments of dotted paths aside."""
    suite = config.get("suite")
    found = setting_problems(config, read_yaml(config_root() / "train.yaml"))
    return [*found, *(suite_problems(suite, names("task")) if isinstance(suite, dict) else ())]


def text(config: Config) -> str:
    """A configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config))


def save(config: Config, path: Path) -> None:
    """Writes a resolved configuration as YAML, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text(config), encoding="utf-8")


def read_yaml(path: Path) -> Config:
    """A YAML file, its references as they stand.

    Raises:
        AdamergeError: no YAML of keys and values, too much of it, or a `_target_` in a file that
            lies with it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MB")
        tree = copy.deepcopy(_parsed(content))
    except _UNREADABLE as error:
        said = one_line(error, 300)
        raise AdamergeError(f"{path} is not valid YAML ({said}): mend that line") from error
    except RecursionError as error:
        raise AdamergeError(f"{path} is nested too deeply: write it flatter") from error
    if not isinstance(tree, dict):
        raise AdamergeError(f"{path} is not a configuration: expected keys and values in YAML")
    if not path.resolve().is_relative_to(config_root()):
        code_beside(tree, path)
    return {str(key): value for key, value in tree.items()}


@functools.lru_cache(32)  # a run reads train.yaml three times, and a grid reads every file anew
def _parsed(content: bytes) -> Any:
    _refuse_many_aliases(content)
    return OmegaConf.to_container(OmegaConf.load(io.BytesIO(content)), resolve=False)


def _refuse_many_aliases(content: bytes) -> None:
    """A few hundred bytes of aliases of aliases (`b: [*a, *a]`) can stand for gigabytes."""
    counts: dict[int, int] = {}

    def count(node: Any) -> int:
        if isinstance(node, tuple):  # a key and its value
            return count(node[0]) + count(node[1])
        if node is None or isinstance(node.value, str):
            return 1
        if id(node) not in counts:
            counts[id(node)] = 10**9  # of one that holds itself
            counts[id(node)] = 1 + sum(map(count, node.value))
        return counts[id(node)]

    if b"&" in content and count(yaml.compose(content, yaml.SafeLoader)) > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES} values")


def key_and_value(word: str) -> tuple[str, Any]:
    """A key and its value; `wandb=off` is `wandb.mode=off`, though YAML reads `off` as false."""
    key, equals, value = word.partition("=")
    if not equals or not all(re.split(r"[.\[]", key)):
        raise AdamergeError(f"{word!r} is not a setting: expected key=value, like optim.lr=1e-3")
    try:
        _refuse_many_aliases(value.encode())
        tree = OmegaConf.from_dotlist([f"value={value}"])
        parsed = OmegaConf.to_container(tree, resolve=False)
    except Exception as error:  # tags raise anything
        raise AdamergeError(f"{word[:80]!r}: the value is not valid YAML; quote it") from error
    assert isinstance(parsed, dict)
    plain = value if key in GROUPS else parsed["value"]
    key = key if isinstance(plain, dict) else _SWITCHES.get(key, key)
    if key == "wandb.mode" and isinstance(plain, bool):
        plain = "auto" if plain else "off"
    return key, plain


def _set(config: Config, key: str, value: Any) -> None:
    """Sets a dotted key, making the parts that are not there."""
    node: Any = config
    parts = re.findall(r"[^.\[\]]+", key) or [key]
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        place = int(part) if isinstance(node, list) and part.isdecimal() else part
        if not isinstance(node, dict) and not (isinstance(place, int) and place < len(node)):
            raise AdamergeError(
                f"{key} cannot be set at {part!r}: a part of it holds a list or a value that has "
                "no keys; set that part whole"
            )
        if after is None:
            node[place] = value
        elif isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[place]


def _merged(below: Config, above: Config) -> Config:
    """The keys of both, those of `above` over those of `below`, at any depth."""
    both = {
        key: _merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **both}


def _task(where: str, source: str, folder: Path) -> Config:
    """The keys of a shipped task file, or of one beside the suite or in the working folder."""
    path = _named_file(f"{where}={source}", "task", source, folder / source, Path(source))
    task = resolved(read_yaml(path), f"task {source}")
    locate_data(task, path.resolve().parent)
    return task


def _named_file(said: str, group: str, name: str, *others: Path) -> Path:
    """The shipped config of a group, or the first other file that is there."""
    for path in (config_root() / group / f"{name}.yaml", *others):
        if path.is_file():
            return path
    raise AdamergeError(
        f"{said}: no such {group}{nearest(name, names(group))}; expected a file or one of "
        f"{', '.join(names(group))}"
    )


def _at_home(config: Config) -> Config:
    """With `~` in paths replaced by the home folder, and the base's path absolute."""
    for part, key in ((config, "run_dir"), (config, "cache_dir"), (config["method"], "base")):
        if isinstance(part, dict) and isinstance(part.get(key), str):
            path = os.path.expanduser(part[key])
            part[key] = os.path.realpath(path) if key == "base" and os.path.exists(path) else path
    return config
