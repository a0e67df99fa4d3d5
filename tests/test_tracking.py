"""Whether Weights & Biases can be used online is found out without asking anybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from adamerge.report import tracking

KEY = "0123456789" * 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """A user without a key, and how `wandb.login` was called; a login as of old versions."""
    calls: list[dict[str, Any]] = []

    def login(anonymous: str | None = None, key: str | None = None, verify: bool = False) -> bool:
        calls.append({"verify": verify})
        return True

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setattr(wandb, "login", login)
    wandb.teardown()  # it reads the environment once
    yield calls
    wandb.teardown()


def test_without_a_key_an_old_version_is_not_called(asked: list[dict[str, Any]]) -> None:
    assert not tracking._logged_in()
    assert asked == []


def test_a_key_in_the_environment(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking._logged_in()
    assert asked == [{"verify": True}]


@pytest.mark.parametrize(("host", "found"), [("wandb.example", True), ("other.example", False)])
def test_a_key_in_the_netrc(
    asked: list[dict[str, Any]], tmp_path: Path, host: str, found: bool
) -> None:
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    assert tracking._logged_in() is found
    assert asked == [{"verify": True}] * found


def test_a_new_version_is_told_not_to_ask(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(key: str | None = None, verify: bool = True, prompt: bool = True) -> bool:
        asked.append({"verify": verify, "prompt": prompt})
        return False

    monkeypatch.setattr(wandb, "login", login)
    assert not tracking._logged_in()
    assert asked == [{"verify": True, "prompt": False}]


def test_a_refused_key_is_no_error(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(**_: object) -> bool:
        raise wandb.errors.AuthenticationError("wrong key")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "login", login)
    assert not tracking._logged_in()
