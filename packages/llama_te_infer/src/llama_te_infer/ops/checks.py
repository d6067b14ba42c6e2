"""Checks of tensors that several operators share. An error names the argument, its value and the allowed values."""

from __future__ import annotations

import torch

from . import library


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int | None, ...],
    meaning: str,
) -> None:
    """Refuse a tensor with another dtype, device or shape, or with gaps in its last dimension.

    Args:
        name: The argument's name, for the message.
        tensor: The argument.
        dtype: The required dtype.
        device: The required device.
        shape: The required shape; None allows any size.
        meaning: The meaning of the shape, for the message, such as "[B, K]".

    Raises:
        ValueError: The tensor does not meet a requirement.
    """
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {name_of(tensor.dtype)}; it must be {name_of(dtype)}.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as the other tensors.")
    if len(tensor.shape) != len(shape) or any(
        wanted not in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has the shape {shape_of(tensor)}; it must be [{wanted_shape}], which is {meaning}.")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has the strides {tensor.stride()}: its last dimension must be contiguous.")


def check_contiguous(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors that are not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has the strides {tensor.stride()}: it must be contiguous.")


def check_aligned(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors whose first element a kernel cannot load as a vector."""
    vector_bytes = library.limits().vector_bytes
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % vector_bytes:
            raise ValueError(
                f"{name} starts at address {tensor.data_ptr()}: on a GPU it must be a multiple of {vector_bytes}. "
                "Pass a copy, or a tensor whose storage_offset is such a multiple."
            )


def check_bfloat16_vectors(name: str, tensor: torch.Tensor, dimension: str) -> None:
    """Refuse a matrix that a kernel cannot read in whole vectors of bfloat16.

    Args:
        name: The argument's name, for the message.
        tensor: A matrix.
        dimension: The name of its columns, for the message.
    """
    elements = vector_elements(torch.bfloat16)
    if tensor.dtype != torch.bfloat16 or tensor.shape[1] % elements:
        raise ValueError(
            f"{name} is {name_of(tensor.dtype)} {shape_of(tensor)}: on a GPU allowed are bfloat16 and "
            f"{dimension} a multiple of {elements}."
        )


def check_apart(one: str, first: torch.Tensor, other: str, second: torch.Tensor) -> None:
    """Refuse two tensors that share memory."""
    if overlap(first, second):
        raise ValueError(f"{one} and {other} share memory: they must be apart from each other.")


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the ranges from the first to the last element of two tensors have addresses in common."""

    def end(tensor: torch.Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.itemsize

    empty = one.numel() == 0 or other.numel() == 0
    return not empty and one.data_ptr() < end(other) and other.data_ptr() < end(one)


def vector_elements(dtype: torch.dtype) -> int:
    """Return the number of elements in one vector of a kernel."""
    return library.limits().vector_bytes // dtype.itemsize


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Return the strides in elements. A dimension of size 1 gets a contiguous stride, since torch leaves it open."""
    strides = list(tensor.stride())
    following = 1
    for dim in reversed(range(tensor.dim())):
        if tensor.shape[dim] == 1:
            strides[dim] = following
        following = strides[dim] * tensor.shape[dim]
    return strides


def address_of(tensor: torch.Tensor | None) -> int:
    """Return the address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: torch.Tensor) -> str:
    """Return the shape as text."""
    return str(list(tensor.shape))
