"""Rotary embedding of new tokens and their append to a cache: `torch.ops.llama_te.append_rope`.

Shapes: N new tokens, B rows of the batch, R rows of a cache, L places of a row, K key/value heads, G query heads per
key/value head, D size of a head, P positions.
"""

from __future__ import annotations

from typing import Any

import torch

from .library import checks_values, cpu_kernel, cuda_function, extension, limits, on_host, register


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
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
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
        key_cache: [R, L, K, D] with R at least B, or [pages, page size, K, D]; receives the rotated keys. Of qkv's
            dtype, or for pages and bfloat16 also float8_e4m3fn: then keys, rotated and rounded to bfloat16, and values
            are rounded to FP8 with a scale for each head (`widen_pages` describes the format).
        value_cache: The same shape and dtype; receives the values.
        key_scale: uint8 [pages, K, page size], receives the scales of FP8 keys; None for other caches.
        value_scale: Likewise for values.

    Raises:
        TypeError: An argument is no dense tensor or no number. The operator has written nothing.
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.append_rope(
        qkv, cos_sin, cu_new, start, page_table, width, query, key_cache, value_cache, key_scale, value_scale
    )


def takes_heads(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `append_rope` takes heads of this dtype and size.

    Raises:
        RuntimeError: The extension is missing.
    """
    most = limits()
    return dtype in most.element_types and head_dim % most.head_dim_multiple == 0 and 0 < head_dim <= most.max_head_dim


def _append_rope_cuda(*arguments: Any) -> None:
    if checks_values():
        qkv, cos_sin, cu_new, start, page_table, *others = arguments
        values = map(on_host, (cu_new, start, page_table))
        extension().append_rope_check(qkv, cos_sin, *values, *others)
    cuda_function("append_rope_cuda")(*arguments)


register(
    "append_rope(Tensor qkv, Tensor cos_sin, Tensor cu_new, Tensor start, Tensor? page_table, int width, "
    "Tensor(a!) query, Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor(d!)? key_scale=None, "
    "Tensor(e!)? value_scale=None) -> ()",
    cpu=cpu_kernel("append_rope_cpu"),
    cuda=_append_rope_cuda,
)
