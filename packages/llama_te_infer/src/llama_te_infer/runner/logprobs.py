"""Log-probabilities to report.

Shapes: B rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..ops import library
from ..ops.logprobs import logprobs


class Logprobs(NamedTuple):
    """Log-probabilities of the model itself, in float32.

    Attributes:
        logprob_B: Of the rows' tokens.
        top_logprob_BK: The highest ones, in falling order; `None` if none are wanted.
        top_token_BK: int64, their tokens; the lower id comes first where logits are equal.
    """

    logprob_B: torch.Tensor
    top_logprob_BK: torch.Tensor | None
    top_token_BK: torch.Tensor | None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Logprobs:
        """Return what a function makes of each tensor."""
        logprob_B, *top = self
        return Logprobs(change(logprob_B), *(None if tensor is None else change(tensor) for tensor in top))


def samples_by_operators(device: torch.device) -> bool:
    """Return whether compiled operators sample on this device. On others PyTorch's operations do."""
    return library.available(device.type)


def token_logprobs(logits_BV: torch.Tensor, token_B: torch.Tensor, count: int) -> Logprobs:
    """Return log-probabilities of tokens, and of the `count` likeliest ones. Does not wait for the device.

    Args:
        logits_BV: bfloat16, float16, float32 or float64.
        token_B: int64; the result for a token outside the vocabulary means nothing.
        count: K; of a smaller vocabulary all tokens.
    """
    count = min(count, logits_BV.shape[1])
    if samples_by_operators(logits_BV.device):
        found = _by_operator(logits_BV, token_B, count)
    else:
        found = _by_pytorch(logits_BV, token_B, count)
    return found if count else Logprobs(found.logprob_B, None, None)


def concatenated(parts: Sequence[Logprobs]) -> Logprobs:
    """Put the rows of several results together, of which all or none have likeliest tokens."""
    if parts[0].top_logprob_BK is None:
        return Logprobs(torch.cat([part.logprob_B for part in parts]), None, None)
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _by_operator(logits_BV: torch.Tensor, token_B: torch.Tensor, count: int) -> Logprobs:
    rows, device = len(logits_BV), logits_BV.device
    logprob_B = torch.empty(rows, dtype=torch.float32, device=device)
    top_logprob_BK = torch.empty(rows, count, dtype=torch.float32, device=device)
    top_token_BK = torch.empty(rows, count, dtype=torch.int64, device=device)
    read_BV = logits_BV.float() if logits_BV.dtype == torch.float64 else logits_BV
    logprobs(read_BV, token_B, logprob_B, top_logprob_BK, top_token_BK)
    return Logprobs(logprob_B, top_logprob_BK, top_token_BK)


def _by_pytorch(logits_BV: torch.Tensor, token_B: torch.Tensor, count: int) -> Logprobs:
    logits_BV = logits_BV.float()
    logprob_BV = logits_BV.log_softmax(dim=-1)
    logprob_B = logprob_BV.gather(1, token_B.clamp(0, logits_BV.shape[1] - 1)[:, None])[:, 0]
    _, top_token_BK = largest(logits_BV, count)
    return Logprobs(logprob_B, logprob_BV.gather(1, top_token_BK), top_token_BK)


def largest(value_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest float32 values of each row in descending order, and equal values in the order of their index.

    `torch.topk` does not define its choice among equal values, nor their order. Many bfloat16 logits are equal.

    Returns:
        Values [B, count] and their indices, int64.
    """
    bits_BV = (value_BV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    # Make integers with the order of the numbers: a negative number's bits ascend as the number descends.
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)
    last_first_V = torch.arange(2**32 - 1, 2**32 - 1 - value_BV.shape[-1], -1, device=value_BV.device)
    key_BK = ((order_BV.long() << 32) | last_first_V).topk(count, dim=-1).values
    index_BK = (2**32 - 1) - (key_BK & (2**32 - 1))
    return value_BV.gather(-1, index_BK), index_BK
