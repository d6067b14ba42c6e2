"""The scale of an FP8 weight. Weights that a model held in FP8 come back bit for bit.

Such a checkpoint has w = dtype(q · s) with FP8 numbers q and one scale s, and does not store s. FP8 has only 126
positive magnitudes, so the search for s needs only the distinct magnitudes of w, whatever the size of the tensor.

Shapes: M positive FP8 numbers, N distinct magnitudes of a weight.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
MAGNITUDES = torch.arange(1, 127, dtype=torch.uint8).view(FP8).float()  # all positive FP8 numbers, ascending

# Bits of float32 numbers, which sort as the numbers do.
_SMALLEST_SCALE = 0x00800000  # the smallest normal number
_INFINITY = 0x7F800000
_MANTISSA = 0x007FFFFF


def quantize(weight: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Round weight / scale to the nearest FP8 numbers."""
    return (weight.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def exact_scale(magnitudes: torch.Tensor, dtype: torch.dtype) -> float | None:
    """Find a scale with which FP8 numbers q give the magnitudes back exactly, as dtype(q · scale).

    The largest magnitude can stand for several FP8 numbers. Each of them fixes the scale within a fraction of the
    distance between FP8 numbers, and so fixes the FP8 number of every other magnitude. dtype(q · s) grows with s, so
    the scales that give one magnitude back form an interval of float32 numbers. Bisection finds the interval, whatever
    is rounded on the way. Any scale in the intersection of all intervals gives all magnitudes back. (If `dtype` holds
    small magnitudes with fewer bits, the search may miss a scale that exists.)

    Args:
        magnitudes: Distinct positive numbers of `dtype`, in float32.
        dtype: Dtype of the weights.

    Returns:
        The scale, a power of two if one is possible; `None` if there is none.
    """
    if len(magnitudes) > len(MAGNITUDES):
        return None
    if len(magnitudes) == 0:
        return 1.0
    top_M1 = MAGNITUDES.flip(0)[:, None]  # the largest first: it leaves the most of FP8's range to small weights
    quantized_MN = quantize(magnitudes, magnitudes.max() / top_M1).float()
    lowest_MN = _first_scale(quantized_MN, magnitudes, dtype, above=False)
    highest_MN = _first_scale(quantized_MN, magnitudes, dtype, above=True) - 1
    lowest_M = lowest_MN.amax(1).clamp(min=_SMALLEST_SCALE)
    highest_M = highest_MN.amin(1).clamp(max=_INFINITY - 1)
    possible_M = (quantized_MN > 0).all(1) & (lowest_M <= highest_M)
    for lowest, highest in zip(lowest_M[possible_M].tolist(), highest_M[possible_M].tolist(), strict=True):
        power_of_two = (lowest + _MANTISSA) & ~_MANTISSA
        bits = power_of_two if power_of_two <= highest else (lowest + highest) // 2
        scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        if torch.equal((quantize(magnitudes, scale).float() * scale).to(dtype).float(), magnitudes):
            return float(scale)
    return None


def _first_scale(quantized_MN: torch.Tensor, wanted_N: torch.Tensor, dtype: torch.dtype, above: bool) -> torch.Tensor:
    """Bits of the first float32 scale whose product reaches the wanted number, or exceeds it if `above`."""
    low = torch.zeros(quantized_MN.shape, dtype=torch.int32)  # never enough
    high = torch.full_like(low, _INFINITY)  # always enough
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        made = (quantized_MN * middle.view(torch.float32)).to(dtype).float()
        enough = made > wanted_N if above else made >= wanted_N
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high
