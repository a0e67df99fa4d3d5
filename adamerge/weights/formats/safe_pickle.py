"""Reads a pickle without executing it: opcodes in; containers, tensor references, stand-ins out.

Python's own unpickler imports and calls what a file names. This one is a small stack machine over
`pickletools.genops`: nothing is ever imported or called, so a file can at most be refused.

`torch.load(weights_only=True)` is not used in its place: it reads no raw pickles, holds no
checksums against what it maps, takes memory by what a file claims, and would have to be given a
class to make for every name that a file mentions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from adamerge.weights.formats.pickled import (
    LOAD_STORAGE,
    Blob,
    Named,
    Refused,
    Standin,
    StorageRef,
    TensorRef,
    Unsafe,
    is_count,
    key_of,
    made,
    named,
    object_of,
    words,
)

MOST_OPCODES = 500_000  # a pickled CLIP has some 20 thousand; bounds the memory of a crafted file
_MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, MemoryError, RecursionError),
)


def load(stream: BinaryIO | bytes, nested: Callable[[Blob | str], StorageRef] | None = None) -> Any:
    """The object of one pickle; a file is left just behind it.

    dicts, lists, tuples, texts and numbers are themselves (sets become lists); tensors become
    `TensorRef`; objects of any class become `Standin`; a class or function that is only mentioned
    becomes `Named`.

    Args:
        nested: gives the storage that a file of torch within the pickle holds; bytes are then left
            in the stream, as `Blob`.

    Raises:
        Refused: nothing but the outcome of a call, a name of something that runs programs, an
            unknown opcode, or a malformed stream.
    """
    machine = _Machine(nested)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_OPCODES:
                raise Refused(f"more than {MOST_OPCODES} pickle opcodes")
            if nested is not None and opcode.name in _BYTES:
                size = len(cast(bytes, argument))
                argument = Blob(cast(BinaryIO, stream).tell() - size, size)
            machine.step(opcode.name, argument)
    except Refused:
        raise
    except _MALFORMED as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise Refused(f"not a well-formed pickle ({reason})") from error
    if isinstance(machine.result, Standin) and machine.result.called:
        raise Unsafe(f"a call of {machine.result.path}")
    return machine.result


class _Machine:
    def __init__(self, nested: Callable[[Blob | str], StorageRef] | None) -> None:
        self.nested = nested
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
    machine.stack.append(named(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(named(module, name))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    if machine.nested is not None and function == Named(LOAD_STORAGE):
        if not isinstance(arguments, tuple) or not isinstance(arguments[0], Blob | str):
            raise Refused(f"{LOAD_STORAGE} of something that is no file")
        machine.stack.append(machine.nested(arguments[0]))
        return
    machine.stack.append(made(function, arguments))


def _new_object(machine: _Machine, _: Any) -> None:
    arguments, kind = machine.pop(), machine.pop()
    machine.stack.append(object_of(kind, arguments))


def _new_object_ex(machine: _Machine, _: Any) -> None:
    machine.pop()  # keyword arguments say nothing about tensors
    _new_object(machine, None)


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
    if not isinstance(kind, Named) or not isinstance(key, str | int) or not is_count(numel):
        raise Refused("a malformed reference to a tensor storage")
    view = identity[5] if len(identity) > 5 else None
    if view is not None:
        raise Refused("a storage that is a view of another, of a very old torch")
    machine.stack.append(StorageRef(str(key), kind.path, numel))


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
        place[key_of(key)] = value


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Standin):
        raise Refused("items for something that is no list")


def _two(machine: _Machine) -> list[Any]:
    value, key = machine.pop(), machine.pop()
    return [key, value]


_PUSHES = words(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8"
)
_BYTES = frozenset(["BINBYTES", "SHORT_BINBYTES", "BINBYTES8"])
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
        {key_of(key): value for key, value in _pairs(machine.pop_mark())}
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
