"""The hooks that let a cache rotate and store for a Transformer Engine layer, on a stand-in for its call path.

TE's attention projects, splits, rotates if it was given angles, and calls its core attention, which hands keys and
values to the cache's `step` and gets all of them back. The stand-in does the same in plain PyTorch; tests/gpu has the
real one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core.fake_transformer_engine import FakeTransformerEngine
from llama_te_core.reference_layer import split_qkv
from llama_te_core.rope import rotate
from llama_te_infer import InferenceParams

HEADS, KV_HEADS, DIM = 4, 2, 16


class Config:
    attn_input_format = "bshd"
    num_attention_heads = HEADS
    num_key_value_heads = KV_HEADS
    head_dim = DIM


class CoreAttention(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, inference_params: Any) -> Any:
        assert query.is_contiguous()
        keys, values, _, _, _, qkv_format = inference_params.step(1, key, value, "bshd")
        assert qkv_format == "bshd"
        lengths_B = inference_params.cu_seqlens_kv.diff()[: query.shape[0]]
        visible_BSL = (
            torch.arange(keys.shape[1])
            <= (lengths_B[:, None] - query.shape[1] + torch.arange(query.shape[1]))[..., None]
        )
        parts = (x.transpose(1, 2) for x in (query, keys, values))
        return F.scaled_dot_product_attention(*parts, attn_mask=visible_BSL[:, None], enable_gqa=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layernorm_qkv = nn.Linear(24, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.core_attention = CoreAttention()
        self.rotations = 0

    def forward(self, hidden: torch.Tensor, *, inference_params: Any, rotary_pos_emb: torch.Tensor | None) -> Any:
        if 1 not in inference_params.cache_manager.cache:
            inference_params.allocate_memory(1)
        qkv = self.layernorm_qkv(hidden).unflatten(-1, (KV_HEADS, HEADS // KV_HEADS + 2, DIM))
        query, key, value = split_qkv(qkv)
        if rotary_pos_emb is not None:
            self.rotations += 1
            start = inference_params.get_seqlens_pre_step()[: hidden.shape[0], None]
            angles = rotary_pos_emb[start + torch.arange(hidden.shape[1]), 0, 0]
            query, key = rotate(query, key, angles)
        return self.core_attention(query.contiguous(), key, value, inference_params=inference_params)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention = Attention()

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> Any:
        return self.self_attention(hidden, **arguments)


def test_the_cache_does_what_the_layer_would(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTransformerEngine().install(monkeypatch)
    from llama_te_core.transformer_engine_layer import CacheRotates

    torch.manual_seed(0)
    hooked, plain = Layer(), Layer()
    plain.load_state_dict(hooked.state_dict())
    hooks = CacheRotates(hooked, Config(), 1)  # type: ignore[arg-type]
    angle_PD = torch.outer(torch.arange(32.0), torch.logspace(0, -3, DIM // 2))
    angles = torch.cat((angle_PD, angle_PD), -1)[:, None, None]

    def run(layer: Layer, fuses_rope: bool) -> tuple[list[torch.Tensor], InferenceParams]:
        monkeypatch.setattr(InferenceParams, "fuses_rope", fuses_rope)
        cache = InferenceParams(3, 16, KV_HEADS, DIM, torch.float32, device="cpu")
        generator = torch.Generator().manual_seed(1)
        outputs = []
        with torch.no_grad():
            for width in (5, 1, 3, 1):
                cache.pre_step(OrderedDict((row, width) for row in range(3)))
                hidden = torch.randn(3, width, 24, generator=generator)
                outputs.append(layer(hidden, inference_params=cache, rotary_pos_emb=angles))
        return outputs, cache

    wanted, _ = run(plain, False)
    for layer, fuses_rope in ((hooked, True), (hooked, False)):
        layer.self_attention.rotations = 0
        outputs, cache = run(layer, fuses_rope)
        for output, expected in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert layer.self_attention.rotations == (0 if fuses_rope else 4)
        assert list(cache.sequences.values()) == [10, 10, 10]
        assert hooks._cache is None, "a layer must not keep a cache alive"
