"""Checkpoints that `torch.save` wrote: `pytorch_model.bin`, in one file or in shards.

These files are pickles, which can run code when they are loaded. torch's restricted unpickler loads only tensors here.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from ..layout.tensor_info import TensorInfo
from .file_names import TORCH_SAVE
from .shard_index import check_shard, shard_files
from .torch_tensors import as_bytes, info_of

_ZIP_MAGIC = b"PK\x03\x04"


class TorchSaveSource:
    """The tensors of `pytorch_model.bin`, or else of the shards that `pytorch_model.bin.index.json` names.

    Args:
        folder: The checkpoint's folder.
        entry: Another file with all tensors, or another index.

    Raises:
        CheckpointError: A file is missing, cannot be read or holds anything but tensors by name, or the index names a
            file outside of the folder.
    """

    concurrent = True

    def __init__(self, folder: Path, entry: str | None = None) -> None:
        entry = entry or TORCH_SAVE.find(folder) or TORCH_SAVE.single_file
        self.files: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        for path, expected in shard_files(folder, entry):
            mapped = _load(path)
            check_shard(path, expected, mapped, self._mapped)
            self.files.append(path.name)
            self._mapped |= mapped
            self.tensors |= {name: info_of(tensor) for name, tensor in mapped.items()}

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read rows of a tensor: see `TensorSource`."""
        tensor = self._mapped[name]
        return as_bytes(tensor[start:stop] if tensor.dim() else tensor)

    def close(self) -> None:
        """Unmap the files."""
        self._mapped.clear()


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of one file into memory."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if magic != _ZIP_MAGIC:
        raise CheckpointError(
            f"{path} does not have the format that torch.save writes since torch 1.6: it begins with {magic!r}. "
            "Download it again if it is damaged. If it is older and from a source that you trust, load it with torch "
            "and save it again."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1].rstrip('.,')})" if found else ""
        raise CheckpointError(
            f"{path} is refused: it holds something other than tensors{what}, and loading that could run any code. "
            "Get the checkpoint in the safetensors format, or save its state dict alone."
        ) from error
    except Exception as error:  # torch does not document its errors for damaged files
        raise CheckpointError(
            f"{path} cannot be read: {first_line(error).rstrip('.:')}. It is damaged or not complete: get it again."
        ) from error
    return _checked(loaded, path)


def _checked(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not tensors by name: save a state dict alone.")
    tensors = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path} holds a {type(tensor).__name__} as {name!r}, not only tensors by name: save a state dict "
                "alone."
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: {name!r} is not an ordinary tensor ({tensor.layout}, {tensor.dtype}, on {tensor.device}): "
                "save it as a dense one."
            )
        tensors[name] = tensor.detach()
    return tensors
