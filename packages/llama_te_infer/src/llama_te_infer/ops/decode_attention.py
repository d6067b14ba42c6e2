"""Attention of one decoding step: `torch.ops.llama_te.decode_attention`.

On a GPU one kernel rotates, appends to the cache and attends over it. On a CPU `append_rope` and PyTorch do this work.

Shapes: B rows, R rows of a cache, L places of a row, K key/value heads, G query heads per key/value head, D size of a
head, P positions, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch

from .append_rope import append_rope
from .cache_arguments import (
    cache_arguments,
    check_cache,
    check_heads,
    check_rows,
    check_tokens_contiguous,
    rows_and_places,
)
from .checks import check_contiguous, check_tensor, name_of, strides_of
from .library import check_on_host, checks_values, cuda_function, extension, launch_arguments, limits, register


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
) -> None:
    """Append one new token to each row, and let it attend to its whole row.

    The token's query heads and its key are rotated by its position as in `append_rope` and rounded to their dtype. Key
    and value are written to the cache. Then `output = softmax(scale · query · keysᵀ) · values` over the row's tokens,
    the new one included. Sums are float32; on a GPU the weights are rounded to the dtype before they multiply the
    values. A row's result is the same, bit by bit, in every batch.

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
        key_cache: [R, L, K, D] with R at least B, or [pages, page size, K, D]; receives the new keys.
        value_cache: The same shape; receives the new values.
        output: [B, K * G, D], contiguous.
        workspace: int32 [at least `workspace_size(...)`], zeros before its first use. One workspace serves calls of
            different shapes. Calls that may run at the same time need separate workspaces. A CPU does not use it.

    Raises:
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.decode_attention(
        qkv, cos_sin, start, page_table, scale, key_cache, value_cache, output, workspace
    )


def takes_decode_attention(dtype: torch.dtype, group: int, head_dim: int, page_size: int | None) -> bool:
    """Whether the GPU's kernel takes these heads and pages.

    Args:
        dtype: The dtype of the heads and the caches.
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


def _decode_attention_cuda(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    _check(qkv, cos_sin, start, page_table, key_cache, value_cache, output)
    arguments = _kernel_arguments(qkv, cos_sin, start, page_table, scale, key_cache, value_cache, output, workspace)
    rows = len(qkv)
    if rows == 0:
        return
    if checks_values():
        appended = cache_arguments(qkv, cos_sin, start, page_table, key_cache, value_cache) | {
            "qkv_token_stride": arguments["qkv_row_stride"],
            "tokens": rows,
            "width": 1,
            "rows": rows,
            "query": output.data_ptr(),
        }
        cu_new = torch.arange(rows + 1, dtype=torch.int32)
        check_on_host(extension().append_rope_check, appended, page_table, cu_new=cu_new, start=start)
    cuda_function("decode_attention_cuda")(**launch_arguments(qkv), **arguments)


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
) -> None:
    _check(qkv, cos_sin, start, page_table, key_cache, value_cache, output)
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    one_token_each = torch.arange(rows + 1, dtype=torch.int32)
    append_rope(qkv, cos_sin, one_token_each, start, page_table, 1, output, key_cache, value_cache)
    query_BKGD = output.view(rows, kv_heads, heads_of_group - 2, head_dim)
    for row, before in enumerate(start[:rows].tolist()):
        if page_table is None:
            key_TKD, value_TKD = key_cache[row], value_cache[row]
        else:
            pages = page_table[row, : before // key_cache.shape[1] + 1]
            key_TKD, value_TKD = key_cache[pages].flatten(0, 1), value_cache[pages].flatten(0, 1)
        key_TKD, value_TKD = key_TKD[: before + 1].float(), value_TKD[: before + 1].float()
        score_KGT = torch.einsum("kgd,tkd->kgt", query_BKGD[row].float(), key_TKD) * scale
        query_BKGD[row] = torch.einsum("kgt,tkd->kgd", score_KGT.softmax(-1), value_TKD)


register(
    "decode_attention(Tensor qkv, Tensor cos_sin, Tensor start, Tensor? page_table, float scale, "
    "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) output, Tensor(d!) workspace) -> ()",
    cpu=_decode_attention_cpu,
    cuda=_decode_attention_cuda,
)


def _check(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Refuse arguments whose dtypes, devices or shapes do not fit each other."""
    check_heads("decode_attention", qkv, "B")
    check_cache(qkv, cos_sin, start, page_table, key_cache, value_cache)
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    heads = kv_heads * (heads_of_group - 2)
    check_tensor("output", output, qkv.dtype, qkv.device, (rows, heads, head_dim), "[B, K * G, D]")
    check_contiguous(output=output)
    check_tokens_contiguous(qkv)
    check_rows(rows, start, page_table, key_cache)


def _kernel_arguments(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
) -> dict[str, Any]:
    """Refuse sizes that the GPU's kernel does not take, and return its arguments.

    The extension checks alignment and overlap.
    """
    most = limits()
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    group = heads_of_group - 2
    page_size = None if page_table is None else key_cache.shape[1]
    if not takes_decode_attention(qkv.dtype, group, head_dim, page_size):
        pages = "" if page_size is None else f" and pages of {page_size}"
        dtypes = " and ".join(map(name_of, most.decode_element_types))
        raise ValueError(
            f"qkv is {name_of(qkv.dtype)} with G={group} and D={head_dim}{pages}: on a GPU allowed are "
            f"{dtypes}, G up to {most.max_decode_group}, D of {', '.join(map(str, most.decode_head_dims))} and "
            f"pages of a multiple of {most.decode_tile_keys}. Call append_rope and attend with PyTorch instead."
        )
    for letter, size, allowed in (("B", rows, most.max_decode_rows), ("K", kv_heads, most.max_decode_kv_heads)):
        if size > allowed:
            raise ValueError(f"qkv has {letter}={size}: on a GPU allowed are up to {allowed}.")
    check_tensor("workspace", workspace, torch.int32, qkv.device, (None,), "[at least workspace_size(...)]")
    capacity = rows_and_places(key_cache, page_table)[1]
    needed = workspace_size(rows, kv_heads, group, head_dim, capacity)
    if workspace.shape[0] < needed:
        raise ValueError(
            f"workspace has {workspace.shape[0]} numbers, but {needed} are needed: make one of "
            f"workspace_size({rows}, {kv_heads}, {group}, {head_dim}, {capacity}) zeros."
        )
    return cache_arguments(qkv, cos_sin, start, page_table, key_cache, value_cache) | {
        "rows": rows,
        "qkv_row_stride": strides_of(qkv)[0] * qkv.itemsize,
        "scale": scale,
        "output": output.data_ptr(),
        "workspace": workspace.data_ptr(),
    }
