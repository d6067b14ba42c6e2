"""Checkpoints as `torch.save` wrote them: `pytorch_model.bin`, in one file or in shards.

They are pickles, which can run code when they are loaded. Here nothing but tensors is loaded from them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .safetensors import read_index
from .tensor_source import CheckpointError, TensorInfo, first_line
from .torch_tensors import as_bytes, info_of

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_ZIP_MAGIC = b"PK\x03\x04"


class PickleSource:
    """`pytorch_model.bin`, or the shards that `pytorch_model.bin.index.json` names.

    Args:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: A file is missing, cannot be read, holds anything but tensors by name, or the index names files
            outside of the folder.
    """

    concurrent = True

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        index = folder / INDEX
        if not index.exists():
            self._open(folder / SINGLE, None)
            return
        file_of = read_index(index)
        for file_name in dict.fromkeys(file_of.values()):
            self._open(folder / file_name, [name for name, file in file_of.items() if file == file_name])

    def _open(self, path: Path, names: Iterable[str] | None) -> None:
        mapped = _load(path)
        for name in mapped if names is None else names:
            if name not in mapped:
                raise CheckpointError(f"{path} does not have the tensor {name!r}, which the index says it has.")
            tensor = mapped[name]
            self._mapped[name] = tensor
            self.tensors[name] = info_of(tensor)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Rows of a tensor: see `TensorSource`."""
        tensor = self._mapped[name]
        return as_bytes(tensor[start:stop] if tensor.dim() else tensor)

    def close(self) -> None:
        """Let go of the files."""
        self._mapped.clear()


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped into memory."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if magic != _ZIP_MAGIC:
        raise CheckpointError(
            f"{path} is not as torch.save writes files since torch 1.6: it begins with {magic!r}. Download it again if "
            "it should be; load and save an older one with torch, where it comes from a source that you trust."
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
    except Exception as error:  # what torch raises for a damaged file is not documented
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
                f"{path}: {name!r} is no ordinary tensor ({tensor.layout}, {tensor.dtype}, on {tensor.device}): save "
                "it as a dense one."
            )
        tensors[name] = tensor.detach()
    return tensors
