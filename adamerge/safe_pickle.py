"""Reads a pickle without executing it: opcodes in; containers, tensor references, stand-ins out.

Python's own unpickler imports and calls what a file names. This one is a small stack machine over
`pickletools.genops`: nothing is ever imported or called, so a file can at most be refused.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from adamerge.errors import AdamergeError

MOST_OPCODES = 500_000  # a pickled CLIP has some 20 thousand; bounds the memory of a crafted file
_LONGEST_COPY = 16  # items a call may copy, for the same reason; shapes have fewer


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Only so that the message says what was tried: no name in any module is ever imported.
_DANGEROUS = _words(
    "os posix nt sys subprocess runpy importlib ctypes socket shutil pty pickle _pickle cPickle "
    "marshal code codeop types commands webbrowser asyncio multiprocessing signal operator "
    "_operator inspect pdb bdb timeit cProfile profile pip urllib http requests tempfile io "
    "pydoc platform popen2 dill cloudpickle"
)
_MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, MemoryError, RecursionError),
)
_BUILTINS = ("builtins", "__builtin__")
_PLAIN_BUILTINS = _words(
    "set frozenset list dict tuple slice complex bytearray bytes object int float str bool range "
    "long unicode"
)
# Functions that stand for the object they make: kept as stand-ins, like classes.
_MAKERS = _words(
    "numpy.dtype numpy.ndarray torch.device torch.dtype functools.partial "
    "numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar "
    "numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar"
)


@dataclass(frozen=True)
class Named:
    """A global the pickle names; never imported."""

    path: str


@dataclass
class Standin:
    """An object of a class that is never imported: what it was made from, and its state."""

    path: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


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


def load(stream: BinaryIO | bytes) -> Any:
    """The object of one pickle; a file is left just behind it.

    dicts, lists, tuples, texts and numbers are themselves (sets become lists); tensors become
    `TensorRef`; objects of any class become `Standin`; a class or function that is only mentioned
    becomes `Named`.

    Raises:
        Refused: a call of anything that is not a known tensor or container constructor, a name of
            a module that runs programs, an unknown opcode, or a malformed stream.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_OPCODES:
                raise Refused(f"more than {MOST_OPCODES} pickle opcodes")
            machine.step(opcode.name, argument)
    except Refused:
        raise
    except _MALFORMED as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise Refused(f"not a well-formed pickle ({reason})") from error
    return machine.result


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        elif name in _PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"the pickle opcode {name}, which no weights need")

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise Refused("not a well-formed pickle (stack underflow)")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def replace_top(self, count: int) -> None:
        items = [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))


def _stop(machine: _Machine, _: Any) -> None:
    machine.result = machine.pop()


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(len(machine.stack))


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(_named(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(_named(module, name))


def _named(module: Any, name: Any) -> Named:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("a global whose name is no text")
    path = f"{module}.{name}"
    risky = module.partition(".")[0] in _DANGEROUS
    if risky or (module in _BUILTINS and name not in _PLAIN_BUILTINS):
        raise Unsafe(f"{path}, which no weights need")
    if "." in name:
        raise Unsafe(f"{path}, a dotted name")
    return Named(path)


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.stack.append(_made(function, arguments))


def _new_object(machine: _Machine, _: Any) -> None:
    arguments, kind = machine.pop(), machine.pop()
    machine.stack.append(_object(kind, arguments))


def _new_object_ex(machine: _Machine, _: Any) -> None:
    machine.pop()  # keyword arguments say nothing about tensors
    _new_object(machine, None)


def _object(kind: Any, arguments: Any) -> Any:
    """An instance of a class: always inert, whatever the class is."""
    if not isinstance(kind, Named) or not isinstance(arguments, tuple):
        raise Refused("an object of something that is no class")
    return _container(kind.path, arguments, otherwise=lambda: Standin(kind.path, arguments))


def _made(function: Any, arguments: Any) -> Any:
    """What a call gives, for the few constructors that are known; all else is refused by name."""
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise Refused("a call of something that is no function")
    path = function.path
    if path in _REBUILDS:
        return _REBUILDS[path](*arguments)
    return _container(path, arguments, otherwise=lambda: _class_like(path, arguments))


def _class_like(path: str, arguments: tuple[Any, ...]) -> Standin:
    name = path.rpartition(".")[2].lstrip("_")
    if path in _MAKERS or name[:1].isupper():  # a class by the convention of every library
        return Standin(path, arguments)
    raise Unsafe(f"a call of {path}")


def _container(path: str, arguments: tuple[Any, ...], otherwise: Callable[[], Any]) -> Any:
    module, _, name = path.rpartition(".")
    if path in ("collections.OrderedDict", "collections.defaultdict"):
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        made = {_key(key): value for key, value in pairs}
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
        if not isinstance(numbers, tuple) or not all(_is_count(number) for number in numbers):
            raise Refused("a tensor whose shape is no list of sizes")
    if not _is_count(offset) or len(size) != len(stride) or len(size) > 8:
        raise Refused("a tensor whose shape, strides and offset do not belong together")
    return TensorRef(storage, offset, size, stride)


def _is_count(number: Any) -> bool:
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
    return _made(function, arguments)


def _reconstruct(kind: Any, *rest: Any) -> Any:
    return _object(kind, ())


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
    "copyreg.__newobj__": lambda kind, *arguments: _object(kind, arguments),
    "_codecs.encode": _encode,
    "torch.jit._pickle.build_intlist": _jit_list,
    "torch.jit._pickle.build_doublelist": _jit_list,
    "torch.jit._pickle.build_boollist": _jit_list,
    "torch.jit._pickle.build_tensorlist": _jit_list,
    "torch.jit._pickle.restore_type_tag": lambda value, *kind: value,
}


def _build(machine: _Machine, _: Any) -> None:
    """Never `__setstate__`: a state is only kept."""
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, Standin):
        target.state = state
    elif not isinstance(target, dict | list | TensorRef):
        raise Refused("state for something that is no object")


def _persistent(machine: _Machine, _: Any) -> None:
    identity = machine.pop()
    if isinstance(identity, tuple) and len(identity) >= 2 and identity[0] == "module":
        machine.stack.append(identity[1])  # legacy files keep a class with its source text
        return
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise Refused("a reference to something that is no tensor storage")
    kind, key, numel = identity[1], identity[2], identity[4]
    if not isinstance(kind, Named) or not isinstance(key, str | int) or not _is_count(numel):
        raise Refused("a malformed reference to a tensor storage")
    view = identity[5] if len(identity) > 5 else None
    if view is not None:
        raise Refused("a storage that is a view of another, of a very old torch")
    machine.stack.append(StorageRef(str(key), kind.path, numel))


def _key(key: Any) -> Any:
    """Keys are compared and hashed: only flat ones are let through."""
    flat = (str, int, float, bytes, Named, type(None))
    if isinstance(key, flat) or (
        isinstance(key, tuple) and len(key) < 16 and all(isinstance(k, flat) for k in key)
    ):
        return key
    raise Refused("a dictionary key that is neither text nor number")


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise Refused("not a well-formed pickle (a key without a value)")
    return zip(items[::2], items[1::2], strict=True)


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    place = target.items if isinstance(target, Standin) else target
    if not isinstance(place, dict):
        raise Refused("items for something that is no dictionary")
    for key, value in _pairs(items):
        place[_key(key)] = value


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Standin):
        raise Refused("items for something that is no list")


def _two(machine: _Machine) -> list[Any]:
    value, key = machine.pop(), machine.pop()
    return [key, value]


_PUSHES = _words(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8"
)
_GETS = frozenset(["GET", "BINGET", "LONG_BINGET"])
_PUTS = frozenset(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "STOP": _stop,
    "MARK": _mark,
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.replace_top(1),
    "TUPLE2": lambda machine, _: machine.replace_top(2),
    "TUPLE3": lambda machine, _: machine.replace_top(3),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "DICT": lambda machine, _: machine.stack.append(
        {_key(key): value for key, value in _pairs(machine.pop_mark())}
    ),
    "APPEND": lambda machine, _: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_mark()),
    "ADDITEMS": lambda machine, _: _append(machine, machine.pop_mark()),
    "SETITEM": lambda machine, _: _set_items(machine, _two(machine)),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "BINPERSID": _persistent,
}
