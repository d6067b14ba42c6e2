"""Drawing each row's next token: `torch.ops.llama_te.draw`, for CPU tensors.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch

from .library import extension, register


def draw(logits: torch.Tensor, numbers: torch.Tensor, integers: torch.Tensor, tokens: torch.Tensor) -> None:
    """Draw a token for each row: top-k, then top-p, then min-p, then the token with the most logit plus Gumbel noise.

    Logits are divided by the temperature first. A drawn token depends on its own row alone: noise is a hash of the
    seed, the position and the token's id. A row at temperature 0 gets its likeliest token, the lowest id among equals.
    A row with NaN, or whose greatest logit is infinite, gets `NO_TOKEN`.

    Args:
        logits: [B, V], bfloat16, float16 or float32; rows may lie apart.
        numbers: float32 [B, 3]: temperature, top_p and min_p.
        integers: int64 [B, 3]: seed; top_k from 1 to V, where V takes all tokens; the position of the new token. Other
            values of top_k count as the nearest one of these.
        tokens: int64 [B], contiguous; receives the tokens.

    Raises:
        TypeError: An argument is no dense tensor.
        ValueError: An argument does not fit.
        RuntimeError: The extension is missing.
    """
    torch.ops.llama_te.draw(logits, numbers, integers, tokens)


def _draw_cpu(logits: torch.Tensor, numbers: torch.Tensor, integers: torch.Tensor, tokens: torch.Tensor) -> None:
    extension().draw_cpu(logits, numbers, integers, tokens)


register("draw(Tensor logits, Tensor numbers, Tensor integers, Tensor(a!) tokens) -> ()", cpu=_draw_cpu)
