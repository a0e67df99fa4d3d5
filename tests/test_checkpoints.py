"""Checkpoints: what is read, what is refused, and that nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge import AdamergeError
from adamerge.encoders.clip import build_clip
from adamerge.encoders.pretrained import load_pretrained
from adamerge.weights.formats.read import Checkpoint, read, tower_state
from tests import golden_data as golden

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605157884\n"
STATE = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4)}


def opened(state: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint("state", Path("state"), (), state)


def save_legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("plain.safetensors", save_file),
        ("plain.pt", torch.save),
        ("legacy.pt", save_legacy),
        ("lightning.ckpt", lambda state, path: torch.save({"state_dict": state}, path)),
        ("open_clip.pt", lambda s, p: torch.save({"epoch": 3, "state_dict": s, "name": "x"}, p)),
        ("no_suffix", save_file),
        ("wrong_suffix.safetensors", torch.save),
    ],
)
def test_reads(tmp_path: Path, name: str, write: Callable[..., None]) -> None:
    write(STATE, tmp_path / name)
    found = read(tmp_path / name).tensors
    assert set(found) == set(STATE)
    assert all(torch.equal(found[key], tensor) for key, tensor in STATE.items())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['ADAMERGE_TEST_MARK']}",)


def test_never_executes_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "executed"
    monkeypatch.setenv("ADAMERGE_TEST_MARK", str(mark))
    torch.save({"a": Evil()}, tmp_path / "zip.pt")
    save_legacy({"a": Evil()}, tmp_path / "legacy.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("zip.pt", "legacy.pt", "bare.pt"):
        with pytest.raises(AdamergeError, match=f"{name} (cannot be read safely|is a pickle)"):
            read(tmp_path / name)
    assert not mark.exists()


def truncated(path: Path) -> None:
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-20])


def truncated_zip(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("a.safetensors", truncated, "not a readable safetensors file.*truncated"),
        ("a.safetensors", lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
        ("a.safetensors", lambda p: p.write_bytes(b"\x99\x01" + bytes(6) + b'{"a":'), "truncated"),
        ("a.pt", truncated_zip, "cannot be read safely.*its end is missing"),
        ("a.pt", lambda p: p.write_text("<!DOCTYPE html><p>404"), "is a web page saved under"),
        ("a.pt", lambda p: p.write_text("\n<html>"), "is a web page saved under that name"),
        ("a.pt", lambda p: p.write_text("\ufeff<html>"), "is a web page saved under that name"),
        ("a.pt", lambda p: torch.save(torch.ones(2), p), "holds a bare tensor: expected a state"),
        ("a.pt", lambda p: p.write_text("Entry not found"), "a text that begins 'Entry not found'"),
        ("a.pt", lambda p: p.write_text('{"error": "gated"}'), 'text that begins \'{"error"'),
        ("a.pt", lambda p: p.write_text(LFS), "a Git LFS pointer.*git lfs pull"),
        ("a.pt", lambda p: p.write_bytes(bytes(5000)), "zeros where its header should be"),
        ("a.pt", lambda p: p.write_bytes(b"\x1f\x8b\x08rest"), "compressed with gzip"),
        ("a.pt", lambda p: p.write_bytes(b"\x00\xff\xfe\x9d" * 99), "no known weight format"),
        ("a.pt", lambda p: zipfile.ZipFile(p, "w").close(), "no known weight format"),
        ("a.pt", lambda p: torch.save([1, 2], p), "holds a list: expected a state dict"),
        ("a.pt", lambda p: torch.save({}, p), "holds no tensors by name"),
        ("a.pt", lambda p: torch.save({1: torch.ones(1)}, p), "holds no tensors by name"),
        ("a.pt", lambda p: None, "does not exist"),
    ],
)
def test_spoilt_files_are_named(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(tmp_path / name)
    with pytest.raises(AdamergeError, match=rf"{name}.*{message}"):
        read(tmp_path / name)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(AdamergeError, match=r"holds no weights under a known name .*none"):
        read(tmp_path)
    save_file(STATE, tmp_path / "open_clip_model.safetensors")
    assert set(read(tmp_path).tensors) == set(STATE)


def test_tower_of_a_full_clip_in_the_order_of_its_layers() -> None:
    clip = golden.clip()
    full = dict(sorted(clip.model.state_dict().items()))
    assert list(tower_state(opened(full), clip.backbone)) == list(clip.backbone.state_dict())
    alone = dict(sorted(clip.backbone.state_dict().items()))
    assert list(tower_state(opened(alone), clip.backbone)) == list(clip.backbone.state_dict())


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual.", "model.", "module.model.", 
                                    "image_encoder.model.visual.", "model.visual."])  # fmt: skip
def test_any_prefix(prefix: str) -> None:
    backbone = golden.clip().backbone
    state = {f"{prefix}{name}": tensor for name, tensor in backbone.state_dict().items()}
    state["classification_head.weight" if prefix else "image_size"] = torch.ones(1)
    found = tower_state(opened(state), backbone)
    assert list(found) == list(backbone.state_dict())
    assert all(torch.equal(found[name], t) for name, t in backbone.state_dict().items())


def test_no_tower_or_several() -> None:
    backbone = golden.clip().backbone
    with pytest.raises(AdamergeError, match=r"holds no image tower.*names like 'a.weight'"):
        tower_state(opened({"a.weight": torch.ones(1)}), backbone)
    state = {
        f"{p}.{n}": t + i
        for i, p in enumerate(("student", "teacher"))
        for n, t in backbone.state_dict().items()
    }
    with pytest.raises(AdamergeError, match=r"holds 2 image towers \(student\., teacher\.\)"):
        tower_state(opened(state), backbone)


def test_pretrained_that_does_not_fit(tmp_path: Path) -> None:
    clip = build_clip(str(golden.FOLDER / "model.json"))
    state = {name: tensor.contiguous() for name, tensor in clip.model.state_dict().items()}

    def refuse(change: dict[str, torch.Tensor | None], message: str) -> None:
        changed = {name: t for name, t in {**state, **change}.items() if t is not None}
        save_file(changed, tmp_path / "p.safetensors")
        with pytest.raises(AdamergeError, match=message):
            load_pretrained(clip, read(tmp_path / "p.safetensors"))

    refuse({"visual.proj": None}, r"lacks tensor 'visual\.proj' \(1 such\)")
    refuse({"odd": torch.ones(1)}, r"has the unknown tensor 'odd'")
    refuse({"visual.proj": torch.ones(1)}, r"'visual\.proj' of shape \[1\].*\[32, 16\]")
    refuse({"visual.proj": torch.ones(2, 2)}, r"'visual\.proj' of shape \[2, 2\].*\[32, 16\]")
    save_file({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")},
              tmp_path / "tower.safetensors")  # fmt: skip
    with pytest.raises(AdamergeError, match="expected a whole CLIP"):
        load_pretrained(clip, read(tmp_path / "tower.safetensors"))


@pytest.mark.parametrize(
    ("architecture", "tag", "message"),
    [
        ("ViT-B-33", None, "'ViT-B-33' is neither an open_clip model name nor a folder"),
        ("ViT-B-32", "openai", "silently costs accuracy: set suite.architecture to ViT-B-32-quick"),
        ("ViT-B-32", "opnai", r"'opnai' is neither a file nor a weight tag of ViT-B-32: .*openai"),
    ],
)
def test_unknown_architecture_or_tag(architecture: str, tag: str | None, message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        build_clip(architecture, tag)


def test_a_tokenizer_of_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AdamergeError, match="needs a package that is not installed"):
        build_clip("ViT-B-16-SigLIP")


def test_broken_model_configs(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    for text, message in (
        ("{", "is not a model config"),
        ("[1]", "is not a model config"),
        ('{"embed_dim": 3}', "lacks embed_dim, vision_cfg or text_cfg"),
        ('{"embed_dim": 3, "vision_cfg": {"widht": 2}, "text_cfg": {}}', "not a model open_clip"),
    ):
        path.write_text(text)
        with pytest.raises(AdamergeError, match=message):
            build_clip(str(path))
