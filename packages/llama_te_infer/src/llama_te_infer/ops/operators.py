"""The compiled extension's kernels as operators `torch.ops.llama_te.*`, for CPU and CUDA tensors.

Everything that changes from step to step is read from the device's memory: the operators allocate nothing, wait for
nothing and can be captured in CUDA graphs. What the host can see of their arguments is checked before anything is
launched. What is in `cu_new`, `start`, `page_table`, `source_rows` and `lengths` is always checked for CPU tensors, and
for CUDA tensors with LLAMA_TE_CHECK=1 in the environment, which copies them to the host and so waits for the GPU; a
kernel leaves out a token or a row whose values are out of range.

Shapes: N new tokens, B rows that take part, R rows of a cache, L places of a row, K key/value heads, G query heads per
key/value head, D size of a head, P positions.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from types import ModuleType
from typing import Any

import torch

MAX_REORDER_ROWS = 64
MAX_CACHES = 256  # their addresses travel in the kernel's parameters

_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in csrc/kernels.h
_VECTOR_BYTES = 16

torch.library.define(
    "llama_te::append_rope",
    "(Tensor qkv, Tensor cos_sin, Tensor cu_new, Tensor start, Tensor? page_table, int width, "
    "Tensor(a!) query, Tensor(b!) key_cache, Tensor(c!) value_cache) -> ()",
)
torch.library.define("llama_te::reorder_rows", "(Tensor(a!)[] caches, Tensor source_rows, Tensor lengths) -> ()")
torch.library.define(
    "llama_te::reorder_pages",
    "(Tensor(a!)[] caches, Tensor(b!) page_table, Tensor source_rows, Tensor lengths, int page_size, "
    "Tensor(c!) ticket) -> ()",
)


def append_rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cu_new: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    width: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> None:
    """Rotate the queries and keys of new tokens, and append their keys and values to a cache.

    Token i of row b has position `start[b] + i`, in the rotation as in the cache. Dimensions d and d + D/2 rotate into
    each other, in float32. What is no token (behind the last row of packed tokens; behind a row's tokens in a padded
    batch) leaves the cache alone and gets zeros as its query.

    Args:
        qkv: [N, K, G + 2, D], the fused projection's output: for each key/value head its query heads, its key and its
            value. bfloat16, float16 or float32; D a multiple of 16, at most 256. Tokens may be any multiple of 16 bytes
            apart; what belongs to one token must be contiguous.
        cos_sin: float32 [P, D]: the cosines of each position's D/2 angles, then their sines.
        cu_new: int32 [B + 1], the running sum of the rows' new tokens, from 0.
        start: int32 [at least B], the tokens that each row had before.
        page_table: int32 [at least B, pages per row] for a paged cache, None for a contiguous one.
        width: 0 for packed tokens, row after row; S for a padded batch of N / S rows and S columns, tokens first.
        query: [N, K * G, D], contiguous; gets the rotated queries.
        key_cache: [R, L, K, D] with R at least B, or [pages, page size, K, D].
        value_cache: Likewise.

    Raises:
        ValueError: An argument does not fit; nothing has been written then.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.append_rope(qkv, cos_sin, cu_new, start, page_table, width, query, key_cache, value_cache)


def reorder_rows(caches: Sequence[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    """Make row i of contiguous caches what row `source_rows[i]` was, in place, in one launch.

    Only places below a row's length move, and rows that stay cost nothing.

    Args:
        caches: Keys and values of all layers, each [R, L, K, D] and contiguous, of one shape, dtype and device.
        source_rows: int32 or int64 [B], B at most 64 and at most R. Rows may be repeated and left out.
        lengths: int32 [B], the tokens of each row afterwards, which are those of its source.

    Raises:
        ValueError: An argument does not fit; nothing has been written then.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.reorder_rows(list(caches), source_rows, lengths)


def reorder_pages(
    caches: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> None:
    """Make row i of paged caches what row `source_rows[i]` was, in one launch.

    The table's entries for the full pages become the source's, so that rows share these pages. What the partly filled
    page behind them holds is copied to the row's own page: the one that `page_table[i, lengths[i] // page_size]` names,
    which must belong to row i alone.

    Args:
        caches: Keys and values of all layers, each [pages, page_size, K, D] and contiguous, of one shape, dtype and
            device.
        page_table: int32 [at least B, pages per row].
        source_rows: int32 or int64 [B], B at most 64. Rows may be repeated and left out.
        lengths: int32 [B], the tokens of each row afterwards, which are those of its source.
        page_size: Tokens of a page.
        ticket: int32 [1] that is 0 and is 0 again afterwards. The GPU's blocks agree over it on who changes the table:
            calls that may run at the same time need one each.

    Raises:
        ValueError: An argument does not fit; nothing has been written then.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.reorder_pages(list(caches), page_table, source_rows, lengths, page_size, ticket)


# --- where they apply ------------------------------------------------------------------------------------------------


@functools.cache
def available(device_type: str) -> bool:
    """Whether the extension is there and has kernels for "cpu" tensors, or for "cuda" ones on the current GPU."""
    try:
        compiled = extension()
    except RuntimeError:
        return False
    return device_type == "cpu" or (device_type == "cuda" and compiled.cuda_problem() is None)


def takes_heads(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `append_rope` takes heads of this dtype and size."""
    return dtype in _ELEMENTS and head_dim % 16 == 0 and 0 < head_dim <= 256


def takes_reorder(caches: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether `reorder_rows` and `reorder_pages` take these caches and as many rows."""
    place_bytes = prod(caches[0].shape[2:]) * caches[0].itemsize
    alike = all(cache.shape == caches[0].shape for cache in caches)
    return alike and rows <= MAX_REORDER_ROWS and len(caches) <= MAX_CACHES and place_bytes % _VECTOR_BYTES == 0


# --- implementations -------------------------------------------------------------------------------------------------


@torch.library.impl("llama_te::append_rope", "cpu")
def _append_rope_cpu(*tensors: Any) -> None:
    arguments = _append_arguments(*tensors)
    if arguments is not None:
        extension().append_rope_cpu(**arguments)


@torch.library.impl("llama_te::append_rope", "cuda")
def _append_rope_cuda(*tensors: Any) -> None:
    arguments = _append_arguments(*tensors)
    if arguments is None:
        return
    qkv, _, cu_new, start, page_table = tensors[:5]
    if checks_values():
        check_on_host(extension().append_rope_check, arguments, page_table, cu_new=cu_new, start=start)
    cuda_function("append_rope_cuda")(**launch_arguments(qkv), **arguments)


@torch.library.impl("llama_te::reorder_rows", "cpu")
def _reorder_rows_cpu(caches: list[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    arguments = _reorder_arguments(caches, source_rows, lengths)
    if arguments is not None:
        extension().reorder_rows_cpu(**arguments)


@torch.library.impl("llama_te::reorder_rows", "cuda")
def _reorder_rows_cuda(caches: list[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    arguments = _reorder_arguments(caches, source_rows, lengths)
    if arguments is None:
        return
    if checks_values():
        check_on_host(extension().reorder_check, arguments, None, source_rows=source_rows, lengths=lengths)
    cuda_function("reorder_rows_cuda")(**launch_arguments(source_rows), **arguments)


@torch.library.impl("llama_te::reorder_pages", "cpu")
def _reorder_pages_cpu(
    caches: list[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> None:
    arguments = _reorder_arguments(caches, source_rows, lengths, page_table, page_size, ticket)
    if arguments is not None:
        extension().reorder_pages_cpu(**arguments)


@torch.library.impl("llama_te::reorder_pages", "cuda")
def _reorder_pages_cuda(
    caches: list[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> None:
    arguments = _reorder_arguments(caches, source_rows, lengths, page_table, page_size, ticket)
    if arguments is None:
        return
    if checks_values():
        check_on_host(extension().reorder_check, arguments, page_table, source_rows=source_rows, lengths=lengths)
    cuda_function("reorder_pages_cuda")(**launch_arguments(source_rows), **arguments)


@torch.library.register_fake("llama_te::append_rope")
@torch.library.register_fake("llama_te::reorder_rows")
@torch.library.register_fake("llama_te::reorder_pages")
def _fake(*arguments: Any) -> None:
    """Nothing comes back, and what is mutated keeps its shape."""


# --- what the host can check ------------------------------------------------------------------------------------------


def _append_arguments(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cu_new: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    width: int,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> dict[str, Any] | None:
    """What the kernel takes; None if there is no token. Alignment and overlap are checked by the extension."""
    if qkv.dtype not in _ELEMENTS:
        raise ValueError(f"qkv is {name_of(qkv.dtype)}: allowed are {', '.join(map(name_of, _ELEMENTS))}.")
    if qkv.dim() != 4 or qkv.shape[2] < 3:
        raise ValueError(f"qkv has the shape {_shape(qkv)}; it must be [N, K, G + 2, D] with G of at least 1.")
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("qkv requires a gradient, which append_rope does not have: call it under torch.no_grad().")
    tokens, kv_heads, heads_of_group, head_dim = qkv.shape
    group = heads_of_group - 2
    if not takes_heads(qkv.dtype, head_dim):
        raise ValueError(f"qkv has heads of size D={head_dim}: allowed are multiples of 16 up to 256.")
    if tokens >= 2**31:
        raise ValueError(f"qkv has N={tokens} tokens: allowed are less than 2**31.")
    device = qkv.device
    check_tensor("cos_sin", cos_sin, torch.float32, device, (None, head_dim), "[P, D]")
    check_tensor("cu_new", cu_new, torch.int32, device, (None,), "[B + 1]")
    check_tensor("start", start, torch.int32, device, (None,), "[at least B]")
    check_tensor("query", query, qkv.dtype, device, (tokens, kv_heads * group, head_dim), "[N, K * G, D]")
    check_tensor("key_cache", key_cache, qkv.dtype, device, (None, None, kv_heads, head_dim), "[R, L, K, D]")
    check_tensor("value_cache", value_cache, qkv.dtype, device, tuple(key_cache.shape), "that of key_cache")
    if not query.is_contiguous():
        raise ValueError(f"query has the strides {query.stride()}: it must be contiguous.")
    if width < 0 or (width > 0 and tokens % width != 0):
        raise ValueError(
            f"width={width} does not fit the N={tokens} tokens of qkv: give 0 for packed tokens, or the columns of a "
            "padded batch, which divide N."
        )
    if cu_new.shape[0] == 0:
        raise ValueError("cu_new is empty: it must be [B + 1], beginning with 0.")
    rows = cu_new.shape[0] - 1
    if width > 0 and tokens // width > rows:
        raise ValueError(
            f"width={width} makes {tokens // width} rows of the N={tokens} tokens of qkv, but cu_new has {rows}."
        )
    if width > 0:
        rows = tokens // width
    if page_table is not None:
        check_tensor("page_table", page_table, torch.int32, device, (None, None), "[at least B, pages per row]")
    cached_rows, _ = rows_and_places(key_cache, page_table)
    for name, room in (
        ("start", start.shape[0]),
        ("page_table" if page_table is not None else "key_cache", cached_rows),
    ):
        if room < rows:
            raise ValueError(f"{name} has {room} rows, but there are B={rows} rows of new tokens.")
    if tokens == 0:
        return None
    if not qkv[0].is_contiguous():
        raise ValueError(f"qkv has the strides {qkv.stride()}: all but the first dimension must be contiguous.")
    return tokens_and_cache(qkv, cos_sin, start, page_table, key_cache, value_cache) | {
        "qkv_token_stride": strides_of(qkv)[0] * qkv.itemsize,
        "tokens": tokens,
        "width": width,
        "cu_new": cu_new.data_ptr(),
        "rows": rows,
        "query": query.data_ptr(),
    }


def _reorder_arguments(
    caches: list[torch.Tensor],
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor | None = None,
    page_size: int = 0,
    ticket: torch.Tensor | None = None,
) -> dict[str, Any] | None:
    """What the kernel takes; None if there is nothing to move."""
    if not 0 < len(caches) <= MAX_CACHES:
        raise ValueError(f"caches has {len(caches)} tensors: allowed are 1 to {MAX_CACHES}.")
    first = caches[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) < 3 or prod(shape) == 0:
        raise ValueError(
            f"caches[0] has the shape {_shape(first)}; it must be [R, L, K, D] or [pages, page size, K, D]."
        )
    place_bytes = prod(shape[2:]) * first.itemsize
    if place_bytes % _VECTOR_BYTES != 0:
        raise ValueError(f"caches[0] has {place_bytes} bytes per token: allowed are multiples of {_VECTOR_BYTES}.")
    addresses = [cache.data_ptr() for cache in caches]
    for i, cache in enumerate(caches):
        if cache.shape != shape or cache.dtype != dtype or cache.device != device:
            raise ValueError(
                f"caches[{i}] is {name_of(cache.dtype)} {_shape(cache)} on {cache.device}, but caches[0] is "
                f"{name_of(dtype)} {_shape(first)} on {device}: all must be alike."
            )
        if not cache.is_contiguous():
            raise ValueError(f"caches[{i}] has the strides {cache.stride()}: it must be contiguous.")
        if addresses[i] % _VECTOR_BYTES != 0:
            raise ValueError(f"caches[{i}] starts at an address that is not a multiple of {_VECTOR_BYTES} bytes.")
    extent = prod(shape) * first.itemsize
    order = sorted(range(len(caches)), key=addresses.__getitem__)
    for lower, upper in pairwise(order):
        if addresses[lower] + extent > addresses[upper]:
            raise ValueError(f"caches[{lower}] and caches[{upper}] share memory: a reorder would move it twice.")
    if source_rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"source_rows is {name_of(source_rows.dtype)}: allowed are int32 and int64.")
    check_tensor("source_rows", source_rows, source_rows.dtype, device, (None,), "[B]")
    rows = source_rows.shape[0]
    check_tensor("lengths", lengths, torch.int32, device, (rows,), "[B]")
    if rows > MAX_REORDER_ROWS:
        raise ValueError(f"source_rows has B={rows} rows: allowed are up to {MAX_REORDER_ROWS}.")
    blocks, block_places = shape[:2]
    if page_table is not None:
        check_tensor("page_table", page_table, torch.int32, device, (None, None), "[at least B, pages per row]")
        assert ticket is not None
        check_tensor("ticket", ticket, torch.int32, device, (1,), "[1]")
        if page_size != block_places:
            raise ValueError(
                f"page_size={page_size}, but the pages of caches[0], {_shape(first)}, have {block_places}."
            )
    cached_rows, capacity = rows_and_places(first, page_table)
    if cached_rows < rows:
        name = "caches[0]" if page_table is None else "page_table"
        raise ValueError(f"source_rows has B={rows} rows, but {name} has {cached_rows}.")
    if rows == 0:
        return None
    return {
        "caches": addresses,
        "rows": rows,
        "source_rows": source_rows.data_ptr(),
        "wide": source_rows.dtype == torch.int64,
        "lengths": lengths.data_ptr(),
        "block_bytes": block_places * place_bytes,
        "place_bytes": place_bytes,
        "page_table": table_of(page_table),
        "capacity": capacity,
        "blocks": blocks,
        "block_places": block_places,
        "ticket": 0 if ticket is None else ticket.data_ptr(),
    }


# --- what all operators share ----------------------------------------------------------------------------------------


def extension() -> ModuleType:
    """The compiled extension.

    Raises:
        RuntimeError: It is missing.
    """
    try:
        from .. import _extension
    except ImportError as error:
        raise RuntimeError(
            f"llama_te_infer's compiled extension does not import ({error}): install the package with pip, which "
            "builds it, instead of using its source folder."
        ) from error
    return _extension


def cuda_function(name: str) -> Callable[..., Any]:
    """A function of the extension that only a build with CUDA has.

    Raises:
        RuntimeError: The extension is missing, or was built without CUDA.
    """
    function: Callable[..., Any] | None = getattr(extension(), name, None)
    if function is None:
        raise RuntimeError(
            "llama_te_infer's extension was built without CUDA, so its operators take CPU tensors only: reinstall "
            "llama-te-infer where nvcc is on PATH (`python -m llama_te_infer.info` tells what was built)."
        )
    return function


def launch_arguments(tensor: torch.Tensor) -> dict[str, int]:
    """Where a kernel runs."""
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


def checks_values() -> bool:
    """Whether LLAMA_TE_CHECK asks for a look at the values of CUDA tensors, and nothing is being captured."""
    if os.environ.get("LLAMA_TE_CHECK", "0") in ("", "0"):
        return False
    if torch.cuda.is_current_stream_capturing():
        warnings.warn("LLAMA_TE_CHECK: values are not checked while a CUDA graph is captured.", stacklevel=3)
        return False
    return True


def check_on_host(
    check: Any, arguments: dict[str, Any], page_table: torch.Tensor | None, **arrays: torch.Tensor
) -> None:
    """Run the CPU's check on copies of the arrays: nothing is launched when it raises."""
    copies = {name: array.cpu() for name, array in arrays.items()}
    replaced: dict[str, Any] = {name: copy.data_ptr() for name, copy in copies.items()}
    if page_table is not None:
        table = page_table.cpu().contiguous()
        replaced["page_table"] = (table.data_ptr(), table.stride(0) * table.itemsize)
    check(**(arguments | replaced))


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int | None, ...],
    meaning: str,
) -> None:
    """Refuse a tensor of another dtype, device or shape (None: any size), or whose last dimension has gaps."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {name_of(tensor.dtype)}; it must be {name_of(dtype)}.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as the other tensors.")
    if len(tensor.shape) != len(shape) or any(
        wanted not in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has the shape {_shape(tensor)}; it must be [{wanted_shape}], which is {meaning}.")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has the strides {tensor.stride()}: its last dimension must be contiguous.")


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Strides in elements, with those of dimensions of size 1, which torch leaves open, as in a contiguous tensor."""
    strides = list(tensor.stride())
    following = 1
    for dim in reversed(range(tensor.dim())):
        if tensor.shape[dim] == 1:
            strides[dim] = following
        following = strides[dim] * tensor.shape[dim]
    return strides


def table_of(page_table: torch.Tensor | None) -> tuple[int, int]:
    """A page table's address and its stride in bytes; zeros where there is none."""
    return (0, 0) if page_table is None else (page_table.data_ptr(), strides_of(page_table)[0] * page_table.itemsize)


def rows_and_places(cache: torch.Tensor, page_table: torch.Tensor | None) -> tuple[int, int]:
    """How many rows a cache has, and how many places each."""
    blocks, block_places = cache.shape[:2]
    return (blocks, block_places) if page_table is None else (len(page_table), page_table.shape[1] * block_places)


def tokens_and_cache(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> dict[str, Any]:
    """What a kernel takes that rotates tokens and appends them to a cache, of shapes that fit together."""
    _, kv_heads, heads_of_group, head_dim = qkv.shape
    itemsize = qkv.itemsize
    return {
        "element": _ELEMENTS[qkv.dtype],
        "qkv": qkv.data_ptr(),
        "kv_heads": kv_heads,
        "group": heads_of_group - 2,
        "head_dim": head_dim,
        "cos_sin": cos_sin.data_ptr(),
        "cos_sin_stride": strides_of(cos_sin)[0] * cos_sin.itemsize,
        "positions": cos_sin.shape[0],
        "start": start.data_ptr(),
        "page_table": table_of(page_table),
        "capacity": rows_and_places(key_cache, page_table)[1],
        "blocks": key_cache.shape[0],
        "block_places": key_cache.shape[1],
        "key": (key_cache.data_ptr(), *(stride * itemsize for stride in strides_of(key_cache)[:3])),
        "value": (value_cache.data_ptr(), *(stride * itemsize for stride in strides_of(value_cache)[:3])),
    }


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the ranges from their first to their last elements have addresses in common."""

    def end(tensor: torch.Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.itemsize

    empty = one.numel() == 0 or other.numel() == 0
    return not empty and one.data_ptr() < end(other) and other.data_ptr() < end(one)


def name_of(dtype: torch.dtype) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
