"""Greedy sampling: `torch.ops.llama_te.greedy`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch

from .library import extension, kernel, register

NO_TOKEN = -1
"""In place of a token where a row has NaN, or its greatest logit is infinite: nothing can be chosen from it."""


def greedy(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    """Take each row's most likely token, the lowest id among equals, and count it.

    A row with NaN, or whose greatest logit is infinite, gets `NO_TOKEN` and is counted too.

    Args:
        logits: [B, V]; on a GPU bfloat16, V and the rows' stride a multiple of 8, at most 65,535 rows.
            On a CPU float16, float32 and float64 also work. No two tensors overlap.
        tokens: int64 [B]; receives the tokens.
        lengths: int32 [B]; the operator adds 1 to each length except 0. Padding rows have length 0.
        best: int64 [B], zeros before and after the call. Calls that may run at the same time need separate tensors.
        tickets: int32 [B], semaphores: zeros before and after the call. Calls that may run at the same time need
            separate tensors.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.greedy(logits, tokens, lengths, best, tickets)


def _greedy_cpu(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    extension().greedy_cpu_check(logits, tokens, lengths, best, tickets)
    greatest_B1 = logits.amax(1, keepdim=True)  # NaN where the row has NaN
    token_B = (logits == greatest_B1).byte().argmax(1)
    tokens.copy_(token_B.where(greatest_B1[:, 0].isfinite(), NO_TOKEN))
    if lengths is not None:
        lengths.add_(lengths > 0)


register(
    "greedy(Tensor logits, Tensor(a!) tokens, Tensor(b!)? lengths, Tensor(c!) best, Tensor(d!) tickets) -> ()",
    cpu=_greedy_cpu,
    cuda=kernel("greedy_cuda"),
)
