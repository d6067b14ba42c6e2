"""Embedding lookup: `torch.ops.llama_te.embed`.

Shapes: B rows, V vocabulary, E hidden size.
"""

from __future__ import annotations

import torch

from .checks import check_aligned, check_contiguous, check_tensor
from .library import cuda_function, launch_arguments, limits, register


def embed(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    """Copy each token's row of the table. A token outside the table gives zeros.

    Args:
        tokens: int64 [B].
        table: [V, E], contiguous; on a GPU a row is a multiple of 16 bytes.
        output: [B, E], contiguous, of the table's dtype.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.embed(tokens, table, output)


def _embed_cuda(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    _check(tokens, table, output)
    row_bytes, vector_bytes = table.shape[1] * table.itemsize, limits().vector_bytes
    if row_bytes % vector_bytes:
        raise ValueError(f"table has rows of {row_bytes} bytes: on a GPU allowed are multiples of {vector_bytes}.")
    check_aligned(table=table, output=output)
    if len(tokens) == 0 or row_bytes == 0:
        return
    cuda_function("embed_cuda")(
        **launch_arguments(tokens),
        tokens=tokens.data_ptr(),
        table=table.data_ptr(),
        output=output.data_ptr(),
        rows=len(tokens),
        vocabulary=table.shape[0],
        row_bytes=row_bytes,
    )


def _embed_cpu(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    _check(tokens, table, output)
    known_B = (tokens >= 0) & (tokens < len(table))
    output.copy_(torch.where(known_B[:, None], table[tokens.where(known_B, 0)], 0))


register("embed(Tensor tokens, Tensor table, Tensor(a!) output) -> ()", cpu=_embed_cpu, cuda=_embed_cuda)


def _check(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    dtype, device = table.dtype, table.device
    check_tensor("tokens", tokens, torch.int64, device, (None,), "[B]")
    check_tensor("table", table, dtype, device, (None, None), "[V, E]")
    check_tensor("output", output, dtype, device, (len(tokens), table.shape[1]), "[B, E]")
    check_contiguous(table=table, output=output)
