"""Grammars on a GPU: masks are computed and copied while the GPU computes the step that needs them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from byte_tokenizers import tokenizer_of_bytes
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, RequestOutput, SamplingParams, StructuredOutputs
from llama_te_infer.runner import model_runner
from llama_te_infer.runner.model_runner import ModelRunner

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]
PATTERN = "([a-f]{2,5} ){3,12}end"
FORM = StructuredOutputs(regex=PATTERN)
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 2},
    {"num_beams": 3, "n": 2},
]
PROMPTS = ["hello", "a longer prompt than the others", "b", "12:30"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one special token; the model's other 7,935 tokens are none of the tokenizer's."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of_bytes("<|end|>"), eos_token="<|end|>")


def make_engine(make_llama: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Engine:
    model = convert_llama_hf_to_te(make_llama(eos_token_id=256)).bfloat16()
    return Engine(model, tokenizer, max_batch_size=24, max_sequence_length=256, prefix_caching=False, **options)


def params(way: dict[str, Any], form: StructuredOutputs | None = FORM) -> SamplingParams:
    return SamplingParams(structured_outputs=form, max_tokens=90, **way)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    assert all(output.error is None for output in outputs)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("decode_implementation", ["fused", "layers"])
def test_texts_have_their_form(decode_implementation: str, make_llama: Any, tokenizer: Any) -> None:
    engine = make_engine(make_llama, tokenizer, decode_implementation=decode_implementation)
    outputs = engine.generate(PROMPTS, list(map(params, WAYS)))
    outputs += engine.generate(PROMPTS, [params(way, StructuredOutputs(choice=["the only text"])) for way in WAYS])
    for output in outputs[: len(WAYS)]:
        for completion in output.outputs:
            assert completion.finish_reason == "length" or re.fullmatch(PATTERN, completion.text)
    for output in outputs[len(WAYS) :]:
        assert {completion.text for completion in output.outputs} == {"the only text"}
        assert {completion.finish_reason for completion in output.outputs} == {"stop"}


@pytest.mark.parametrize("decode_implementation", ["fused", "layers"])
def test_the_host_need_not_wait_for_the_gpu(
    decode_implementation: str, make_llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_llama, tokenizer, decode_implementation=decode_implementation)
    each = [params(way, form) for form in (FORM, None) for way in WAYS]
    overlapping = tokens(engine.generate(PROMPTS * 2, each))
    launch = ModelRunner.launch

    def launch_and_wait(self: ModelRunner, *plans: Any) -> Any:
        pending = launch(self, *plans)
        torch.cuda.synchronize()
        return pending

    monkeypatch.setattr(ModelRunner, "launch", launch_and_wait)
    assert tokens(engine.generate(PROMPTS * 2, each)) == overlapping


def test_steps_without_grammars_are_one_graph(make_llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_llama, tokenizer, decode_implementation="fused")
    assert engine._fused is not None
    monkeypatch.setattr(model_runner, "compute_masks", lambda *_: pytest.fail("no text has a grammar"))
    engine.generate(PROMPTS, params({"temperature": 0}, None))
    assert {name for name, _ in engine._fused._graphs} == {"_advance"}
