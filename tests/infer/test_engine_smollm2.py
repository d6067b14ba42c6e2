"""The real model: SmolLM2-135M-Instruct writes the same text in the engine as in `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, SamplingParams

QUESTIONS = ["Why is the sky blue?", "Name three fruits.", "What is the capital of France, and what is it known for?"]
NEW = 20


@pytest.fixture(scope="module")
def chats(smollm2_tokenizer: Any) -> list[list[int]]:
    """The questions as tokens; all begin with the same system prompt."""
    return [
        smollm2_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module", params=["thd", "bshd"])
def engine(request: pytest.FixtureRequest, smollm2: PreTrainedModel, smollm2_tokenizer: Any) -> Engine:
    model = convert_llama_hf_to_te(smollm2, attn_input_format=request.param)
    return Engine(
        model,
        smollm2_tokenizer,
        max_batch_size=6,
        max_sequence_length=128,
        page_size=16,
        total_num_pages=30,
        prefill_budget=40,
    )


def generated(model: PreTrainedModel, chat: list[int], **options: Any) -> list[list[int]]:
    ids = model.generate(
        torch.tensor([chat]),
        attention_mask=torch.ones(1, len(chat), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        **options,
    )
    return ids[:, len(chat) :].tolist()


def test_greedy_text(engine: Engine, smollm2: PreTrainedModel, smollm2_tokenizer: Any, chats: list[list[int]]) -> None:
    outputs = engine.generate(chats, SamplingParams(max_tokens=NEW, temperature=0))
    for chat, output in zip(chats, outputs, strict=True):
        (expected,) = generated(smollm2, chat)
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == smollm2_tokenizer.decode(expected, skip_special_tokens=True)
    assert "Paris" in outputs[2].outputs[0].text
    # The system prompt's pages serve all three, and again in another call.
    again = engine.generate(chats[:1], SamplingParams(max_tokens=NEW, temperature=0))
    assert again[0].outputs == outputs[0].outputs


def test_beams(engine: Engine, smollm2: PreTrainedModel, chats: list[list[int]]) -> None:
    outputs = engine.generate(chats, SamplingParams(max_tokens=NEW, num_beams=3, n=2))
    for chat, output in zip(chats, outputs, strict=True):
        expected = generated(smollm2, chat, num_beams=3, num_return_sequences=2)
        for completion, ids in zip(output.outputs, expected, strict=True):
            assert completion.token_ids == ids[: len(completion.token_ids)]
            assert completion.finish_reason == "stop" or len(completion.token_ids) == NEW


def test_a_stop_string_in_a_stream(engine: Engine, chats: list[list[int]]) -> None:
    whole = engine.generate(chats[2:], SamplingParams(max_tokens=NEW, temperature=0))[0].outputs[0].text
    events = list(engine.stream(chats[2], SamplingParams(max_tokens=NEW, temperature=0, stop="Paris")))
    assert "".join(event.text for event in events) == whole[: whole.index("Paris")]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", "Paris")


def test_an_fp8_cache(smollm2: PreTrainedModel, smollm2_tokenizer: Any, chats: list[list[int]]) -> None:
    """It costs a little accuracy, and the answers stay answers."""
    model = convert_llama_hf_to_te(smollm2)
    params = SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=0)
    sizes: dict[str, Any] = {"max_batch_size": 3, "max_sequence_length": 128, "page_size": 16}
    exact, rounded = (
        Engine(model, smollm2_tokenizer, kv_cache_dtype=name, **sizes).generate(chats, params)
        for name in ("auto", "fp8")
    )
    exact_T, rounded_T = (
        torch.tensor([step.logprob for output in outputs for step in output.prompt_logprobs[1:]])
        for outputs in (exact, rounded)
    )
    assert 0.01 < float((rounded_T - exact_T).abs().mean()) < 0.25
    assert abs(float((rounded_T - exact_T).mean())) < 0.1, "no text becomes likelier or less likely as a whole"
    assert "Paris" in rounded[2].outputs[0].text
