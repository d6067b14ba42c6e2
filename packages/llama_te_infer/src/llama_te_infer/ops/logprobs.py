"""Log-probabilities of chosen tokens and of the likeliest ones: `torch.ops.llama_te.logprobs`.

Shapes: B rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import torch

from .library import cpu_kernel, kernel, register


def logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    top_logprobs: torch.Tensor,
    top_tokens: torch.Tensor,
) -> None:
    """Compute log-probabilities without a table of all of them.

    The sums have no order, so a row has the same bits in any batch. A row with NaN, or whose greatest logit is
    infinite, gets NaN.

    Args:
        logits: [B, V], bfloat16, float16 or float32; rows may lie apart.
        tokens: int64 [B].
        logprobs: float32 [B]; receives the tokens' log-probabilities, NaN of a token outside the vocabulary.
        top_logprobs: float32 [B, K], K at most V; receives the greatest log-probabilities, in falling order.
        top_tokens: int64 [B, K]; receives their tokens, the lower one first of those with equal logits.

    Raises:
        TypeError: An argument is no dense tensor.
        ValueError: An argument does not fit.
        RuntimeError: The extension is missing, or the tensors are on a GPU and it was built without CUDA, or the launch
            failed.
    """
    torch.ops.llama_te.logprobs(logits, tokens, logprobs, top_logprobs, top_tokens)


register(
    "logprobs(Tensor logits, Tensor tokens, Tensor(a!) logprobs, Tensor(b!) top_logprobs, Tensor(c!) top_tokens) -> ()",
    cpu=cpu_kernel("logprobs_cpu"),
    cuda=kernel("logprobs_cuda"),
)
