"""FP8 of many rows, each with a scale of its own: `torch.ops.llama_te.quantize_rows`.

Shapes: B rows, K features.
"""

from __future__ import annotations

import torch

from .library import extension, kernel, register

GREATEST = 448.0  # of float8_e4m3fn
LEAST = 2.0**-116  # of a row whose scale has a finite inverse


def quantize_rows(
    input: torch.Tensor, output: torch.Tensor, scale: torch.Tensor, *, factor: torch.Tensor | None = None
) -> None:
    """Divide rows by their scales, and round to FP8: a row's scale is its greatest absolute number divided by 448.

    A row's result does not depend on the other rows. NaN stays NaN, and infinities make NaN of themselves and zeros of
    their row's other numbers. Rows whose numbers are all below 2^-116 become zeros with the scale 0.

    Args:
        input: bfloat16 [B, K], contiguous. On a GPU K is a multiple of 16; on a CPU float16, float32 and float64 also
            work.
        output: float8_e4m3fn [B, K], contiguous.
        scale: float32 [B], receives each row's scale, times `factor`.
        factor: float32 [1], such as the scale of a weight that multiplies the rows.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.quantize_rows(input, factor, output, scale)


def _quantize_rows_cpu(
    input: torch.Tensor, factor: torch.Tensor | None, output: torch.Tensor, scale: torch.Tensor
) -> None:
    extension().quantize_rows_cpu_check(input, factor, output, scale)
    store_quantized(input, factor, output, scale)


def store_quantized(
    input: torch.Tensor, factor: torch.Tensor | None, output: torch.Tensor, scale: torch.Tensor
) -> None:
    """Do the work of `quantize_rows` by PyTorch's operations."""
    if not input.shape[1]:
        scale.zero_()
        return
    value_BK = input.float()
    greatest_B = value_BK.abs().nan_to_num(0.0, torch.inf).amax(dim=1)
    is_zero_B = greatest_B < LEAST
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    inverse_B = (torch.full_like(greatest_B, GREATEST) / greatest_B).masked_fill(is_zero_B, 0.0)
    # Rounding may have made the product of the greatest number a little larger than 448.
    output.copy_((value_BK * inverse_B[:, None]).clamp(-GREATEST, GREATEST))
    scale.copy_((greatest_B / GREATEST).masked_fill(is_zero_B, 0.0))
    if factor is not None:
        scale.mul_(factor)


register(
    "quantize_rows(Tensor input, Tensor? factor, Tensor(a!) output, Tensor(b!) scale) -> ()",
    cpu=_quantize_rows_cpu,
    cuda=kernel("quantize_rows_cuda"),
)
