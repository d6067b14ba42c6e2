"""Triton kernels for the two passes of `linear_cross_entropy` over a chunk's logits. Each reads the logits once.

Triton comes with torch's GPU builds. Code for other builds does not import this module.

Shapes: C tokens of a chunk, V vocabulary (this process's shard, if sharded), B columns of one step of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 16 logits for each thread of a program: two loads of 16 bytes. Registers then suffice for several programs at a time.
_COLUMNS = 4096
_WARPS = 8


def statistics(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logit of each token, and the sum of exp(logit - largest).

    Args:
        logits_CV: Floating point [C, V], each row contiguous.

    Returns:
        The largest logits and the sums, each [C] in float32 (float64 for float64 logits). Where all logits are -inf,
        the largest is a finite number and the sum is 0. A logit of NaN or inf makes the sum NaN.
    """
    tokens, vocabulary = logits_CV.shape
    precise = torch.promote_types(logits_CV.dtype, torch.float32)
    peak_C, sum_C = (logits_CV.new_empty(tokens, dtype=precise) for _ in range(2))
    with torch.cuda.device_of(logits_CV):
        _statistics_kernel[(tokens,)](
            logits_CV,
            peak_C,
            sum_C,
            logits_CV.stride(0),
            vocabulary,
            torch.finfo(precise).min,
            _columns(vocabulary),
            num_warps=_WARPS,
        )
    return peak_C, sum_C


def write_gradient(
    logits_CV: torch.Tensor,
    peak_C: torch.Tensor,
    factor_C: torch.Tensor,
    target_C: torch.Tensor,
    owned_C: torch.Tensor,
) -> None:
    """Replace logits by exp(logit - peak) · factor, minus 1 at an owned target, rounded once at the end.

    Args:
        logits_CV: Floating point [C, V], each row contiguous. The kernel overwrites it.
        peak_C: float32 [C] (float64 for float64 logits), contiguous like the three tensors below.
        factor_C: Shape and dtype of `peak_C`.
        target_C: int64 [C]: the column of the token's label.
        owned_C: bool [C]: whether this process's shard has the label.
    """
    tokens, vocabulary = logits_CV.shape
    columns = _columns(vocabulary)
    with torch.cuda.device_of(logits_CV):
        _gradient_kernel[(tokens, triton.cdiv(vocabulary, columns))](
            logits_CV,
            peak_C,
            factor_C,
            target_C,
            owned_C,
            logits_CV.stride(0),
            vocabulary,
            columns,
            num_warps=_WARPS,
        )


def _columns(vocabulary: int) -> int:
    return min(_COLUMNS, triton.next_power_of_2(vocabulary))


@triton.jit
def _statistics_kernel(
    logits: tl.tensor,
    peak_C: tl.tensor,
    sum_C: tl.tensor,
    row_stride: tl.tensor,
    vocabulary: tl.constexpr,
    lowest: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    # One program computes one token, so that it adds in the same order every time. The index has 64 bits, since a chunk
    # may have more than 2³¹ logits.
    token = tl.program_id(0).to(tl.int64)
    precise = peak_C.dtype.element_ty
    column_B = tl.arange(0, columns)
    # Start from a finite number: -inf minus -inf would be NaN.
    peak = tl.full((), lowest, precise)
    # Keep one sum for each column of a block. Threads then exchange only the peak before the end.
    sum_B = tl.zeros((columns,), precise)
    for start in range(0, vocabulary, columns):
        inside_B = start + column_B < vocabulary
        logits_B = tl.load(logits + token * row_stride + start + column_B, inside_B, -float("inf")).to(precise)
        higher = tl.maximum(peak, tl.max(logits_B, 0))
        sum_B = sum_B * tl.exp(peak - higher) + tl.exp(logits_B - higher)
        peak = higher
    tl.store(peak_C + token, peak)
    tl.store(sum_C + token, tl.sum(sum_B, 0))


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    peak_C: tl.tensor,
    factor_C: tl.tensor,
    target_C: tl.tensor,
    owned_C: tl.tensor,
    row_stride: tl.tensor,
    vocabulary: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * columns + tl.arange(0, columns)
    inside_B = column_B < vocabulary
    place_B = logits + token * row_stride + column_B
    peak, factor = tl.load(peak_C + token), tl.load(factor_C + token)
    target_B = (column_B == tl.load(target_C + token)) & tl.load(owned_C + token)
    gradient_B = tl.exp(tl.load(place_B, inside_B).to(peak.dtype) - peak) * factor
    gradient_B = tl.where(target_B, gradient_B - 1, gradient_B)
    tl.store(place_B, gradient_B.to(logits.dtype.element_ty), inside_B)
