"""Choosing each row's next token: `torch.ops.llama_te.draw`.

Shapes: B rows of the batch, R rows of the tables, V vocabulary, M masks of W words.
"""

from __future__ import annotations

import torch

from .library import cpu_kernel, kernel, register

# Bits of the last column of `integers`: the tables that a row needs.
BIASED, MASKED, COUNTED = 1, 2, 4


def draw(
    logits: torch.Tensor,
    numbers: torch.Tensor,
    integers: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    seen: torch.Tensor | None,
    ending: torch.Tensor | None,
    counts: torch.Tensor | None,
    mask_index: torch.Tensor | None,
    masks: torch.Tensor | None,
    tokens: torch.Tensor,
) -> None:
    """Choose a token for each row, and record it in the row's tables.

    The row's logits are changed in this order: its mask, bias, repetition penalty, tokens that may not end it yet,
    frequency and presence penalty, temperature. Then top-k, top-p and min-p select tokens, and the one with the most
    logit plus Gumbel noise is taken. A token depends on its own row alone: noise is a hash of the seed, the position
    and the token's id. A row at temperature 0 takes its likeliest token, the lowest id among equals. A row with NaN, or
    whose greatest changed logit is infinite, gets `NO_TOKEN`, and nothing is recorded.

    Args:
        logits: [B, V], bfloat16, float16 or float32; rows may lie apart.
        numbers: float32 [R, 6]: temperature, top_p, min_p, and the repetition, presence and frequency penalty. The
            first B rows of this and the other tables belong to the rows of `logits`.
        integers: int64 [R, 4]: seed; top_k from 1 to V, where V takes all tokens; the least position at which the row
            may end; and the sum of `BIASED`, `MASKED` and `COUNTED` of the tables that the row needs. Other values of
            top_k count as the nearest one.
        positions: int32 [B], the positions of the new tokens.
        bias: float32 [R, V] or `None`, added to the logits of `BIASED` rows.
        seen: bool [R, V] or `None`: tokens with a repetition penalty, of `MASKED` rows. Receives the tokens.
        ending: bool [R, V]: tokens that end `MASKED` rows; `None` where `seen` is.
        counts: int32 [R, V] or `None`: how often `COUNTED` rows have written each token. Receives the tokens.
        mask_index: int32 [B] or `None`: each row's mask. A number that is no index of `masks`, such as -1, means none.
        masks: int32 [M, W], W at least V / 32: one bit for each token, 1 if the row may write it. The lowest bit of the
            first word is token 0. `None` where `mask_index` is.
        tokens: int64 [B], contiguous; receives the tokens.

    Raises:
        TypeError: An argument is no dense tensor.
        ValueError: An argument does not fit.
        RuntimeError: The extension is missing, or the tensors are on a GPU and it was built without CUDA, or the launch
            failed.
    """
    torch.ops.llama_te.draw(logits, numbers, integers, positions, bias, seen, ending, counts, mask_index, masks, tokens)


register(
    "draw(Tensor logits, Tensor numbers, Tensor integers, Tensor positions, Tensor? bias, Tensor(a!)? seen, "
    "Tensor? ending, Tensor(b!)? counts, Tensor? mask_index, Tensor? masks, Tensor(c!) tokens) -> ()",
    cpu=cpu_kernel("draw_cpu"),
    cuda=kernel("draw_cuda"),
)
