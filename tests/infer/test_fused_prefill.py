"""The fused prefill against the model's layers and float64, on the CPU, where its kernels are PyTorch operations."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.decode import backend
from llama_te_infer.decode import weights as weights_module
from llama_te_infer.decode.fused import FusedDecode
from llama_te_infer.decode.prefill import FusedPrefill, takes_fused_prefill
from llama_te_infer.decode.weights import LayerWeights, layer_weights
from llama_te_infer.kv_cache.engine_cache import EngineCache
from llama_te_infer.kv_cache.storage import tensors_of
from llama_te_infer.ops.prefill_attention import prefill_attention

from .test_fused_decode import distances, in_fp8, make_model

PAGE = 16
SIZES = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return convert_llama_hf_to_te(tiny_llama(**SIZES, initializer_range=0.2, eos_token_id=None))


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take any model."""
    monkeypatch.setattr(backend, "takes_fused_decode", lambda *arguments: True)


def engines(model: PreTrainedModel, **options: Any) -> tuple[Engine, Engine]:
    """An engine whose prompts the kernels read, and one whose prompts the layers read."""
    options = {"page_size": PAGE, "max_batch_size": 8, **options}
    fused, layers = (Engine(model, decode_implementation=name, **options) for name in ("fused", "layers"))
    assert isinstance(fused._runner.prefill.fused, FusedPrefill) and layers._runner.prefill.fused is None
    return fused, layers


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 272, (length,), generator=generator).tolist() for length in lengths]


# --- attention --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=5),
    group=st.sampled_from([1, 2, 4]),
    page_size=st.sampled_from([4, 16]),
    seed=st.integers(0, 2**16),
)
def test_attention_is_that_of_float64(rows: list[tuple[int, int]], group: int, page_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv_heads, head_dim, scale = 2, 16, 0.3
    new = [count for count, _ in rows]
    lengths = [count + before for count, before in rows]
    pages_per_row = -(-max(lengths) // page_size)
    pages = len(rows) * pages_per_row
    query_THD = torch.randn(sum(new), kv_heads * group, head_dim, generator=generator)
    key_cache, value_cache = torch.randn(2, pages, page_size, kv_heads, head_dim, generator=generator).unbind(0)
    table_RP = torch.randperm(pages, generator=generator).view(len(rows), pages_per_row).int()
    cu_new, cu_all = (torch.tensor([0, *each]).cumsum(0).int() for each in (new, lengths))
    output_THD = prefill_attention(
        query_THD, key_cache, value_cache, cu_new, cu_all, table_RP, most_new=max(new), most_keys=64, scale=scale
    )
    token = 0
    for row, (count, start) in enumerate(rows):
        keys, values = (cache[table_RP[row].long()].flatten(0, 1).double() for cache in (key_cache, value_cache))
        for position in range(start, start + count):
            for head in range(kv_heads * group):
                kv_head = head // group
                scores = scale * keys[: position + 1, kv_head] @ query_THD[token, head].double()
                expected = scores.softmax(0) @ values[: position + 1, kv_head]
                torch.testing.assert_close(output_THD[token, head].double(), expected, atol=1e-5, rtol=1e-5)
            token += 1


# --- hidden states ----------------------------------------------------------------------------------------------------


def read(
    model: Any, dtype: torch.dtype, fused: bool, chunks: list[list[int]], is_fp8: bool = False
) -> tuple[torch.Tensor, list[Any]]:
    """Read rows chunk by chunk; return the last hidden states of the last chunks [T, E], and keys and values."""
    model = model.to(dtype)
    rows = len(chunks)
    sizes = {"max_sequence_length": 64, "total_num_pages": 32 * rows, "page_size": PAGE}  # of FP8 all are widened
    cache = EngineCache(model, rows=rows, is_fp8=is_fp8, **sizes)
    table_RP = torch.randperm(4 * rows, generator=torch.Generator().manual_seed(1)).view(rows, 4).int()
    prefill = FusedPrefill(FusedDecode(model, cache, rows, layer_weights(model)))
    generator = torch.Generator().manual_seed(2)
    starts = [0] * rows
    for new in zip(*chunks, strict=True):
        token_T = torch.randint(0, 320, (sum(new),), generator=generator)
        cache.open_rows(table_RP, starts, list(new))
        if fused:
            hidden_TE = prefill(token_T.int(), cache)
        else:
            width = max(new)
            place_S = torch.arange(width)
            mask_BS = place_S < torch.tensor(new)[:, None]
            token_BS = torch.zeros(rows, width, dtype=torch.int64)
            token_BS[mask_BS] = token_T
            attention_mask = None if mask_BS.all() else mask_BS
            output = model.model(input_ids=token_BS, attention_mask=attention_mask, past_key_values=cache)
            hidden_TE = output.last_hidden_state[mask_BS]
        starts = [start + count for start, count in zip(starts, new, strict=True)]
    return hidden_TE.detach(), [tensor.clone() for tensor in tensors_of(cache.caches)]


CHUNKS = [[7, 20], [1, 1], [30, 3], [16, 16]]  # of each row


@torch.inference_mode()
def test_hidden_states_keys_and_values_are_the_layers_own() -> None:
    model = make_model(attn_input_format="bshd")
    expected_TE, expected_caches = read(model, torch.float32, False, CHUNKS)
    found_TE, caches = read(model, torch.float32, True, CHUNKS)
    pairs = [(found_TE, expected_TE)] + [
        (found.flatten(2).flatten(0, 1), expected.flatten(2).flatten(0, 1))
        for found, expected in zip(caches, expected_caches, strict=True)
    ]
    for found, expected in pairs:
        distance = distances(found[:, None], expected[:, None])  # of each token
        assert distance.median() < 1e-6 and distance.max() < 1e-3
        assert torch.equal(found.any(dim=1), expected.any(dim=1)), "a token is in another place"


@torch.inference_mode()
def test_in_bfloat16_no_farther_from_float32_than_the_layers() -> None:
    model = make_model(attn_input_format="bshd").to(torch.bfloat16)
    layers_TE, fused_TE = (read(model, torch.bfloat16, fused, CHUNKS)[0] for fused in (False, True))
    exact_TE, _ = read(model, torch.float32, False, CHUNKS)
    layers, fused = (distances(each[:, None], exact_TE[:, None]).mean() for each in (layers_TE, fused_TE))
    assert fused < 1.1 * layers


@torch.inference_mode()
def test_over_an_fp8_cache() -> None:
    """The layers and the kernels attend to the same keys and values. Those of the first layer are equal bit by bit."""
    model = make_model(attn_input_format="bshd").to(torch.bfloat16)
    (layers_TE, caches), (fused_TE, found) = (
        read(model, torch.bfloat16, fused, CHUNKS, is_fp8=True) for fused in (False, True)
    )
    exact_TE, _ = read(model, torch.float32, False, CHUNKS)
    layers, fused = (distances(each[:, None], exact_TE[:, None]).mean() for each in (layers_TE, fused_TE))
    assert 0.01 < fused < 1.1 * layers
    keys, values, key_scale, value_scale = caches[:4]
    assert keys.dtype == values.dtype == torch.float8_e4m3fn and key_scale.dtype == value_scale.dtype == torch.uint8
    for here, there in zip(found[:4], caches[:4], strict=True):
        differ = here.view(torch.uint8) != there.view(torch.uint8)
        assert differ.float().mean() < 0.03, "products may round to another bfloat16 number"


@torch.inference_mode()
def test_wanted_tokens_alone() -> None:
    model = make_model()
    cache = EngineCache(model, rows=2, max_sequence_length=64, total_num_pages=8, page_size=PAGE)
    table_RP = torch.arange(8).view(2, 4).int()
    prefill = FusedPrefill(FusedDecode(model, cache, 2, layer_weights(model)))
    token_T = torch.randint(0, 320, (12,))
    states = []
    for last in (None, [4, 11], [11], []):
        cache.open_rows(table_RP, [0, 0], [5, 7])
        states.append(prefill(token_T, cache, None if last is None else torch.tensor(last, dtype=torch.int32)))
        states.append([tensor.clone() for tensor in tensors_of(cache.caches)])
    all_TE, caches, both_ME, *_ = states
    torch.testing.assert_close(both_ME, all_TE[[4, 11]])
    torch.testing.assert_close(states[4], all_TE[[11]])
    assert states[6].shape == (0, all_TE.shape[1])
    for others in states[3::2]:
        assert all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))


# --- the engine -------------------------------------------------------------------------------------------------------

PARAMS = {
    "greedy": SamplingParams(max_tokens=8, temperature=0, logprobs=3),
    "drawn": SamplingParams(max_tokens=8, seed=1, logprobs=3),
    "3 texts": SamplingParams(max_tokens=6, seed=1, n=3, logprobs=0),
    "beams": SamplingParams(max_tokens=6, num_beams=3, logprobs=1),
    "scores of the prompt": SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=2),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("prefill_budget", [7, 2048])
def test_texts_and_logprobs_are_those_of_the_layers(
    model: PreTrainedModel, any_dtype: None, params: SamplingParams, prefill_budget: int
) -> None:
    texts = prompts(1, 40, 3, 17, 33, 18, 5)
    texts += [[*texts[1], 9], texts[1]]  # they share pages with a text before
    fused, layers = engines(model, prefill_budget=prefill_budget)
    for _ in range(2):  # the second time from cached prefixes
        for found, expected in zip(fused.generate(texts, params), layers.generate(texts, params), strict=True):
            for text, wanted in zip(found.outputs, expected.outputs, strict=True):
                assert text.token_ids == wanted.token_ids
                if wanted.logprobs is not None:
                    for here, there in zip(text.logprobs, wanted.logprobs, strict=True):
                        assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
            for here, there in zip(found.prompt_logprobs or [], expected.prompt_logprobs or [], strict=True):
                assert (here is None) == (there is None)
                if here is not None:
                    assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
                    assert [token for token, _ in here.top] == [token for token, _ in there.top]


def test_the_model_may_change_between_requests(model: PreTrainedModel, any_dtype: None) -> None:
    fused, layers = engines(model)
    params, texts = SamplingParams(max_tokens=4, temperature=0, logprobs=0), prompts(9, 20)
    before = [output.outputs[0].logprobs for output in fused.generate(texts, params)]
    norm = model.model.layers[0].layernorm_mlp
    norm.layer_norm_weight = nn.Parameter(norm.layer_norm_weight.detach() * 1.5)
    found, expected = ([o.outputs[0].logprobs for o in each.generate(texts, params)] for each in (fused, layers))
    for here, there, old in zip(found, expected, before, strict=True):
        assert here[0].logprob == pytest.approx(there[0].logprob, abs=1e-4) != old[0].logprob


# --- which prompts the kernels read -----------------------------------------------------------------------------------


def test_kernels_read_prompts_in_the_precision_of_the_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().to(torch.bfloat16)
    cache = EngineCache(model, rows=2, max_sequence_length=64, total_num_pages=8, page_size=PAGE)
    layers = layer_weights(model)
    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "_weight", in_fp8)
        quantized = layer_weights(model)
    decode = FusedDecode(model, cache, 2, layers)
    precision = model.model.precision

    def takes(precisions: list[str | None], weights: list[LayerWeights]) -> bool:
        precision.layers, decode.layers = precisions, weights
        return takes_fused_prefill(model, decode)

    plain, fp8 = [None] * 3, ["fp8"] * 3
    assert takes(plain, layers) and takes(fp8, quantized)
    assert takes([None, "fp8", None], [layers[0], quantized[1], layers[2]])
    assert not takes(fp8, layers), "layers round weights to FP8 which the kernels read in bfloat16"
    assert not takes(plain, quantized)
    assert not takes(plain, [layers[0], layers[1]._replace(fc2_EF=quantized[1].fc2_EF), layers[2]])
    assert not takes(["fp4"] * 3, layers)


@torch.inference_mode()
def test_fp8_rounds_a_prompt_alike_beside_any_other_and_behind_any_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token has a scale of its own, so that a cached prefix or another prompt changes nothing."""
    model = make_model(attn_input_format="bshd").to(torch.bfloat16)
    exact_TE, _ = read(model, torch.float32, False, [[27], [7]])
    model = model.to(torch.bfloat16)
    monkeypatch.setattr(weights_module, "_weight", in_fp8)
    together_TE, _ = read(model, torch.bfloat16, True, [[27], [7]])
    distance = distances(together_TE.float()[:, None], exact_TE[:, None])
    assert 0.01 < distance.median() < 0.15, "FP8 has three bits behind the leading one"
    alone_TE, _ = read(model, torch.bfloat16, True, [[27]])
    assert torch.equal(alone_TE, together_TE[:27])


def test_under_the_users_autocast_of_te_the_layers_read_prompts(
    model: PreTrainedModel, any_dtype: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, _ = engines(model)
    calls = []
    monkeypatch.setattr(FusedPrefill, "__call__", lambda *arguments: calls.append(1))
    manager = types.SimpleNamespace(is_fp8_enabled=lambda: True)
    name = "transformer_engine.pytorch.quantization"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(FP8GlobalStateManager=manager))
    assert len(fused.generate(prompts(5), SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2
    assert not calls


def test_attention_that_does_not_run_leaves_prompts_to_the_layers(
    model: PreTrainedModel, any_dtype: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "prefill_attention_problem", lambda *arguments: "there is no attention for it (x)")
    backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"Prompts are read by the model's layers, since there is no attention"):
        engine = Engine(model, decode_implementation="fused", page_size=PAGE)
    assert isinstance(engine._runner.decode, FusedDecode) and engine._runner.prefill.fused is None
