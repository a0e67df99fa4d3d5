"""Configuration: files and `key=value` words in, one checked plain dictionary out.

The only module that knows omegaconf.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adamerge.binding import fits, nearest
from adamerge.errors import AdamergeError
from adamerge.files import replacing
from adamerge.storage_kinds import DTYPES, PLACES
from adamerge.suite_check import suite_problems
from adamerge.suite_files import locate, locate_data, name_by_text, take_task_files

Config = dict[str, Any]

GROUPS = ("suite", "method", "objective")
# Dictionaries whose keys are arguments of something else, checked where that is known.
_OPEN = ("trainer", "optim", "scheduler", "transform", *GROUPS)


def config_root() -> Path:
    """The folder of shipped configs: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
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
        loaded = _group(group, str(chosen.get(group, tree[group])), own if group == "suite" else ())
        overrides = loaded.pop("defaults", {})
        if not isinstance(overrides, DictConfig | dict):
            raise AdamergeError(
                f"{group}.defaults is {overrides!r}: expected settings of configs/train.yaml"
            )
        if "suite" in overrides:
            raise AdamergeError(
                f"{group}.defaults sets suite: expected other settings of configs/train.yaml; "
                "write what belongs to a suite into its file"
            )
        tree[group] = loaded
        tree.merge_with(overrides)
    for key, value in settings:
        if key not in GROUPS and not key.startswith("suite."):
            _set(tree, *_sugar(key, value, defaults))
    config = _plain(tree)
    base = config["method"].get("base") if isinstance(config["method"], dict) else None
    if isinstance(base, str) and Path(base).exists():
        config["method"]["base"] = str(Path(base).resolve())
    return config


def problems(config: Config) -> list[str]:
    """Unknown keys, mistyped values and an incomplete suite; arguments of dotted paths aside."""
    defaults = _plain(_read(config_root() / "train.yaml"))
    return [
        *_unknown(config, defaults),
        *_mistyped(config, defaults),
        *suite_problems(config["suite"], names("task")),
    ]


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
    tree = _read(path)
    for key in defaults.keys() - tree.keys():  # settings that are younger than the run
        tree[key] = defaults[key]
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
        _set(tree, *_sugar(key, value, defaults))
    return _plain(tree)


def text(config: Config) -> str:
    """A configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config))


def _read(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise AdamergeError(f"{path} is not valid YAML ({reason}): mend that line") from error
    if not isinstance(tree, DictConfig):
        raise AdamergeError(f"{path} is not a configuration: expected keys and values in YAML")
    return tree


def _plain(tree: Any, where: str = "configuration") -> Config:
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        what = " ".join(str(error).split("\n    ")[0].split())
        at = f" (in {error.full_key})" if error.full_key else ""
        raise AdamergeError(
            f"{where}: {what}{at}: write another value there, or set what it names"
        ) from error
    assert isinstance(plain, dict)  # `_read` and `create` give dictionaries only
    return {str(key): value for key, value in plain.items()}


def _group(group: str, name: str, words: Sequence[tuple[str, Any]] = ()) -> DictConfig:
    """A group's file with its `key=value` words on top, resolved."""
    shipped = config_root() / group / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise AdamergeError(
            f"{group}={name}: no such {group}{nearest(name, names(group))}; expected a file or one "
            f"of {', '.join(names(group))}"
        )
    tree = _read(path)
    if group == "suite":  # before the words, whose keys are texts
        tree = _named_by_text(tree)
    for key, value in words:
        _set(tree, key, value)
    plain = {"name": path.stem, **_plain(tree, f"{group} {name}")}
    if group == "suite":
        name_by_text(plain)  # what the words have set
        folder = path.resolve().parent
        take_task_files(plain, lambda where, source: _task(where, source, folder))
        locate(plain, folder)
    return OmegaConf.create(plain)


def _named_by_text(tree: DictConfig) -> DictConfig:
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)  # as `_read` has made sure
    suite = {str(key): value for key, value in raw.items()}
    name_by_text(suite)
    return OmegaConf.create(suite)


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
        parsed = OmegaConf.create({"value": OmegaConf.from_dotlist([f"value={value}"])["value"]})
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise AdamergeError(f"{word!r}: the value is not valid YAML; quote it") from error
    return key, value if key in GROUPS else _plain(parsed)["value"]


def _set(tree: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(tree, key, value, force_add=True, merge=False)
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        raise AdamergeError(
            f"{key} cannot be set ({' '.join(str(error).split())}): a part of it holds a list or a "
            "value that has no keys; set that part whole"
        ) from error


def _sugar(key: str, value: Any, defaults: Config) -> tuple[str, Any]:
    """`wandb=off` means `wandb.mode=off`, `preflight=off` `preflight.enabled=false`; YAML reads a
    bare `off` as false."""
    if isinstance(defaults.get(key), dict) and not isinstance(value, dict):
        switches = [name for name in ("mode", "enabled") if name in defaults[key]]
        key = ".".join([key, *switches])
    if key.endswith(".mode") and isinstance(value, bool):
        value = "auto" if value else "off"
    return key, value


def _unknown(config: Config, defaults: Config) -> Iterable[str]:
    for key, value in config.items():
        if key not in defaults:
            yield f"{key} is unknown{nearest(key, defaults)}"
        elif key not in _OPEN and isinstance(defaults[key], dict) and isinstance(value, dict):
            for inner in value:
                if inner not in defaults[key]:
                    yield f"{key}.{inner} is unknown{nearest(inner, defaults[key])}"


_NULLABLE = {"micro_batch": int, "run_dir": str, "resume": str, "cache_dir": str, "fold": str}
_CHOICES = {
    "protocol": ("paper", "heldout"),
    "on_bad_image": ("error", "skip"),
    "fold": ("dynamic", "per_task", "single"),
    "dtype": DTYPES,
    "device": PLACES,
    "mode": ("auto", "online", "offline", "off"),
    "precision": ("32-true", "bf16-mixed"),
}
_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "micro_batch": 1,
    "num_workers": 0,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 1,
    "images": 1,
    "max_steps": 1,
}


def _mistyped(config: Config, defaults: Config, prefix: str = "") -> Iterable[str]:
    for key, default in defaults.items():
        value, where = config.get(key), prefix + key
        if key not in config:
            yield f"{where} is missing"
        elif key == "transform":
            if not isinstance(value, list):
                yield f"transform is {value!r}: expected a list of {{_target_: ...}}"
        elif key in ("optim", "scheduler", *GROUPS):
            continue
        elif isinstance(default, dict):
            if isinstance(value, dict):
                yield from _mistyped({**default, **value}, default, f"{where}.")
            else:
                yield f"{where} is {value!r}: expected {', '.join(f'{where}.{k}' for k in default)}"
        elif key in _NULLABLE and value is None:
            continue
        elif key in _CHOICES and value not in _CHOICES[key]:
            yield (
                f"{where} is {value!r}: expected {' or '.join(_CHOICES[key])}"
                f"{nearest(str(value), _CHOICES[key])}"
            )
        elif key == "devices":  # an int, a list of devices or "auto": lightning's to judge
            continue
        elif key in _NULLABLE or not fits(value, type(default)):
            wanted = _NULLABLE.get(key, type(default))
            if not fits(value, wanted):
                yield f"{where} is {value!r}: expected {wanted.__name__}"
        if key in _LEAST and isinstance(value, int) and value < _LEAST[key]:
            yield f"{where} is {value}: expected at least {_LEAST[key]}"
