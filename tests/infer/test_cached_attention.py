"""The hooks that join a Transformer Engine layer and a cache, on a stand-in for TE's call path.

TE's attention projects, splits, rotates if it was given angles, and calls its core attention, which hands keys and
values to the cache's `step` and gets all of them back. The stand-in does the same in plain PyTorch, and takes packed
queries as badly as TE 2.20 does; tests/gpu has the real one.
"""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core.fake_transformer_engine import FakeTransformerEngine
from llama_te_core.layers.reference import split_qkv
from llama_te_core.layers.rope import rotate
from llama_te_infer import InferenceParams

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 16, 24
ROWS = HEADS + 2  # more rows than heads: see CachedAttention


class CoreAttention(nn.Module):
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, qkv_format: str, max_seqlen_q: int,
        inference_params: Any,
    ) -> Any:  # fmt: skip
        assert query.is_contiguous()
        assert query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        keys, values, cu_new, cu_all, _, _ = inference_params.step(1, key, value, qkv_format)
        new_B, all_B = cu_new.diff(), cu_all.diff()
        if qkv_format == "thd":
            parts = list(query.split(new_B.tolist()))
        else:
            assert max_seqlen_q == query.shape[1]
            parts = [row[:new] for row, new in zip(query, new_B.tolist(), strict=True)]
        output = torch.full_like(query, float("nan"))  # reading an element without a token gives NaN
        for row, part in enumerate(parts):
            length, new = int(all_B[row]), len(part)
            visible_SL = torch.arange(length) <= length - new + torch.arange(new)[:, None]
            states = (x.transpose(0, 1) for x in (part, keys[row, :length], values[row, :length]))
            result = F.scaled_dot_product_attention(*states, attn_mask=visible_SL, enable_gqa=True).transpose(0, 1)
            if qkv_format == "bshd":
                output[row, :new] = result
            elif row < HEADS:
                output[int(cu_new[row]) : int(cu_new[row]) + new] = result
        return output.flatten(-2)


class Attention(nn.Module):
    def __init__(self, qkv_format: str) -> None:
        super().__init__()
        self.layernorm_qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.core_attention = CoreAttention()
        self.qkv_format = qkv_format
        self.rotations = 0

    def forward(
        self, hidden: torch.Tensor, *, inference_params: Any, rotary_pos_emb: torch.Tensor | None, **arguments: Any
    ) -> Any:
        if 1 not in inference_params.cache_manager.cache:
            inference_params.allocate_memory(1)
        qkv = self.layernorm_qkv(hidden).unflatten(-1, (KV_HEADS, HEADS // KV_HEADS + 2, DIM))
        query, key, value = split_qkv(qkv)
        if rotary_pos_emb is not None:
            self.rotations += 1
            positions = inference_params._positions(qkv, self.qkv_format)
            query, key = rotate(query, key, rotary_pos_emb[positions, 0, 0])
        return self.core_attention(
            query.contiguous(), key, value, qkv_format=self.qkv_format, inference_params=inference_params, **arguments
        )


class Layer(nn.Module):
    def __init__(self, qkv_format: str) -> None:
        super().__init__()
        self.self_attention = Attention(qkv_format)

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> Any:
        return self.self_attention(hidden, **arguments)


STEPS = [[5] * ROWS, [1] * ROWS, [3, 0, 2, 1, 4, 3], [1] * ROWS, [1, 0, 1, 1, 0, 1]]
ANGLES = torch.outer(torch.arange(32.0), torch.logspace(0, -3, DIM // 2)).repeat(1, 2)[:, None, None]


def run(layer: Layer, qkv_format: str, filling: int = 0) -> list[list[torch.Tensor]]:
    """Return the rows' outputs at each step; `filling` tokens of no row follow the packed tokens."""
    cache = InferenceParams(
        ROWS + 1, 16, KV_HEADS, DIM, torch.float32, qkv_format=qkv_format, max_ctx_len=16, device="cpu"
    )
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for new in STEPS:
        cache.pre_step(OrderedDict(enumerate(new)))
        rows = [torch.randn(count, WIDTH, generator=generator) for count in new]
        if qkv_format == "thd":
            hidden = F.pad(torch.cat(rows), (0, 0, 0, filling))
        else:
            hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.no_grad():
            output = layer(hidden, inference_params=cache, rotary_pos_emb=ANGLES, max_seqlen_q=max(new))
        assert output.shape == (*hidden.shape[:-1], HEADS * DIM)
        if qkv_format == "thd":
            assert not output[sum(new) :].isnan().any()
            outputs.append(list(output[: sum(new)].split(new)))
        else:
            outputs.append([row[:count] for row, count in zip(output, new, strict=True)])
    assert list(cache.sequences.values()) == [sum(counts) for counts in zip(*STEPS, strict=True)]
    return outputs


@pytest.mark.parametrize("fuses_rope", [True, False], ids=["the cache rotates", "the layer rotates"])
@pytest.mark.parametrize(("qkv_format", "filling"), [("bshd", 0), ("thd", 0), ("thd", 3)])
def test_outputs_are_those_of_a_padded_batch(
    qkv_format: str, filling: int, fuses_rope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeTransformerEngine().install(monkeypatch)
    from llama_te_core.layers.te_cached_attention import CachedAttention

    torch.manual_seed(0)
    plain, hooked = Layer("bshd"), Layer(qkv_format)
    hooked.load_state_dict(plain.state_dict())
    config: Any = SimpleNamespace(
        attn_input_format=qkv_format, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM
    )
    hooks = CachedAttention(hooked, config, 1)
    monkeypatch.setattr(InferenceParams, "fuses_rope", False)
    wanted = run(plain, "bshd")
    monkeypatch.setattr(InferenceParams, "fuses_rope", fuses_rope)
    for outputs, expected in zip(run(hooked, qkv_format, filling), wanted, strict=True):
        for output, row in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, row, atol=1e-5, rtol=1e-5)
    assert hooked.self_attention.rotations == (0 if fuses_rope else len(STEPS))
    assert hooks._cache is hooks._query is hooks._unpad is None, "a layer must not keep a cache alive"
