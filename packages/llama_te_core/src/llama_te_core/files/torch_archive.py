"""Files that `torch.save` wrote, read without `torch.load`.

Such a file is a zip archive without compression. The record `data.pkl` is a pickle of the saved value, in which each
tensor names a storage, and the record `data/NAME` has the bytes of a storage. The archive can lie inside another file:
torch.distributed.checkpoint writes one after the other.

Nothing is mapped into memory, since a process that touches a mapped page behind the end of a file is killed: the bytes
are read with `preadv`, and a file that has become shorter is an error.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .dcp_metadata import DTYPES, size_of
from .pickles import Constructor, PickleFileError, Vocabulary, hashable, read_pickle

MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 2**28
_MAX_DIRECTORY_BYTES = 2**24
_LOCAL_HEADER_BYTES = 30


class Region(io.RawIOBase):
    """A range of the bytes of an open file, or bytes in memory.

    Several threads can call `read_at` at the same time.

    Args:
        source: The bytes, or the descriptor of the file.
        begin: Position of the first byte in the file.
        length: Number of bytes; `None` for all to the end.
    """

    def __init__(self, source: int | bytes, begin: int = 0, length: int | None = None) -> None:
        self._source, self._begin = source, begin
        end = os.fstat(source).st_size if isinstance(source, int) else len(source)
        self.size = end - begin if length is None else length
        if self.size < 0 or begin + self.size > end:
            raise PickleFileError(f"is not complete: it has {end} bytes, but byte {begin + self.size} is asked for")
        self._at = 0

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill a view with the bytes that begin at an offset.

        Raises:
            OSError: The file cannot be read.
            PickleFileError: It ends before, though it was longer when it was opened.
        """
        done, count = 0, view.nbytes
        if not 0 <= offset <= self.size - count:
            raise PickleFileError(f"is damaged: it has {self.size} bytes, but byte {offset + count} is asked for")
        if isinstance(self._source, bytes):
            start = self._begin + offset
            view[:] = self._source[start : start + count]
            return
        while done < count:
            read = os.preadv(self._source, [view[done:]], self._begin + offset + done)
            if read == 0:
                raise PickleFileError("is not complete: it has become shorter while it was read")
            done += read

    # For zipfile, which reads the directory of the archive.

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position of the next `read`."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of the next `read`."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if at < 0:
            raise OSError("a position before the begin")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, at most 16 MiB of them."""
        rest = max(0, self.size - self._at)
        size = rest if size is None or size < 0 else min(size, rest)
        if size > _MAX_DIRECTORY_BYTES:
            raise PickleFileError(f"has a directory of {size:,} bytes, too many for such a file")
        content = bytearray(size)
        self.read_at(self._at, memoryview(content))
        self._at += size
        return bytes(content)


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors.

    Attributes:
        dtype: The dtype of its class, bytes for the class that has none.
        begin: Position of its first byte in the archive.
        nbytes: Its bytes.
    """

    dtype: torch.dtype
    begin: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        strides: Steps between its elements in the file, in elements.
        storage: The bytes that it shares with other tensors.
        offset: Its first element in the storage.
        region: The archive.
    """

    dtype: torch.dtype
    shape: torch.Size
    strides: torch.Size
    storage: Storage
    offset: int
    region: Region

    @property
    def _begin(self) -> int:
        """The position of its first byte in the archive."""
        return self.storage.begin + self.offset * self.dtype.itemsize

    @property
    def _row(self) -> int:
        """The elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def has_whole_rows(self) -> bool:
        """Whether the elements of each row lie one after the other, in order."""
        step = 1
        for size, stride in zip(self.shape[:0:-1], self.strides[:0:-1], strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop) of a tensor with whole rows.

        Raises:
            OSError: The file cannot be read.
            PickleFileError: The file has become shorter.
        """
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype, device="cpu")
        view = _bytes_of(rows)
        if not view.nbytes:
            return rows
        row, step = self._row * self.dtype.itemsize, self.strides[0] * self.dtype.itemsize
        if row == step or stop - start == 1:
            self.region.read_at(self._begin + start * step, view)
        else:
            for number in range(stop - start):
                part = view[number * row : (number + 1) * row]
                self.region.read_at(self._begin + (start + number) * step, part)
        return rows

    def read(self) -> torch.Tensor:
        """Read the tensor.

        Raises:
            OSError: The file cannot be read.
            PickleFileError: The file has become shorter, or the elements are far from each other.
        """
        if self.shape and self.has_whole_rows:
            return self.read_rows(0, self.shape[0])
        count = self.shape.numel()
        span = _span(self.shape, self.strides)
        if span > 8 * count:
            raise PickleFileError(f"has a tensor of {count} elements within {span}: save a contiguous copy of it")
        stored = torch.empty(span, dtype=self.dtype, device="cpu")
        self.region.read_at(self._begin, _bytes_of(stored))
        return stored.as_strided(self.shape, self.strides).contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


def _span(shape: torch.Size, strides: torch.Size) -> int:
    """The elements from the first to the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class _Archive:
    """The records of an archive."""

    def __init__(self, region: Region) -> None:
        self.region = region
        try:
            with zipfile.ZipFile(region) as archive:
                self._records = {each.filename: each for each in archive.infolist()}
                total = sum(each.file_size for each in archive.infolist())
        except (PickleFileError, MemoryError):
            raise
        except Exception as error:  # zipfile does not document its errors for damaged files
            raise PickleFileError(f"is damaged or not complete: its zip directory is not valid ({error})") from error
        if total > region.size:  # compressed, or several in one place
            raise PickleFileError(f"is refused: its {region.size:,} bytes would become {total:,}")
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PickleFileError("is not a file of torch.save: it has no record data.pkl, or several")
        self._contents: dict[Storage, torch.Tensor] = {}
        self._folder = pickles[0].removesuffix("data.pkl")
        order = self._folder + "byteorder"
        if order in self._records and self._read(order, 16) != b"little":
            raise PickleFileError("has big-endian numbers: save it on a little-endian machine")

    def place(self, name: str) -> tuple[int, int]:
        """The position and the size of a record."""
        info = self._records.get(name)
        if info is None:
            raise PickleFileError(f"is damaged: it has no record {name[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise PickleFileError(f"is refused: its record {name[:80]!r} is compressed, which torch.save never does")
        header = bytearray(_LOCAL_HEADER_BYTES)
        self.region.read_at(info.header_offset, memoryview(header))
        if header[:4] != MAGIC:
            raise PickleFileError(f"is damaged: its record {name[:80]!r} is not where the directory says")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        begin = info.header_offset + _LOCAL_HEADER_BYTES + names
        if begin + info.file_size > self.region.size:
            raise PickleFileError(f"is not complete: it ends within its record {name[:80]!r}")
        return begin, info.file_size

    def _read(self, name: str, most: int) -> bytes:
        begin, size = self.place(name)
        if size > most:
            raise PickleFileError(f"is refused: its record {name[:80]!r} has {size:,} bytes, too many")
        content = bytearray(size)
        self.region.read_at(begin, memoryview(content))
        return bytes(content)

    def read(self, vocabulary: Vocabulary) -> Any:
        """The saved value."""
        content = self._read(self._folder + "data.pkl", MAX_PICKLE_BYTES)
        return read_pickle(content, Vocabulary(vocabulary.names, vocabulary.states, self._storage))

    def _storage(self, key: Any) -> Storage:
        match key:
            case ("storage", torch.dtype() as dtype, str(name), str(device), int(count)):
                if device == "meta":
                    raise PickleFileError("has a tensor without values (on the device meta)")
                begin, size = self.place(f"{self._folder}data/{name}")
                nbytes = count * dtype.itemsize
                if not 0 <= nbytes <= size:
                    raise PickleFileError(f"is damaged: storage {name[:80]!r} has {size} bytes, not {nbytes}")
                return Storage(dtype, begin, nbytes)
        raise PickleFileError("is damaged: it names a storage in another form")

    def tensor(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        *,
        dtype: torch.dtype | None = None,
        marks: Any = None,
    ) -> StoredTensor:
        """A tensor, checked against its storage. Gradients and hooks are left out."""
        if not isinstance(storage, Storage):
            raise PickleFileError("is damaged: a tensor has no storage")
        if marks:
            raise PickleFileError("has a tensor that is conjugated or negated lazily: save a copy of it (clone)")
        dtype = storage.dtype if dtype is None else dtype
        shape, strides, (offset,) = size_of(shape), size_of(strides), size_of((offset,))
        count, there = math.prod(shape), storage.nbytes // dtype.itemsize
        if len(shape) != len(strides) or (count and offset + _span(shape, strides) > there):
            raise PickleFileError(f"is refused: a tensor of {list(shape)} reaches beyond its storage")
        if count > there:
            raise PickleFileError(f"is refused: a tensor of {list(shape)} repeats the elements of a smaller storage")
        return StoredTensor(dtype, shape, strides, storage, offset, self.region)

    def loaded(self, tensor: StoredTensor) -> torch.Tensor:
        """A tensor on the host. Tensors that shared a storage share it again."""
        storage = tensor.storage
        content = self._contents.get(storage)
        if content is None:
            content = self._contents[storage] = torch.empty(storage.nbytes, dtype=torch.uint8, device="cpu")
            self.region.read_at(storage.begin, _bytes_of(content))
        whole = content[: storage.nbytes // tensor.dtype.itemsize * tensor.dtype.itemsize].view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.strides, tensor.offset if whole.numel() else 0)


def stored_value(region: Region) -> Any:
    """Return the value in a file of tensors, with a `StoredTensor` for each of them.

    Args:
        region: The whole archive.

    Raises:
        OSError: The file cannot be read.
        PickleFileError: It is damaged, or holds something other than tensors, numbers, texts and their containers.
    """
    archive = _Archive(region)
    return archive.read(_vocabulary(archive, lazily=True))


def load_value(region: Region) -> Any:
    """Return the value in a file, with tensors on the host.

    Beside tensors, numbers, texts, bytes and their containers, it may have arrays and numbers of NumPy.

    Args:
        region: The whole archive.

    Raises:
        OSError: The file cannot be read.
        PickleFileError: It is damaged, or holds something else.
    """
    archive = _Archive(region)
    return archive.read(_vocabulary(archive, lazily=False))


def _vocabulary(archive: _Archive, *, lazily: bool) -> Vocabulary:
    def whole(tensor: StoredTensor) -> Any:
        return tensor if lazily else archive.loaded(tensor)

    def second(*arguments: Any) -> Any:
        return whole(archive.tensor(*arguments[:6], marks=arguments[6] if len(arguments) > 6 else None))

    def third(*arguments: Any) -> Any:
        dtype = arguments[6]
        if not isinstance(dtype, torch.dtype):
            raise PickleFileError("is damaged: a tensor has no dtype")
        return whole(archive.tensor(*arguments[:6], dtype=dtype, marks=arguments[7] if len(arguments) > 7 else None))

    def parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
        if not isinstance(data, torch.Tensor | StoredTensor):
            raise PickleFileError("is damaged: a parameter is not a tensor")
        return torch.nn.Parameter(data, bool(requires_grad)) if isinstance(data, torch.Tensor) else data

    names = {
        **_NAMES,
        ("torch._utils", "_rebuild_tensor_v2"): Constructor(second),
        ("torch._utils", "_rebuild_tensor_v3"): Constructor(third),
        ("torch._utils", "_rebuild_parameter"): Constructor(parameter),
    }
    return Vocabulary(names if lazily else {**names, **_VALUES}, _STATES)


def _other_tensor(kind: str) -> Constructor:
    def refuse(*arguments: Any) -> None:
        raise PickleFileError(f"has a tensor that is {kind}, not an ordinary one: save it as a dense one")

    return Constructor(refuse)


_STORAGES: dict[str, torch.dtype] = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_NAMES: dict[tuple[str, str], Any] = {
    **DTYPES,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "Size"): Constructor(size_of),
    ("collections", "OrderedDict"): Constructor(lambda: OrderedDict()),
    ("torch._utils", "_rebuild_sparse_tensor"): _other_tensor("sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _other_tensor("nested"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _other_tensor("on the device meta"),
    ("torch.serialization", "_get_layout"): Constructor(lambda name: name if isinstance(name, str) else ""),
}


# Values that are not tensors


class _Dtype:
    """A dtype of NumPy that is being read."""

    def __init__(self, code: Any, align: Any, copy: Any) -> None:
        # Numbers only: others hold Python's objects or fields.
        if not isinstance(code, str) or np.dtype(code).kind not in "biufc" or np.dtype(code).names is not None:
            raise PickleFileError("has an array of NumPy that does not consist of numbers")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise PickleFileError("has an array of NumPy in another byte order")


def _set_array(array: np.ndarray[Any, Any], state: Any) -> None:
    match state:
        case (int(), tuple(sizes), _Dtype() as dtype, bool(by_columns), bytes(content)):
            shape = size_of(sizes)
            if len(content) != math.prod(shape) * dtype.dtype.itemsize:
                raise PickleFileError("is damaged: an array of NumPy has not as many bytes as its shape says")
            checked: Any = (1, tuple(shape), dtype.dtype, by_columns, content)
            array.__setstate__(checked)
        case _:
            raise PickleFileError("is damaged: an array of NumPy has another form")


def _number(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes) or len(content) != dtype.dtype.itemsize:
        raise PickleFileError("is damaged: a number of NumPy has another form")
    return np.frombuffer(content, dtype.dtype)[0]


def _encode(text: Any, encoding: Any) -> bytes:
    """The bytes that protocol 2 writes as a text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise PickleFileError("is damaged: bytes have another form")
    return text.encode("latin1")


def _listed(items: Any = None) -> list[Any]:
    if not isinstance(items, (list, type(None))):
        raise PickleFileError("is damaged: a set or bytes have another form")
    return items or []


def _counter(items: Any = None) -> Counter[Any]:
    if not isinstance(items, (dict, type(None))):
        raise PickleFileError("is damaged: a Counter has another form")
    return Counter(items or {})


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    content = content if isinstance(content, bytes) else _encode(content, encoding)
    return bytearray(content)


_VALUES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): Constructor(_encode),
    ("collections", "Counter"): Constructor(_counter),
    ("torch", "device"): Constructor(torch.device),
    ("numpy", "dtype"): Constructor(_Dtype),
    ("numpy", "ndarray"): np.ndarray,
    **{
        (module, name): constructor
        for module in ("builtins", "__builtin__")
        for name, constructor in (
            ("set", Constructor(lambda items=None: set(map(hashable, _listed(items))))),
            ("bytearray", Constructor(_bytearray)),
            ("complex", Constructor(lambda real, imaginary: complex(float(real), float(imaginary)))),
        )
    },
    **{
        (f"{module}.multiarray", name): constructor
        for module in ("numpy.core", "numpy._core")
        for name, constructor in (
            ("_reconstruct", Constructor(lambda kind, shape, code: np.ndarray((0,), np.uint8))),
            ("scalar", Constructor(_number)),
        )
    },
}
_STATES: Mapping[type, Any] = {
    OrderedDict: lambda target, state: None,  # `_metadata` of a state dict, which has no values
    np.ndarray: _set_array,
    _Dtype: _Dtype.set_state,
}
