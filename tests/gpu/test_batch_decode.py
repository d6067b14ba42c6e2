"""`generate` with steps of one token as replays of a CUDA graph of the engine's kernels."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_engine.common.recipe import Float8CurrentScaling

from call_counts import Calls
from gpu.small_llama import relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaForCausalLM
from llama_te_infer import inference_params_for
from llama_te_infer.decode import backend
from llama_te_infer.decode.fused import FusedDecode

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]
COLUMNS, NEW = 20, 24


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts of steps, graph captures and graph replays."""
    counted = Calls()
    counted.watch(monkeypatch, FusedDecode, "__call__", "steps")
    counted.watch(monkeypatch, torch.cuda.CUDAGraph, "capture_begin", "captures")
    counted.watch(monkeypatch, torch.cuda.CUDAGraph, "replay", "replays")
    return counted


def prompts(rows: int) -> dict[str, torch.Tensor]:
    """Make a left-padded batch, in which every third row has no padding."""
    ids_BS = torch.randint(3, 8192, (rows, COLUMNS), generator=torch.Generator().manual_seed(2))
    padding_B1 = torch.tensor([[7 * row % 3 * 4] for row in range(rows)])
    mask_BS = (torch.arange(COLUMNS) >= padding_B1).long()
    return {"input_ids": (ids_BS * mask_BS).cuda(), "attention_mask": mask_BS.cuda()}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


@torch.no_grad()
def forced(model: Any, text_BC: torch.Tensor, mask_BS: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits of steps that read the texts one token at a time."""
    model(text_BC[:, :COLUMNS], attention_mask=mask_BS, past_key_values=cache)
    columns = range(COLUMNS, text_BC.shape[1])
    return torch.cat([model(text_BC[:, column, None], past_key_values=cache).logits for column in columns], dim=1)


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("rows", [1, 3, 32, 40, 256])
def test_logits(rows, attn_input_format, is_paged, calls, make_llama, measured, fused_attention):
    """The kernels' logits are about as close to float32 as the layers' logits."""
    hf = make_llama(eos_token_id=None)
    exact_model = convert_llama_hf_to_te(hf, layer_implementation="reference")
    model = convert_llama_hf_to_te(hf.bfloat16(), attn_input_format=attn_input_format)
    mask_BS = prompts(rows)["attention_mask"]
    text_BC = torch.cat((prompts(rows)["input_ids"], torch.randint(3, 8192, (rows, 8), device="cuda")), dim=1)
    sizes = {"batch_size": rows + 2, "max_length": 64, "is_paged": is_paged, "page_size": 16}  # two rows stay empty
    exact = forced(exact_model, text_BC, mask_BS, inference_params_for(exact_model, **sizes))
    assert calls.steps == 0
    layers = inference_params_for(model, **sizes, decode_implementation="layers")
    usual = relative(forced(model, text_BC, mask_BS, layers), exact)
    fused = inference_params_for(model, **sizes, decode_implementation="fused")
    distance = relative(forced(model, text_BC, mask_BS, fused), exact)
    assert (calls.steps, calls.captures, calls.replays) == (8, 1, 8)
    measured(f"logits against float32, bound: 1.1 times the layers' {usual:.3g}", distance, 1.1 * usual)


@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 4}, {"num_return_sequences": 3, "do_sample": True}],
    ids=["greedy", "sampling", "beams", "returned"],
)
def test_one_replay_for_each_token(options, is_paged, calls, make_llama):
    """One capture serves all prompts of a cache; the texts of two calls with one seed are the same."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    counts = {name: options[name] for name in ("num_beams", "num_return_sequences") if name in options}
    cache = inference_params_for(model, batch_size=3, max_length=64, is_paged=is_paged, page_size=16, **counts)
    texts = []
    for turn in (1, 2):
        cache.reset()
        torch.manual_seed(7)
        texts.append(generate(model, prompts(3), past_key_values=cache, **options).tolist())
        assert (calls.steps, calls.captures, calls.replays) == (turn * (NEW - 1), 1, turn * (NEW - 1))
    assert texts[0] == texts[1]


def test_without_a_cache_of_one_s_own(calls, make_llama):
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    texts = generate(model, prompts(3)).tolist()
    assert (calls.captures, calls.replays) == (1, NEW - 1)
    own = inference_params_for(model, batch_size=3, max_length=64)
    assert texts == generate(model, prompts(3), past_key_values=own).tolist()


@pytest.mark.hopper
def test_fp8_weights(calls, make_llama, measured, tmp_path: Path):
    """Products of FP8 weights with bfloat16 activations are at least as close to float32 as the layers."""
    hf = make_llama(eos_token_id=None)
    exact_model = convert_llama_hf_to_te(hf, layer_implementation="reference")
    convert_llama_hf_to_te(hf.bfloat16()).save_pretrained(tmp_path)
    model = NVLlamaForCausalLM.from_pretrained(
        tmp_path,
        layer_precision=["fp8"] * 6,
        use_quantized_model_init=True,
        fp8_recipe=Float8CurrentScaling(),
        dtype=torch.bfloat16,
        device_map="cuda",
    ).eval()
    mask_BS = torch.ones(8, COLUMNS, dtype=torch.int64, device="cuda")
    text_BC = torch.randint(3, 8192, (8, COLUMNS + 8), generator=torch.Generator().manual_seed(2)).cuda()
    exact = forced(exact_model, text_BC, mask_BS, inference_params_for(exact_model, batch_size=8, max_length=64))
    distances = {}
    for implementation in ("layers", "fused"):
        cache = inference_params_for(model, batch_size=8, max_length=64, decode_implementation=implementation)
        distances[implementation] = relative(forced(model, text_BC, mask_BS, cache), exact)
    assert calls.replays == 8
    measured("logits against float32, bound: the layers'", distances["fused"], distances["layers"])


def test_weights_may_change(calls, make_llama):
    """A graph reads weights after in-place changes; after a replacement the next prompt captures a new graph."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    cache = inference_params_for(model, batch_size=3, max_length=64)

    def text() -> list[list[int]]:
        cache.reset()
        return generate(model, prompts(3), past_key_values=cache).tolist()

    first = text()
    mlp = model.model.layers[3].layernorm_mlp
    with torch.no_grad():
        mlp.fc2_weight.neg_()
    second = text()
    assert second != first
    fresh = inference_params_for(model, batch_size=3, max_length=64)
    assert second == generate(model, prompts(3), past_key_values=fresh).tolist()
    assert calls.captures == 2  # the fresh cache captured the other graph
    mlp.fc2_weight = torch.nn.Parameter(-mlp.fc2_weight.detach())
    assert text() == first
    assert calls.captures == 3


def test_memory_is_freed_without_the_garbage_collector(make_llama):
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    gc.collect()
    gc.disable()
    try:
        allocated = []
        for _ in range(4):
            generate(model, prompts(40))
            # memory_allocated() would also count the unused rest of the allocator's blocks.
            allocated.append(torch.cuda.memory_stats()["requested_bytes.all.current"])
        assert len(set(allocated[1:])) == 1, allocated  # libraries keep memory after the first call
    finally:
        gc.enable()


def test_a_model_that_the_kernels_do_not_take(calls, make_llama):
    """Float16 uses the layers, with one warning. With decode_implementation="fused" it is an error."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).half())
    backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"by the model's layers, since there are no kernels for this model \(float16"):
        ids = generate(model, prompts(3))
    assert ids.shape[1] == COLUMNS + NEW and calls.steps == 0
    cache = inference_params_for(model, batch_size=3, max_length=64, decode_implementation="fused")
    with pytest.raises(RuntimeError, match="decode_implementation='fused', but there are no kernels for this model"):
        generate(model, prompts(3), past_key_values=cache)
