"""Checkpoints of `torch.distributed.checkpoint`: a folder with `.metadata` and files of sharded tensors.

`torch.save` wrote each part of a tensor, at a position that `.metadata` gives. This reader loads one part at a time,
and needs no process group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama_te_core.files.dcp_metadata import DCPMetadata, Part
from llama_te_core.files.input_files import open_file
from llama_te_core.files.pickles import PickleFileError
from llama_te_core.files.torch_archive import Region, StoredTensor, stored_value

from ..errors import CheckpointError
from ..layout.tensor_info import TensorInfo
from .file_names import DCP_METADATA
from .torch_tensors import as_bytes, dtype_name, torch_dtype

# At most this many tensors make one tensor of the other layout: query, key and value rows are read in turns.
_HELD_TENSORS = 3
_EMBEDDING = re.compile(
    r"(?:(?P<before_decoder>(?:.+\.)?)(?:model|transformer)\.|(?P<before>(?:.+\.)?))embed_tokens\.weight"
)


class DCPSource:
    """A checkpoint that `torch.distributed.checkpoint.save` wrote, with a Llama somewhere in the saved state.

    Tensors have their names in the model's own state dict; keys and prefixes before the model are removed. Everything
    else is left out: the optimizer's state, values that are not tensors, and the state of TE's recipes.

    Args:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: `.metadata` is missing, not valid or refused; the checkpoint has no model or several; a tensor
            is not complete.
    """

    concurrent = False  # the next read uses the parts that the last one loaded

    def __init__(self, folder: Path) -> None:
        path = folder / DCP_METADATA
        try:
            metadata = DCPMetadata(path)
            names = _model_names(metadata, folder)
            self._parts = {short: metadata.parts(name) for name, short in names.items()}
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror or error}. torch.distributed.checkpoint writes this file into "
                "the folder of every checkpoint."
            ) from error
        except PickleFileError as error:
            raise CheckpointError(f"{path} {error}.") from error
        self.tensors = {
            short: TensorInfo(dtype_name(metadata.tensors[name].dtype), tuple(metadata.tensors[name].shape))
            for name, short in names.items()
        }
        self._folder = folder
        self._held: dict[str, dict[Part, torch.Tensor]] = {}

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read rows of a tensor: see `TensorSource`."""
        info = self.tensors[name]
        rows = torch.empty((stop - start, *info.shape[1:]), dtype=torch_dtype(info.dtype), device="cpu")
        held = self._held.pop(name, {})
        used: dict[Part, torch.Tensor] = {}
        for part in self._parts[name]:
            (offset, *columns), (size, *widths) = part.offsets or (0,), part.sizes or (1,)
            first, last = max(start, offset), min(stop, offset + size)
            if first >= last or 0 in widths:
                continue
            tensor = used[part] = held[part] if part in held else self._load(name, part)
            target = rows[first - start : last - start]
            for dimension, (column, width) in enumerate(zip(columns, widths, strict=True), start=1):
                target = target.narrow(dimension, column, width)
            target.copy_((tensor if part.sizes else tensor[None])[first - offset : last - offset])
        self._held[name] = used  # rows are mostly read in order, so the next ones begin in these parts
        if len(self._held) > _HELD_TENSORS:
            del self._held[next(iter(self._held))]
        return as_bytes(rows)

    def _load(self, name: str, part: Part) -> torch.Tensor:
        path = self._folder / part.place.file
        expected = (self.tensors[name].dtype, part.sizes)
        try:
            with open_file(path, buffering=0) as file:
                stored = stored_value(Region(file.fileno(), part.place.begin, part.place.length))
                if not isinstance(stored, StoredTensor) or (dtype_name(stored.dtype), stored.shape) != expected:
                    raise PickleFileError("is not the tensor that the metadata describe")
                return stored.read()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        except PickleFileError as error:
            raise CheckpointError(
                f"{path}: the part of {name} at byte {part.place.begin} cannot be read: it {error}."
            ) from error

    def close(self) -> None:
        """Free the parts that the last reads loaded."""
        self._held.clear()


def _model_names(metadata: DCPMetadata, folder: Path) -> dict[str, str]:
    """The model's tensors: their names in the model, by their names in the checkpoint.

    The embedding shows where the model is: in which nested state dict, and with which prefix before its keys.
    """
    models = {}
    for name in metadata.tensors:
        *parents, key = map(str, metadata.path(name))
        match = _EMBEDDING.fullmatch(key)
        if match is not None:
            prefix = match["before"] if match["before_decoder"] is None else match["before_decoder"]
            models[tuple(parents), prefix] = ".".join((*parents, prefix))
    if len(models) != 1:
        what = (
            f"more than one model, in {', '.join(map(repr, models.values()))}. Save only the one to convert."
            if models
            else f"no Llama: no tensor has the name embed_tokens.weight. It holds {_some(metadata.tensors)}."
        )
        raise CheckpointError(f"{folder} holds {what}")
    ((model_parents, prefix),) = models
    names = {}
    for name in metadata.tensors:
        *parents, key = map(str, metadata.path(name))
        if tuple(parents) == model_parents and key.startswith(prefix) and not key.endswith("_extra_state"):
            names[name] = key[len(prefix) :]
    return names


def _some(names: Mapping[str, Any], most: int = 8) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "no tensors"
