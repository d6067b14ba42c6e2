"""Every field of OpenAI's API, and of vLLM's requests, is supported, is without effect, or is refused with a reason."""

from __future__ import annotations

from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types import completion_create_params as of_completions
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as of_chats
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from pydantic import BaseModel

from llama_te_infer.serve.protocol.chat import ChatRequest
from llama_te_infer.serve.protocol.completions import CompletionRequest
from llama_te_infer.serve.protocol.sampling import SamplingFields, StreamOptions
from serving.conftest import RunningServer

MESSAGES: Any = [{"role": "user", "content": "Hello"}]

# The fields of `ChatCompletionRequest` and `CompletionRequest` in vLLM 0.26 that OpenAI's API does not have.
VLLM = {
    *("add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "ec_transfer_params"),
    *("ignore_eos", "include_stop_str_in_output", "kv_transfer_params", "length_penalty"),
    *("logprob_token_ids", "min_p", "min_tokens", "priority", "prompt_logprobs", "repetition_detection"),
    *("repetition_penalty", "request_id", "response_format", "return_mm_kwargs", "return_token_ids"),
    *("return_token_offsets", "return_tokens_as_token_ids", "routed_experts_prompt_start", "session_id"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "stream_interval"),
    *("structured_outputs", "thinking_token_budget", "top_k", "truncate_prompt_tokens", "truncation_side"),
    *("use_beam_search", "vllm_xargs", "watermarking"),
}
VLLM_COMPLETIONS = {"prompt_embeds"}
VLLM_CHATS = {
    *("add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message"),
    *("documents", "echo", "include_reasoning", "media_io_kwargs", "mm_processor_kwargs"),
    *("return_prompt_text",),
}


def known(body_class: type[SamplingFields]) -> set[str]:
    return body_class.model_fields.keys() | body_class.unsupported.keys()


@pytest.mark.parametrize(
    ("body_class", "params", "more"),
    [
        (ChatRequest, of_chats, VLLM | VLLM_CHATS),
        (CompletionRequest, of_completions, VLLM | VLLM_COMPLETIONS),
    ],
)
def test_every_field_is_known(body_class: type[SamplingFields], params: Any, more: set[str]) -> None:
    openais = get_type_hints(params.CompletionCreateParamsBase) | get_type_hints(params.CompletionCreateParamsStreaming)
    assert {"model", "stream", "temperature"} < openais.keys()
    assert openais.keys() | more <= known(body_class)
    assert not body_class.model_fields.keys() & body_class.unsupported.keys()


def test_every_option_of_streams_is_known() -> None:
    assert get_type_hints(ChatCompletionStreamOptionsParam).keys() <= StreamOptions.model_fields.keys()


def refusal(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the error of a request, or `None` if it is answered."""
    answer = httpx.post(f"{server.url}/v1/{path}", json={"max_tokens": 1, **body})
    assert answer.status_code in (200, 400), answer.text
    error: dict[str, Any] | None = answer.json().get("error")
    return error


@pytest.mark.parametrize(
    ("body_class", "path", "least"),
    [
        (ChatRequest, "chat/completions", {"messages": MESSAGES}),
        (CompletionRequest, "completions", {"prompt": "a"}),
    ],
)
def test_what_asks_for_nothing_passes_and_the_rest_is_refused_with_a_reason(
    server: RunningServer, body_class: type[SamplingFields], path: str, least: dict[str, Any]
) -> None:
    nulls = dict.fromkeys(known(body_class) - {"messages", "prompt", "max_tokens"})
    assert refusal(server, path, nulls | least) is None
    neutral = {name: field.neutral[-1] for name, field in body_class.unsupported.items() if field.neutral}
    assert refusal(server, path, neutral | least) is None
    for name, field in body_class.unsupported.items():
        error = refusal(server, path, {name: "something"} | least)
        assert error is not None and error["message"] == f"{name} is not supported: {field.reason}."
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_false_is_not_zero(server: RunningServer) -> None:
    assert refusal(server, "completions", {"prompt": "a", "priority": 0}) is None
    assert refusal(server, "completions", {"prompt": "a", "priority": False}) is not None
    for fields in ({"return_token_ids": 0}, {"n": True}, {"stream_options": {"include_obfuscation": 0}}):
        answer = httpx.post(f"{server.url}/v1/responses", json={"input": "a", "max_output_tokens": 1, **fields})
        assert answer.status_code == 400 and answer.json()["error"]["param"] is not None
    fields = {"return_token_ids": False, "n": 1, "stream_options": {"include_obfuscation": False}}
    answer = httpx.post(f"{server.url}/v1/responses", json={"input": "a", "max_output_tokens": 1, **fields})
    assert answer.status_code == 200, answer.text


def test_fields_without_effect(server: RunningServer) -> None:
    arguments: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    plain = server.client.chat.completions.create(**arguments)
    more = server.client.chat.completions.create(
        **arguments,
        metadata={"a": "b"},
        prediction={"type": "content", "content": "Hello"},
        prompt_cache_key="a",
        prompt_cache_options={},
        prompt_cache_retention="24h",
        safety_identifier="a",
        service_tier="auto",
        store=True,
        user="a",
        extra_body={"include_reasoning": False, "session_id": "a", "spaces_between_special_tokens": False},
    )
    assert more.choices == plain.choices


def test_tokens_named_by_their_ids(server: RunningServer) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True, "prompt_logprobs": 0, "request_id": "mine"}
    arguments: Any = {"model": "tiny", "max_tokens": 4, "extra_body": extra}
    chat = server.client.chat.completions.create(**arguments, messages=MESSAGES, logprobs=True, top_logprobs=2)
    (choice,) = chat.choices
    assert [each.token for each in choice.logprobs.content] == [f"token_id:{token}" for token in choice.token_ids]
    assert choice.logprobs.content[0].top_logprobs[0].token.startswith("token_id:") and chat.id == "chatcmpl-mine"
    assert chat.prompt_logprobs[0] is None
    assert [list(each) for each in chat.prompt_logprobs[1:]] == [[str(token)] for token in chat.prompt_token_ids[1:]]

    completion = server.client.completions.create(**arguments, prompt="ab", logprobs=1)
    (choice,) = completion.choices
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
    assert choice.logprobs.text_offset == [0, 1, 2, 3], "of the texts, not of the names"
    assert all(name.startswith("token_id:") for top in choice.logprobs.top_logprobs for name in top)
    assert completion.id == "cmpl-mine"


def test_contents_in_parts_are_texts(server: RunningServer) -> None:
    def answer(content: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}]
        return server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)

    parts = [{"type": "text", "text": "Two"}, {"type": "text", "text": "lines"}]
    assert answer(parts).usage.prompt_tokens == answer("Two\nlines").usage.prompt_tokens
    assert answer(parts).choices == answer("Two\nlines").choices
    for part, message in (
        ({"type": "image_url", "image_url": {"url": "https://example.org"}}, "has the type 'image_url'"),
        ({"type": "text"}, "has the type 'text'"),
        ({"text": "a"}, "has no type"),
        ("a", "has no type"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            answer([*parts, part])
        assert caught.value.body["param"] == "messages.0.content.2"


def test_answers_have_all_that_openais_types_need(server: RunningServer) -> None:
    """The client builds its objects without validation, so this test validates."""

    def validate(kind: type[BaseModel], content: str) -> None:
        kind.model_validate_json(content, strict=True)

    chat = {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2}
    completion = {"prompt": ["a", "b"], "max_tokens": 4, "logprobs": 2}
    for path, body, whole, chunk in (
        ("chat/completions", chat, ChatCompletion, ChatCompletionChunk),
        ("completions", completion, Completion, Completion),
    ):
        url = f"{server.url}/v1/{path}"
        validate(whole, httpx.post(url, json=body).text)
        streamed = httpx.post(url, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
        events = [event.removeprefix("data: ") for event in streamed.strip().split("\n\n")]
        assert events.pop() == "[DONE]" and len(events) > 4
        for event in events:
            # The type of completions has no null for the chunks before the last one, but OpenAI's chunks have.
            validate(chunk, event.replace('"finish_reason":null', '"finish_reason":"stop"'))
