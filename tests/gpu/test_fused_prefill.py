"""The fused prefill on the GPU: cuDNN's attention called directly, and prompts against the model's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_engine.common.recipe import Float8CurrentScaling
from transformers import LlamaForCausalLM

from gpu.small_llama import relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaForCausalLM
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.decode import backend
from llama_te_infer.decode.prefill import FusedPrefill
from llama_te_infer.ops.prefill_attention import prefill_attention, prefill_attention_problem, table_rows

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

MOST_KEYS = 2048
# Tokens of each row: new ones, and those before. 40 rows are more than the heads, 20 of 64 more than 1024 tokens.
ROWS: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 0)],
    "one row": [(512, 0)],
    "a later chunk": [(300, 1024)],
    "many rows": [(1 + 5 * row, 31 * row) for row in range(40)],
    "more than 1024 tokens": [(64, 3)] * 20,
    "the longest row": [(2048, 0)],
    "the last token of the longest row": [(1, 2047), (7, 0)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size"), [(16, 4, 64, 16), (32, 8, 128, 64)])
def test_attention_is_that_of_float32(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, page_size: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    pages_per_row = MOST_KEYS // page_size
    pages = len(rows) * pages_per_row

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    new, lengths = [new for new, _ in rows], [new + before for new, before in rows]
    query_THD = random(sum(new), heads, head_dim)
    key_cache, value_cache = (random(pages, page_size, kv_heads, head_dim) for _ in range(2))
    table_RP = torch.zeros(table_rows(len(rows), key_cache.device), pages_per_row, dtype=torch.int32, device="cuda")
    permuted = torch.randperm(pages, generator=generator, device="cuda").view(len(rows), pages_per_row)
    table_RP[: len(rows)] = permuted
    cu_new, cu_all = (torch.tensor([0, *each]).cumsum(0).int().cuda() for each in (new, lengths))
    sizes: dict[str, Any] = {"most_new": max(new), "most_keys": MOST_KEYS, "scale": 0.11}
    arguments = (query_THD, key_cache, value_cache, cu_new, cu_all, table_RP)
    output_THD = prefill_attention(*arguments, **sizes)
    exact_THD = prefill_attention(
        *(each.float().cpu() for each in arguments[:3]), *(each.cpu() for each in arguments[3:]), **sizes
    )
    assert output_THD.isfinite().all()
    first = 0
    for count in new:
        part = slice(first, first + count)
        assert relative(output_THD[part].cpu(), exact_THD[part]) < 0.01
        first += count


def test_cudnn_takes_pages() -> None:
    cache = torch.zeros(8, 64, 4, 64, dtype=torch.bfloat16, device="cuda")
    assert prefill_attention_problem(cache, cache, 16, 4, 512, 0.125) is None


def test_cudnn_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = torch.zeros(8, 64, 4, 64, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert "NVTE_FUSED_ATTN=0" in str(prefill_attention_problem(cache, cache, 16, 4, 512, 0.125))


@pytest.mark.parametrize("prefill_budget", [100, 2048])
def test_prompts_read_by_kernels_are_no_farther_from_float32(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, prefill_budget: int
) -> None:
    """The log-probabilities of all tokens of prompts, and of the tokens after them."""
    hf = make_llama().bfloat16().float()
    model = convert_llama_hf_to_te(make_llama().bfloat16()).eval()
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 77, 300, 512, 40, 1000, 129]
    texts = [torch.randint(3, 8192, (length,), generator=generator).tolist() for length in lengths]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    distances = {}
    for reads in (True, False):
        if not reads:
            monkeypatch.setattr(backend, "takes_fused_prefill", lambda model, decode: False)
        engine = Engine(model, prefill_budget=prefill_budget, prefix_caching=False, max_batch_size=8)
        assert isinstance(engine._runner.prefill.fused, FusedPrefill) == reads
        found, exact = [], []
        for text, output in zip(texts, engine.generate(texts, params), strict=True):
            with torch.inference_mode():
                logits_SV = hf(torch.tensor([text], device="cuda")).logits[0]
            logprob_SV = logits_SV.float().log_softmax(-1).cpu()
            for position, each in enumerate(output.prompt_logprobs[1:], 1):
                found.append(each.logprob)
                exact.append(float(logprob_SV[position - 1, text[position]]))
            (completion,) = output.outputs
            found.append(completion.logprobs[0].logprob)
            exact.append(float(logprob_SV[-1, completion.token_ids[0]]))
        distances[reads] = float((torch.tensor(found) - torch.tensor(exact)).abs().mean())
        del engine
    assert 0 < distances[True] < 1.1 * distances[False], distances


@pytest.mark.hopper
def test_fp8_prompts_are_no_farther_from_float32_than_the_layers(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each token has a scale of its own, where TE's current scaling has one for all tokens of a pass."""
    hf = make_llama().bfloat16().float()
    convert_llama_hf_to_te(make_llama().bfloat16()).save_pretrained(tmp_path)
    model = NVLlamaForCausalLM.from_pretrained(
        tmp_path,
        layer_precision=["fp8"] * 6,
        use_quantized_model_init=True,
        fp8_recipe=Float8CurrentScaling(),
        dtype=torch.bfloat16,
        device_map="cuda",
    ).eval()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 8192, (length,), generator=generator).tolist() for length in (77, 300, 512, 129)]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    distances = {}
    for reads in (True, False):
        if not reads:
            monkeypatch.setattr(backend, "takes_fused_prefill", lambda model, decode: False)
        engine = Engine(model, prefix_caching=False, max_batch_size=8)
        assert isinstance(engine._runner.prefill.fused, FusedPrefill) == reads
        found, exact = [], []
        for text, output in zip(texts, engine.generate(texts, params), strict=True):
            with torch.inference_mode():
                logprob_SV = hf(torch.tensor([text], device="cuda")).logits[0].float().log_softmax(-1).cpu()
            for position, each in enumerate(output.prompt_logprobs[1:], 1):
                found.append(each.logprob)
                exact.append(float(logprob_SV[position - 1, text[position]]))
        distances[reads] = float((torch.tensor(found) - torch.tensor(exact)).abs().mean())
        del engine
    assert 0 < distances[True] < 1.05 * distances[False], distances


def test_texts_continue_over_what_the_kernels_stored(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, cached prefixes and several texts of one prompt: mostly the tokens that the layers' prefill gives."""
    model = convert_llama_hf_to_te(make_llama().bfloat16()).eval()
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 8192, (length,), generator=generator).tolist() for length in (200, 64, 333, 5, 128)]
    texts += [texts[0] + [7], texts[2]]
    params = SamplingParams(max_tokens=4, seed=1, n=2, ignore_eos=True)
    results = []
    for reads in (True, False):
        if not reads:
            monkeypatch.setattr(backend, "takes_fused_prefill", lambda model, decode: False)
        engine = Engine(model, prefill_budget=150, max_batch_size=16)
        outputs = [engine.generate(texts, params) for _ in range(2)]  # the second time from cached prefixes
        results.append([c.token_ids for each in outputs for output in each for c in output.outputs])
    same = [a == b for a, b in zip(*results, strict=True)]
    assert sum(same) / len(same) > 0.8, results
