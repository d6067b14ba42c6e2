"""What `rms_norm` and `swiglu` must give, by float64 PyTorch, and how far they may be from it.

A result is rounded once, by half a unit in the last place, `u`, or by that much of the least normal number. RMSNorm's
factor, from sums of up to 28,672 squares in float32, and the activation are off by less than 2^-16.

Shapes: B rows, K features, F features of the activation.
"""

from __future__ import annotations

import torch


def expected_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows normed, and the bound of the error; `hidden` has the addend."""
    hidden_BK = hidden.double()
    normed_BK = hidden_BK * torch.rsqrt(hidden_BK.square().mean(1, keepdim=True) + epsilon) * weight.double()
    return normed_BK, _bound(normed_BK, hidden.dtype)


def expected_swiglu(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation times the up projection, and the bound of the error."""
    gate_BF, up_BF = input.double().chunk(2, dim=1)
    product_BF = gate_BF * gate_BF.sigmoid() * up_BF
    return product_BF, _bound(product_BF, input.dtype)


def _bound(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = torch.finfo(dtype)
    return kind.eps / 2 * exact.abs().clamp(min=kind.tiny) + 2**-16 * exact.abs()
