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
    "long unicode type property xrange reduce intern iter map filter zip enumerate reversed getattr"
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


class Refused(AdamergeError):
    """The pickle is not well formed, or not of weights."""


class Unsafe(Refused):
    """The pickle asks for a call, or names something to call, that no weights need."""


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
    return _container(kind.path, arguments, otherwise=lambda: Standin(kind.path, arguments))


def made(function: Any, arguments: Any) -> Any:
    """What a call gives: that of known constructors, else a stand-in for it, as nothing is called.

    Functions that by their names run or read something are refused.
    """
    function = _attribute(function)
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise Refused("a call of something that is no function")
    path = function.path
    if path in _REBUILDS:
        return _REBUILDS[path](*arguments)
    return _container(path, arguments, otherwise=lambda: _class_like(path, arguments))


def _attribute(found: Any) -> Any:
    """The name of what `getattr` was asked for, as old protocols write a class within a class."""
    if isinstance(found, Standin) and found.path.endswith(".getattr") and len(found.arguments) == 2:
        owner, name = found.arguments
        return Named(f"{owner.path}.{name}")
    return found


def _class_like(path: str, arguments: tuple[Any, ...]) -> Standin:
    name = path.rpartition(".")[2]
    of_object = bool(arguments) and isinstance(arguments[0], Named | Standin)
    if name in _RUNNING or path == LOAD_STORAGE or (name == "getattr" and not of_object):
        raise Unsafe(f"a call of {path}")
    # A class by the convention of every library, or a function that gives who knows what.
    return Standin(path, arguments, called=not name.lstrip("_")[:1].isupper())


def _container(path: str, arguments: tuple[Any, ...], otherwise: Callable[[], Any]) -> Any:
    module, _, name = path.rpartition(".")
    if path in ("collections.OrderedDict", "collections.defaultdict"):
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        made = {key_of(key): value for key, value in pairs}
        pairs.clear()  # used once, so that no file can make many copies of one long list
        return made
    if path == "torch.Size" or (
        module in _BUILTINS and name in ("set", "frozenset", "list", "tuple")
    ):
        items = arguments[0] if arguments else []
        if not isinstance(items, list | tuple):
            raise Refused(f"{path} of something that is no list")
        if isinstance(items, list) and name in ("Size", "tuple") and len(items) > _LONGEST_COPY:
            raise Refused(f"{path} of {len(items)} items")
        return tuple(items) if name in ("Size", "tuple") else items
    return otherwise()


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise Refused("a tensor without a storage")
    for numbers in (size, stride):
        if not isinstance(numbers, tuple) or not all(is_count(number) for number in numbers):
            raise Refused("a tensor whose shape is no list of sizes")
    if not is_count(offset) or len(size) != len(stride) or len(size) > 8:
        raise Refused("a tensor whose shape, strides and offset do not belong together")
    return TensorRef(storage, offset, size, stride)


def is_count(number: Any) -> bool:
    """Whether it is a size, offset or stride that a file could have."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**48


def _rebuild_tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
    made = _rebuild_tensor(storage, offset, size, stride)
    kind = rest[2] if len(rest) > 2 else None  # requires_grad, hooks, dtype, metadata
    if not isinstance(kind, Named):
        raise Refused("an untyped tensor without a type")
    return dataclasses.replace(made, dtype=kind.path.removeprefix("torch."))


def _rebuild_parameter(data: Any, *rest: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise Refused("a parameter without a tensor")
    return data


def _rebuild_subclass(function: Any, kind: Any, arguments: Any, *state: Any) -> Any:
    return made(function, arguments)


def _reconstruct(kind: Any, *rest: Any) -> Any:
    return object_of(kind, ())


def _encode(text: Any, encoding: Any = "latin1") -> str:
    """Bytes, of no use for weights: the text they come as, so that no file can multiply it."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("_codecs.encode with another encoding than latin1")
    return text


def _jit_list(items: Any) -> Any:
    return items


_REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "copyreg._reconstructor": _reconstruct,
    "copy_reg._reconstructor": _reconstruct,
    "copyreg.__newobj__": lambda kind, *arguments: object_of(kind, arguments),
    "_codecs.encode": _encode,
    "torch.jit._pickle.build_intlist": _jit_list,
    "torch.jit._pickle.build_doublelist": _jit_list,
    "torch.jit._pickle.build_boollist": _jit_list,
    "torch.jit._pickle.build_tensorlist": _jit_list,
    "torch.jit._pickle.restore_type_tag": lambda value, *kind: value,
}


def key_of(key: Any) -> Any:
    """Keys are compared and hashed: only flat ones are let through."""
    flat = (str, int, float, bytes, Named, type(None))
    if isinstance(key, flat) or (
        isinstance(key, tuple) and len(key) < 16 and all(isinstance(k, flat) for k in key)
    ):
        return key
    if isinstance(key, Standin):  # a date, a member of an enumeration: told apart, and no more
        return Named(f"{key.path} {id(key)}")
    raise Refused("a dictionary key that is neither text nor number")
