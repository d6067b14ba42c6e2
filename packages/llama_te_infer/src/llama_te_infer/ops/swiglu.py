"""SwiGLU of many rows: `torch.ops.llama_te.swiglu`.

Shapes: B rows, F features of the activation.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import extension, kernel, register


def swiglu(input: torch.Tensor, output: torch.Tensor) -> None:
    """Multiply SiLU of the gate with the up projection, in float32, and round once.

    Args:
        input: bfloat16 [B, 2 F], contiguous: gate, then up. On a GPU F is a multiple of 8; on a CPU float16,
            float32 and float64 also work.
        output: bfloat16 [B, F], contiguous, without overlap with `input`.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.swiglu(input, output)


def _swiglu_cpu(input: torch.Tensor, output: torch.Tensor) -> None:
    extension().swiglu_cpu_check(input, output)
    gate_BF, up_BF = input.chunk(2, dim=-1)
    torch.mul(F.silu(gate_BF.float()), up_BF, out=output)


register("swiglu(Tensor input, Tensor(a!) output) -> ()", cpu=_swiglu_cpu, cuda=kernel("swiglu_cuda"))
