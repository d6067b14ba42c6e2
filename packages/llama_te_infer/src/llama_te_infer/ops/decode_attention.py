"""Attention of one decoding step: `torch.ops.llama_te.decode_attention`.

On a GPU one kernel rotates, appends to the cache and attends over it. On a CPU `append_rope` and PyTorch do this work.

Shapes: B rows, R rows of a cache, L places of a row, K key/value heads, G query heads per key/value head, D size of a
head, P positions, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch

from .library import checks_values, cuda_function, extension, limits, on_host, register


def decode_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Append one new token to each row, and let it attend to its whole row.

    The token's query heads and its key are rotated by its position as in `append_rope` and rounded to their dtype. Key
    and value are written to the cache. Then `output = softmax(scale · query · keysᵀ) · values` over the row's tokens,
    the new one included. Sums are float32; on a GPU the weights are rounded to the dtype before they multiply the
    values. A row's result is the same, bit by bit, in every batch.

    With an FP8 cache (`widen_pages` describes the format) the row attends to the widened keys and values, and the new
    token sees its own key and value as the cache holds them. A head that is NaN there makes the output of its query
    heads NaN. The kernel's products are those of bfloat16, with FP8 numbers times 2^-120 and the other factor times
    2^60. So queries and values should be smaller than 2^66 and, unless they hardly count, greater than 2^-50.

    Lengths and pages out of range raise an error for CPU tensors, and for CUDA tensors with LLAMA_TE_CHECK=1. Otherwise
    the kernel skips a row whose token has no place or no position, and does not attend in a row with a page number
    outside the cache. The outputs of these rows are zeros.

    The kernel starts before the previous kernel on the stream ends, prefetches keys and values meanwhile, and lets the
    next kernel start at once. So the previous kernel may write `qkv`, but only earlier kernels may write `start`,
    `page_table` and the caches. This is safe if at least one kernel after those writes waited for its predecessor
    before it let its successor start, as `embed` and `linear` do, or was launched without overlap.

    Args:
        qkv: [B, K, G + 2, D], the fused projection's output: for each key/value head its query heads, its key and its
            value. The stride between rows may be any multiple of 16 bytes; the numbers of one row must be contiguous.
            On a GPU `takes_decode_attention` checks dtype and sizes, B is at most 256 and K at most 64. A CPU allows
            the same inputs as `append_rope`.
        cos_sin: float32 [P, D]: the cosines of each position's D/2 angles, then their sines.
        start: int32 [at least B], the number of cached tokens of each row: the new token's position and place.
        page_table: int32 [at least B, pages per row] for a paged cache, None for a contiguous one.
        scale: The factor of the scores, usually D^-0.5.
        key_cache: [R, L, K, D] with R at least B, or [pages, page size, K, D]; receives the new keys. Of qkv's dtype,
            or for pages and bfloat16 also float8_e4m3fn.
        value_cache: The same shape and dtype; receives the new values.
        output: [B, K * G, D], contiguous.
        workspace: int32 [at least `workspace_size(...)`], zeros before its first use. One workspace serves calls of
            different shapes. Calls that may run at the same time need separate workspaces. A CPU does not use it.
        key_scale: uint8 [pages, K, page size], the scales of FP8 keys, of which the operator writes the new keys'; None
            for other caches.
        value_scale: Likewise for values.

    Raises:
        TypeError: An argument is no dense tensor or no number. The operator has written nothing.
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.decode_attention(
        qkv, cos_sin, start, page_table, scale, key_cache, value_cache, output, workspace, key_scale, value_scale
    )


def takes_decode_attention(dtype: torch.dtype, group: int, head_dim: int, page_size: int | None) -> bool:
    """Whether the GPU's kernel takes these heads and pages.

    Args:
        dtype: The dtype of the heads, and of the caches unless these are FP8, which bfloat16 heads allow.
        group: G.
        head_dim: D.
        page_size: Places of a page, None for a contiguous cache.

    Raises:
        RuntimeError: The extension is missing.
    """
    most = limits()
    whole_tiles = page_size is None or page_size % most.decode_tile_keys == 0
    fits = 1 <= group <= most.max_decode_group and head_dim in most.decode_head_dims
    return dtype in most.decode_element_types and fits and whole_tiles


def workspace_size(rows: int, kv_heads: int, group: int, head_dim: int, capacity: int) -> int:
    """Return the size of the workspace of `decode_attention` on a GPU, in int32 numbers.

    Args:
        rows: The largest B, at most 256.
        kv_heads: K, at most 64.
        group: G, at most 16.
        head_dim: D, at most 256.
        capacity: Places of a row: L, or pages per row times page size; less than 2^31.

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is out of range.
        RuntimeError: The extension is missing.
    """
    size: int = extension().decode_attention_workspace(rows, kv_heads, group, head_dim, capacity)
    return size


def _decode_attention_cuda(*arguments: Any) -> None:
    if checks_values():
        qkv, cos_sin, start, page_table, *others = arguments
        extension().decode_attention_check(qkv, cos_sin, on_host(start), on_host(page_table), *others)
    cuda_function("decode_attention_cuda")(*arguments)


def _decode_attention_cpu(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    extension().decode_attention_append_cpu(
        qkv, cos_sin, start, page_table, scale, key_cache, value_cache, output, workspace, key_scale, value_scale
    )
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    query_BKGD = output.view(rows, kv_heads, heads_of_group - 2, head_dim)
    for row, before in enumerate(start[:rows].tolist()):
        if page_table is None:
            key_TKD, value_TKD = key_cache[row], value_cache[row]
        else:
            page_P = page_table[row, : before // key_cache.shape[1] + 1]
            key_TKD, value_TKD = _pages(key_cache, key_scale, page_P), _pages(value_cache, value_scale, page_P)
        key_TKD, value_TKD = key_TKD[: before + 1].float(), value_TKD[: before + 1].float()
        score_KGT = torch.einsum("kgd,tkd->kgt", query_BKGD[row].float(), key_TKD) * scale
        query_BKGD[row] = torch.einsum("kgt,tkd->kgd", score_KGT.softmax(-1), value_TKD)


def _pages(cache: torch.Tensor, scale: torch.Tensor | None, page_P: torch.Tensor) -> torch.Tensor:
    """Return the keys or values [P * page size, K, D] of pages, in bfloat16 of an FP8 cache."""
    if scale is None:
        return cache[page_P].flatten(0, 1)
    wide = torch.empty(len(page_P), *cache.shape[1:], dtype=torch.bfloat16)
    length_B = torch.tensor([len(page_P) * cache.shape[1]], dtype=torch.int32)
    extension().widen_pages_cpu(cache, scale, page_P[None], length_B, wide)
    return wide.flatten(0, 1)


register(
    "decode_attention(Tensor qkv, Tensor cos_sin, Tensor start, Tensor? page_table, float scale, "
    "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) output, Tensor(d!) workspace, "
    "Tensor(e!)? key_scale=None, Tensor(f!)? value_scale=None) -> ()",
    cpu=_decode_attention_cpu,
    cuda=_decode_attention_cuda,
)
