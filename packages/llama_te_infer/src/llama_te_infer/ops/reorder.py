"""Beam search's reordering of caches: `torch.ops.llama_te.reorder_rows` and `torch.ops.llama_te.reorder_pages`.

Shapes: B rows of the batch, R rows of a cache, L places of a row, K key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from .library import checks_values, cpu_kernel, cuda_function, extension, limits, on_host, register


def reorder_rows(caches: list[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    """Replace row i of contiguous caches by row `source_rows[i]`, in place, in one launch.

    Only places below a row's length move, and rows that are their own source cost nothing. The kernel skips a row whose
    values in `source_rows` or `lengths` are out of range.

    Args:
        caches: Keys and values of all layers, each [R, L, K, D] and contiguous, of one shape, dtype and device.
        source_rows: int32 or int64 [B], B at most 64 and at most R. Rows may repeat or be missing.
        lengths: int32 [B], the number of tokens of each row after the call, equal to its source's.

    Raises:
        TypeError: An argument is no dense tensor or no number. The operator has written nothing.
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    _check_list(caches)
    torch.ops.llama_te.reorder_rows(caches, source_rows, lengths)


def reorder_pages(
    caches: list[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> None:
    """Replace row i of paged caches by row `source_rows[i]`, in one launch.

    A row takes its source's entries of `page_table` for full pages, so the rows share these pages. The operator copies
    the tokens of the partly filled last page to the row's own page, `page_table[i, lengths[i] // page_size]`. This page
    must belong to row i alone. The kernel skips a row whose values are out of range.

    Args:
        caches: Keys and values of all layers, each [pages, page_size, K, D] and contiguous, of one shape, dtype and
            device. With float8_e4m3fn also their scales, each uint8 [pages, K, page_size] and contiguous, anywhere
            behind the first tensor; then page_size is a multiple of 16.
        page_table: int32 [at least B, pages per row].
        source_rows: int32 or int64 [B], B at most 64. Rows may repeat or be missing.
        lengths: int32 [B], the number of tokens of each row after the call, equal to its source's.
        page_size: Tokens of a page.
        ticket: int32 [1], a semaphore: 0 before and after the call. It selects the block that changes the table. Calls
            that may run at the same time need separate semaphores.

    Raises:
        TypeError: An argument is no dense tensor or no number. The operator has written nothing.
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    _check_list(caches)
    torch.ops.llama_te.reorder_pages(caches, page_table, source_rows, lengths, page_size, ticket)


def _check_list(caches: list[torch.Tensor]) -> None:
    """Refuse other sequences: torch would copy one of any length before it looks at its items."""
    if not isinstance(caches, list | tuple):
        raise TypeError(f"caches is a {type(caches).__name__}: it must be a list or a tuple of tensors.")


def takes_reorder(caches: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether `reorder_rows` and `reorder_pages` take these caches and this number of rows.

    Raises:
        RuntimeError: The extension is missing.
    """
    most = limits()
    first = caches[0]
    scale_shape = (first.shape[0], first.shape[2], first.shape[1])
    has_scales = first.dtype == torch.float8_e4m3fn
    scales = [cache for cache in caches if has_scales and cache.dtype == torch.uint8 and cache.shape == scale_shape]
    alike = sum(cache.shape == first.shape for cache in caches) + len(scales) == len(caches)
    whole_vectors = _place_bytes(first) % most.vector_bytes == 0
    if scales:
        whole_vectors = whole_vectors and first.shape[1] % most.vector_bytes == 0
    return alike and whole_vectors and rows <= most.max_reorder_rows and len(caches) <= most.max_reorder_caches


def _reorder_rows_cuda(caches: list[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    if checks_values():
        extension().reorder_rows_check(caches, on_host(source_rows), on_host(lengths))
    cuda_function("reorder_rows_cuda")(caches, source_rows, lengths)


def _reorder_pages_cuda(*arguments: Any) -> None:
    if checks_values():
        caches, page_table, source_rows, lengths, *others = arguments
        values = map(on_host, (page_table, source_rows, lengths))
        extension().reorder_pages_check(caches, *values, *others)
    cuda_function("reorder_pages_cuda")(*arguments)


register(
    "reorder_rows(Tensor(a!)[] caches, Tensor source_rows, Tensor lengths) -> ()",
    cpu=cpu_kernel("reorder_rows_cpu"),
    cuda=_reorder_rows_cuda,
)
register(
    "reorder_pages(Tensor(a!)[] caches, Tensor(b!) page_table, Tensor source_rows, Tensor lengths, int page_size, "
    "Tensor(c!) ticket) -> ()",
    cpu=cpu_kernel("reorder_pages_cpu"),
    cuda=_reorder_pages_cuda,
)


def _place_bytes(cache: torch.Tensor) -> int:
    """Return the number of bytes of one token in a cache."""
    return prod(cache.shape[2:]) * cache.itemsize
