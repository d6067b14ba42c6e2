"""Embedding lookup: `torch.ops.llama_te.embed`.

Shapes: B rows, V vocabulary, E hidden size.
"""

from __future__ import annotations

import torch

from .library import extension, kernel, register


def embed(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    """Copy each token's row of the table. A token outside the table gives zeros.

    Args:
        tokens: int64 [B]; on a GPU at most 65,535 of them.
        table: bfloat16, float16, float32 or float64 [V, E], contiguous; on a GPU a row is a multiple of 16 bytes.
        output: [B, E], contiguous, of the table's dtype. No two tensors overlap.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.embed(tokens, table, output)


def _embed_cpu(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    extension().embed_cpu_check(tokens, table, output)
    known_B = (tokens >= 0) & (tokens < len(table))
    output.zero_()
    output[known_B] = table[tokens[known_B]]


register("embed(Tensor tokens, Tensor table, Tensor(a!) output) -> ()", cpu=_embed_cpu, cuda=kernel("embed_cuda"))
