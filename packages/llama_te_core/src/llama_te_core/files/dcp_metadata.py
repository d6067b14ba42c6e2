"""The `.metadata` file of `torch.distributed.checkpoint`, read without running its code.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`, and torch's own reader unpickles any class
in it. This reader accepts only the classes that such metadata consist of, and checks their values.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .input_files import read_bytes
from .pickles import Constructor, PickleFileError, Record, Vocabulary, read_pickle, record

MAX_BYTES = 2**28
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1

_MODULE = "torch.distributed.checkpoint.metadata"
_PATHS = [
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
]
_RECORDS = [
    *(
        (_MODULE, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *_PATHS,
]

DTYPES: Mapping[tuple[str, str], torch.dtype] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
"""The dtypes by the names that pickles have for them."""


def size_of(numbers: Any = ()) -> torch.Size:
    """Return a `torch.Size` of numbers in a pickle.

    Raises:
        ValueError: They are not whole numbers from 0 to 2⁶³ - 1, or too many.
    """
    if (
        not isinstance(numbers, tuple)
        or len(numbers) > _MAX_DIMENSIONS
        or not all(type(number) is int and 0 <= number <= _MAX_SIZE for number in numbers)
    ):
        raise ValueError(f"{_short(numbers)} are not whole numbers from 0")
    return torch.Size(numbers)


# Shared values can be large beyond measure when they are written out.
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_short = _REPR.repr

_VOCABULARY = Vocabulary(
    {
        **{(module, name): record(name) for module, name in _RECORDS},
        **DTYPES,
        ("torch", "Size"): Constructor(size_of),
        ("torch.serialization", "_get_layout"): Constructor(lambda name: str(name) if isinstance(name, str) else ""),
    }
)


@dataclass(frozen=True)
class Place:
    """Where a value is stored.

    Attributes:
        file: Name of its file in the checkpoint's folder.
        begin: Position of its first byte in the file.
        length: Its bytes in the file.
    """

    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Part:
    """A stored part of a tensor.

    Attributes:
        offsets: Index of its first element in the tensor.
        sizes: Its shape.
        place: Where it is stored.
    """

    offsets: torch.Size
    sizes: torch.Size
    place: Place


@dataclass(frozen=True)
class DCPTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: torch.Size


class DCPMetadata:
    """The content of a checkpoint, and where it is stored.

    Args:
        path: The `.metadata` file.

    Attributes:
        tensors: The tensors by name.
        values: The names of the values that are not tensors.

    Raises:
        OSError: The file cannot be read.
        PickleFileError: The file is damaged, is not such metadata, or asks for other classes.
    """

    def __init__(self, path: Path) -> None:
        metadata = _state(read_pickle(read_bytes(path, MAX_BYTES), _VOCABULARY), "Metadata")
        self.tensors: dict[str, DCPTensor] = {}
        self.values: list[str] = []
        self._chunks: dict[str, list[Any]] = {}
        for name, entry in _dict(metadata, "state_dict_metadata").items():
            if not isinstance(name, str):
                raise _invalid("state_dict_metadata has a key that is not a name")
            if isinstance(entry, Record) and entry.kind == "BytesStorageMetadata":
                self.values.append(name)
                continue
            state = _state(entry, "TensorStorageMetadata")
            properties = state.get("properties")
            dtype = properties.state if isinstance(properties, Record) else None
            if not isinstance(dtype, tuple) or not dtype or not isinstance(dtype[0], torch.dtype):
                raise _invalid(f"{name} has no dtype")
            self.tensors[name] = DCPTensor(dtype[0], _size(state, "size"))
            self._chunks[name] = _list(state, "chunks")
        paths = metadata.get("planner_data")
        self._paths = paths if isinstance(paths, dict) else {}
        self._places = {}
        for key, place in _dict(metadata, "storage_data").items():
            index = _state(key, "MetadataIndex")
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str) or not isinstance(offset, (torch.Size, type(None))):
                raise _invalid("storage_data has a key that is not a part of a tensor")
            self._places[name, offset] = _state(place, "_StorageInfo")

    def path(self, name: str) -> tuple[str | int, ...]:
        """The keys of the nested state dicts that lead to a value.

        torch's default planner flattens nested state dicts and records the keys. Other planners may not.
        """
        path = self._paths.get(name)
        if isinstance(path, tuple) and path and all(isinstance(key, str | int) for key in path):
            return path
        return (name,)

    def place(self, name: str, offset: torch.Size | None = None) -> Place:
        """Where a value or the part of a tensor at this offset is stored.

        Raises:
            PickleFileError: The metadata do not say it, or name a file outside of the folder.
        """
        state = self._places.get((name, offset))
        if state is None:
            raise _invalid(f"{name} has a part that is stored nowhere")
        if state.get("transform_descriptors"):
            raise _invalid(
                f"{name} is transformed by {_short(state['transform_descriptors'])}, which is not supported: "
                "save without extensions"
            )
        file, numbers = state.get("relative_path"), (state.get("offset"), state.get("length"))
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise _invalid(f"{name} is in {_short(file)}, but files must lie in the folder itself")
        try:
            return Place(file, *size_of(numbers))
        except ValueError as error:
            raise _invalid(f"{name} is in {file}, where {error}") from error

    def parts(self, name: str) -> list[Part]:
        """The parts of a tensor. They cover it, and do not overlap.

        Raises:
            PickleFileError: The metadata are not valid.
        """
        shape = self.tensors[name].shape
        found: dict[torch.Size, Part] = {}
        for chunk in self._chunks[name]:
            state = _state(chunk, "ChunkStorageMetadata")
            offsets, sizes = _size(state, "offsets"), _size(state, "sizes")
            if not len(offsets) == len(sizes) == len(shape) or any(
                offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
            ):
                raise _invalid(f"{name} has the shape {list(shape)}, but a part of {list(sizes)} at {list(offsets)}")
            found[offsets] = Part(offsets, sizes, self.place(name, offsets))
        parts = list(found.values())
        stored = sum(math.prod(part.sizes) for part in parts)
        if stored != math.prod(shape):
            raise _invalid(f"{name} has {math.prod(shape)} elements, and its parts have {stored}")
        if _overlap(parts):
            raise _invalid(f"{name} has parts that overlap")
        return parts


def _overlap(parts: list[Part]) -> bool:
    """Whether parts overlap. Those of meshes are a grid, so few cells lie between all their borders."""
    parts = [part for part in parts if math.prod(part.sizes)]
    if len(parts) < 2:
        return False
    dimensions = range(len(parts[0].sizes))
    starts = np.array([part.offsets for part in parts], dtype=np.int64)
    ends = starts + np.array([part.sizes for part in parts], dtype=np.int64)
    borders = [np.unique(np.concatenate([starts[:, each], ends[:, each]])) for each in dimensions]
    cells = [len(each) - 1 for each in borders]
    if math.prod(cells) > 64 * len(parts) + 4096:
        raise _invalid("a tensor has parts of very many different borders")
    taken = np.zeros(cells, dtype=bool)
    first = np.stack([np.searchsorted(borders[each], starts[:, each]) for each in dimensions], axis=1)
    last = np.stack([np.searchsorted(borders[each], ends[:, each]) for each in dimensions], axis=1)
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        part = taken[tuple(map(slice, begin, end))]
        if part.any():
            return True
        part[...] = True
    return False


def _invalid(what: str) -> PickleFileError:
    return PickleFileError(f"is not valid metadata of torch.distributed.checkpoint: {what}")


def _state(value: Any, kind: str) -> dict[str, Any]:
    state = value.state if isinstance(value, Record) and value.kind == kind else None
    # A class with __slots__ has its attributes behind None.
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
        state = state[1]
    if not isinstance(state, dict):
        raise _invalid(f"it has a {type(value).__name__} where a {kind} belongs")
    return state


def _dict(state: dict[str, Any], name: str) -> dict[Any, Any]:
    value = state.get(name)
    if not isinstance(value, dict):
        raise _invalid(f"it has no {name}")
    return value


def _list(state: dict[str, Any], name: str) -> list[Any]:
    value = state.get(name)
    if not isinstance(value, list):
        raise _invalid(f"a tensor has no {name}")
    return value


def _size(state: dict[str, Any], name: str) -> torch.Size:
    try:
        return size_of(state.get(name))
    except ValueError as error:
        raise _invalid(f"the {name} of a tensor: {error}") from error
