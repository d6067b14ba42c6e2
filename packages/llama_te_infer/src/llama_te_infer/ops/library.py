"""The compiled extension: its availability, its limits, and the registration and launch of operators.

The operators `torch.ops.llama_te.*` take CPU and CUDA tensors. On a GPU they allocate no memory, do not wait for the
GPU, and read all values that change between steps from device memory, so CUDA graphs can capture them.

The extension checks all arguments: whatever Python passes, a kernel stays inside the memory of its tensors. It reads
pointers, dtypes, devices, shapes and strides from the tensors themselves, and takes no addresses. It checks values in
device memory (positions, page tables, row numbers) for CPU tensors, and for CUDA tensors only with LLAMA_TE_CHECK=1 in
the environment, because that copies them to the host. Without this check the kernels skip rows whose values are out of
range.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

_REINSTALL = "reinstall llama-te-infer where nvcc is on PATH (`python -m llama_te_infer.info` shows how it was built)."


class Limits(NamedTuple):
    """The sizes and types that the compiled kernels take.

    Attributes:
        vector_bytes: Addresses and strides are multiples of this number of bytes.
        element_types: The cache's dtypes.
        weight_types: The dtypes of `linear`'s weights.
        head_dim_multiple: Head sizes of `append_rope` are multiples of this number.
        max_head_dim: The largest head size of `append_rope`.
        max_reorder_rows: Most rows of one reorder.
        max_reorder_caches: Most caches of one reorder.
        decode_element_types: The dtypes that `decode_attention` takes.
        decode_head_dims: The head sizes that `decode_attention` takes.
        decode_tile_keys: Keys of one tile of `decode_attention`. A page holds whole tiles.
        max_decode_rows: Most rows of one `decode_attention`.
        max_decode_group: Most query heads per key/value head of `decode_attention`.
        max_decode_kv_heads: Most key/value heads of `decode_attention`.
        max_grid_rows: Most rows of one `embed` and of one `greedy`.
        max_linear_rows: Most rows of one `linear`.
        max_linear_products: Most products of one `linear_chain`.
        linear_row_bytes_multiple: The bytes of one row of `linear`'s weight are a multiple of this number.
        linear_out_features_multiple: The rows of `linear`'s weight are a multiple of this number.
    """

    vector_bytes: int
    element_types: tuple[torch.dtype, ...]
    weight_types: tuple[torch.dtype, ...]
    head_dim_multiple: int
    max_head_dim: int
    max_reorder_rows: int
    max_reorder_caches: int
    decode_element_types: tuple[torch.dtype, ...]
    decode_head_dims: tuple[int, ...]
    decode_tile_keys: int
    max_decode_rows: int
    max_decode_group: int
    max_decode_kv_heads: int
    max_grid_rows: int
    max_linear_rows: int
    max_linear_products: int
    linear_row_bytes_multiple: int
    linear_out_features_multiple: int


# --- the extension ---------------------------------------------------------------------------------------------------


def extension() -> ModuleType:
    """Return the compiled extension.

    Raises:
        RuntimeError: The extension is missing.
    """
    try:
        from .. import _extension
    except ImportError as error:
        raise RuntimeError(
            f"llama_te_infer's compiled extension does not import ({error}): install the package with pip, which "
            "builds it, instead of using its source folder."
        ) from error
    return _extension


@functools.cache
def limits() -> Limits:
    """Return the limits of the kernels. A build without CUDA has the same limits.

    Raises:
        RuntimeError: The extension is missing, or another version of the package built it.
    """
    compiled = extension()
    values: dict[str, Any] = compiled.limits() if hasattr(compiled, "limits") else {}
    if values.keys() != set(Limits._fields):
        differing = ", ".join(sorted(values.keys() ^ set(Limits._fields)))
        raise RuntimeError(
            f"another version of llama-te-infer built the compiled extension {compiled.__file__} (its limits differ in "
            f"{differing}): reinstall llama-te-infer, which builds the extension of its own version."
        )
    for name in ("element_types", "weight_types", "decode_element_types"):
        values[name] = tuple(getattr(torch, dtype) for dtype in values[name])
    return Limits(**values)


@functools.cache
def available(device_type: str) -> bool:
    """Whether the extension imports and has kernels for "cpu" tensors, or for "cuda" tensors on the current GPU.

    Warns once where torch sees a GPU but the extension was built without CUDA.
    """
    try:
        compiled = extension()
    except RuntimeError:
        return False
    if device_type == "cpu":
        return True
    if device_type != "cuda":
        return False
    if compiled.build_info()["cuda"] is None and torch.cuda.is_available():
        warnings.warn(
            "torch sees a CUDA GPU, but llama_te_infer's extension was built without CUDA, so generation is slow: "
            f"{_REINSTALL}",
            stacklevel=3,
        )
    return compiled.cuda_problem() is None


def cuda_function(name: str) -> Callable[..., Any]:
    """Return a function of the extension's CUDA part.

    Raises:
        RuntimeError: The extension is missing, or was built without CUDA.
    """
    function: Callable[..., Any] | None = getattr(extension(), name, None)
    if function is None:
        raise RuntimeError(
            f"llama_te_infer's extension was built without CUDA, so its operators take CPU tensors only: {_REINSTALL}"
        )
    return function


def cpu_kernel(name: str) -> Callable[..., None]:
    """Return an operator's implementation for CPU tensors: a function of the extension."""

    def run(*arguments: Any) -> None:
        getattr(extension(), name)(*arguments)

    return run


def kernel(name: str) -> Callable[..., None]:
    """Return an operator's implementation for CUDA tensors: a function of the extension."""

    def launch(*arguments: Any) -> None:
        cuda_function(name)(*arguments)

    return launch


# --- operators -------------------------------------------------------------------------------------------------------


def register(schema: str, *, cpu: Callable[..., None], cuda: Callable[..., None] | None = None) -> None:
    """Register an operator of `torch.ops.llama_te` that writes to its arguments and returns nothing.

    Args:
        schema: A schema for `torch.library.define`, with the operator's name in front.
        cpu: Implementation for CPU tensors.
        cuda: Implementation for CUDA tensors; `None` if there is no kernel.
    """
    operator, parameters = schema.split("(", 1)
    name = f"llama_te::{operator}"
    torch.library.define(name, f"({parameters}")
    torch.library.impl(name, "cpu", cpu)
    if cuda is not None:
        torch.library.impl(name, "cuda", cuda)
    torch.library.register_fake(name, _fake)


def _fake(*arguments: Any) -> None:
    """Do nothing, like the operators on tensors without data: the tensors that they write keep their shapes.

    Raises:
        ValueError: Only some of the tensors have no data.
    """
    tensors = [item for argument in arguments for item in (argument if isinstance(argument, list) else [argument])]
    devices = {str(tensor.device) for tensor in tensors if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"The tensors are on {' and '.join(sorted(devices))}: pass tensors of one device.")


# --- LLAMA_TE_CHECK --------------------------------------------------------------------------------------------------


def checks_values() -> bool:
    """Whether LLAMA_TE_CHECK asks to check the values of CUDA tensors. Warns and returns False during a capture."""
    if os.environ.get("LLAMA_TE_CHECK", "0") in ("", "0"):
        return False
    if torch.cuda.is_current_stream_capturing():
        warnings.warn("LLAMA_TE_CHECK: values are not checked while a CUDA graph is captured.", stacklevel=3)
        return False
    return True


def on_host(value: Any) -> Any:
    """Return a copy of a tensor in host memory, and any other value as it is. This function waits for the GPU."""
    return value.cpu() if isinstance(value, torch.Tensor) else value


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")
