"""Conversion between the bytes of a checkpoint and torch tensors."""

from __future__ import annotations

import torch

from ..layout.tensor_info import TensorInfo
from .tensor_source import TensorSource


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Dtype and shape of a tensor."""
    return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in `TensorInfo`, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype with this name in `TensorInfo`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def as_tensor(data: memoryview, dtype: str) -> torch.Tensor:
    """A flat tensor over these bytes, without a copy."""
    if not data:
        return torch.empty(0, dtype=torch_dtype(dtype), device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8).view(torch_dtype(dtype))


def cast(data: memoryview, dtype: str, to: str) -> memoryview:
    """The bytes of the same elements in another dtype."""
    return as_bytes(as_tensor(data, dtype).to(torch_dtype(to)))


def read_tensor(source: TensorSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Read rows [start, stop) of a tensor. The source's next read in the same thread may overwrite them.

    Raises:
        CheckpointError: The file cannot be read.
    """
    info = source.tensors[name]
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    return as_tensor(source.read(name, start, stop), info.dtype).view(shape)
