"""RMSNorm of many rows, after a residual's addition: `torch.ops.llama_te.rms_norm`.

Shapes: B rows, K features.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch.nn import functional as F

from .checks import address_of, check_aligned, check_apart, check_bfloat16_vectors, check_contiguous, check_tensor
from .library import cuda_function, launch_arguments, register


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    output: torch.Tensor,
    *,
    addend: torch.Tensor | None = None,
) -> None:
    """Add a product to rows and normalize them: `hidden += addend`, then RMSNorm of `hidden`.

    The operator rounds the sum and the norm's result, as `torch.add` and `torch.nn.functional.rms_norm` do. Arithmetic
    in between is float32. A row's result does not depend on the other rows.

    Args:
        hidden: bfloat16 [B, K], contiguous; receives the sum if there is an `addend`. On a GPU K is a multiple of 8; on
            a CPU any dtype that the other tensors share.
        weight: bfloat16 [K].
        epsilon: Added to the mean of a row's squares.
        output: bfloat16 [B, K], contiguous; receives the normalized rows.
        addend: bfloat16 [B, K], contiguous. The three matrices do not overlap.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.rms_norm(hidden, weight, epsilon, addend, output)


def _rms_norm_cuda(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, addend: torch.Tensor | None, output: torch.Tensor
) -> None:
    _check(hidden, weight, addend, output)
    check_bfloat16_vectors("hidden", hidden, "K")
    check_aligned(hidden=hidden, weight=weight, addend=addend, output=output)
    if hidden.numel() == 0:
        return
    cuda_function("rms_norm_cuda")(
        **launch_arguments(hidden),
        hidden=hidden.data_ptr(),
        addend=address_of(addend),
        weight=weight.data_ptr(),
        epsilon=epsilon,
        output=output.data_ptr(),
        rows=len(hidden),
        features=hidden.shape[1],
    )


def _rms_norm_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, addend: torch.Tensor | None, output: torch.Tensor
) -> None:
    _check(hidden, weight, addend, output)
    if addend is not None:
        hidden.add_(addend)
    output.copy_(F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon))


register(
    "rms_norm(Tensor(a!) hidden, Tensor weight, float epsilon, Tensor? addend, Tensor(b!) output) -> ()",
    cpu=_rms_norm_cpu,
    cuda=_rms_norm_cuda,
)


def _check(hidden: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None, output: torch.Tensor) -> None:
    dtype, device = hidden.dtype, hidden.device
    check_tensor("hidden", hidden, dtype, device, (None, None), "[B, K]")
    rows, features = hidden.shape
    check_tensor("weight", weight, dtype, device, (features,), "[K]")
    check_tensor("output", output, dtype, device, (rows, features), "[B, K]")
    matrices = {"hidden": hidden, "output": output}
    if addend is not None:
        check_tensor("addend", addend, dtype, device, (rows, features), "[B, K]")
        matrices["addend"] = addend
    check_contiguous(**matrices)
    for (one, first), (other, second) in combinations(matrices.items(), 2):
        check_apart(one, first, other, second)
