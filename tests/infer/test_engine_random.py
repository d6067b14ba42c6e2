"""Random mixes of requests: each result equals the request's result alone in a separate engine.

LLAMA_TE_RANDOM_MIXES=1000 in the environment sets the number of mixes. The default number takes a minute.
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer.engine.engine import Engine
from llama_te_infer.engine.outputs import RequestOutput
from llama_te_infer.sampling_params import SamplingParams

MIXES = int(os.environ.get("LLAMA_TE_RANDOM_MIXES", "200"))
VOCABULARY = 61
ENDS = (5, 6)  # EOS tokens: one in thirty tokens, so that many texts end by themselves


@functools.cache
def model(attn_input_format: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        eos_token_id=list(ENDS),
    )
    return convert_llama_hf_to_te(LlamaForCausalLM(config).eval().to(dtype), attn_input_format=attn_input_format)


def random_request(choose: random.Random, kinds: list[str], least: int) -> tuple[list[int], dict[str, Any]]:
    """A prompt and parameters, `max_tokens` at least `least`; many prompts begin alike."""
    beginnings = [[7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [7, 8, 9, 10, 20, 21, 22, 23], []]
    beginning = choose.choice(beginnings)
    prompt = beginning[: choose.choice([4, 8, 12, choose.randint(0, 12)])]
    prompt = prompt + [choose.randrange(3, VOCABULARY) for _ in range(choose.randint(0, 10))] or [3]
    params: dict[str, Any] = {"max_tokens": choose.choice([least, choose.randint(least, 20)])}
    if choose.random() < 0.2:
        params["stop_token_ids"] = [choose.randrange(VOCABULARY)]
    if choose.random() < 0.2:
        params["min_tokens"] = choose.randint(0, params["max_tokens"])
    params["prompt_logprobs"] = choose.choice([0, 3]) if choose.random() < 0.15 else None
    kind = choose.choice(kinds)
    if kind == "beams":
        params["num_beams"] = choose.randint(2, 4)
        params["n"] = choose.randint(1, params["num_beams"])
        params["length_penalty"] = choose.choice([1.0, 0.0, -1.0, 2.0])
        params["early_stopping"] = choose.choice([False, True, "never"])
        return prompt, params
    params["logprobs"] = choose.choice([None, None, 0, 3])
    params["repetition_penalty"] = choose.choice([1.0, 1.0, 1.3])
    if kind == "greedy":
        return prompt, {**params, "temperature": 0}
    params |= {"seed": choose.randint(0, 3), "temperature": choose.choice([0.5, 1.0, 2.0]), "n": choose.randint(1, 3)}
    params |= choose.choice([{}, {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])
    return prompt, params


def pages_needed(prompt: list[int], params: dict[str, Any], page_size: int) -> int:
    """Pages that a request needs by itself."""
    longest = -(-(len(prompt) + params["max_tokens"] - 1) // page_size)
    full, partial = divmod(len(prompt), page_size)
    if "num_beams" in params:
        return full + params["num_beams"] * (longest - full)
    return max(longest, full + params.get("n", 1) * (partial > 0))


def check_equal(found: RequestOutput, expected: RequestOutput) -> None:
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.error is None
    assert len(found.outputs) == len(expected.outputs)
    # Other batches mean other orders of summation, in float32.
    close = functools.partial(pytest.approx, rel=1e-3, abs=1e-3)
    for completion, alone in zip(found.outputs, expected.outputs, strict=True):
        assert completion.token_ids == alone.token_ids
        assert (completion.finish_reason, completion.stop_reason) == (alone.finish_reason, alone.stop_reason)
        assert (completion.score is None) == (alone.score is None)
        assert completion.score is None or completion.score == close(alone.score)
        assert (completion.logprobs is None) == (alone.logprobs is None)
        for here, there in zip(completion.logprobs or [], alone.logprobs or [], strict=True):
            assert here.logprob == close(there.logprob)
            assert [logprob for _, logprob in here.top] == close([logprob for _, logprob in there.top])
    assert (found.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    if found.prompt_logprobs is not None and expected.prompt_logprobs is not None:
        for here, there in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert here is not None and there is not None
            assert here.logprob == close(there.logprob)
            assert [logprob for _, logprob in here.top] == close([logprob for _, logprob in there.top])


# In float64 the order of summation decides nothing, not even how keys are rounded to FP8. The compiled kernels take
# float32.
@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"), [(torch.float64, "auto"), (torch.float32, "auto"), (torch.float64, "fp8")]
)
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@settings(
    max_examples=-(-MIXES // 6),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 9),
    page_size=st.sampled_from([1, 2, 4, 16]),
    spare_pages=st.sampled_from([0, 0, 1, 3, 10, 200]),
    max_batch_size=st.integers(4, 12),
    prefill_budget=st.sampled_from([1, 5, 16, 1000]),
    prefix_caching=st.booleans(),
)
def test_every_request_of_a_mix_has_the_result_that_it_has_alone(
    attn_input_format: str,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    seed: int,
    requests: int,
    page_size: int,
    spare_pages: int,
    max_batch_size: int,
    prefill_budget: int,
    prefix_caching: bool,
) -> None:
    choose = random.Random(seed)
    its_model = model(attn_input_format, dtype)
    kinds = choose.choice([["greedy", "sampled", "sampled", "beams"], ["sampled"], ["beams"]])
    least = choose.choice([1, 15])  # where all texts are long, pages run short
    mix = [random_request(choose, kinds, least) for _ in range(requests)]
    engine = Engine(
        its_model,
        max_batch_size=max_batch_size,
        max_sequence_length=64,
        page_size=page_size,
        total_num_pages=max(pages_needed(*request, page_size) for request in mix) + spare_pages,
        prefill_budget=prefill_budget,
        prefix_caching=prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
    )
    waiting = list(mix)
    ids: dict[int, int] = {}
    outputs: dict[int, RequestOutput] = {}
    cancelled = set()
    while waiting or engine.has_unfinished:
        for _ in range(choose.choice([0, 1, 1, 3])):
            if waiting:
                prompt, params = waiting.pop(0)
                ids[engine.submit(prompt, SamplingParams(**params))] = len(ids)
        if choose.random() < 0.05 and ids:
            request_id = choose.choice(list(ids))
            if engine.cancel(request_id):
                cancelled.add(request_id)
        outputs |= {output.request_id: output for output in engine.step()}

    blocks = engine.scheduler.blocks
    held = {0: len(blocks.pool.free), 1: len(blocks.prefixes.remembered)}
    assert Counter(blocks.pool.holders) == Counter(held)
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.scheduler.rows
    assert outputs.keys() == ids.keys()
    for request_id, number in ids.items():
        prompt, params = mix[number]
        alone = Engine(its_model, max_batch_size=4, page_size=16, kv_cache_dtype=kv_cache_dtype)
        expected = alone.generate([prompt], SamplingParams(**params))[0]
        if request_id not in cancelled:
            check_equal(outputs[request_id], expected)
            continue
        for completion, whole in zip(outputs[request_id].outputs, expected.outputs, strict=True):
            assert completion.finish_reason in ("cancelled", "stop", "length")
            if "num_beams" not in params:
                assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
