"""`/v1/chat/completions` through the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from llama_te_infer import Engine, SamplingParams
from serving.conftest import RunningServer

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
PROMPT = "<|bos|><|user|>Hello<|end|><|assistant|>"


def test_an_answer(server: RunningServer, reference: Engine) -> None:
    answer = server.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    (output,) = reference.chat(MESSAGES, SamplingParams(max_tokens=8, temperature=0))
    (choice,) = answer.choices
    assert choice.message.content == output.outputs[0].text and choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    assert output.prompt_token_ids.count(256) == 1, "BOS once"


def test_an_answer_is_as_long_as_fits(server: RunningServer) -> None:
    extra = {"ignore_eos": True}
    answer = server.client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra)
    assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"


def test_a_stream_begins_with_the_role_and_joins_to_the_answer(server: RunningServer) -> None:
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 12, "seed": 1, "n": 2}
    whole = server.client.chat.completions.create(**arguments)
    chunks = list(
        server.client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        own = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]


def test_log_probabilities(server: RunningServer, reference: Engine) -> None:
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}
    content = server.client.chat.completions.create(**arguments, top_logprobs=3).choices[0].logprobs.content
    (output,) = reference.chat(MESSAGES, SamplingParams(max_tokens=6, temperature=0, logprobs=3))
    (completion,) = output.outputs
    assert [each.logprob for each in content] == pytest.approx([e.logprob for e in completion.logprobs], abs=1e-6)
    for each, expected in zip(content, completion.logprobs, strict=True):
        found = [top.logprob for top in each.top_logprobs]
        assert found == pytest.approx([logprob for _, logprob in expected.top], abs=1e-6)
    special = {256: b"<|bos|>", 257: b"<|end|>", 258: b"<|pad|>"}
    written = b"".join(special.get(token, b"?") for token in completion.token_ids if token > 255)
    assert bytes(byte for each in content for byte in each.bytes or []).count(b"<|") == written.count(b"<|")
    streamed = server.client.chat.completions.create(**arguments, top_logprobs=3, stream=True)
    parts = [part for chunk in streamed for part in chunk.choices if part.logprobs]
    assert [each for part in parts for each in part.logprobs.content] == content


def test_continuing_the_last_message(server: RunningServer, reference: Engine) -> None:
    messages: Any = [*MESSAGES, {"role": "assistant", "content": "Good day"}]
    extra = {"continue_final_message": True}
    answer = server.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0, extra_body=extra
    )
    prompt = "<|bos|><|user|>Hello<|end|><|assistant|>Good day"
    (output,) = reference.generate([prompt], SamplingParams(max_tokens=5, temperature=0))
    assert answer.choices[0].message.content == output.outputs[0].text


def test_many_clients_at_once(server: RunningServer, reference: Engine) -> None:
    texts = [f"Question {number}" for number in range(20)]

    async def ask() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            calls = [
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": text}], max_tokens=8, temperature=0
                )
                for text in texts
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    expected = reference.chat(
        [[{"role": "user", "content": text}] for text in texts], SamplingParams(max_tokens=8, temperature=0)
    )
    assert asyncio.run(ask()) == [output.outputs[0].text for output in expected]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "messages=[] is not possible"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "messages.0.role=None is not possible"),
        ({"messages": "a"}, "messages", "messages='a' is not possible"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs=2 needs logprobs=true"),
        ({"chat_template": "x"}, "chat_template", "chat_template is not supported: a template is a program"),
        ({"continue_final_message": True, "add_generation_prompt": True}, None, "continue_final_message"),
    ],
)
def test_what_is_refused(server: RunningServer, fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.post("/chat/completions", body={"messages": MESSAGES, **fields}, cast_to=object)
    assert message in caught.value.body["message"]
    if param is not None:
        assert caught.value.body["param"] == param
