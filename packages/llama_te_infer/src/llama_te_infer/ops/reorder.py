"""Beam search's reordering of caches: `torch.ops.llama_te.reorder_rows` and `torch.ops.llama_te.reorder_pages`.

Shapes: B rows of the batch, R rows of a cache, L places of a row, K key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch

from .cache_arguments import index_arguments, rows_and_places
from .checks import check_tensor, name_of, shape_of
from .library import check_on_host, checks_values, cuda_function, extension, launch_arguments, limits, register


def reorder_rows(caches: Sequence[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    """Replace row i of contiguous caches by row `source_rows[i]`, in place, in one launch.

    Only places below a row's length move, and rows that are their own source cost nothing. The kernel skips a row whose
    values in `source_rows` or `lengths` are out of range.

    Args:
        caches: Keys and values of all layers, each [R, L, K, D] and contiguous, of one shape, dtype and device.
        source_rows: int32 or int64 [B], B at most 64 and at most R. Rows may repeat or be missing.
        lengths: int32 [B], the number of tokens of each row after the call, equal to its source's.

    Raises:
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
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
    """Replace row i of paged caches by row `source_rows[i]`, in one launch.

    A row takes its source's entries of `page_table` for full pages, so the rows share these pages. The operator copies
    the tokens of the partly filled last page to the row's own page, `page_table[i, lengths[i] // page_size]`. This page
    must belong to row i alone. The kernel skips a row whose values are out of range.

    Args:
        caches: Keys and values of all layers, each [pages, page_size, K, D] and contiguous, of one shape, dtype and
            device.
        page_table: int32 [at least B, pages per row].
        source_rows: int32 or int64 [B], B at most 64. Rows may repeat or be missing.
        lengths: int32 [B], the number of tokens of each row after the call, equal to its source's.
        page_size: Tokens of a page.
        ticket: int32 [1], a semaphore: 0 before and after the call. It selects the block that changes the table. Calls
            that may run at the same time need separate semaphores.

    Raises:
        TypeError: `page_table` is None. The operator has written nothing.
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.reorder_pages(list(caches), page_table, source_rows, lengths, page_size, ticket)


def takes_reorder(caches: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether `reorder_rows` and `reorder_pages` take these caches and this number of rows.

    Raises:
        RuntimeError: The extension is missing.
    """
    most = limits()
    alike = all(cache.shape == caches[0].shape for cache in caches)
    whole_vectors = _place_bytes(caches[0]) % most.vector_bytes == 0
    return alike and whole_vectors and rows <= most.max_reorder_rows and len(caches) <= most.max_reorder_caches


def _reorder_rows_cpu(caches: list[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    arguments = _check(caches, source_rows, lengths)
    if arguments is not None:
        extension().reorder_rows_cpu(**arguments)


def _reorder_rows_cuda(caches: list[torch.Tensor], source_rows: torch.Tensor, lengths: torch.Tensor) -> None:
    _launch("reorder_rows_cuda", _check(caches, source_rows, lengths), None, source_rows, lengths)


def _reorder_pages_cpu(
    caches: list[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> None:
    arguments = _check_pages(caches, page_table, source_rows, lengths, page_size, ticket)
    if arguments is not None:
        extension().reorder_pages_cpu(**arguments)


def _reorder_pages_cuda(
    caches: list[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> None:
    arguments = _check_pages(caches, page_table, source_rows, lengths, page_size, ticket)
    _launch("reorder_pages_cuda", arguments, page_table, source_rows, lengths)


register(
    "reorder_rows(Tensor(a!)[] caches, Tensor source_rows, Tensor lengths) -> ()",
    cpu=_reorder_rows_cpu,
    cuda=_reorder_rows_cuda,
)
register(
    "reorder_pages(Tensor(a!)[] caches, Tensor(b!) page_table, Tensor source_rows, Tensor lengths, int page_size, "
    "Tensor(c!) ticket) -> ()",
    cpu=_reorder_pages_cpu,
    cuda=_reorder_pages_cuda,
)


def _launch(
    function: str,
    arguments: dict[str, Any] | None,
    page_table: torch.Tensor | None,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    if arguments is None:
        return
    if checks_values():
        check_on_host(extension().reorder_check, arguments, page_table, source_rows=source_rows, lengths=lengths)
    cuda_function(function)(**launch_arguments(source_rows), **arguments)


def _check_pages(
    caches: list[torch.Tensor],
    page_table: torch.Tensor,
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    ticket: torch.Tensor,
) -> dict[str, Any] | None:
    """Return the kernel's arguments for paged caches, or None if there is nothing to move."""
    if page_table is None:  # torch passes None on
        raise TypeError("page_table is None: it must be a tensor. Contiguous caches have reorder_rows.")
    arguments = _check(caches, source_rows, lengths, page_table)
    check_tensor("ticket", ticket, torch.int32, caches[0].device, (1,), "[1]")
    if page_size != caches[0].shape[1]:
        raise ValueError(
            f"page_size={page_size}, but the pages of caches[0], {shape_of(caches[0])}, have {caches[0].shape[1]}."
        )
    return None if arguments is None else arguments | {"ticket": ticket.data_ptr()}


def _check(
    caches: list[torch.Tensor],
    source_rows: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> dict[str, Any] | None:
    """Return the kernel's arguments, or None if there is nothing to move."""
    most = limits()
    if not 0 < len(caches) <= most.max_reorder_caches:
        raise ValueError(f"caches has {len(caches)} tensors: allowed are 1 to {most.max_reorder_caches}.")
    addresses = _check_caches(caches)
    first, device = caches[0], caches[0].device
    if source_rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"source_rows is {name_of(source_rows.dtype)}: allowed are int32 and int64.")
    check_tensor("source_rows", source_rows, source_rows.dtype, device, (None,), "[B]")
    rows = len(source_rows)
    check_tensor("lengths", lengths, torch.int32, device, (rows,), "[B]")
    if rows > most.max_reorder_rows:
        raise ValueError(f"source_rows has B={rows} rows: allowed are up to {most.max_reorder_rows}.")
    if page_table is not None:
        check_tensor("page_table", page_table, torch.int32, device, (None, None), "[at least B, pages per row]")
    cached_rows, _ = rows_and_places(first, page_table)
    if cached_rows < rows:
        name = "caches[0]" if page_table is None else "page_table"
        raise ValueError(f"source_rows has B={rows} rows, but {name} has {cached_rows}.")
    if rows == 0:
        return None
    return index_arguments(first, page_table) | {
        "caches": addresses,
        "rows": rows,
        "source_rows": source_rows.data_ptr(),
        "wide": source_rows.dtype == torch.int64,
        "lengths": lengths.data_ptr(),
        "block_bytes": first.shape[1] * _place_bytes(first),
        "place_bytes": _place_bytes(first),
        "ticket": 0,
    }


def _check_caches(caches: list[torch.Tensor]) -> list[int]:
    """Refuse caches that differ in shape or dtype, have gaps, are not aligned, or overlap. Return their addresses."""
    vector_bytes = limits().vector_bytes
    first = caches[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) < 3 or prod(shape) == 0:
        raise ValueError(
            f"caches[0] has the shape {shape_of(first)}; it must be [R, L, K, D] or [pages, page size, K, D]."
        )
    if _place_bytes(first) % vector_bytes != 0:
        raise ValueError(
            f"caches[0] has {_place_bytes(first)} bytes per token: allowed are multiples of {vector_bytes}."
        )
    addresses = [cache.data_ptr() for cache in caches]
    for i, cache in enumerate(caches):
        if cache.shape != shape or cache.dtype != dtype or cache.device != device:
            raise ValueError(
                f"caches[{i}] is {name_of(cache.dtype)} {shape_of(cache)} on {cache.device}, but caches[0] is "
                f"{name_of(dtype)} {shape_of(first)} on {device}: all must be alike."
            )
        if not cache.is_contiguous():
            raise ValueError(f"caches[{i}] has the strides {cache.stride()}: it must be contiguous.")
        if addresses[i] % vector_bytes != 0:
            raise ValueError(f"caches[{i}] starts at an address that is not a multiple of {vector_bytes} bytes.")
    extent = prod(shape) * first.itemsize
    order = sorted(range(len(caches)), key=addresses.__getitem__)
    for lower, upper in pairwise(order):
        if addresses[lower] + extent > addresses[upper]:
            raise ValueError(f"caches[{lower}] and caches[{upper}] share memory: a reorder would move it twice.")
    return addresses


def _place_bytes(cache: torch.Tensor) -> int:
    """Return the number of bytes of one token in a cache."""
    return prod(cache.shape[2:]) * cache.itemsize
