"""hf:// addresses, against a server that answers as the hub does, in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from adamerge import AdamergeError
from adamerge.weights.formats.hub import fetch, wanted
from tests.processes import forgetting, started

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import json, sys
from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.hub import fetch
try:
    found = fetch(sys.argv[1])
    print(json.dumps([found.revision, sorted(p.name for p in found.path.glob("*"))]))
except AdamergeError as error:
    sys.exit(f"error: {error}")
"""
READ = """
import json, sys
from adamerge._base.errors import AdamergeError
from adamerge.weights.formats.read import read
try:
    found = read(sys.argv[1])
    print(json.dumps([sorted(found.tensors), found.record(), sorted(p.name for p in found.files)]))
except AdamergeError as error:
    sys.exit(f"error: {error}")
"""


class Hub(http.server.ThreadingHTTPServer):
    """One repository, owner/model, at one commit."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.tokens = files, list[str](), set[str | None]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        files = self.server.files
        if path.startswith("/api/models/owner/model"):
            if "/tree/" in path:
                listed = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                          for n, c in files.items()]  # fmt: skip
                return self.send(json.dumps(listed).encode())
            info = {"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "private": False,
                    "downloads": 0, "likes": 0, "tags": [],
                    "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
            return self.send(json.dumps(info).encode())
        name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
        name = name.removeprefix("/owner/model/resolve/main/")
        if name in files:
            self.server.asked.append(name)
            return self.send(files[name], hashlib.sha256(files[name]).hexdigest())
        self.send(b'{"error": "Repository not found"}', status=404)

    def send(self, content: bytes, etag: str | None = None, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files = {
        "config.json": b'{"model_type": "clip"}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": one,
        "model-2.safetensors": two,
        "pytorch_model.bin": b"not wanted, the same weights once more",
        "tf_model.h5": b"not wanted",
        "old/other.safetensors": one,
        "code.py": b"raise SystemExit('executed')",
    }
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def asked(source: str, script: str, environment: dict[str, str], said: Path) -> int:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", source]
    with said.open("w") as file, contextlib.redirect_stdout(file):
        return forgetting(("adamerge", "huggingface_hub"), script)  # it reads its variables once


def ask(
    hub: Hub, home: Path, source: str, script: str = FETCH, **more: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    said, errors = home.with_name("said"), home.with_name("errors")
    process = started(partial(asked, source, script, {**clean, **ours, **more}, said), errors)
    process.join(120)
    assert process.exitcode is not None
    texts = (said.read_text(), errors.read_text())
    return subprocess.CompletedProcess([source], process.exitcode, *texts)


def test_a_repository_is_fetched_once_and_pinned(hub: Hub, tmp_path: Path) -> None:
    answer = ask(hub, tmp_path / "home", "hf://owner/model", READ, HF_TOKEN="hf_secret")
    assert answer.returncode == 0, answer.stderr
    names, record, files = json.loads(answer.stdout)
    assert names == ["a", "b"] and files == ["model-1.safetensors", "model-2.safetensors"]
    assert record["revision"] == COMMIT and record["source"] == "hf://owner/model"
    assert "Bearer hf_secret" in hub.tokens
    fetched = set(hub.asked)
    assert fetched == {"config.json", "model.safetensors.index.json", *files}
    # Offline the cache serves; a repository that is not in it says so.
    again = ask(hub, tmp_path / "home", "hf://owner/model", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == [COMMIT, sorted(fetched)]
    wrong = ask(hub, tmp_path / "home", "hf://owner/none", HF_HUB_OFFLINE="1")
    assert wrong.returncode and "hf://owner/none cannot be fetched" in wrong.stderr
    # What the cache holds is named by its hash: a damaged download is found.
    (broken,) = (tmp_path / "home").rglob("snapshots/*/model-1.safetensors")
    raw = bytearray(broken.read_bytes())
    raw[-1] ^= 1
    broken.resolve().write_bytes(raw)
    damaged = ask(hub, tmp_path / "home", "hf://owner/model", READ, HF_HUB_OFFLINE="1")
    assert damaged.returncode and "the download is damaged" in damaged.stderr


def test_one_file_of_a_revision(hub: Hub, tmp_path: Path) -> None:
    source = f"hf://owner/model@{COMMIT}/old/other.safetensors"
    answer = ask(hub, tmp_path / "home", source)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)[0] == COMMIT and set(hub.asked) == {"old/other.safetensors"}
    missing = ask(hub, tmp_path / "home", "hf://owner/model/none.pt")
    assert missing.returncode and "no file 'none.pt' in that repository" in missing.stderr
    unknown = ask(hub, tmp_path / "home", "hf://owner/unknown")
    assert unknown.returncode and "hf://owner/unknown cannot be fetched" in unknown.stderr


@pytest.mark.parametrize("source", ["hf://model", "hf://a/b@", "hf://", "hf://a/b/c@d/e"])
def test_no_address(source: str) -> None:
    with pytest.raises(AdamergeError, match="is not an address of the hub: expected hf://owner"):
        fetch(source)


def test_of_several_formats_one_is_downloaded() -> None:
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "x/model.safetensors", "a.py"]
    assert wanted(files) == ["config.json", "model.safetensors"]
    assert wanted(["open_clip_config.json", "open_clip_model.safetensors", *files])[-1] == (
        "open_clip_model.safetensors"
    )
    assert wanted(["README.md", "finetuned.pt"]) == ["finetuned.pt"]


def test_with_nobody_to_ask_the_cache_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **more: object) -> None:
        raise httpx.ConnectError("refused")

    def cached(repo: str, local_files_only: bool, **more: object) -> str:
        assert repo == "owner/model" and local_files_only
        return str(tmp_path / COMMIT)

    (tmp_path / COMMIT).mkdir()
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refused)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert fetch("hf://owner/model").revision == COMMIT
