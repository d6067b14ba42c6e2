"""Checkpoints of `torch.distributed.checkpoint`: a folder with `.metadata` and files of sharded tensors.

`.metadata` is a pickle, and torch's own reader unpickles whatever it says. Here it is read by an unpickler that knows
the names of the classes that such metadata are made of, and for each makes a record that has none of its code. A part
of a tensor is what `torch.save` wrote, at the place in a file that the metadata tell; parts are read one at a time,
without a process group.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from .tensor_source import CheckpointError, TensorInfo
from .torch_tensors import as_bytes, dtype_name, info_of, torch_dtype

METADATA = ".metadata"
# The most tensors that make one tensor of the other layout: query, key and value rows are read in turns.
_HELD_TENSORS = 3
_EMBEDDING = re.compile(
    r"(?:(?P<before_decoder>(?:.+\.)?)(?:model|transformer)\.|(?P<before>(?:.+\.)?))embed_tokens\.weight"
)


class DCPSource:
    """A checkpoint that `torch.distributed.checkpoint.save` wrote, with a Llama somewhere in what was saved.

    Its tensors have the names that they have in the model's state dict, without what stands before them. Everything
    else is left out: the optimizer's state, entries that are no tensors, and the state of Transformer Engine's recipes.

    Args:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: `.metadata` is missing, not valid, or holds what metadata do not; there is no model or more
            than one; a tensor is not whole.
    """

    concurrent = False  # parts that are held belong to what is read next

    def __init__(self, folder: Path) -> None:
        path = folder / METADATA
        metadata = _unpickle(path)
        try:
            entries = _Entries(metadata)
            names = _model_names(entries, folder)
            self._chunks = {short: list(entries.chunks(name)) for name, short in names.items()}
            self.tensors = {short: entries.infos[name] for name, short in names.items()}
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not valid metadata of torch.distributed.checkpoint: {type(error).__name__}: {error}."
            ) from error
        self._folder = folder
        self._held: dict[str, dict[_Chunk, torch.Tensor]] = {}

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Rows of a tensor: see `TensorSource`."""
        info = self.tensors[name]
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=torch_dtype(info.dtype))
        held = self._held.pop(name, {})
        used: dict[_Chunk, torch.Tensor] = {}
        for chunk in self._chunks[name]:
            (offset, *columns), (size, *widths) = chunk.offsets or (0,), chunk.sizes or (1,)
            first, last = max(start, offset), min(stop, offset + size)
            if first >= last or 0 in widths:
                continue
            tensor = used[chunk] = held[chunk] if chunk in held else self._load(name, chunk)
            target = rows[first - start : last - start]
            for dimension, (column, width) in enumerate(zip(columns, widths, strict=True), start=1):
                target = target.narrow(dimension, column, width)
            target.copy_((tensor if chunk.sizes else tensor[None])[first - offset : last - offset])
        self._held[name] = used  # rows are mostly read in order: the next ones begin in these parts
        if len(self._held) > _HELD_TENSORS:
            del self._held[next(iter(self._held))]
        return as_bytes(rows)

    def _load(self, name: str, chunk: _Chunk) -> torch.Tensor:
        path = self._folder / chunk.file
        try:
            with path.open("rb") as file:
                part = cast(IO[bytes], _Slice(file, chunk.begin, chunk.length))
                loaded = torch.load(part, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        except Exception as error:  # what torch raises for a damaged file is not documented
            raise CheckpointError(
                f"{path}: the part of {name} at byte {chunk.begin} cannot be read ({type(error).__name__}): the file "
                "is damaged, not complete, or holds something other than tensors."
            ) from error
        expected = TensorInfo(self.tensors[name].dtype, chunk.sizes)
        if not isinstance(loaded, torch.Tensor) or info_of(loaded) != expected:
            raise CheckpointError(
                f"{path}: the part of {name} at byte {chunk.begin} is not the tensor that it should be."
            )
        return loaded.detach()

    def close(self) -> None:
        """Let go of what was read."""
        self._held.clear()


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, and where it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class _Slice(io.RawIOBase):
    """Bytes [begin, begin + length) of a file, as a file."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(view[: max(0, self._length - self._at)])
        self._at += count
        return count


class _Record:
    """The state of an object in the metadata."""

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
    """Makes records for the classes of metadata, and refuses all other names."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file)
        # A pickle can set attributes of classes: these live no longer than it.
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
    """A name that metadata have no use for."""


@dataclass(frozen=True)
class _Metadata:
    """What `.metadata` holds, as records."""

    state: dict[str, Any]
    tensor_class: type[_Record]


def _unpickle(path: Path) -> _Metadata:
    try:
        with path.open("rb") as file:
            unpickler = _Unpickler(file)
            state = cast(_Record, unpickler.load()).state
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. The folder of a checkpoint that "
            "torch.distributed.checkpoint wrote has this file."
        ) from error
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: it asks for {error}, which metadata of torch.distributed.checkpoint have no use for "
            "and which could run any code."
        ) from error
    except Exception as error:  # a pickle that is damaged can raise anything
        raise CheckpointError(
            f"{path} is no metadata of torch.distributed.checkpoint: {type(error).__name__}: {error}."
        ) from error
    return _Metadata(state, unpickler.record_classes[_TENSOR])


class _Entries:
    """The tensors that metadata tell of. What is not as it should be raises whatever comes first."""

    def __init__(self, metadata: _Metadata) -> None:
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
        """Keys of nested state dicts, and the key in the innermost one."""
        path = self._paths.get(name)
        # torch's planner flattens nested state dicts; others can leave names as they are.
        *parents, key = map(str, path if isinstance(path, tuple) else (name,))
        return tuple(parents), key

    def chunks(self, name: str) -> Iterator[_Chunk]:
        """The parts of a tensor."""
        info = self.infos[name]
        parts = {}
        for chunk in self._tensors[name]["chunks"]:
            offsets, sizes = _numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])
            ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            if any(end > size for end, size in zip(ends, info.shape, strict=True)):
                raise ValueError(f"{name} has the shape {list(info.shape)}, but a part that ends at {ends}")
            parts[offsets] = sizes
        there = sum(math.prod(sizes) for sizes in parts.values())
        if there != math.prod(info.shape):
            raise ValueError(f"{name} has {math.prod(info.shape)} elements, and its parts {there}")
        for offsets, sizes in parts.items():
            place = self._places[name, offsets]
            if place.get("transform_descriptors"):
                raise ValueError(
                    f"{name} is transformed by {place['transform_descriptors']}, which is not supported: save without "
                    "extensions"
                )
            file = place["relative_path"]
            if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
                raise ValueError(f"{name} is in {file!r}, but files must lie in the folder itself")
            yield _Chunk(offsets, sizes, file, *_numbers((place["offset"], place["length"])))


def _info(state: dict[str, Any]) -> TensorInfo:
    dtype = state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is no dtype")
    return TensorInfo(dtype_name(dtype), _numbers(state["size"]))


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are not numbers from 0")
    return values


def _model_names(entries: _Entries, folder: Path) -> dict[str, str]:
    """The model's tensors: their names in the model by their names in the checkpoint.

    The embedding tells where the model is: in which of the nested state dicts, and behind which prefix of its keys.
    """
    models = {}
    for name in entries.infos:
        parents, key = entries.path(name)
        match = _EMBEDDING.fullmatch(key)
        if match is not None:
            prefix = match["before"] if match["before_decoder"] is None else match["before_decoder"]
            models[parents, prefix] = ".".join((*parents, prefix))
    if len(models) != 1:
        what = (
            f"more than one model, in {', '.join(map(repr, models.values()))}. Save the one to convert alone."
            if models
            else f"no Llama: no tensor is its embed_tokens.weight. There are {_some(entries.infos)}."
        )
        raise CheckpointError(f"{folder} holds {what}")
    ((model_parents, prefix),) = models
    names = {}
    for name in entries.infos:
        parents, key = entries.path(name)
        if parents == model_parents and key.startswith(prefix) and not key.endswith("_extra_state"):
            names[name] = key[len(prefix) :]
    return names


def _some(names: Mapping[str, Any], most: int = 8) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "no tensors"
