"""Rotary embedding of new tokens and their append to a cache: `torch.ops.llama_te.append_rope`.

Shapes: N new tokens, B rows of the batch, R rows of a cache, L places of a row, K key/value heads, G query heads per
key/value head, D size of a head, P positions.
"""

from __future__ import annotations

from typing import Any

import torch

from .cache_arguments import cache_arguments, check_cache, check_heads, check_rows, check_tokens_contiguous
from .checks import check_contiguous, check_tensor, name_of, strides_of
from .library import check_on_host, checks_values, cuda_function, extension, launch_arguments, limits, register


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

    Token i of row b has position `start[b] + i`, both for the rotation and in the cache. Dimensions d and d + D/2
    rotate into each other, in float32. Padding (packed tokens after the last row, or columns after a row's tokens in a
    padded batch) gets zeros as its query and leaves the cache unchanged. The kernel also skips a token whose values in
    `cu_new`, `start` or `page_table` are out of range.

    Args:
        qkv: [N, K, G + 2, D], the fused projection's output: for each key/value head its query heads, its key and its
            value. bfloat16, float16 or float32; D is a multiple of 16 and at most 256. The stride between tokens may be
            any multiple of 16 bytes; the numbers of one token must be contiguous.
        cos_sin: float32 [P, D]: the cosines of each position's D/2 angles, then their sines.
        cu_new: int32 [B + 1], the running sum of the rows' new tokens, from 0.
        start: int32 [at least B], the number of cached tokens of each row before this call.
        page_table: int32 [at least B, pages per row] for a paged cache, None for a contiguous one.
        width: 0 for packed tokens, row after row; S for a padded batch of N / S rows and S columns, tokens first.
        query: [N, K * G, D], contiguous; receives the rotated queries.
        key_cache: [R, L, K, D] with R at least B, or [pages, page size, K, D]; receives the rotated keys.
        value_cache: The same shape; receives the values.

    Raises:
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.append_rope(qkv, cos_sin, cu_new, start, page_table, width, query, key_cache, value_cache)


def takes_heads(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `append_rope` takes heads of this dtype and size.

    Raises:
        RuntimeError: The extension is missing.
    """
    most = limits()
    return dtype in most.element_types and head_dim % most.head_dim_multiple == 0 and 0 < head_dim <= most.max_head_dim


def _append_rope_cpu(*tensors: Any) -> None:
    arguments = _check(*tensors)
    if arguments is not None:
        extension().append_rope_cpu(**arguments)


def _append_rope_cuda(*tensors: Any) -> None:
    arguments = _check(*tensors)
    if arguments is None:
        return
    qkv, _, cu_new, start, page_table = tensors[:5]
    if checks_values():
        check_on_host(extension().append_rope_check, arguments, page_table, cu_new=cu_new, start=start)
    cuda_function("append_rope_cuda")(**launch_arguments(qkv), **arguments)


register(
    "append_rope(Tensor qkv, Tensor cos_sin, Tensor cu_new, Tensor start, Tensor? page_table, int width, "
    "Tensor(a!) query, Tensor(b!) key_cache, Tensor(c!) value_cache) -> ()",
    cpu=_append_rope_cpu,
    cuda=_append_rope_cuda,
)


def _check(
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
    """Return the kernel's arguments, or None if there is no token. The extension checks alignment and overlap."""
    most = limits()
    if qkv.dtype not in most.element_types:
        raise ValueError(f"qkv is {name_of(qkv.dtype)}: allowed are {', '.join(map(name_of, most.element_types))}.")
    check_heads("append_rope", qkv, "N")
    tokens, kv_heads, heads_of_group, head_dim = qkv.shape
    if not takes_heads(qkv.dtype, head_dim):
        raise ValueError(
            f"qkv has heads of size D={head_dim}: allowed are multiples of {most.head_dim_multiple} up to "
            f"{most.max_head_dim}."
        )
    if tokens >= 2**31:
        raise ValueError(f"qkv has N={tokens} tokens: allowed are less than 2**31.")
    check_cache(qkv, cos_sin, start, page_table, key_cache, value_cache)
    check_tensor("cu_new", cu_new, torch.int32, qkv.device, (None,), "[B + 1]")
    heads = kv_heads * (heads_of_group - 2)
    check_tensor("query", query, qkv.dtype, qkv.device, (tokens, heads, head_dim), "[N, K * G, D]")
    check_contiguous(query=query)
    if width < 0 or (width > 0 and tokens % width != 0):
        raise ValueError(
            f"width={width} does not fit the N={tokens} tokens of qkv: give 0 for packed tokens, or the columns of a "
            "padded batch, which divide N."
        )
    if cu_new.shape[0] == 0:
        raise ValueError("cu_new is empty: it must be [B + 1], beginning with 0.")
    rows = cu_new.shape[0] - 1
    if width > 0:
        if tokens // width > rows:
            raise ValueError(
                f"width={width} makes {tokens // width} rows of the N={tokens} tokens of qkv, but cu_new has {rows}."
            )
        rows = tokens // width
    check_rows(rows, start, page_table, key_cache)
    if tokens == 0:
        return None
    check_tokens_contiguous(qkv)
    return cache_arguments(qkv, cos_sin, start, page_table, key_cache, value_cache) | {
        "qkv_token_stride": strides_of(qkv)[0] * qkv.itemsize,
        "tokens": tokens,
        "width": width,
        "cu_new": cu_new.data_ptr(),
        "rows": rows,
        "query": query.data_ptr(),
    }
