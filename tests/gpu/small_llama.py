"""The model, the batch and the distance that the GPU tests share."""

from __future__ import annotations

from typing import Any

import torch

# Large enough for every kernel's usual path, and small enough for a float32 run on the same GPU.
MODEL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.03,
}
LENGTHS = (128, 77, 1, 100)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float((x - y).norm() / y.norm())


def batch(vocabulary: int = 8192, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(3, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    place_S = torch.arange(max(LENGTHS))
    mask_BS = place_S < torch.tensor(LENGTHS)[:, None]
    if left:
        mask_BS = mask_BS.flip(1)
    return ids_BS.masked_fill(~mask_BS, 0).cuda(), mask_BS.long().cuda()
