"""Configuration: every shipped file loads and binds; every mistake is named, all at once."""

from __future__ import annotations

import inspect
import re
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from adamerge import AdamergeError
from adamerge.cli.command import _parsed
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.config.references import resolved
from adamerge.config.trainer import build_trainer

ASKED = {  # of the user, for a shipped file
    "real": ["suite.vars.data=images"],
    "labels": ["protocol=heldout"],
}


@pytest.mark.parametrize("group", config.GROUPS)
def test_every_shipped_config_loads_and_binds(group: str) -> None:
    assert config.names(group)
    for name in config.names(group):
        settings = config.load([f"{group}={name}", *ASKED.get(name, ())])
        assert settings[group]["name"] == name
        build.check(settings)


def test_order_defaults_suite_method_command_line(suite: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(
        "_target_: adamerge.methods.AdaMerging\ninit: 0.2\n"
        "defaults: {optim: {lr: 0.5}, trainer: {max_steps: 7}}\n"
    )
    settings = config.load([f"suite={suite}", f"method={own}", "trainer.max_steps=9"])
    assert settings["optim"] == {"_target_": "torch.optim.Adam", "lr": 0.5}
    assert settings["trainer"]["max_steps"] == 9 and settings["method"]["init"] == 0.2
    assert settings["method"]["name"] == "mine" and "defaults" not in settings["method"]
    assert config.load(["method=layer_wise_pp"])["transform"][0]["density"] == 0.2


def test_a_suite_has_defaults_for_a_method(suite: Path, tmp_path: Path) -> None:
    own = suite.with_name("more.yaml")
    more = "by_method: {layer_wise: {batch_size: 7, trainer: {max_steps: 8}}}\n"
    own.write_text(suite.read_text() + more)
    settings = config.load([f"suite={own}", "batch_size=9"])
    assert settings["trainer"]["max_steps"] == 8 and settings["batch_size"] == 9
    assert "by_method" not in settings["suite"]
    other = config.load([f"suite={own}", "method=task_wise"])
    assert other["trainer"] == config.load([f"suite={suite}"])["trainer"]
    own.write_text(suite.read_text() + "by_method: {layerwise: {batch_size: 7}}\n")
    with pytest.raises(AdamergeError, match=r"'layerwise' \(did you mean 'layer_wise'"):
        config.load([f"suite={own}"])


def test_no_scheduler_is_made_of_no_steps() -> None:
    for method in ("layer_wise", "fast"):
        build.check(config.load([f"method={method}", "trainer.max_steps=0"]))


def test_paths_are_relative_to_the_suite_file(suite: Path) -> None:
    tasks = config.load([f"suite={suite}"])["suite"]["tasks"]
    assert tasks["dots"]["expert"] == str(suite.parent / "dots.safetensors")
    assert tasks["dots"]["data"]["path"] == str(suite.parent / "dots-images")


def test_settings_may_refer_to_others_whose_last_value_counts(suite: Path, tmp_path: Path) -> None:
    scheduler = (
        "{_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: '${trainer.max_steps}'}"
    )
    for words in (
        [f"scheduler={scheduler}", "trainer.max_steps=7"],
        ["trainer.max_steps=7", f"scheduler={scheduler}"],
        ["method=paper_wemoe", "trainer.max_steps=7"],
    ):
        settings = config.load([f"suite={suite}", *words])
        assert settings["scheduler"]["T_max"] == 7
        build.check(settings)
    own = tmp_path / "own.yaml"
    defaults = "{seed: '${vars.k}', batch_size: '${seed}'}"
    own.write_text(f"vars: {{k: 5}}\nname: n${{vars.k}}\ntasks: {{}}\ndefaults: {defaults}\n")
    settings = config.load([f"suite={own}", "suite.vars.k=6"])
    assert (settings["seed"], settings["batch_size"], settings["suite"]["name"]) == (6, 6, "n6")
    assert config.load([f"suite={own}", "seed=8"])["batch_size"] == 8


def test_the_home_folder(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("expert.pt", "model.pt", "base.pt", "own.yaml"):
        (tmp_path / name).write_text("pretrained: ~/model.pt\ntasks: {a: {expert: ~/expert.pt}}\n")
    words = ["run_dir=~/run", "cache_dir=~/cache", "suite.root=~/root", "method=wemoe"]
    settings = config.load(["suite=~/own.yaml", *words, "method.base=~/base.pt"])
    found: dict[str, Any] = {**settings["suite"], **settings["suite"]["tasks"]["a"]}
    found |= {"base": settings["method"]["base"], **settings}
    for key, name in (
        *(("run_dir", "run"), ("cache_dir", "cache"), ("root", "root"), ("base", "base.pt")),
        *(("pretrained", "model.pt"), ("expert", "expert.pt")),
    ):
        assert found[key] == str(tmp_path / name), key
    config.save(config.load([f"suite={suite}"]), tmp_path / "config.yaml")
    assert config.load_run(tmp_path, ["cache_dir=~/x"])["cache_dir"] == str(tmp_path / "x")
    options = _parsed(["export", "~/run", "--to=~/to"])
    assert (options.run, options.to) == (tmp_path / "run", tmp_path / "to")


def test_an_older_run_gets_the_settings_younger_than_it(suite: Path, tmp_path: Path) -> None:
    now = config.load([f"suite={suite}", "optim={_target_: torch.optim.Adadelta}"])
    old = {key: value for key, value in now.items() if key not in ("wandb", "recompute")}
    old |= {"task_vectors": {"dtype": "int8"}, "evaluate": {"oracle": False}, "trainer": {}}
    config.save(old, tmp_path / "config.yaml")
    found = config.load_run(tmp_path)
    build.check(found)
    assert found["task_vectors"] == {**now["task_vectors"], "dtype": "int8"}
    assert found["evaluate"] == {**now["evaluate"], "oracle": False}
    assert found["wandb"] == now["wandb"] and found["trainer"] == config.load()["trainer"] | {
        "max_steps": 1000
    }
    assert found["optim"] == {"_target_": "torch.optim.Adadelta"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "5", "- a", "\0", "suite: 5", "suite: {}", "suite: ${x}", "[", "a: &a [*a]"),
        "suite: {}\nmethod: {}\nobjective: {}",
        "suite: {tasks: [1]}\nmethod: {base: [1]}\nobjective: {name: {}}\ntrainer: 7\nwandb: []",
        "suite: {tasks: {a: 5}}\nmethod: {}\nobjective: {}\noptim: []\ntransform: {a: 1}",
        "suite: {name: 5}\nmethod: {_target_: [1]}\nobjective: {_target_: 5}\ntask_vectors: 5",
    ],
)
def test_a_config_of_another_shape_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(AdamergeError):
        build.check(config.load_run(tmp_path))


@pytest.mark.parametrize(
    ("target", "shapes", "message"),
    [
        ("torch.optim.Muon", [(2, 3), (4, 4)], None),
        ("torch.optim.Muon", [(2, 3), (4,)], "only supports 2D parameters"),
        ("torch.optim.SparseAdam", [(2, 3)], "does not support dense gradients"),
        ("torch.optim.LBFGS", [(2,)], None),
        ("torch.optim.Adam", [(), (2, 3, 4)], None),
    ],
)
def test_an_optimizer_is_tried_on_what_is_learned(
    target: str, shapes: list[tuple[int, ...]], message: str | None
) -> None:
    if not hasattr(torch.optim, target.rpartition(".")[2]):
        pytest.skip("not in this torch")
    words = [f"optim={{_target_: {target}, lr: 0.1}}", "scheduler=null"]
    found = build._trial(config.load(words), shapes)
    assert not found if message is None else message in found[0]


def test_wandb_takes_a_word_even_where_yaml_reads_a_boolean() -> None:
    for word in ("off", "offline", "online", "auto"):
        assert config.load([f"wandb={word}"])["wandb"]["mode"] == word
    assert config.load(["wandb.artifact=true"])["wandb"]["artifact"] is True


def test_a_saved_config_loads_as_it_was(suite: Path, tmp_path: Path) -> None:
    settings = config.load([f"suite={suite}", "method=task_wise_pp", "objective=infomax"])
    config.save(settings, tmp_path / "config.yaml")
    assert config.load_run(tmp_path) == settings
    with pytest.raises(AdamergeError, match="method=layer_wise cannot be changed on resuming"):
        config.load_run(tmp_path, ["method=layer_wise"])
    with pytest.raises(AdamergeError, match=r"holds no run: expected its config\.yaml"):
        config.load_run(tmp_path / "elsewhere")


MISTAKES = [
    ("optm.lr=1", r"optm is unknown \(did you mean 'optim'\?\)"),
    ("optim.lrr=1", r"optim\.lrr is unknown \(did you mean 'lr'\?\)"),
    ("optim.lr=fast", r"optim\.lr is 'fast': expected float"),
    ("trainer.max_step=1", r"trainer\.max_step is unknown .*\(did you mean 'max_steps'\?\)"),
    ("trainer.max_steps=-1", r"trainer\.max_steps is -1: expected at least 0"),
    ("method.granulrity=task", r"method\.granulrity is unknown \(did you mean 'granularity'\?\)"),
    ("method.granularity=row", r"method\.granularity is 'row': expected 'task' or 'layer'"),
    ("method.init=high", r"method\.init is 'high': expected float"),
    ("method.clamp=3", r"method\.clamp is 3: expected bool"),
    ("method._target_=adamerge.methods.Ada", r"nothing at 'adamerge\.methods\.Ada'"),
    ("method._target_=os.system", r"'os\.system' is not a MergeMethod class"),
    ("optim._target_=builtins.eval", r"'builtins\.eval' is not a torch optimizer class"),
    ("objective.weight=1", r"objective\.weight is unknown \(did you mean 'weights'\?\)"),
    ("transform=[{_target_: adamerge.transforms.tie}]", r"nothing at .*did you mean 'ties'"),
    ("transform=[{density: 2}]", r"transform\[0\] has no _target_"),
    ("protocol=papr", r"protocol is 'papr': expected paper or heldout \(did you mean 'paper'\?\)"),
    ("batch_size=many", r"batch_size is 'many': expected int"),
    ("micro_batch=0", r"micro_batch is 0: expected at least 1"),
    ("evaluate.orcale=false", r"evaluate\.orcale is unknown \(did you mean 'oracle'\?\)"),
    ("evaluate=false", r"evaluate is False: expected evaluate\.baselines"),
    ("seed=abc", r"seed is 'abc': expected int"),
    ("seed=-1", r"seed is -1: expected at least 0"),
    ("run_dir=5", r"run_dir is 5: expected str"),
    ("trainer=5", r"trainer is 5: expected trainer\.max_steps"),
    (
        "trainer.accumulate_grad_batches=2",
        r"accumulate_grad_batches is not for adamerge: .*set batch_size",
    ),
    ("trainer.precision=64-true", r"trainer\.precision is '64-true': expected 32-true"),
    (
        "trainer.callbacks=5",
        r"trainer\.callbacks\.0 has no _target_: expected the dotted path of a",
    ),
    ("trainer.callbacks=[a]", r"trainer\.callbacks\.0 has no _target_"),
    (
        "trainer.callbacks=[{_target_: os.system}]",
        r"'os\.system' is not a callback or another part",
    ),
    ("trainer.callbacks=[{_target_: tests.tiny.Recording}]", r"is not a callback or another part"),
    ("trainer.callbacks=[{_target_: lightning.pytorch.Trainer}]", r"is not a callback or another"),
    (
        "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Timer, durations: 5}]",
        r"trainer\.callbacks\.0\.durations is unknown \(did you mean 'duration'\?\)",
    ),
    (
        "trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint}]",
        r"ModelCheckpoint is not for adamerge: checkpoints are written every checkpoint_every",
    ),
    (
        "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, "
        "cluster_environment: {_target_: builtins.eval}}",
        r"strategy\.cluster_environment\._target_: 'builtins\.eval' is not a callback or another",
    ),
    ("trainer.profiler=5", r"trainer\.profiler is 5: expected Profiler or str or none"),
    ("wandb.entity=5", r"wandb\.entity is 5: expected str"),
    ("wandb.tags=a", r"wandb\.tags is 'a': expected a list"),
    ("scheduler=5", r"scheduler is 5: expected its keys and values"),
    (
        "scheduler={_target_: torch.optim.lr_scheduler.ChainedScheduler, schedulers: [{_target_: "
        "torch.optim.lr_scheduler.StepLR}]}",
        r"scheduler\.schedulers\.0\.step_size is missing",
    ),
    ("transform=5", r"transform is 5: expected a list"),
    ("suite.architecture=5", r"suite\.architecture is 5: expected a name or a path"),
    ("suite.tasks.dots.templates=5", r"dots\.templates is 5: expected a list"),
    ("suite.tasks.dots.templates=['{} {x}']", r"'\{\} \{x\}' has no single \{\}"),
    ("suite.tasks.dots.classes=[a,b,b,c]", r"dots\.classes: 'b' is listed twice"),
    ("suite.tasks.dots.data.pth=5", r"dots\.data\.pth is unknown \(did you mean 'path'\?\)"),
    ("optim._target_=.a.b", r"cannot import '\.a\.b'"),
    ("transform.a.b=1", r"transform\.a\.b cannot be set .*: a part of it holds a list"),
    ("suite.tasks.dots.classes.a=1", r"dots\.classes\.a cannot be set .*set that part whole"),
    ("optim.lr=-1", r"optim: Invalid learning rate"),
    ("method._target_=adamerge.methods.MergeMethod", r"is not a MergeMethod class"),
    ("seed=4294967296", r"seed is 4294967296: expected at most 4294967295"),
    ("batch_size=1000000000", r"batch_size is 1000000000: expected at most 65536"),
    ("evaluate.batch_size=1000000000", r"evaluate\.batch_size is 1000000000: expected at most"),
    ("trainer.devices=1000000000", r"trainer\.devices is 1000000000: expected at most"),
    ("suite.name=/abs", r"suite\.name is '/abs', which cannot name a run's folder"),
    ("suite.name=../up", r"suite\.name is '\.\./up', which cannot"),
    ("suite.name=a/b", r"suite\.name is 'a/b', which cannot"),
    ("suite.name=~", r"suite\.name is 'None', which cannot"),
    ("suite.name='~x'", r"suite\.name is '~x', which cannot"),
    ("suite.name=[a]", r"suite\.name is .*, which cannot"),
    ("method.name=a\\b", r"method\.name is .*, which cannot"),
    ("objective.name=" + "x" * 300, r"objective\.name is .*, which cannot"),
    ("optim={_target_: torch.optim.SparseAdam}", r"optim: SparseAdam does not support dense"),
    ("optim=5", r"optim is 5: expected optim\._target_"),
    ("task_vectors=5", r"task_vectors is 5: expected task_vectors\.dtype"),
    ("seed=${nothing}", r"Interpolation key 'nothing' not found \(in seed\)"),
    ("method={1: 2}", r"no such method"),
    ("update.rho=0", r"update\.rho is 0: expected a finite number > 0"),
    ("update.rho=abc", r"update\.rho is 'abc': expected float"),
    ("update.rho=null", r"update\.rho is None: expected float"),
    ("update.inner_lr=abc", r"update\.inner_lr is 'abc': expected float"),
    ("optim..lr=1", r"'optim\.\.lr=1' is not a setting"),
    ("suite.=1", r"'suite\.=1' is not a setting"),
    ("trainer.gradient_clip_val=-1", r"gradient_clip_val is -1: expected a number >= 0"),
    ("wandb=onlin", r"wandb\.mode is 'onlin': .*did you mean 'online'"),
]


@pytest.mark.parametrize(("word", "message"), MISTAKES)
def test_mistakes_are_named(suite: Path, word: str, message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        build.check(config.load([f"suite={suite}", word]))


def test_steps_that_would_learn_nothing_are_refused(suite: Path) -> None:
    masks = [f"suite={suite}", "method=concrete_task_arithmetic", "method.mask_steps=4"]
    build.check(config.load([*masks, "trainer.max_steps=4"]))
    build.check(config.load([*masks, "trainer.max_steps=6", "method.granularity=task"]))
    with pytest.raises(
        AdamergeError, match=r"learned for 4 steps .* trainer\.max_steps=6 would go"
    ):
        build.check(config.load([*masks, "trainer.max_steps=6"]))
    clamped = [f"suite={suite}", "method=layer_wise", "method.clamp=true"]
    build.check(config.load([*clamped, "method.init=1"]))
    build.check(config.load([*clamped, "method.init=1.5", "trainer.max_steps=0"]))
    with pytest.raises(AdamergeError, match=r"method\.init is 1\.5, outside the \[0, 1\] that"):
        build.check(config.load([*clamped, "method.init=1.5"]))


@pytest.mark.parametrize("method", ["dare", "della", "atlas"])
def test_what_is_drawn_follows_the_seed(method: str) -> None:
    settings = config.load([f"method={method}", "seed=7"])
    drawn = settings["transform"][0] if settings["transform"] else settings["method"]
    assert drawn["seed"] == 7


def test_every_argument_of_the_trainer_is_taken_or_refused_with_the_reason(suite: Path) -> None:
    taken = []
    for name, parameter in inspect.signature(Trainer).parameters.items():
        settings = config.load([f"suite={suite}", "trainer.accelerator=cpu"])
        settings["trainer"].setdefault(name, parameter.default)
        try:
            build.check(settings)
        except AdamergeError as error:
            assert re.fullmatch(rf"trainer\.{name} is not for adamerge: .*", str(error))
        else:
            taken.append(name)
            build_trainer(settings["trainer"], callbacks=[], plugins=[], logger=False)
    assert len(taken) == len(inspect.signature(Trainer).parameters) - 14


def test_schedulers_within_a_scheduler() -> None:
    inner = "{_target_: torch.optim.lr_scheduler.LinearLR, start_factor: 0.5, total_iters: 2}"
    chained = "_target_: torch.optim.lr_scheduler.ChainedScheduler"
    word = f"scheduler={{{chained}, schedulers: [{inner}, {inner}]}}"
    settings = config.load([word, "optim.lr=0.1"])
    build.check(settings)
    optimizer = build._optimizer(settings["optim"], [torch.nn.Parameter(torch.zeros(2))])
    scheduler = build._scheduler(settings["scheduler"], optimizer)
    assert len(scheduler._schedulers) == 2 and optimizer.param_groups[0]["lr"] == 0.1 / 4


def test_all_mistakes_in_one_message(suite: Path) -> None:
    words = [word for word, _ in MISTAKES[:3]] + ["batch_size=many"]
    with pytest.raises(AdamergeError) as caught:
        build.check(config.load([f"suite={suite}", *words]))
    for part in ("optm is unknown", "optim.lrr is unknown", "optim.lr is 'fast'", "batch_size"):
        assert part in str(caught.value)


def test_whole_numbers_where_a_number_is_wanted_and_mistakes_told_once(suite: Path) -> None:
    build.check(config.load([f"suite={suite}", "update.rho=1"]))
    for word, setting in (("update.name=foo", "update.name"), ("update.order=up", "update.order")):
        with pytest.raises(AdamergeError) as caught:
            build.check(config.load([f"suite={suite}", word]))
        assert str(caught.value).count(setting) == 1


def test_words_and_names(suite: Path) -> None:
    with pytest.raises(AdamergeError, match="'seed' is not a setting: expected key=value"):
        config.load(["seed"])
    with pytest.raises(AdamergeError, match=r"method=layerwise: no such method \(did you mean"):
        config.load(["method=layerwise"])


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{inner}: &{inner} [*{outer}, *{outer}, *{outer}, *{outer}]\n"
    for outer, inner in pairwise("abcdefghijklmnop")
)


def doubling(start: Any, twice: Callable[[str], Any]) -> dict[str, Any]:
    """Thirty settings, each made of twice the one before: 2 ** 30 of the first."""
    links = pairwise([f"a{i}" for i in range(31)])
    return {"a0": start} | {b: twice(f"${{vars.{a}}}") for a, b in links}


MANY = r"what its \$\{…\} name is more than 4 MB in all"


@pytest.mark.parametrize(
    ("start", "twice"),
    [
        ("x" * 1000, lambda a: a + a),
        ("x" * 1000, lambda a: [a, a]),
        ({"x": "x" * 1000}, lambda a: {"x": a, "y": a}),
        ("x" * 1000, lambda a: f"${{.a0}}{a}${{vars.a0}}{a}"),
    ],
)
def test_references_of_references_do_not_explode(start: Any, twice: Callable[[str], Any]) -> None:
    tracemalloc.start()
    with pytest.raises(AdamergeError, match=MANY):
        resolved({"vars": doubling(start, twice)})
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("place", ["suite", "defaults", "task", "word"])
def test_references_do_not_explode_wherever_they_stand(tmp_path: Path, place: str) -> None:
    bomb = {"vars": doubling("x" * 1000, lambda a: a + a)}
    own: dict[str, Any] = {**bomb, "tasks": {}}
    words = ["suite.tasks={a: {expert: '${vars.a30}'}}"] if place == "word" else []
    if place == "defaults":
        own["defaults"] = {"wandb": {"project": "${suite.vars.a30}"}}
    elif place == "task":
        own = {"tasks": {"a": {"task": "task.yaml"}}}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**bomb, "classes": ["${vars.a30}"]}))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(AdamergeError, match=MANY):
        config.load([f"suite={tmp_path / 'own.yaml'}", *words])


def test_aliases_in_a_word_do_not_explode() -> None:
    links = [f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]" for a, b in pairwise("abcdefghijklmnop")]
    with pytest.raises(AdamergeError, match="the value is not valid YAML"):
        config.load([f"optim={{a: &a [x, x], {', '.join(links)}}}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${trainer.max_steps}", 7),
        ("${seed}-${trainer.max_steps}", "3-7"),
        ("${vars.${vars.which}}", 5),
        ("${tasks.a.list[1].x}", 9),
        ("${...b}", None),
        ("${suite.vars.five}", 5),
    ],
)
def test_references_from_anywhere_to_anything(tmp_path: Path, text: str, expected: Any) -> None:
    tasks = {"b": None, "a": {"list": [1, {"x": 9}], "c": {"d": text}}}
    own = {"vars": {"five": 5, "which": "five"}, "tasks": tasks}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    settings = config.load([f"suite={tmp_path / 'own.yaml'}", "trainer.max_steps=7", "seed=3"])
    assert settings["suite"]["tasks"]["a"]["c"]["d"] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {a: {}}", r"suite\.pretrained is missing; .*suite\.tasks\.a\.expert is missing"),
        ("tasks: {}", r"suite\.tasks is empty"),
        ("tasks: {a: {exprt: x}}", r"suite\.tasks\.a\.exprt is unknown \(did you mean 'expert'"),
        ("tasks: {a: {templates: [x]}}", r"'x' has no single \{\} for the class name"),
        ("tasks: {a: {}, a: {}}", r"broken\.yaml is not valid YAML .*duplicate key a"),
        ("tasks: [", r"broken\.yaml is not valid YAML"),
        ("- a", r"broken\.yaml is not a configuration"),
        ("tasks: " + "[" * 20_000, r"broken\.yaml is (not valid YAML|nested too deeply)"),
        ("tasks: " + "{a: " * 300 + "}" * 300, r"broken\.yaml is nested too deeply"),
        (LAUGHS, r"broken\.yaml is not valid YAML \(its aliases stand for more than"),
        ("tasks: &a [*a]", r"its aliases stand for more than"),
        ("tasks: 5\n5: 6", r"suite\.5 is unknown"),
        ("tasks: ${tasks}", r"(?i)recursive|interpolation"),
        ("defaults: {optim: [1]}", r"optim is \[1\]: expected optim\._target_"),
        ("defaults: ${x}", r"suite\.defaults is '\$\{x\}': expected settings"),
    ],
)
def test_broken_suites(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(AdamergeError, match=message):
        build.check(config.load([f"suite={path}"]))


def test_defaults_do_not_rewrite_the_suite(tmp_path: Path) -> None:
    text = (config.config_root() / "method" / "layer_wise.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"{text}\ndefaults: {{suite: {{pretrained: x}}}}\n")
    with pytest.raises(AdamergeError, match=r"method\.defaults sets suite"):
        config.load([f"method={tmp_path / 'mine.yaml'}"])
