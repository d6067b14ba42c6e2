"""Between the bytes of checkpoints and torch's tensors, for what computes with them."""

from __future__ import annotations

import torch

from .tensor_source import TensorInfo, TensorSource


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Dtype and shape of a tensor."""
    return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as `TensorInfo` names it."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that `TensorInfo` names so."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def as_tensor(data: memoryview, dtype: str) -> torch.Tensor:
    """The tensor [elements] that has these bytes, in the same memory."""
    if not data:
        return torch.empty(0, dtype=torch_dtype(dtype))
    return torch.frombuffer(data, dtype=torch.uint8).view(torch_dtype(dtype))


def cast(data: memoryview, dtype: str, to: str) -> memoryview:
    """The bytes of elements in another dtype."""
    return as_bytes(as_tensor(data, dtype).to(torch_dtype(to)))


def read_tensor(source: TensorSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor; the source's next read in this thread may overwrite them.

    Raises:
        CheckpointError: The file cannot be read.
    """
    info = source.tensors[name]
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    return as_tensor(source.read(name, start, stop), info.dtype).view(shape)
