"""Checks and kernel arguments of operators that append new tokens to a cache.

Shapes: N new tokens, B rows of the batch, R rows of a cache, L places of a row, K key/value heads, G query heads per
key/value head, D size of a head, P positions.
"""

from __future__ import annotations

from typing import Any

import torch

from .checks import address_of, check_tensor, strides_of
from .library import limits


def check_heads(operator: str, qkv: torch.Tensor, tokens: str) -> None:
    """Refuse a `qkv` without heads, and a `qkv` that needs a gradient.

    Args:
        operator: The operator's name, for the message.
        qkv: [tokens, K, G + 2, D].
        tokens: The name of its first dimension, for the message.
    """
    if qkv.dim() != 4 or qkv.shape[2] < 3:
        raise ValueError(
            f"qkv has the shape {list(qkv.shape)}; it must be [{tokens}, K, G + 2, D] with G of at least 1."
        )
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError(f"qkv requires a gradient, which {operator} does not have: call it under torch.no_grad().")


def check_tokens_contiguous(qkv: torch.Tensor) -> None:
    """Refuse a `qkv` in which the heads of one token have gaps."""
    if len(qkv) > 0 and not qkv[0].is_contiguous():
        raise ValueError(f"qkv has the strides {qkv.stride()}: all but the first dimension must be contiguous.")


def check_cache(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> None:
    """Refuse a cache whose dtype, device or shape does not fit the tokens in `qkv`."""
    kv_heads, head_dim, device = qkv.shape[1], qkv.shape[3], qkv.device
    check_tensor("cos_sin", cos_sin, torch.float32, device, (None, head_dim), "[P, D]")
    check_tensor("start", start, torch.int32, device, (None,), "[at least B]")
    check_tensor("key_cache", key_cache, qkv.dtype, device, (None, None, kv_heads, head_dim), "[R, L, K, D]")
    check_tensor("value_cache", value_cache, qkv.dtype, device, tuple(key_cache.shape), "that of key_cache")
    if page_table is not None:
        check_tensor("page_table", page_table, torch.int32, device, (None, None), "[at least B, pages per row]")


def check_rows(rows: int, start: torch.Tensor, page_table: torch.Tensor | None, key_cache: torch.Tensor) -> None:
    """Refuse a cache with fewer rows than the batch of new tokens."""
    cached = "key_cache" if page_table is None else "page_table"
    for name, room in (("start", len(start)), (cached, rows_and_places(key_cache, page_table)[0])):
        if room < rows:
            raise ValueError(f"{name} has {room} rows, but there are B={rows} rows of new tokens.")


def rows_and_places(cache: torch.Tensor, page_table: torch.Tensor | None) -> tuple[int, int]:
    """Return the number of rows of a cache, and the number of places of a row."""
    blocks, block_places = cache.shape[:2]
    return (blocks, block_places) if page_table is None else (len(page_table), page_table.shape[1] * block_places)


def index_arguments(cache: torch.Tensor, page_table: torch.Tensor | None) -> dict[str, Any]:
    """Return a kernel's arguments that map the places of a row to blocks of a cache."""
    table_stride = 0 if page_table is None else strides_of(page_table)[0] * page_table.itemsize
    blocks, block_places = cache.shape[:2]
    return {
        "page_table": (address_of(page_table), table_stride),
        "capacity": rows_and_places(cache, page_table)[1],
        "blocks": blocks,
        "block_places": block_places,
    }


def cache_arguments(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> dict[str, Any]:
    """Return the arguments of a kernel that rotates tokens and appends them to a cache. The caller checks shapes."""
    _, kv_heads, heads_of_group, head_dim = qkv.shape
    itemsize = qkv.itemsize
    return index_arguments(key_cache, page_table) | {
        "element": limits().element_types[qkv.dtype],
        "qkv": qkv.data_ptr(),
        "kv_heads": kv_heads,
        "group": heads_of_group - 2,
        "head_dim": head_dim,
        "cos_sin": cos_sin.data_ptr(),
        "cos_sin_stride": strides_of(cos_sin)[0] * cos_sin.itemsize,
        "positions": cos_sin.shape[0],
        "start": start.data_ptr(),
        "key": (key_cache.data_ptr(), *(stride * itemsize for stride in strides_of(key_cache)[:3])),
        "value": (value_cache.data_ptr(), *(stride * itemsize for stride in strides_of(value_cache)[:3])),
    }
