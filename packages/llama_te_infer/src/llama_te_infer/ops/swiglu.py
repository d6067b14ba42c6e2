"""SwiGLU of many rows: `torch.ops.llama_te.swiglu`.

Shapes: B rows, F features of the activation.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .checks import check_aligned, check_apart, check_bfloat16_vectors, check_contiguous, check_tensor
from .library import cuda_function, launch_arguments, register


def swiglu(input: torch.Tensor, output: torch.Tensor) -> None:
    """Multiply SiLU of the gate with the up projection, in float32, and round once.

    Args:
        input: bfloat16 [B, 2 F], contiguous: gate, then up. On a GPU F is a multiple of 8; on a CPU any dtype that the
            output shares.
        output: bfloat16 [B, F], contiguous, without overlap with `input`.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.swiglu(input, output)


def _swiglu_cuda(input: torch.Tensor, output: torch.Tensor) -> None:
    _check(input, output)
    check_bfloat16_vectors("output", output, "F")
    check_aligned(input=input, output=output)
    if output.numel() == 0:
        return
    cuda_function("swiglu_cuda")(
        **launch_arguments(input),
        input=input.data_ptr(),
        output=output.data_ptr(),
        rows=len(output),
        features=output.shape[1],
    )


def _swiglu_cpu(input: torch.Tensor, output: torch.Tensor) -> None:
    _check(input, output)
    gate_BF, up_BF = input.chunk(2, dim=-1)
    torch.mul(F.silu(gate_BF.float()), up_BF, out=output)


register("swiglu(Tensor input, Tensor(a!) output) -> ()", cpu=_swiglu_cpu, cuda=_swiglu_cuda)


def _check(input: torch.Tensor, output: torch.Tensor) -> None:
    dtype, device = input.dtype, input.device
    check_tensor("input", input, dtype, device, (None, None), "[B, 2 F]")
    rows, features = input.shape
    if features % 2:
        raise ValueError(f"input has {features} columns: half of them are the gate's, so pass an even number.")
    check_tensor("output", output, dtype, device, (rows, features // 2), "[B, F]")
    check_contiguous(input=input, output=output)
    check_apart("input", input, "output", output)
