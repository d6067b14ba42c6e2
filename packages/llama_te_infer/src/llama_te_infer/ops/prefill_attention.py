"""Attention of a prompt's new tokens over the pages of its row: cuDNN through Transformer Engine, or PyTorch on a CPU.

Shapes: T packed new tokens, B rows, R rows of a page table, P pages per row, K key/value heads, H query heads, D size
of a head, S new tokens of a row, L tokens of a row.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F

from llama_te_core.compat.transformer_engine import paged_attention, planned_rows


def prefill_attention(
    query_THD: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_new: torch.Tensor,
    cu_all: torch.Tensor,
    page_table_RP: torch.Tensor,
    *,
    most_new: int,
    most_keys: int,
    scale: float,
) -> torch.Tensor:
    """Let new tokens attend to their rows' tokens up to themselves.

    Args:
        query_THD: Rotated queries of packed rows.
        key_cache: [pages, page size, K, D], with the new tokens' keys.
        value_cache: Likewise.
        cu_new: int32 [B + 1], running sums of the rows' new tokens.
        cu_all: int32 [B + 1], running sums of the rows' tokens, the new ones included.
        page_table_RP: int32; on a GPU R is at least `table_rows(B)`.
        most_new: The largest number of new tokens of a row.
        most_keys: Most tokens that any row of the cache can have.
        scale: The factor of the scores.

    Returns:
        [T, H, D].

    Raises:
        RuntimeError: On a GPU, Transformer Engine or cuDNN cannot compute this.
    """
    if query_THD.is_cuda:
        return paged_attention(
            query_THD,
            key_cache,
            value_cache,
            cu_new,
            cu_all,
            page_table_RP,
            most_new=most_new,
            most_keys=most_keys,
            softmax_scale=scale,
        )
    output_THD = torch.empty_like(query_THD)
    new_B, length_B = cu_new.diff().tolist(), cu_all.diff().tolist()
    first = 0
    for row, (new, length) in enumerate(zip(new_B, length_B, strict=True)):
        place_L = torch.arange(length)
        page_L = page_table_RP[row, place_L // key_cache.shape[1]].long()
        key_LKD, value_LKD = (cache[page_L, place_L % cache.shape[1]] for cache in (key_cache, value_cache))
        output_HSD = F.scaled_dot_product_attention(
            query_THD[first : first + new].transpose(0, 1),
            key_LKD.transpose(0, 1),
            value_LKD.transpose(0, 1),
            attn_mask=place_L <= place_L[length - new :, None],
            scale=scale,
            enable_gqa=True,
        )
        output_THD[first : first + new] = output_HSD.transpose(0, 1)
        first += new
    return output_THD


def table_rows(rows: int, device: torch.device) -> int:
    """Return how many rows the page table of up to so many rows must have."""
    return planned_rows(rows) if device.type == "cuda" else rows


def prefill_attention_problem(
    key_cache: torch.Tensor, value_cache: torch.Tensor, heads: int, rows: int, most_keys: int, scale: float
) -> str | None:
    """Find out by one small call whether `prefill_attention` computes over these pages.

    Args:
        key_cache: See `prefill_attention`.
        value_cache: Likewise.
        heads: H.
        rows: Most rows of a call.
        most_keys: See `prefill_attention`.
        scale: Likewise.

    Returns:
        In one line why not; `None` if it does.
    """
    device = key_cache.device
    if device.type == "cuda" and os.environ.get("NVTE_FUSED_ATTN", "1") == "0":
        return "NVTE_FUSED_ATTN=0 turns cuDNN's attention off"
    query_THD = torch.zeros(1, heads, key_cache.shape[-1], dtype=key_cache.dtype, device=device)
    one_token = torch.arange(2, dtype=torch.int32, device=device)
    pages = -(-most_keys // key_cache.shape[1])
    table_RP = torch.zeros(table_rows(rows, device), pages, dtype=torch.int32, device=device)
    try:
        prefill_attention(
            query_THD,
            key_cache,
            value_cache,
            one_token,
            one_token,
            table_RP,
            most_new=1,
            most_keys=most_keys,
            scale=scale,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        return f"there is no attention for it ({str(error).strip().splitlines()[0]})"
    return None
