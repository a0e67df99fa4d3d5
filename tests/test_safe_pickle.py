"""Malicious files: every known trick is refused by name; nothing runs, nothing crashes."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adamerge import AdamergeError
from adamerge.weights.formats.pickled import Named, Refused, Standin
from adamerge.weights.formats.read import read
from adamerge.weights.formats.safe_pickle import load
from adamerge.weights.formats.torch_files import TorchFile

PROTO = b"\x80\x02"


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """GLOBAL, a tuple of texts, REDUCE."""
    packed = b"".join(b"X" + struct.pack("<I", len(a)) + a.encode() for a in arguments)
    return f"c{module}\n{name}\n".encode() + b"(" + packed + b"tR"


class Reduced:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


class WithState:
    def __setstate__(self, state: Any) -> None:
        Path(os.environ["ADAMERGE_TEST_MARK"]).touch()

    def __getstate__(self) -> Any:
        return {"x": 1}


def touch() -> str:
    return f"touch {os.environ['ADAMERGE_TEST_MARK']}"


def writes() -> str:
    return f"open({os.environ['ADAMERGE_TEST_MARK']!r}, 'w')"


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "os.system": (lambda: PROTO + call("os", "system", touch()) + b".", r"os\.system"),
    "posix.system": (lambda: pickle.dumps(Reduced(os.system, touch())), r"posix\.system"),
    "eval": (lambda: pickle.dumps(Reduced(eval, writes())), r"builtins\.eval"),
    "python 2 eval": (lambda: PROTO + call("__builtin__", "eval", writes()) + b".", "eval"),
    "exec": (lambda: pickle.dumps(Reduced(exec, writes())), r"builtins\.exec"),
    "getattr": (lambda: pickle.dumps(Reduced(getattr, "x", "upper")), r"builtins\.getattr"),
    "subprocess": (
        lambda: pickle.dumps(Reduced(subprocess.Popen, ["sh", "-c", touch()])),
        r"subprocess\.Popen",
    ),
    "torch.load": (lambda: PROTO + call("torch", "load", "x") + b".", r"call of torch\.load"),
    "torch.hub": (lambda: PROTO + call("torch.hub", "load", "x") + b".", r"torch\.hub\.load"),
    "an unknown function": (lambda: PROTO + call("mine", "run", "x") + b".", r"call of mine\.run"),
    "nested load": (
        lambda: PROTO + call("torch.storage", "_load_from_bytes", "x") + b".",
        "_load_from_bytes",
    ),
    "nested through an allowed function": (
        lambda: (
            PROTO
            + b"ctorch._tensor\n_rebuild_from_type_v2\n"
            + b"(cos\nsystem\nctorch\nTensor\n(X"
            + struct.pack("<I", len(touch()))
            + touch().encode()
            + b"t}tR."
        ),
        r"os\.system",
    ),
    "nested through reconstructor": (
        lambda: PROTO + b"ccopyreg\n_reconstructor\n(" + call("os", "system", touch()) + b"NNtR.",
        r"os\.system",
    ),
    "dotted name": (
        lambda: b"\x80\x04" + short("torch") + short("serialization.os.system") + b"\x93.",
        "a dotted name",
    ),
    "instance opcode": (lambda: PROTO + b"(ios\nsystem\n.", "INST, which no weights need"),
    "object opcode": (lambda: PROTO + b"(cmine\nA\no.", "OBJ, which no weights need"),
    "extension registry": (lambda: PROTO + b"\x82\x01.", "EXT1, which no weights need"),
    "text persistent id": (lambda: PROTO + b"Pstorage\n.", "PERSID, which no weights need"),
    "callable made by a call": (
        lambda: PROTO + b"cmine\nThing\n)R)R.",
        "a call of something that is no function",
    ),
    "global without a text": (lambda: b"\x80\x04]]\x93.", "whose name is no text"),
    "unhashable key": (lambda: PROTO + b"}]Ns.", "neither text nor number"),
    "deep tuple as key": (lambda: PROTO + b"})" + b"\x85" * 100_000 + b"Ns.", "neither text nor"),
    "deep nested calls": (
        lambda: (
            PROTO + b"ctorch._tensor\n_rebuild_from_type_v2\nq\x000cmine\nThing\nq\x010h\x00"
            + b"h\x00h\x01" * 50_000 + b")" + b"\x87" * 50_000 + b"R."
        ),
        "not a well-formed pickle",
    ),
    "huge memo index": (lambda: PROTO + b"Nr\xff\xff\xff\x7f.", "holds a NoneType"),
    "huge byte array": (
        lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "not a well-formed pickle",
    ),
    "huge text": (lambda: PROTO + b"X\xff\xff\xff\x7fabc.", "not a well-formed pickle"),
    "huge number": (lambda: PROTO + b"\x8b\xff\xff\xff\x7f1.", "not a well-formed pickle"),
    "copies of a long list": (
        lambda: (
            PROTO + b"]q\x00(" + b"N" * 9000 + b"e0ctorch\nSize\nq\x01"
            + b"h\x01h\x00\x85R0" * 1000 + b"N."
        ),
        r"torch\.Size of 9000 items",
    ),
    "copies of a long text": (
        lambda: (
            PROTO + b"X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x000"
            + b"c_codecs\nencode\nq\x010" + b"(" + b"h\x01h\x00\x85R" * 50_000 + b"l."
        ),
        "holds a list",
    ),
    "too many opcodes": (lambda: PROTO + b"N0" * 1_000_100 + b"N.", "more than 500000"),
    "stack underflow": (lambda: PROTO + b"0.", "not a well-formed pickle"),
    "no stop": (lambda: PROTO + b"N", "not a well-formed pickle"),
}  # fmt: skip
HARMLESS = {"huge memo index", "copies of a long text"}  # nothing is made room for


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("container", ["stream", "zip", "legacy"])
def test_nothing_runs(
    name: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    monkeypatch.setenv("ADAMERGE_TEST_MARK", str(mark))
    make, message = ATTACKS[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if container == "stream":
        open_it: Callable[[], Any] = lambda: load(make())  # noqa: E731
    elif container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", make())
        open_it = lambda: read(path)  # noqa: E731
    else:
        head = io.BytesIO()
        torch.save({}, head, _use_new_zipfile_serialization=False)
        stream = io.BytesIO(head.getvalue())
        for _ in range(3):
            load(stream)
        path.write_bytes(head.getvalue()[: stream.tell()] + make() + pickle.dumps([], 2))
        open_it = lambda: read(path)  # noqa: E731
    if name in HARMLESS and container == "stream":
        open_it()
    else:
        with pytest.raises(AdamergeError, match=message):
            open_it()
    assert not mark.exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kB: half a million opcodes at most


def test_setstate_is_never_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "executed"
    monkeypatch.setenv("ADAMERGE_TEST_MARK", str(mark))
    found = load(pickle.dumps(WithState()))
    assert isinstance(found, Standin) and found.path.endswith("WithState")
    assert found.state == {"x": 1} and not mark.exists()
    # A state that smuggles in a __setstate__, then uses it.
    stream = PROTO + b"cmine\nThing\n)\x81}X\x0c\x00\x00\x00__setstate__cmine\nrun\nsb}b."
    assert isinstance(load(stream), Standin)


def test_classes_are_never_imported() -> None:
    found = load(PROTO + b"cantigravity_of_adamerge\nFlight\n)\x81.")
    assert found == Standin("antigravity_of_adamerge.Flight")
    assert load(PROTO + b"cantigravity\nfly\n.") == Named("antigravity.fly")
    assert "antigravity" not in sys.modules


def storage(numel: int, key: str = "0", size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85",
            offset: bytes = b"K\x00") -> bytes:  # fmt: skip
    """A pickled `{"a": tensor}` over one float storage, every number free to lie."""
    persistent = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00"
        + key.encode() + b"X\x03\x00\x00\x00cpuJ" + struct.pack("<i", numel) + b"tQ"
    )  # fmt: skip
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + offset + size + stride
    return PROTO + b"}X\x01\x00\x00\x00a" + rebuilt + b"\x89NtRs."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (storage(10**9), "claims 4000000000 bytes where the file has 16"),
        (storage(-1), "malformed reference"),
        (storage(4, key="7"), "lacks the tensor data '7'"),
        (storage(4, size=b"J\xff\xff\xff\x7f\x85"), r"shape \[2147483647\] over 4 numbers"),
        (storage(4, size=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85"), "over 4 numbers"),
        (storage(4, size=b"J\xff\xff\xff\xff\x85"), "shape is no list of sizes"),
        (storage(4, stride=b"J\xff\xff\xff\xff\x85"), "shape is no list of sizes"),
        (storage(4, offset=b"K\x01"), "over 4 numbers"),
        (storage(4, stride=b")"), "do not belong together"),
        (storage(4, size=b"X\x01\x00\x00\x00a\x85"), "shape is no list of sizes"),
    ],
)
def test_sizes_that_lie(tmp_path: Path, pickled: bytes, message: str) -> None:
    path = tmp_path / "lie.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
    with pytest.raises(AdamergeError, match=message):
        read(path).tensors["a"]


def test_an_honest_file_made_the_same_way_is_read(tmp_path: Path) -> None:
    path = tmp_path / "honest.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", storage(4))
        archive.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
    assert torch.equal(read(path).tensors["a"], torch.arange(4.0))


def test_a_compressed_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(AdamergeError, match=r"is compressed, which torch\.save never does"):
        read(path)


def test_modules_within_themselves_are_refused(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.inner = torch.nn.Module()
    module.inner.outer = module
    torch.save(module, tmp_path / "loop.pt")
    with pytest.raises(AdamergeError, match="nests modules deeper than any model"):
        read(tmp_path / "loop.pt")
    shared = torch.nn.Module()
    for _ in range(40):  # two ways down at every level: a million million paths
        outer = torch.nn.Module()
        outer.a, outer.b = shared, shared
        shared = outer
    torch.save(shared, tmp_path / "many.pt")
    with pytest.raises(AdamergeError, match="nests modules deeper than any model"):
        read(tmp_path / "many.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_type_and_shape_of_tensor(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24.0).view(4, 6)
    state = {
        str(kind): torch.arange(6).to(kind).view(2, 3)
        for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                     torch.int16, torch.int8, torch.uint8, torch.bool)
    } | {"turned": base.T, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 3),
         "parameter": torch.nn.Parameter(base[1:3].clone()), "slice": base[1:3],
         "negated": torch._neg_view(base)}  # fmt: skip
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found = read(tmp_path / "a.pt").tensors
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_plain_values_are_themselves() -> None:
    value = {"a": [1, -(2**70), 2.5, True, None, "ö"], "b": (1, (2,)), 3: {4}}
    for protocol in range(2, 6):
        assert load(pickle.dumps(value, protocol)) == value | {3: [4]}
    assert load(pickle.dumps(b"x\xff", 4)) == b"x\xff"
    assert load(pickle.dumps(b"x\xff", 2)) == "x\xff"  # as protocol 2 spells bytes


def test_a_flipped_bit_in_the_numbers_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(64.0)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.arange(64.0).numpy().tobytes()) + 40] ^= 4
    path.write_bytes(raw)
    with pytest.raises(AdamergeError, match=r"checksum of .*data/0 is wrong: bits were flipped"):
        read(path).tensors["a"]


def test_torchscript_files(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    module = Scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases of torch advise against it
        torch.jit.save(torch.jit.trace(module, torch.ones(1, 3)), tmp_path / "jit.pt")
    found = read(tmp_path / "jit.pt").tensors
    assert set(found) == set(module.state_dict())
    assert all(torch.equal(found[k], v) for k, v in module.state_dict().items())


def test_one_module_under_many_names(tmp_path: Path) -> None:
    """A small file whose state dict would be millions of names long."""
    inner, outer = torch.nn.Module(), torch.nn.Module()
    for index in range(2000):
        inner.register_buffer(f"b{index}", torch.ones(1))
    outer._modules.update({f"m{index}": inner for index in range(2000)})
    torch.save(outer, tmp_path / "many.pt")
    with pytest.raises(AdamergeError, match="made to harm"):
        read(tmp_path / "many.pt")


def test_refused_is_blamed_on_the_file(tmp_path: Path) -> None:
    torch.save({"a": Reduced(os.getcwd)}, tmp_path / "a.pt")
    with pytest.raises(AdamergeError, match=r"a\.pt cannot be read safely \(posix\.getcwd") as info:
        TorchFile(tmp_path / "a.pt")
    assert not isinstance(info.value, Refused)
