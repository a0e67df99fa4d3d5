"""`hf://owner/repo[@revision][/file]`: the files of a Hugging Face repository, in its cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import httpx
import huggingface_hub

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json

SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/pr/\d+|[\w.-]+))?(/(?P<file>[^@]+))?"
)
CONFIGS = (
    *("open_clip_config.json", "config.json", "adapter_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "spiece.model", "added_tokens.json"),
)
# In order of preference; the first that is there is the one that is read.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class Fetched(NamedTuple):
    """Files on this disk: a folder or one file in it, and of a repository the exact commit."""

    path: Path
    revision: str | None


def is_hub(source: str) -> bool:
    """Whether a source is an address of the hub."""
    return source.startswith(SCHEME)


def fetch(source: str) -> Fetched:
    """Downloads what is needed to read a checkpoint, or finds it in the cache.

    The hub's own cache, token and `HF_HUB_OFFLINE` are honoured; of several formats of the same
    weights, only the preferred one is downloaded.

    Raises:
        AdamergeError: not an address, or a repository, revision or file that cannot be had.
    """
    address = _ADDRESS.fullmatch(source)
    if address is None:
        raise AdamergeError(
            f"{source!r} is not an address of the hub: expected hf://owner/repo, "
            "hf://owner/repo@revision, or either with /path/of/file"
        )
    repo, revision, file = address["repo"], address["revision"], address["file"]
    try:
        patterns = [file] if file else _to_download(repo, revision)
        snapshot = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns or list(CONFIGS),
            local_files_only=patterns is None,
        )
    except AdamergeError:
        raise
    except Exception as error:  # of the hub, the network or the cache: one thing to the user
        reason = " ".join(str(error).split()).partition(" To enable")[0][:240]
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set, and it is not in the cache; {reason}"
        raise AdamergeError(
            f"{source} cannot be fetched ({type(error).__name__}: {reason}): check the name, the "
            "revision and the connection (a private repository needs a token: `hf auth login`), or "
            "give a local path"
        ) from error
    folder = Path(str(snapshot))
    path = folder / (file or "")
    if not path.exists():
        raise AdamergeError(f"{source}: no file {file!r} in that repository; check its name")
    return Fetched(path, folder.name)


def _to_download(repo: str, revision: str | None) -> list[str] | None:
    """The files that are needed; None where the hub cannot be asked: the cache has what it has."""
    try:
        patterns = wanted(huggingface_hub.HfApi().list_repo_files(repo, revision=revision))
    except huggingface_hub.errors.HfHubHTTPError:  # it answered: no such repository, no access …
        raise
    except (OSError, httpx.TransportError):  # offline, by wish or by accident
        return None
    for name in [name for name in patterns if name.endswith(".index.json")]:
        index = huggingface_hub.hf_hub_download(repo, name, revision=revision)
        patterns += shards(Path(index))
    return patterns


def wanted(files: Iterable[str]) -> list[str]:
    """The files to download: configurations, and one set of weights, at the top of a repository."""
    top = [name for name in files if "/" not in name]
    chosen = [name for name in top if name in CONFIGS]
    for name in WEIGHTS:
        if name in top:
            return [*chosen, name]
    return chosen + [name for name in top if PurePosixPath(name).suffix in SUFFIXES]


def shards(index: Path) -> list[str]:
    """The weight files a `*.index.json` names, each a plain file name.

    Raises:
        AdamergeError: an index that is none, or names files elsewhere.
    """
    try:
        names: list[str] = sorted(
            {*read_json(index, "an index of weight files")["weight_map"].values()}
        )
        plain = all(Path(name).name == name for name in names)
    except (KeyError, TypeError, AttributeError) as error:
        raise AdamergeError(
            f"{index} is not an index of weight files ({type(error).__name__}): download it again"
        ) from error
    if not names or not plain:
        raise AdamergeError(f"{index} names files outside its own folder: download it again")
    return names


def refuse_sharded(folder: Path) -> None:
    """Refuses a folder of a sharded training: names it, and the command that joins it."""
    inside = [*folder.glob("*"), *folder.glob("*/*")]
    parts = [path.parent for path in inside if path.suffix == ".distcp"]
    if parts:
        call = f"dcp_to_torch_save({str(parts[0])!r}, 'joined.pt')"
        raise AdamergeError(
            f"{folder} is a sharded checkpoint of torch (FSDP, .distcp files): join it with "
            f'`python -c "from torch.distributed.checkpoint.format_utils import *; {call}"`, and '
            "give joined.pt"
        )
    whole = any((folder / name).is_file() for name in WEIGHTS)
    if not whole and any(path.name.endswith("_optim_states.pt") for path in inside):
        raise AdamergeError(
            f"{folder} is a checkpoint folder of DeepSpeed: join it with `python zero_to_fp32.py "
            f"{folder} joined` (DeepSpeed writes that script into the folder), and give what is "
            "then in joined"
        )
