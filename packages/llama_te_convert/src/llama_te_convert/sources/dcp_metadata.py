"""The `.metadata` file of `torch.distributed.checkpoint`, read without running its code.

`.metadata` is a pickle, and torch's own reader unpickles any class in it. The unpickler here accepts only the classes
that such metadata consist of, and builds a plain record in the place of each.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import CheckpointError
from ..layout.tensor_info import TensorInfo
from .file_names import is_plain_name
from .torch_tensors import dtype_name


class _Record:
    """The pickled state of an object, without its class's code."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_TENSOR = (_METADATA_MODULE, "TensorStorageMetadata")
_RECORDS = {
    _TENSOR,
    *(
        (_METADATA_MODULE, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
}


class _Unpickler(pickle.Unpickler):
    """Builds records for the classes of metadata, and refuses every other name."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file)
        # A pickle can set attributes of classes, so each unpickler has record classes of its own.
        self.record_classes = {key: type(key[1], (_Record,), {}) for key in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.record_classes:
            return self.record_classes[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise _RefusedError(f"{module}.{name}")


class _RefusedError(Exception):
    """A pickle asks for a name that metadata do not need."""


@dataclass(frozen=True)
class _Metadata:
    """The content of `.metadata`, as records."""

    state: dict[str, Any]
    tensor_class: type[_Record]


def _unpickle(path: Path) -> _Metadata:
    try:
        with path.open("rb") as file:
            unpickler = _Unpickler(file)
            state = cast(_Record, unpickler.load()).state
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. torch.distributed.checkpoint writes this file into the "
            "folder of every checkpoint."
        ) from error
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: it asks for {error}, which metadata of torch.distributed.checkpoint do not need and "
            "which could run any code."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is not metadata of torch.distributed.checkpoint: {type(error).__name__}: {error}."
        ) from error
    return _Metadata(state, unpickler.record_classes[_TENSOR])


@dataclass(frozen=True)
class DCPChunk:
    """A stored part of a tensor.

    Attributes:
        offsets: Index of its first element in the tensor.
        sizes: Its shape.
        file: Name of its file in the checkpoint's folder.
        begin: Position of its first byte in the file.
        length: Its bytes in the file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class DCPMetadata:
    """The tensors of a checkpoint, and where their chunks are.

    Metadata with another structure raise `AttributeError`, `KeyError`, `TypeError` or `ValueError` here and in the
    methods.

    Args:
        path: The `.metadata` file.

    Raises:
        CheckpointError: The file cannot be read, is not a pickle of metadata, or holds other classes.
    """

    def __init__(self, path: Path) -> None:
        metadata = _unpickle(path)
        self._tensors = {
            name: entry.state
            for name, entry in metadata.state["state_dict_metadata"].items()
            if isinstance(entry, metadata.tensor_class)
        }
        self.infos = {name: _info(state) for name, state in self._tensors.items()}
        paths = metadata.state.get("planner_data")
        self._paths = paths if isinstance(paths, dict) else {}
        self._places = {
            (key.state["fqn"], key.state.get("offset")): place.state
            for key, place in metadata.state["storage_data"].items()
        }

    def path(self, name: str) -> tuple[tuple[str, ...], str]:
        """The keys of the nested state dicts that hold a tensor, and its key in the innermost one."""
        path = self._paths.get(name)
        # torch's default planner flattens nested state dicts and records the keys. Other planners may not.
        *parents, key = map(str, path if isinstance(path, tuple) else (name,))
        return tuple(parents), key

    def chunks(self, name: str) -> Iterator[DCPChunk]:
        """The chunks of a tensor. They cover it completely."""
        info = self.infos[name]
        sizes_at = {}
        for chunk in self._tensors[name]["chunks"]:
            offsets, sizes = _numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])
            ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            if any(end > size for end, size in zip(ends, info.shape, strict=True)):
                raise ValueError(f"{name} has the shape {list(info.shape)}, but a part that ends at {ends}")
            sizes_at[offsets] = sizes
        stored = sum(math.prod(sizes) for sizes in sizes_at.values())
        if stored != math.prod(info.shape):
            raise ValueError(f"{name} has {math.prod(info.shape)} elements, and its parts {stored}")
        for offsets, sizes in sizes_at.items():
            place = self._places[name, offsets]
            if place.get("transform_descriptors"):
                raise ValueError(
                    f"{name} is transformed by {place['transform_descriptors']}, which is not supported: save without "
                    "extensions"
                )
            file = place["relative_path"]
            if not is_plain_name(file):
                raise ValueError(f"{name} is in {file!r}, but files must lie in the folder itself")
            yield DCPChunk(offsets, sizes, file, *_numbers((place["offset"], place["length"])))


def _info(state: dict[str, Any]) -> TensorInfo:
    dtype = state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is not a dtype")
    return TensorInfo(dtype_name(dtype), _numbers(state["size"]))


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are not whole numbers from 0")
    return values
