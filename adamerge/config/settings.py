"""Configuration: files and `key=value` words in, one checked plain dictionary out.

The only module that knows omegaconf.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge._base.binding import code_beside, nearest
from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing
from adamerge.config.settings_check import (
    GROUPS,
    Config,
    count_values,
    filled,
    lookups,
    setting_problems,
    sugar,
    without_references,
)
from adamerge.config.suite_check import suite_problems
from adamerge.config.suite_files import locate, locate_data, name_by_text, take_task_files

__all__ = ["GROUPS", "Config", "config_root", "load", "load_run", "names", "problems", "save"]

_MOST_BYTES, _MOST_VALUES = 8 * 2**20, 10**6  # of a YAML file, its aliases written out


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

    Args:
        words: `key=value`, later ones win; keys are dotted.

    Returns:
        A plain dictionary; `suite`, `method` and `objective` are dictionaries with a `name`. The
        suite is whole: its task files are read, its `${vars.…}` resolved, and its paths absolute
        where the files exist.

    Raises:
        AdamergeError: a file that is missing or no YAML, or a word that is no `key=value`.
    """
    tree = _read(config_root() / "train.yaml")
    defaults = _plain(tree)
    settings = [_word(word) for word in words]
    chosen = {key: value for key, value in settings if key in GROUPS}
    own = [
        (key.removeprefix("suite."), value) for key, value in settings if key.startswith("suite.")
    ]
    for group in GROUPS:
        name = str(chosen.get(group, tree[group]))
        tree[group], overrides = _group(group, name, own if group == "suite" else ())
        try:
            tree.merge_with(overrides)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise AdamergeError(f"{group}.defaults cannot be used ({reason}): mend them") from error
    for key, value in settings:
        if key not in GROUPS and not key.startswith("suite."):
            _set(tree, *sugar(key, value, defaults))
    return _at_home(_plain(tree))


def _at_home(config: Config) -> Config:
    """With `~` in paths replaced by the home folder, and the base's path absolute."""
    for part, key in ((config, "run_dir"), (config, "cache_dir"), (config["method"], "base")):
        if isinstance(part, dict) and isinstance(part.get(key), str):
            found = os.path.expanduser(part[key])
            part[key] = (
                os.path.realpath(found) if key == "base" and os.path.exists(found) else found
            )
    return config


def problems(config: Config) -> list[str]:
    """Unknown keys, mistyped values and an incomplete suite; arguments of dotted paths aside."""
    defaults = _plain(_read(config_root() / "train.yaml"))
    suite = config.get("suite")
    found = setting_problems(config, defaults)
    return [*found, *(suite_problems(suite, names("task")) if isinstance(suite, dict) else ())]


def save(config: Config, path: Path) -> None:
    """Writes a resolved configuration as YAML, whole or not at all."""
    with replacing(path) as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)


def load_run(run: Path, words: Sequence[str] = ()) -> Config:
    """The configuration of a run folder, with `key=value` words on top.

    Raises:
        AdamergeError: the folder holds no run, or a word names a group (a resumed run keeps its
            suite, method and objective).
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise AdamergeError(f"{run} holds no run: expected its config.yaml; give a run folder")
    defaults = _plain(_read(config_root() / "train.yaml"))
    saved = _plain(_read(path), str(path))
    for group in GROUPS:
        if not isinstance(saved.get(group), dict):
            raise AdamergeError(
                f"{path} has no settings under {group}: expected a run's own config.yaml; copy the "
                "run again, or start a new one"
            )
    tree = OmegaConf.create(filled(saved, defaults))
    for key, value in (_word(word) for word in words):
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
        _set(tree, *sugar(key, value, defaults))
    return _at_home(_plain(tree, str(path)))


def text(config: Config) -> str:
    """A configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config))


def _read(path: Path) -> DictConfig:
    """A YAML file, its references unresolved.

    Raises:
        AdamergeError: no YAML of keys and values, too much of it, or a `_target_` in a file that
            lies with it.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MB")
        if b"&" in text and count_values(yaml.compose(text, yaml.SafeLoader), {}) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES} values")
        tree = OmegaConf.load(path)
        raw = OmegaConf.to_container(tree, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise AdamergeError(f"{path} is not valid YAML ({said}): mend that line") from error
    except RecursionError as error:
        raise AdamergeError(f"{path} is nested too deeply: write it flatter") from error
    if not isinstance(tree, DictConfig):
        raise AdamergeError(f"{path} is not a configuration: expected keys and values in YAML")
    if not path.resolve().is_relative_to(config_root()):
        code_beside(raw, path)
    return tree


def _refuse_lookups(value: Any, where: str) -> None:
    """A configuration is written to the run's folder, its export and W&B: no place for secrets."""
    for key in lookups(value):
        raise AdamergeError(
            f"{where}: {key} takes its value from elsewhere by ${{…}}: expected a value, or "
            "${key} of another setting; give it on the command line, as suite.root=$DATA"
        )


def _plain(tree: Any, where: str = "configuration") -> Config:
    """The values of a tree, each reference to another setting replaced by that setting's value.

    Raises:
        AdamergeError: a reference to nothing, or to something outside the configuration.
    """
    try:
        _refuse_lookups(without_references(_raw(tree)), where)
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        what = " ".join(str(error).split("\n    ")[0].split())
        at = f" (in {error.full_key})" if error.full_key else ""
        raise AdamergeError(
            f"{where}: {what}{at}: write another value there, or set what it names"
        ) from error
    except RecursionError as error:
        raise AdamergeError(f"{where} is nested too deeply: write it flatter") from error
    _refuse_lookups(plain, where)
    assert isinstance(plain, dict)  # `_read` and `create` give dictionaries only
    return {str(key): value for key, value in plain.items()}


def _group(
    group: str, name: str, words: Sequence[tuple[str, Any]] = ()
) -> tuple[DictConfig, DictConfig]:
    """A group's file with its `key=value` words on top, and the defaults that it sets.

    A suite is resolved by itself: what it refers to, it holds.
    """
    shipped = config_root() / group / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(os.path.expanduser(name))
    if not path.is_file():
        raise AdamergeError(
            f"{group}={name}: no such {group}{nearest(name, names(group))}; expected a file or one "
            f"of {', '.join(names(group))}"
        )
    tree = _read(path)
    if group == "suite":  # before the words, whose keys are texts
        suite = _raw(tree)
        name_by_text(suite)
        tree = OmegaConf.create(suite)
    for key, value in words:
        _set(tree, key, value)
    defaults = _defaults(group, tree)
    if group != "suite":
        if "name" not in tree:
            tree.name = path.stem
        return tree, defaults
    plain = {"name": path.stem, **_plain(tree, f"{group} {name}")}
    name_by_text(plain)  # what the words have set
    folder = path.resolve().parent
    take_task_files(plain, lambda where, source: _task(where, source, folder))
    locate(plain, folder)
    return OmegaConf.create(plain), defaults


def _defaults(group: str, tree: DictConfig) -> DictConfig:
    """Takes `defaults` out of a group's file; what they refer to are settings of the run."""
    found = _raw(tree).get("defaults", {})
    if not isinstance(found, dict):
        raise AdamergeError(
            f"{group}.defaults is {found!r}: expected settings of configs/train.yaml"
        )
    if "suite" in found:
        raise AdamergeError(
            f"{group}.defaults sets suite: expected other settings of configs/train.yaml; "
            "write what belongs to a suite into its file"
        )
    tree.pop("defaults", None)
    text = OmegaConf.to_yaml(OmegaConf.create(found))
    return OmegaConf.create(_raw(OmegaConf.create(text.replace("${vars.", "${suite.vars."))))


def _raw(tree: Any) -> Config:
    """The content of a tree with its references as they stand."""
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)  # `_read` and `create` give dictionaries only
    return {str(key): value for key, value in raw.items()}


def _task(where: str, source: str, folder: Path) -> Config:
    """The keys of a shipped task file, or of one beside the suite or in the working folder."""
    for path in (config_root() / "task" / f"{source}.yaml", folder / source, Path(source)):
        if path.is_file():
            task = _plain(_read(path), f"task {source}")
            locate_data(task, path.resolve().parent)
            return task
    raise AdamergeError(
        f"{where}: no such task {source!r}{nearest(source, names('task'))}; expected a file or one "
        f"of {', '.join(names('task'))}"
    )


def _word(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise AdamergeError(f"{word!r} is not a setting: expected key=value, like optim.lr=1e-3")
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])
        raw = _raw(parsed)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise AdamergeError(f"{word[:80]!r}: the value is not valid YAML; quote it") from error
    return key, value if key in GROUPS else raw["value"]


def _set(tree: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(tree, key, value, force_add=True, merge=False)
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        raise AdamergeError(
            f"{key} cannot be set ({' '.join(str(error).split())}): a part of it holds a list or a "
            "value that has no keys; set that part whole"
        ) from error
