"""Greedy sampling: `torch.ops.llama_te.greedy`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch

from .checks import address_of, check_aligned, check_tensor, name_of, shape_of, strides_of, vector_elements
from .library import cuda_function, launch_arguments, register

NO_TOKEN = -1
"""In place of a token where a row has NaN, or its greatest logit is infinite: nothing can be chosen from it."""


def greedy(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    """Take each row's most likely token, the lowest id among equals, and count it.

    A row with NaN, or whose greatest logit is infinite, gets `NO_TOKEN` and is counted too.

    Args:
        logits: [B, V]; on a GPU bfloat16, V and the rows' stride a multiple of 8.
        tokens: int64 [B]; receives the tokens.
        lengths: int32 [B]; the operator adds 1 to each length except 0. Padding rows have length 0.
        best: int64 [B], zeros before and after the call. Calls that may run at the same time need separate tensors.
        tickets: int32 [B], semaphores: zeros before and after the call. Calls that may run at the same time need
            separate tensors.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.greedy(logits, tokens, lengths, best, tickets)


def _greedy_cuda(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    _check(logits, tokens, lengths, best, tickets)
    rows, vocabulary = logits.shape
    stride, elements = strides_of(logits)[0], vector_elements(torch.bfloat16)
    if logits.dtype != torch.bfloat16 or vocabulary % elements or stride % elements:
        raise ValueError(
            f"logits is {name_of(logits.dtype)} {shape_of(logits)} with the strides {logits.stride()}: on a GPU "
            f"allowed are bfloat16, and V and the rows' stride multiples of {elements}."
        )
    check_aligned(logits=logits)
    if rows == 0:
        return
    cuda_function("greedy_cuda")(
        **launch_arguments(logits),
        logits=logits.data_ptr(),
        row_stride=stride * logits.itemsize,
        rows=rows,
        vocabulary=vocabulary,
        tokens=tokens.data_ptr(),
        lengths=address_of(lengths),
        best=best.data_ptr(),
        tickets=tickets.data_ptr(),
    )


def _greedy_cpu(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    _check(logits, tokens, lengths, best, tickets)
    greatest_B1 = logits.amax(1, keepdim=True)  # NaN where the row has NaN
    token_B = (logits == greatest_B1).byte().argmax(1)
    tokens.copy_(token_B.where(greatest_B1[:, 0].isfinite(), NO_TOKEN))
    if lengths is not None:
        lengths.add_(lengths > 0)


register(
    "greedy(Tensor logits, Tensor(a!) tokens, Tensor(b!)? lengths, Tensor(c!) best, Tensor(d!) tickets) -> ()",
    cpu=_greedy_cpu,
    cuda=_greedy_cuda,
)


def _check(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    device = logits.device
    check_tensor("logits", logits, logits.dtype, device, (None, None), "[B, V]")
    rows, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError(f"logits has the shape {shape_of(logits)}: there must be a token to take.")
    check_tensor("tokens", tokens, torch.int64, device, (rows,), "[B]")
    if lengths is not None:
        check_tensor("lengths", lengths, torch.int32, device, (rows,), "[B]")
    check_tensor("best", best, torch.int64, device, (rows,), "[B]")
    check_tensor("tickets", tickets, torch.int32, device, (rows,), "[B]")
