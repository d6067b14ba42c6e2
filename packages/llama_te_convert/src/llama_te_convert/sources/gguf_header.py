"""The header of a GGUF file, read within limits.

The package gguf and transformers trust the numbers in a header: one changed byte can make them build lists without end.
So this module reads the header first, and refuses what these readers cannot take.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3: the magic number, the version,
the numbers of tensors and of fields, the fields (a key, a type, a value), the tensors (a name, the sizes of the
dimensions, a type, an offset), padding, and the bytes of the tensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

# Real files stay far below these limits: a Llama with a vocabulary of 128,256 has 8 MB and 540,000 elements in arrays.
_MAX_BYTES = 64 * 2**20
_MAX_ELEMENTS = 2**21
_MAX_FIELDS = 2**12
_MAX_TENSORS = 2**16
_MAX_KEY = 1024
_MAX_TEXT_IN_ARRAY = 1024
_MAX_DIMENSIONS = 4  # of ggml
_MAX_SIZE = 2**48
_DEFAULT_ALIGNMENT = 32
_ALIGNMENT = "general.alignment"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9


class GGUFTensor(NamedTuple):
    """A tensor in the file.

    Attributes:
        name: Its name in the file.
        shape: Sizes of its dimensions, rows first.
        quantization: The number of its type.
        offset: Position of its first byte in the file.
        nbytes: Its bytes.
    """

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int
    nbytes: int


class GGUFHeader(NamedTuple):
    """The header of a file.

    Attributes:
        fields: The value of each field. An array of texts, which no conversion needs, is `None`.
        tensors: The tensors, in the file's order.
    """

    fields: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


class OtherByteOrderError(ValueError):
    """The file was written for machines of another byte order."""


def read_gguf_header(file: BinaryIO, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
    """Read the header of an open file.

    Args:
        file: The file.
        block_sizes: Elements and bytes of a block of each type of tensors, by the number of the type.

    Raises:
        OSError: The file cannot be read.
        OtherByteOrderError: See there.
        ValueError: The header is not valid. The message says why, without the path.
    """
    size = os.fstat(file.fileno()).st_size
    reader = _Reader(os.pread(file.fileno(), _MAX_BYTES, 0))
    try:
        return _header(reader, size, block_sizes)
    except struct.error as error:
        raise ValueError(f"it ends within its header, at {reader.place:,} of {size:,} bytes") from error


class _Reader:
    """The bytes of the header, and the place that reading has reached."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0
        self._elements = 0

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.content, self.place)
        self.place += struct.calcsize(layout)
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def raw(self, count: int) -> bytes:
        if count > len(self.content) - self.place:
            raise struct.error
        self.place += count
        return self.content[self.place - count : self.place]

    def text(self, most: int, what: str) -> str:
        length = self.number("Q")
        if length > most:
            raise ValueError(f"{what} has {length:,} bytes, but at most {most:,} are read")
        raw = self.raw(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8: {raw[:40]!r}") from error

    def skip_texts(self, count: int, what: str) -> None:
        content, place = self.content, self.place
        for _ in range(count):
            length = int.from_bytes(content[place : place + 8], "little")
            if length > _MAX_TEXT_IN_ARRAY:
                raise ValueError(f"{what} has a text of {length:,} bytes, but at most {_MAX_TEXT_IN_ARRAY:,} are read")
            place += 8 + length
            if place > len(content):
                raise struct.error
        self.place = place

    def value(self, kind: int, what: str) -> Any:
        if kind == _TEXT:
            return self.text(_MAX_BYTES, what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _NUMBERS:
            raise ValueError(f"{what} has the unknown type {kind}")
        if kind == _BOOL and self.content[self.place : self.place + 1] not in (b"\0", b"\1"):
            raise ValueError(f"{what} is neither true nor false")
        value = self.number(_NUMBERS[kind])
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what} is {value}, which is not finite")
        return value

    def _array(self, what: str) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise ValueError(f"{what} has {count:,} elements, but all arrays may have {_MAX_ELEMENTS:,}")
        if kind == _TEXT:
            self.skip_texts(count, what)
            return None
        if kind not in _NUMBERS:
            raise ValueError(f"{what} is an array of the type {kind}, which is not a number or a text")
        return list(self.numbers(_NUMBERS[kind], count))


def _header(reader: _Reader, size: int, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
    if reader.raw(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise OtherByteOrderError
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, but 2 and 3 are read")
    tensor_count, field_count = reader.numbers("Q", 2)
    for count, most, what in ((tensor_count, _MAX_TENSORS, "tensors"), (field_count, _MAX_FIELDS, "fields")):
        if count > most:
            raise ValueError(f"it says that it has {count:,} {what}, but at most {most:,} are read")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = reader.text(_MAX_KEY, "a key")
        if key in fields:
            raise ValueError(f"it has the field {key!r} twice")
        kind = reader.number("I")
        fields[key] = reader.value(kind, f"the field {key!r}")
        if key == _ALIGNMENT and (kind != 4 or fields[key].bit_count() != 1):
            raise ValueError(f"{_ALIGNMENT} is {fields[key]!r}, but must be a power of 2, as an unsigned 32-bit number")
    described = [_tensor(reader, block_sizes) for _ in range(tensor_count)]
    start = -(-reader.place // (alignment := fields.get(_ALIGNMENT, _DEFAULT_ALIGNMENT))) * alignment
    tensors = tuple(each._replace(offset=start + each.offset) for each in described)
    _check_places(tensors, alignment, size)
    return GGUFHeader(fields, tensors)


def _tensor(reader: _Reader, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFTensor:
    """The next tensor. Its offset counts from the first byte of the first tensor."""
    name = reader.text(_MAX_KEY, "the name of a tensor")
    dimensions = reader.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {dimensions} dimensions, but must have 1 to {_MAX_DIMENSIONS}")
    shape = reader.numbers("Q", dimensions)
    quantization, offset = reader.number("I"), reader.number("Q")
    elements = math.prod(shape)
    if not 1 <= elements <= _MAX_SIZE:
        raise ValueError(f"the tensor {name!r} has the sizes {list(shape)}, which no tensor can have")
    if quantization not in block_sizes:
        raise ValueError(f"the tensor {name!r} has the unknown type {quantization}")
    block, block_bytes = block_sizes[quantization]
    if shape[0] % block:
        raise ValueError(f"the tensor {name!r} has rows of {shape[0]} elements, which is no multiple of {block}")
    return GGUFTensor(name, shape[::-1], quantization, offset, elements // block * block_bytes)


def _check_places(tensors: tuple[GGUFTensor, ...], alignment: int, size: int) -> None:
    end, before, names = 0, "", set[str]()
    for tensor in sorted(tensors, key=lambda each: each.offset):
        name = tensor.name
        if name in names:
            raise ValueError(f"it has the tensor {name!r} twice")
        names.add(name)
        if tensor.offset % alignment:
            raise ValueError(f"the tensor {name!r} begins at {tensor.offset:,}, which is no multiple of {alignment}")
        if tensor.offset < end:
            raise ValueError(f"the tensors {before!r} and {name!r} overlap")
        end, before = tensor.offset + tensor.nbytes, name
        if end > size:
            raise ValueError(f"the tensor {name!r} ends at {end:,}, but the file has {size:,} bytes")
