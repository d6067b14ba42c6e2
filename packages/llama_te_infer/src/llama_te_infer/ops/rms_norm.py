"""RMSNorm of many rows, after a residual's addition: `torch.ops.llama_te.rms_norm`.

Shapes: B rows, K features.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import extension, kernel, register
from .quantize_rows import store_quantized


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    output: torch.Tensor,
    *,
    addend: torch.Tensor | None = None,
    addend_scale: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> None:
    """Add a product to rows and normalize them: `hidden += addend`, then RMSNorm of `hidden`.

    The operator rounds the sum and the norm's result, as `torch.add` and `torch.nn.functional.rms_norm` do. Arithmetic
    in between is float32. A row's result does not depend on the other rows.

    Args:
        hidden: bfloat16 [B, K], contiguous; receives the sum if there is an `addend`. On a GPU K is a multiple of 8; on
            a CPU float16, float32 and float64 also work.
        weight: bfloat16 [K].
        epsilon: Added to the mean of a row's squares.
        output: bfloat16 [B, K], contiguous; receives the normalized rows. Or float8_e4m3fn, which receives them as
            `quantize_rows` makes them; on a GPU K is a multiple of 16 then.
        addend: bfloat16 [B, K], contiguous. The three matrices do not overlap.
        addend_scale: float32 [B], multiplies the addend's rows.
        scale: float32 [B], receives the scales of an output in FP8.
        factor: float32 [1], multiplies these scales.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.rms_norm(hidden, weight, epsilon, addend, addend_scale, factor, output, scale)


def _rms_norm_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    addend: torch.Tensor | None,
    addend_scale: torch.Tensor | None,
    factor: torch.Tensor | None,
    output: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    extension().rms_norm_cpu_check(hidden, weight, epsilon, addend, addend_scale, factor, output, scale)
    if addend is not None and addend_scale is not None:
        hidden.copy_(hidden + addend * addend_scale[:, None])
    elif addend is not None:
        hidden.add_(addend)
    normed_BK = F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)
    if scale is None:
        output.copy_(normed_BK)
    else:
        store_quantized(normed_BK, factor, output, scale)


register(
    "rms_norm(Tensor(a!) hidden, Tensor weight, float epsilon, Tensor? addend, Tensor? addend_scale, Tensor? factor, "
    "Tensor(b!) output, Tensor(c!)? scale) -> ()",
    cpu=_rms_norm_cpu,
    cuda=kernel("rms_norm_cuda"),
)
