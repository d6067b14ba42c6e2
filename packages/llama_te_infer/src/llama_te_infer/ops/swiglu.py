"""SwiGLU of many rows: `torch.ops.llama_te.swiglu`.

Shapes: B rows, F features of the activation.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import extension, kernel, register
from .quantize_rows import store_quantized


def swiglu(
    input: torch.Tensor,
    output: torch.Tensor,
    *,
    input_scale: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> None:
    """Multiply SiLU of the gate with the up projection, in float32, and round once.

    Args:
        input: bfloat16 [B, 2 F], contiguous: gate, then up. On a GPU F is a multiple of 8; on a CPU float16,
            float32 and float64 also work.
        output: bfloat16 [B, F], contiguous, without overlap with `input`. Or float8_e4m3fn, which receives the rounded
            numbers as `quantize_rows` makes them; on a GPU F is a multiple of 16 then.
        input_scale: float32 [B], multiplies the rows of the input.
        scale: float32 [B], receives the scales of an output in FP8.
        factor: float32 [1], multiplies these scales.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.swiglu(input, input_scale, factor, output, scale)


def _swiglu_cpu(
    input: torch.Tensor,
    input_scale: torch.Tensor | None,
    factor: torch.Tensor | None,
    output: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    extension().swiglu_cpu_check(input, input_scale, factor, output, scale)
    gate_BF, up_BF = input.chunk(2, dim=-1)
    if input_scale is not None:
        gate_BF, up_BF = gate_BF * input_scale[:, None], up_BF * input_scale[:, None]
    activation_BF = F.silu(gate_BF.float()) * up_BF
    if scale is None:
        output.copy_(activation_BF)
    else:
        store_quantized(activation_BF.to(input.dtype), factor, output, scale)


register(
    "swiglu(Tensor input, Tensor? input_scale, Tensor? factor, Tensor(a!) output, Tensor(b!)? scale) -> ()",
    cpu=_swiglu_cpu,
    cuda=kernel("swiglu_cuda"),
)
