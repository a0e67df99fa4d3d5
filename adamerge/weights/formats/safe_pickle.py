"""Reads a pickle without executing it: opcodes in; containers, tensor references, stand-ins out.

Python's own unpickler imports and calls what a file names. This one is a small stack machine over
`pickletools.genops`: nothing is ever imported or called, so a file can at most be refused.

`torch.load(weights_only=True)` is not used in its place: it reads no raw pickles, holds no
checksums against what it maps, takes memory by what a file claims, and would have to be given a
class to make for every name that a file mentions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, cast

from adamerge._base.errors import one_line
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
_BYTES = words("BINBYTES SHORT_BINBYTES BINBYTES8")
_ARGUMENTS = _BYTES | words(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BYTEARRAY8"
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


def load(
    stream: BinaryIO | bytes,
    nested: Callable[[Blob | str], StorageRef] | None = None,
    storages: list[StorageRef] | None = None,
) -> Any:
    """The object of one pickle; a file is left just behind it.

    dicts, lists, tuples, texts and numbers are themselves (sets become lists); tensors become
    `TensorRef`; objects of any class become `Standin`; a class or function that is only mentioned
    becomes `Named`.

    Args:
        nested: gives the storage that a file of torch within the pickle holds; bytes are then left
            in the stream, as `Blob`.
        storages: to which every storage that the pickle mentions is added.

    Raises:
        Refused: nothing but the outcome of a call, a name of something that runs programs, an
            unknown opcode, or a malformed stream.
    """
    machine = _Machine(nested, [] if storages is None else storages)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_OPCODES:
                raise Refused(f"more than {MOST_OPCODES} pickle opcodes")
            if nested is not None and opcode.name in _BYTES:
                size = len(cast(bytes, argument))
                argument = Blob(cast(BinaryIO, stream).tell() - size, size)
            machine.step(opcode.name, argument)
        result = machine.pop()
    except Refused:
        raise
    except _MALFORMED as error:
        reason = one_line(error, 100) or type(error).__name__
        raise Refused(f"not a well-formed pickle ({reason})") from error
    if isinstance(result, Standin) and result.called:
        raise Unsafe(f"a call of {result.path}")
    return result


class _Machine:
    def __init__(
        self, nested: Callable[[Blob | str], StorageRef] | None, storages: list[StorageRef]
    ) -> None:
        self.nested, self.storages = nested, storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Executes one opcode; the last one leaves the result on the stack."""
        push, pop = self.stack.append, self.pop
        if name in _ARGUMENTS:
            push(argument)
            return
        if name in _CONSTANTS:
            push(_CONSTANTS[name]())
            return
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                push(self.memo[argument])
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                push(self.stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "LIST" | "FROZENSET":
                push(self.pop_mark())
            case "DICT":
                items = self.pop_mark()
                push({})
                self.set_items(items)
            case "APPEND":
                self.extend([pop()])
            case "APPENDS" | "ADDITEMS":
                self.extend(self.pop_mark())
            case "SETITEM":
                value, key = pop(), pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                push(named(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = pop(), pop()
                push(named(module, attribute))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(self.call(function, arguments))
            case "NEWOBJ":
                arguments, kind = pop(), pop()
                push(object_of(kind, arguments))
            case "NEWOBJ_EX":
                _, arguments, kind = pop(), pop(), pop()  # keywords say nothing about tensors
                push(object_of(kind, arguments))
            case "BUILD":
                self.build(pop())
            case "BINPERSID":
                push(self.persistent(pop()))
            case _:
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

    def extend(self, items: Iterable[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Standin):
            raise Refused("items for something that is no list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        place = target.items if isinstance(target, Standin) else target
        if not isinstance(place, dict):
            raise Refused("items for something that is no dictionary")
        place.update(
            (key_of(key), value) for key, value in zip(items[::2], items[1::2], strict=True)
        )

    def call(self, function: Any, arguments: Any) -> Any:
        if self.nested is None or function != Named(LOAD_STORAGE):
            return made(function, arguments)
        if not isinstance(arguments, tuple) or not isinstance(arguments[0], Blob | str):
            raise Refused(f"{LOAD_STORAGE} of something that is no file")
        return self.nested(arguments[0])

    def build(self, state: Any) -> None:
        """Keeps the state of an object; `__setstate__` is never called."""
        target = self.stack[-1]
        if isinstance(target, Standin):
            target.state = state
        elif not isinstance(target, dict | list | TensorRef):
            raise Refused("state for something that is no object")

    def persistent(self, identity: Any) -> Any:
        """What a persistent id stands for: a storage, or a class."""
        if isinstance(identity, tuple) and len(identity) >= 2 and identity[0] == "module":
            return identity[1]  # legacy files keep a class with its source text
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise Refused("a reference to something that is no tensor storage")
        kind, key, numel = identity[1], identity[2], identity[4]
        if not isinstance(kind, Named) or not isinstance(key, str | int) or not is_count(numel):
            raise Refused("a malformed reference to a tensor storage")
        if len(identity) > 5 and identity[5] is not None:
            raise Refused("a storage that is a view of another, of a very old torch")
        storage = StorageRef(str(key), kind.path, numel)
        self.storages.append(storage)
        return storage
