"""A reader of pickles that runs no code: the only place where this project reads a pickle that it did not just write.

A pickle is a program for a machine with a stack. `read_pickle` is such a machine, with the opcodes that torch.save and
torch.distributed.checkpoint write. It calls nothing but the functions of a `Vocabulary`, never imports, and bounds the
depth of nesting, the number of steps and the size of the result. So a hostile file ends in an error, soon.

The opcodes are those of the standard library's `pickletools`, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

MAX_STEPS = 2**24
"""Opcodes in a pickle. The metadata of 240,000 parts of tensors have fewer."""
MAX_DEPTH = 100
"""Containers inside each other."""
MAX_VALUES = 2**24
"""Values in the result. A container that occurs twice counts twice."""

MAX_CONTAINERS = 2**22
"""Lists, tuples, dicts, sets and records. The metadata of 300,000 parts of tensors have fewer."""

_MAX_NAME = 1024


class PickleFileError(ValueError):
    """A pickle is damaged, or refused. The message is a clause that follows the file's name: "... is damaged"."""


class RefusedNameError(PickleFileError):
    """A pickle asks for a class or function that is not in its vocabulary.

    Attributes:
        name: The module and the name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"is refused: it asks for {name}, which such files do not need and which could run any code")
        self.name = name


@dataclass(frozen=True)
class Constructor:
    """The function that a pickle may call by a name.

    Attributes:
        build: It gets the arguments from the pickle, and checks them.
    """

    build: Callable[..., Any]


class Record:
    """An object of a pickle, without its class's code.

    Attributes:
        kind: The name of its class.
        state: Its attributes, mostly.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


def record(kind: str) -> Constructor:
    """Return the constructor of records of this kind. It drops its arguments."""
    return Constructor(lambda *arguments: Record(kind))


@dataclass(frozen=True)
class Vocabulary:
    """What the pickles of one format consist of, beside numbers, texts and containers.

    Attributes:
        names: The value or the `Constructor` for each module and name.
        states: Sets the state of an object, by the object's exact type. Records need none.
        persistent: Returns the object of a persistent id, which torch.save writes for storages.
    """

    names: Mapping[tuple[str, str], Any]
    states: Mapping[type, Callable[[Any, Any], None]] = field(default_factory=dict)
    persistent: Callable[[Any], Any] | None = None


def read_pickle(data: bytes, vocabulary: Vocabulary) -> Any:
    """Return the value of a pickle.

    Args:
        data: The whole pickle.
        vocabulary: The names that it may use.

    Raises:
        RefusedNameError: The pickle asks for another name.
        PickleFileError: The pickle is damaged, needs other opcodes, is too large, too deep, or refers to itself.
    """
    try:
        return _Machine(data, vocabulary).run()
    except (PickleFileError, OSError, MemoryError):
        raise
    except Exception as error:  # a vocabulary's functions get arguments of any kind
        raise PickleFileError(f"is damaged ({type(error).__name__}: {error})") from error


_SCALARS = frozenset({str, int, bool, float, bytes, type(None)})
_Mark = object()
_DEPTH, _PLACED, _SIZE_AT = 127, 128, 8  # the bits of a container's shape


class _Machine:
    """Runs one pickle."""

    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        self.data, self.vocabulary = data, vocabulary
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # A number for each container that has items or is one, by its id: how deep it is, whether it is inside another
        # container, and its size. One inside another may not grow, so that none can come to be inside itself.
        self.shapes: dict[int, int] = {}
        self.kept: list[Any] = []  # these containers, so that no id is used again

    def run(self) -> Any:
        data, stack, memo, operations = self.data, self.stack, self.memo, _OPERATIONS
        size = len(data)
        for _ in range(MAX_STEPS):
            at = self.at
            if at >= size:
                raise PickleFileError("is damaged: it has no end")
            code = data[at]
            self.at = at + 1
            # Half of all steps: the rest of this function is for speed alone.
            if code == _MEMOIZE and stack and stack[-1] is not _Mark:
                memo[len(memo)] = stack[-1]
            elif code == _BINGET and at + 1 < size and data[at + 1] in memo:
                stack.append(memo[data[at + 1]])
                self.at = at + 2
            elif code == _BININT1 and at + 1 < size:
                stack.append(data[at + 1])
                self.at = at + 2
            elif code == _STOP:
                break
            else:
                operation = operations.get(code)
                if operation is None:
                    raise PickleFileError(
                        f"has the opcode 0x{code:02x} at byte {at}, which such files do not need: it is damaged, or "
                        "made to do harm"
                    )
                operation(self)
        else:
            raise PickleFileError(f"has more than {MAX_STEPS:,} steps, too many for such a file")
        if self.at != size or len(stack) != 1:
            raise PickleFileError("is damaged: its end is not where it says")
        return self.pop()

    # Bytes

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise PickleFileError(f"is damaged: it ends within the {count} bytes at byte {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_NAME)
        if end < 0:
            raise PickleFileError(f"is damaged: the name at byte {self.at} does not end")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    # Stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            self.empty()
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            self.empty()
        return self.stack[-1]

    def pop_marked(self) -> list[Any]:
        """Take the values above the last mark, and the mark."""
        stack = self.stack
        for start in range(len(stack) - 1, -1, -1):
            if stack[start] is _Mark:
                values = stack[start + 1 :]
                del stack[start:]
                return values
        self.empty()

    def empty(self) -> NoReturn:
        raise PickleFileError(f"is damaged: the stack is empty at byte {self.at - 1}")

    # Containers

    def contain(self, container: Any, items: Iterable[Any]) -> Any:
        """Note that a container has these new items, and return it."""
        shapes = self.shapes
        shape = self.shape(container)
        if shape & _PLACED:
            raise PickleFileError("has a value that refers to itself")
        depth, size = shape & _DEPTH, shape >> _SIZE_AT
        for item in items:
            if type(item) in _SCALARS:
                size += 1
                continue
            if item is container:
                raise PickleFileError("has a value that refers to itself")
            inner = self.shape(item)
            shapes[id(item)] = inner | _PLACED
            depth = max(depth, (inner & _DEPTH) + 1)
            size += (inner >> _SIZE_AT) + 1
        if depth > MAX_DEPTH:
            raise PickleFileError(f"has values nested more than {MAX_DEPTH} deep")
        if size > MAX_VALUES:
            raise PickleFileError(f"has more than {MAX_VALUES:,} values, too many for such a file")
        shapes[id(container)] = size << _SIZE_AT | depth
        return container

    def shape(self, container: Any) -> int:
        """The shape of a container, which is noted from now on."""
        shape = self.shapes.get(id(container))
        if shape is None:
            if len(self.kept) >= MAX_CONTAINERS:
                raise PickleFileError(f"has more than {MAX_CONTAINERS:,} containers, too many for such a file")
            self.kept.append(container)
            shape = self.shapes[id(container)] = 0
        return shape

    def extend_dict(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise PickleFileError("is damaged: it sets items of what is not a dict")
        self.contain(target, items)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def call(self, arguments: Any) -> None:
        constructor = self.pop()
        if not isinstance(constructor, Constructor) or type(arguments) is not tuple:
            raise PickleFileError(f"calls a value of type {type(constructor).__name__}, which is not allowed")
        made = constructor.build(*arguments)
        if type(made) not in _SCALARS and id(made) not in self.shapes:
            self.contain(made, arguments)  # it is not larger than its arguments are together
        self.push(made)

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MAX_NAME:
            raise PickleFileError("is damaged: a name is not a text, or very long")
        try:
            self.push(self.vocabulary.names[module, name])
        except KeyError:
            raise RefusedNameError(f"{module}.{name}") from None

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        try:
            self.push(self.memo[index])
        except KeyError:
            raise PickleFileError(f"is damaged: it refers to value {index}, which it does not have") from None


def hashable(key: Any) -> Any:
    """Return the key of a dict or the member of a set, if hashing it is quick.

    Nested tuples could hash for ever, and the hashes of large numbers collide.

    Raises:
        PickleFileError: It is of another type than a text, bytes, a number of 64 bits, `None` or a record.
    """
    if type(key) is int and key.bit_length() > 64:
        raise PickleFileError("has a number of more than 64 bits as a key")
    if type(key) not in (str, bytes, int, bool, type(None), Record):
        raise PickleFileError(f"has a {type(key).__name__} as a key, which is not allowed")
    return key


_STOP, _MEMOIZE, _BINGET, _BININT1 = ord("."), 0x94, ord("h"), ord("K")
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {}


def _operation(code: bytes) -> Callable[[Callable[[_Machine], None]], Callable[[_Machine], None]]:
    def add(function: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
        _OPERATIONS[code[0]] = function
        return function

    return add


def _constant(code: bytes, value: Any) -> None:
    _OPERATIONS[code[0]] = lambda machine: machine.push(value)


_constant(b"N", None)
_constant(b"\x88", True)
_constant(b"\x89", False)
_constant(b"(", _Mark)
_constant(b")", ())

for _code, _size in ((b"K", 1), (b"M", 2)):  # BININT1, BININT2
    _OPERATIONS[_code[0]] = lambda machine, size=_size: machine.push(machine.number(size))  # type: ignore[misc]
for _code, _size in ((b"\x8c", 1), (b"X", 4), (b"\x8d", 8)):  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
    _OPERATIONS[_code[0]] = lambda machine, size=_size: machine.push(  # type: ignore[misc]
        machine.take(machine.number(size)).decode("utf-8", "surrogatepass")
    )
for _code, _size in ((b"C", 1), (b"B", 4), (b"\x8e", 8)):  # SHORT_BINBYTES, BINBYTES, BINBYTES8
    _OPERATIONS[_code[0]] = lambda machine, size=_size: machine.push(machine.take(machine.number(size)))  # type: ignore[misc]
for _code, _size in ((b"q", 1), (b"r", 4)):  # BINPUT, LONG_BINPUT
    _OPERATIONS[_code[0]] = lambda machine, size=_size: machine.remember(machine.number(size))  # type: ignore[misc]
for _code, _size in ((b"h", 1), (b"j", 4)):  # BINGET, LONG_BINGET
    _OPERATIONS[_code[0]] = lambda machine, size=_size: machine.recall(machine.number(size))  # type: ignore[misc]
for _code, _size in ((b"\x85", 1), (b"\x86", 2), (b"\x87", 3)):  # TUPLE1, TUPLE2, TUPLE3

    def _short_tuple(machine: _Machine, size: int = _size) -> None:
        items = tuple([machine.pop() for _ in range(size)][::-1])
        machine.push(machine.contain(items, items))

    _OPERATIONS[_code[0]] = _short_tuple


@_operation(b"\x80")
def _proto(machine: _Machine) -> None:
    version = machine.number(1)
    if not 2 <= version <= 5:
        raise PickleFileError(f"is a pickle of protocol {version}, but only 2 to 5 are read")


@_operation(b"\x95")
def _frame(machine: _Machine) -> None:
    if machine.number(8) > len(machine.data) - machine.at:
        raise PickleFileError("is damaged: it ends within a frame")


@_operation(b"J")
def _binint(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(4), "little", signed=True))


@_operation(b"\x8a")
def _long1(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number(1)), "little", signed=True))


@_operation(b"G")
def _binfloat(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0])


@_operation(b"\x96")
def _bytearray8(machine: _Machine) -> None:
    machine.push(bytearray(machine.take(machine.number(8))))


@_operation(b"0")
def _pop(machine: _Machine) -> None:
    machine.pop()


@_operation(b"1")
def _pop_mark(machine: _Machine) -> None:
    machine.pop_marked()


@_operation(b"t")
def _tuple(machine: _Machine) -> None:
    items = tuple(machine.pop_marked())
    machine.push(machine.contain(items, items) if items else items)


@_operation(b"]")
def _empty_list(machine: _Machine) -> None:
    machine.push([])


@_operation(b"}")
def _empty_dict(machine: _Machine) -> None:
    machine.push({})


@_operation(b"\x8f")
def _empty_set(machine: _Machine) -> None:
    machine.push(set())


@_operation(b"a")
def _append(machine: _Machine) -> None:
    _extend_list(machine, [machine.pop()])


@_operation(b"e")
def _appends(machine: _Machine) -> None:
    _extend_list(machine, machine.pop_marked())


def _extend_list(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if type(target) is not list:
        raise PickleFileError("is damaged: it appends to what is not a list")
    machine.contain(target, items).extend(items)


@_operation(b"s")
def _setitem(machine: _Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    machine.extend_dict([key, value])


@_operation(b"u")
def _setitems(machine: _Machine) -> None:
    machine.extend_dict(machine.pop_marked())


@_operation(b"\x90")
def _additems(machine: _Machine) -> None:
    items = machine.pop_marked()
    target = machine.top()
    if type(target) is not set:
        raise PickleFileError("is damaged: it adds to what is not a set")
    machine.contain(target, items).update(map(hashable, items))


@_operation(b"\x94")
def _memoize(machine: _Machine) -> None:
    machine.remember(len(machine.memo))


@_operation(b"c")
def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


@_operation(b"\x93")
def _stack_global(machine: _Machine) -> None:
    name = machine.pop()
    machine.name(machine.pop(), name)


@_operation(b"R")
def _reduce(machine: _Machine) -> None:
    machine.call(machine.pop())


@_operation(b"\x81")
def _newobj(machine: _Machine) -> None:
    machine.call(machine.pop())


@_operation(b"b")
def _build(machine: _Machine) -> None:
    state = machine.pop()
    target = machine.top()
    if type(target) is Record:
        machine.contain(target, (state,)).state = state
        return
    set_state = machine.vocabulary.states.get(type(target))
    if set_state is None:
        raise PickleFileError(f"sets the state of a {type(target).__name__}, which is not allowed")
    machine.contain(target, (state,))
    set_state(target, state)


@_operation(b"Q")
def _binpersid(machine: _Machine) -> None:
    name = machine.pop()
    if machine.vocabulary.persistent is None:
        raise PickleFileError("refers to a storage, which such files do not have")
    machine.push(machine.vocabulary.persistent(name))
