"""What a pickle may stand for: names, stand-ins, references to tensors; nothing is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adamerge._base.errors import AdamergeError

_LONGEST_COPY = 16  # items a call may copy, so that no small file takes much memory


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Only so that the message says what was tried: no name in any module is ever imported.
_DANGEROUS = words(
    "os posix nt sys subprocess runpy importlib ctypes socket shutil pty pickle _pickle cPickle "
    "marshal code codeop types commands webbrowser asyncio multiprocessing signal operator "
    "_operator inspect pdb bdb timeit cProfile profile pip urllib http requests tempfile io "
    "pydoc platform popen2 dill cloudpickle"
)
_BUILTINS = ("builtins", "__builtin__")
_PLAIN_BUILTINS = words(
    "set frozenset list dict tuple slice complex bytearray bytes object int float str bool range "
    "long unicode type property xrange reduce intern iter map filter zip enumerate reversed "
    "getattr"
)
# Plain data of modules that are dangerous otherwise: type hints, namespaces.
_PLAIN = words(
    "operator.getitem _operator.getitem operator.or_ _operator.or_ types.SimpleNamespace "
    "types.GenericAlias types.NoneType types.MappingProxyType types.UnionType io.BytesIO"
)
# What functions that run or read something are called.
_RUNNING = words(
    "load loads open run exec execfile eval system call compile popen spawn import_module "
    "__import__ read_pickle"
)
LOAD_STORAGE = "torch.storage._load_from_bytes"  # of raw pickles: see `torch_files`


@dataclass(frozen=True)
class Named:
    """A global the pickle names; never imported."""

    path: str


@dataclass
class Standin:
    """An object that is never made: the class or function, what it was called with, its state.

    Attributes:
        called: whether it is what a function would have given, which is unknown.
    """

    path: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    called: bool = False


@dataclass(frozen=True)
class Blob:
    """Bytes that were left in the stream: where they begin, and how many."""

    start: int
    size: int


@dataclass(frozen=True)
class StorageRef:
    """A block of numbers elsewhere in the file: its key, element type (a name) and length."""

    key: str
    kind: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage, not read yet."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None  # of untyped storages
    negative: bool = False  # what is stored is to be negated


class Refused(AdamergeError):
    """The pickle is not well formed, or not of weights."""

    mend = (
        "it is truncated, damaged, or holds objects other than weights, which are never executed; "
        "download or save it again, best as a state dict in .safetensors"
    )


class Unsafe(Refused):
    """The pickle asks for a call, or names something to call, that no weights need."""

    mend = (
        "it holds more than weights, and nothing in it is ever executed; get the weights "
        "elsewhere, best as a state dict in .safetensors"
    )


def named(module: Any, name: Any) -> Named:
    """A global, by module and name; dangerous ones are refused by name, none is imported."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("a global whose name is no text")
    path = f"{module}.{name}"
    risky = module.partition(".")[0] in _DANGEROUS and path not in _PLAIN
    plain = name in _PLAIN_BUILTINS or name[:1].isupper()  # exceptions are data
    if risky or (module in _BUILTINS and not plain):
        raise Unsafe(f"{path}, which no weights need")
    if "." in name and not all(part[:1].isupper() for part in name.split(".")):
        raise Unsafe(f"{path}, a dotted name")  # but for a class within a class
    return Named(path)


def object_of(kind: Any, arguments: Any) -> Any:
    """An instance of a class: always inert, whatever the class is."""
    kind = _attribute(kind)
    if not isinstance(kind, Named) or not isinstance(arguments, tuple):
        raise Refused("an object of something that is no class")
    if _is_container(kind.path):
        return _container(kind.path, arguments)
    return Standin(kind.path, arguments)


def made(function: Any, arguments: Any) -> Any:
    """What a call gives: that of known constructors, else a stand-in for it, as nothing is called.

    Functions that by their names run or read something are refused.
    """
    function = _attribute(function)
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise Refused("a call of something that is no function")
    path = function.path
    name = path.rpartition(".")[2]
    if path in _REBUILDS:
        return _REBUILDS[path](*arguments)
    if path.startswith("torch.jit._pickle."):  # typed lists, and values with their types
        return arguments[0]
    if _is_container(path):
        return _container(path, arguments)
    of_object = bool(arguments) and isinstance(arguments[0], Named | Standin)
    if name in _RUNNING or path == LOAD_STORAGE or (name == "getattr" and not of_object):
        raise Unsafe(f"a call of {path}")
    # A class by the convention of every library, or a function that gives who knows what.
    return Standin(path, arguments, called=not name.lstrip("_")[:1].isupper())


def _attribute(value: Any) -> Any:
    """The name of what `getattr` was asked for, as old protocols write a class within a class."""
    if isinstance(value, Standin) and value.path.endswith(".getattr") and len(value.arguments) == 2:
        owner, name = value.arguments
        return Named(f"{owner.path}.{name}")
    return value


def _is_container(path: str) -> bool:
    module, _, name = path.rpartition(".")
    known = ("collections.OrderedDict", "collections.defaultdict", "torch.Size")
    return path in known or (module in _BUILTINS and name in ("set", "frozenset", "list", "tuple"))


def _container(path: str, arguments: tuple[Any, ...]) -> Any:
    items = arguments[0] if arguments else []
    if path.startswith("collections."):
        pairs = items if isinstance(items, list) else []
        mapping = {key_of(key): value for key, value in pairs}
        pairs.clear()  # used once, so that no file can make many copies of one long list
        return mapping
    if not isinstance(items, list | tuple):
        raise Refused(f"{path} of something that is no list")
    if not path.endswith((".Size", ".tuple")):
        return items
    if isinstance(items, list) and len(items) > _LONGEST_COPY:
        raise Refused(f"{path} of {len(items)} items")
    return tuple(items)


def is_count(number: Any) -> bool:
    """Whether it is a size, offset or stride that a file could have."""
    return type(number) is int and 0 <= number < 2**48


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise Refused("a tensor without a storage")
    for numbers in (size, stride):
        if not isinstance(numbers, tuple) or not all(is_count(number) for number in numbers):
            raise Refused("a tensor whose shape is no list of sizes")
    if not is_count(offset) or len(size) != len(stride) or len(size) > 8:
        raise Refused("a tensor whose shape, strides and offset do not belong together")
    # requires_grad, hooks, and from version 2 on a mapping; in version 3 a type stands before it
    marks = next((value for value in reversed(rest) if isinstance(value, dict)), {})
    return TensorRef(storage, offset, size, stride, negative=marks.get("neg") is True)


def _rebuild_untyped(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    tensor = _rebuild_tensor(storage, offset, size, stride)
    kind = rest[2] if len(rest) > 2 else None  # requires_grad, hooks, dtype, metadata
    if not isinstance(kind, Named):
        raise Refused("an untyped tensor without a type")
    return dataclasses.replace(tensor, dtype=kind.path.removeprefix("torch."))


def _encode(text: Any, encoding: Any = "latin1") -> str:
    """Bytes, of no use for weights: the text they come as, so that no file can multiply it."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("_codecs.encode with another encoding than latin1")
    return text


_REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, given, *_: made(function, given),
    "copyreg._reconstructor": lambda kind, *_: object_of(kind, ()),
    "copy_reg._reconstructor": lambda kind, *_: object_of(kind, ()),
    "copyreg.__newobj__": lambda kind, *arguments: object_of(kind, arguments),
    "_codecs.encode": _encode,
}


def key_of(key: Any) -> Any:
    """Keys are compared and hashed: only flat ones are let through."""
    flat = (str, int, float, bytes, Named, type(None))
    items = key if isinstance(key, tuple) else (key,)
    if len(items) < 16 and all(isinstance(item, flat) for item in items):
        return key
    if isinstance(key, Standin):  # a date, a member of an enumeration: told apart, and no more
        return Named(f"{key.path} {id(key)}")
    raise Refused("a dictionary key that is neither text nor number")
