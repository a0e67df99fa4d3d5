"""Configuration: every shipped file loads and binds; every mistake is named, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from adamerge import AdamergeError, build, config


@pytest.mark.parametrize("group", config.GROUPS)
def test_every_shipped_config_loads_and_binds(group: str) -> None:
    assert config.names(group)
    for name in config.names(group):
        settings = config.load([f"{group}={name}"])
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


def test_paths_are_relative_to_the_suite_file(suite: Path) -> None:
    tasks = config.load([f"suite={suite}"])["suite"]["tasks"]
    assert tasks["dots"]["expert"] == str(suite.parent / "dots.safetensors")
    assert tasks["dots"]["data"]["path"] == str(suite.parent / "dots-images")


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
    ("trainer.max_steps=0", r"trainer\.max_steps is 0: expected at least 1"),
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
    ("trainer.accumulate_grad_batches=2", r"accumulate_grad_batches is unknown or not for"),
    ("trainer.precision=64-true", r"trainer\.precision is '64-true': expected 32-true"),
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
    ("wandb=onlin", r"wandb\.mode is 'onlin': .*did you mean 'online'"),
]


@pytest.mark.parametrize(("word", "message"), MISTAKES)
def test_mistakes_are_named(suite: Path, word: str, message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        build.check(config.load([f"suite={suite}", word]))


def test_all_mistakes_in_one_message(suite: Path) -> None:
    words = [word for word, _ in MISTAKES[:3]] + ["batch_size=many"]
    with pytest.raises(AdamergeError) as caught:
        build.check(config.load([f"suite={suite}", *words]))
    for part in ("optm is unknown", "optim.lrr is unknown", "optim.lr is 'fast'", "batch_size"):
        assert part in str(caught.value)


def test_words_and_names(suite: Path) -> None:
    with pytest.raises(AdamergeError, match="'seed' is not a setting: expected key=value"):
        config.load(["seed"])
    with pytest.raises(AdamergeError, match=r"method=layerwise: no such method \(did you mean"):
        config.load(["method=layerwise"])


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
