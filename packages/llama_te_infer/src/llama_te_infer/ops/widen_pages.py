"""Pages of an FP8 cache as bfloat16: `torch.ops.llama_te.widen_pages`.

An FP8 cache stores keys and values as float8_e4m3fn. Each head of each token has one scale in one byte, the exponent of
E8M0: a number is `e4m3 · 2^(scale - 127)`. The scale is the smallest power of two with which the head's greatest
magnitude is at most 448, within 2^-117 and 2^119; zeros have the scale of 1. Greater numbers become the greatest one.
Every such number is a bfloat16 number, so all readers of a cache see the same keys and values, bit by bit. e4m3 has no
infinity: a head with a NaN or an infinity becomes NaN as a whole, with the scale 255.

Shapes: B rows, P pages of a row, K key/value heads, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from .library import checks_values, cpu_kernel, cuda_function, extension, on_host, register


def widen_pages(
    source: torch.Tensor,
    scale: torch.Tensor,
    page_table_BP: torch.Tensor,
    length_B: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Write the pages of an FP8 cache that rows use as bfloat16, row after row.

    Page p of row b becomes page `b * P + p` of the target, for p below `ceil(length_B[b] / page size)`. The operator
    leaves other pages of the target as they are. It also widens the places of a page behind the row's length, whatever
    they hold. On a GPU the kernel skips rows whose length is out of range, and pages that the cache does not have.

    Args:
        source: float8_e4m3fn [pages, page size, K, D], keys or values; D is a multiple of 16 and at most 256.
        scale: uint8 [pages, K, page size], their scales.
        page_table_BP: int32 [at least B, P].
        length_B: int32 [B], the number of tokens of each row.
        target: bfloat16 [at least B * P, page size, K, D], contiguous.

    Raises:
        TypeError: An argument is no dense tensor. The operator has written nothing.
        ValueError: An argument does not fit. The operator has written nothing.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.widen_pages(source, scale, page_table_BP, length_B, target)


def _widen_pages_cuda(*arguments: Any) -> None:
    if checks_values():
        source, scale, page_table_BP, length_B, target = arguments
        extension().widen_pages_check(source, scale, on_host(page_table_BP), on_host(length_B), target)
    cuda_function("widen_pages_cuda")(*arguments)


register(
    "widen_pages(Tensor source, Tensor scale, Tensor page_table_BP, Tensor length_B, Tensor(a!) target) -> ()",
    cpu=cpu_kernel("widen_pages_cpu"),
    cuda=_widen_pages_cuda,
)
