"""Checkpoints that `torch.save` wrote: `pytorch_model.bin`, in one file or in shards.

These files are pickles, which can run code when they are loaded. The reader here runs none, and maps no file.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llama_te_core.files.input_files import open_file
from llama_te_core.files.pickles import PickleFileError, RefusedNameError
from llama_te_core.files.torch_archive import MAGIC, Region, StoredTensor, stored_value

from ..errors import CheckpointError
from ..layout.tensor_info import TensorInfo
from .file_names import TORCH_SAVE
from .shard_index import check_shard, shard_files
from .torch_tensors import as_bytes, dtype_name

# At most this many tensors whose rows are not one after the other are held: query, key and value are read in turns.
_HELD_TENSORS = 3


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
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        self._open: list[BinaryIO] = []
        self._whole = functools.lru_cache(_HELD_TENSORS)(self._read_whole)
        try:
            for path, expected in shard_files(folder, entry):
                stored = self._tensors_of(path)
                check_shard(path, expected, stored, self._stored)
                self.files.append(path.name)
                for name, tensor in stored.items():
                    self._stored[name] = (path, tensor)
                    self.tensors[name] = TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))
        except BaseException:
            self.close()
            raise
        self.tensors = {
            name: TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, (_, tensor) in self._stored.items()
        }

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read rows of a tensor: see `TensorSource`."""
        path, tensor = self._stored[name]
        if not tensor.shape or not tensor.has_whole_rows:
            whole = self._whole(name)
            return as_bytes(whole[start:stop] if tensor.shape else whole)
        with _reading(path):
            return as_bytes(tensor.read_rows(start, stop))

    def close(self) -> None:
        """Close the files."""
        self._whole.cache_clear()
        for file in self._open:
            file.close()

    def _read_whole(self, name: str) -> torch.Tensor:
        path, tensor = self._stored[name]
        with _reading(path):
            return tensor.read()

    def _tensors_of(self, path: Path) -> dict[str, StoredTensor]:
        with _reading(path):
            file = open_file(path, buffering=0)
            self._open.append(file)
            magic = file.read(len(MAGIC))
            if magic != MAGIC:
                raise PickleFileError(
                    f"does not have the format that torch.save writes since torch 1.6: it begins with {magic!r}. "
                    "Download it again if it is damaged. If it is older and from a source that you trust, load it "
                    "with torch and save it again"
                )
            return _checked(stored_value(Region(file.fileno())))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RefusedNameError as error:
        raise CheckpointError(
            f"{path} {error}. Get the checkpoint in the safetensors format, or save its state dict alone."
        ) from error
    except PickleFileError as error:
        raise CheckpointError(f"{path} {error}.") from error


def _checked(loaded: Any) -> dict[str, StoredTensor]:
    if not isinstance(loaded, dict):
        raise PickleFileError(f"holds a {type(loaded).__name__}, not tensors by name: save a state dict alone")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise PickleFileError(
                f"holds a {_kind(tensor)} as {name!r}, not only tensors by name: save a state dict alone"
            )
    return loaded


def _kind(value: object) -> str:
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__
