"""Files in the safetensors format, read and written in chunks.

The format (https://github.com/huggingface/safetensors): 8 bytes hold the length of the header. The header is a JSON
object that maps each name to its `dtype`, `shape` and `data_offsets`. The bytes of the tensors follow. The safetensors
package maps whole files into memory, so a process grows with the checkpoint. This reader calls `pread` into one buffer.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_te_core.files.input_files import MAX_JSON_BYTES, json_object, open_file

from ..errors import CheckpointError
from ..layout.tensor_info import TensorInfo
from .file_names import SAFETENSORS
from .shard_index import check_shard, shard_files
from .tensor_source import read_exactly

DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_NAME = 1024
_MAX_DIMENSIONS = 64  # torch's limit
_MAX_SIZE = 2**63
_ALIGNMENT = 8


class SafetensorsFile:
    """One open file.

    Args:
        path: The file.
        buffers: The read buffer of each thread. The files of one checkpoint share it.

    Raises:
        CheckpointError: The file cannot be read, or its header is not valid.
    """

    concurrent = True

    def __init__(self, path: Path, buffers: threading.local | None = None) -> None:
        self.path = path
        self._buffers = threading.local() if buffers is None else buffers
        try:
            self._file = open_file(path, buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        try:
            self.tensors, self._offsets = _read_header(self._file.fileno(), path)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
            raise

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read rows of a tensor: see `TensorSource`."""
        row_bytes = self.tensors[name].row_bytes
        count = (stop - start) * row_bytes
        buffer = getattr(self._buffers, "bytes", bytearray())
        if len(buffer) < count:
            buffer = self._buffers.bytes = bytearray(count)
        view = memoryview(buffer)[:count]
        read_exactly(self._file.fileno(), view, self._offsets[name] + start * row_bytes, self.path, name)
        return view

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_header(file: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The dtype and shape of each tensor, and the position of its first byte."""
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
        raise CheckpointError(
            f"{path} is not a safetensors file: it has {size} bytes, and a header of {length}. A header has at most "
            f"{MAX_JSON_BYTES:,} bytes."
        )
    try:
        header = json_object(os.pread(file, length, 8))
    except ValueError as error:
        raise CheckpointError(f"the header of {path} cannot be used: {error}.") from error
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    data_bytes = size - 8 - length
    for name, entry in header.items():
        if len(name) > _MAX_NAME:
            raise CheckpointError(
                f"{path}: the name of a tensor has {len(name):,} characters, but at most {_MAX_NAME:,} are read: "
                f"{name[:40]!r}..."
            )
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in DTYPES:
                raise ValueError(f"its dtype {dtype!r} is not one of {', '.join(DTYPES)}")
            if len(shape) > _MAX_DIMENSIONS:
                raise ValueError(f"it has {len(shape)} dimensions, but at most {_MAX_DIMENSIONS} are known")
            numbers = [begin, end, *shape]
            if not all(type(number) is int and 0 <= number < _MAX_SIZE for number in numbers):
                raise ValueError(f"{numbers} are not all whole numbers from 0 that fit in 64 bits")
            info = TensorInfo(DTYPES[dtype], tuple(shape))
            if end > data_bytes or info.nbytes != end - begin:
                raise ValueError(f"{entry['dtype']} {shape} at [{begin}, {end}) of {data_bytes} bytes")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the entry of tensor {name!r} is not valid: {error}.") from error
        tensors[name] = info
        offsets[name] = 8 + length + begin
    _check_places(tensors, offsets, 8 + length, size, path)
    return tensors, offsets


def _check_places(
    tensors: Mapping[str, TensorInfo], offsets: Mapping[str, int], start: int, stop: int, path: Path
) -> None:
    """Refuse tensors that do not fill the bytes [start, stop) of the file, one after the other.

    The format allows neither overlaps nor other bytes: they can hold another file.
    """
    place, before = start, "the header"
    for begin, end, name in sorted(
        (offsets[name], offsets[name] + info.nbytes, name) for name, info in tensors.items()
    ):
        if begin < place:
            raise CheckpointError(f"{path}: the tensors {before!r} and {name!r} overlap.")
        if begin > place:
            raise CheckpointError(f"{path} has {begin - place} bytes before {name!r} that belong to no tensor.")
        place, before = end, name
    if place != stop:
        raise CheckpointError(f"{path} has {stop - place} bytes at its end that belong to no tensor.")


def header_bytes(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The bytes that precede the tensors in a file.

    Args:
        tensors: Dtype and shape of each tensor, in the order of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or else of the shards that `model.safetensors.index.json` names.

    Args:
        folder: The checkpoint's folder.
        entry: Another file with all tensors, or another index.

    Raises:
        CheckpointError: A file is missing, cannot be read or is not valid, or the index names a file outside of the
            folder.
    """

    concurrent = True

    def __init__(self, folder: Path, entry: str | None = None) -> None:
        entry = entry or SAFETENSORS.find(folder) or SAFETENSORS.single_file
        self.files: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        buffers = threading.local()
        try:
            for path, expected in shard_files(folder, entry):
                file = self.files[path.name] = SafetensorsFile(path, buffers)
                check_shard(path, expected, file.tensors, self.tensors)
                self.tensors |= file.tensors
                self._file_of |= dict.fromkeys(file.tensors, file)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read rows of a tensor: see `TensorSource`."""
        return self._file_of[name].read(name, start, stop)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()
