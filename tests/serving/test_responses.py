"""`/v1/responses` through the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_type_hints

import httpx
import jsonschema
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase, ResponseCreateParamsStreaming
from pydantic import BaseModel, TypeAdapter

from llama_te_infer import Engine, SamplingParams
from llama_te_infer.serve.protocol.responses import ResponsesRequest
from llama_te_infer.structured_outputs import StructuredOutputs
from serving.conftest import RunningServer, serving
from serving.test_tools import CALLS, FOUND, LLAMA, LONGEST, SCHEMA, prompt_of

GREEDY: dict[str, Any] = {"model": "tiny", "input": "Hello", "temperature": 0, "max_output_tokens": 8}
TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "now", "parameters": None, "strict": None},
]


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(LONGEST)


@pytest.fixture(scope="module")
def plain_server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    with serving(make_engine(LONGEST), chat_template=LLAMA) as running:
        yield running


@pytest.fixture(scope="module")
def calls_server(engine: Engine) -> Iterator[RunningServer]:
    """A server whose model writes a sentence and two calls."""
    params = {"structured_outputs": StructuredOutputs(choice=(f"Look.\n{CALLS}",))}
    with serving(engine, chat_template=LLAMA, default_params=params) as running:
        yield running


def test_a_response(server: RunningServer, reference: Engine) -> None:
    response = server.client.responses.create(
        **GREEDY, instructions="Be kind.", metadata={"a": "b"}, user="ann", store=False, truncation="disabled"
    )
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    (output,) = reference.chat(messages, SamplingParams(max_tokens=8, temperature=0))
    assert response.output_text == output.outputs[0].text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == len(output.prompt_token_ids) and response.usage.output_tokens == 8
    assert (response.instructions, response.metadata, response.user) == ("Be kind.", {"a": "b"}, "ann")
    assert response.temperature == 0 and response.max_output_tokens == 8


def test_items_are_messages(server: RunningServer) -> None:
    items: Any = [
        {"role": "developer", "content": "Be"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
        },
        {"role": "user", "content": "Go"},
    ]
    messages: Any = [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Go"},
    ]
    response = server.client.responses.create(**{**GREEDY, "input": items})
    chat = server.client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def events_of(running: RunningServer, body: dict[str, Any]) -> list[Any]:
    """Return the events of a stream, checked by the client's types."""
    text = httpx.post(f"{running.url}/v1/responses", json={**body, "stream": True}).text
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue  # a keep-alive
        name, data = block.split("\n")
        events.append(adapter.validate_json(data.removeprefix("data: ")))
        assert name == f"event: {events[-1].type}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def without_ids(response: Any) -> dict[str, Any]:
    # The second of two equal prompts comes from the prefix cache.
    fields = {**response.model_dump(), "id": None, "created_at": None, "completed_at": None}
    fields["usage"]["input_tokens_details"] = None
    fields["output"] = [{**item, "id": None, "call_id": None} for item in fields["output"]]
    return fields


def test_a_stream_has_openais_events_and_ends_with_the_whole_response(server: RunningServer) -> None:
    body = {**GREEDY, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = Response.model_validate_json(httpx.post(f"{server.url}/v1/responses", json=body).text)
    events = events_of(server, body)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    kinds = [event.type for event in events if event not in deltas]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert without_ids(events[-1].response) == without_ids(whole)
    (part,) = whole.output[0].content
    assert "".join(event.delta for event in deltas) == part.text == events[-4].text
    assert len(part.logprobs) == whole.usage.output_tokens and len(part.logprobs[0].top_logprobs) == 2
    assert {event.item_id for event in deltas} == {events[2].item.id}


def test_calls_and_their_answers(calls_server: RunningServer) -> None:
    client = calls_server.client
    response = client.responses.create(model="tiny", input="Weather?", tools=TOOLS)
    message, *calls = response.output
    assert (response.status, response.output_text) == ("completed", "Look.")
    assert [(call.name, json.loads(call.arguments)) for call in calls] == FOUND
    assert message.type == "message" and all(call.status == "completed" for call in calls)
    events = events_of(calls_server, {"input": "Weather?", "tools": TOOLS})
    assert without_ids(events[-1].response) == without_ids(response)
    assert events[-1].type == "response.completed"
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    for index, event in enumerate(done):
        pieces = [e.delta for e in events if e.type.endswith("arguments.delta") and e.item_id == event.item_id]
        assert "".join(pieces) == event.arguments == calls[index].arguments
    with client.responses.stream(model="tiny", input="Weather?", tools=TOOLS) as stream:
        final = stream.get_final_response()
    assert [(call.name, json.loads(call.arguments)) for call in final.output[1:]] == FOUND

    # The items go back as they came, with the answers of the tools.
    answers = [{"type": "function_call_output", "call_id": call.call_id, "output": call.name} for call in calls]
    items: Any = [{"role": "user", "content": "Weather?"}, *response.output, *answers]
    again = client.responses.create(model="tiny", input=items, tools=TOOLS, max_output_tokens=5)
    ids = {"id": calls[0].call_id, "type": "function"}, {"id": calls[1].call_id, "type": "function"}
    written = [{"name": call.name, "arguments": call.arguments} for call in calls]
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Look.",
            "tool_calls": [{**each, "function": call} for each, call in zip(ids, written, strict=True)],
        },
        *(
            {"role": "tool", "tool_call_id": each["id"], "content": call["name"]}
            for each, call in zip(ids, written, strict=True)
        ),
    ]
    chat_tools = [
        {"type": "function", "function": {key: each[key] for key in ("name", "parameters")}} for each in TOOLS
    ]
    prompt = prompt_of(calls_server, messages=messages, tools=chat_tools)
    assert again.usage.input_tokens == len(
        client.post("/../tokenize", body={"prompt": prompt, "add_special_tokens": False}, cast_to=object)["tokens"]
    )


class Weather(BaseModel):
    """How the weather is."""

    city: Literal["Rome", "Bern"]
    sun: bool


def test_parsed_texts_and_calls(plain_server: RunningServer) -> None:
    extra = {"seed": 1}
    parsed = plain_server.client.responses.parse(model="tiny", input="Hi", text_format=Weather, extra_body=extra)
    assert isinstance(parsed.output_parsed, Weather)
    called = plain_server.client.responses.parse(
        model="tiny",
        input="Hi",
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice={"type": "function", "name": "Weather"},
        extra_body=extra,
    )
    (call,) = called.output
    assert call.type == "function_call" and isinstance(call.parsed_arguments, Weather)
    anything = plain_server.client.responses.create(
        model="tiny", input="Hi", text={"format": {"type": "json_object"}}, max_output_tokens=20, extra_body=extra
    )
    assert anything.output_text.startswith("{")


def test_a_text_in_json_or_calls(plain_server: RunningServer) -> None:
    """The model decides whether it calls tools; if not, the text fits the schema."""
    schema = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
    kinds = set()
    for seed in range(8):
        fields: Any = {"tools": TOOLS, "parallel_tool_calls": False, "extra_body": {"seed": seed}}
        form: Any = {
            "format": {"type": "json_schema", "name": "a", "schema": {**schema, "additionalProperties": False}}
        }
        (item,) = plain_server.client.responses.create(model="tiny", input="Hi", text=form, **fields).output
        kinds.add(item.type)
        if item.type == "function_call":
            jsonschema.validate(json.loads(item.arguments), SCHEMA if item.name == "weather" else {"maxProperties": 0})
        else:
            jsonschema.validate(json.loads(item.content[0].text), schema)
    assert kinds == {"function_call", "message"}


def test_the_async_client(server: RunningServer) -> None:
    async def ask() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.responses.create(**GREEDY)
            deltas = [e.delta async for e in await client.responses.create(**GREEDY, stream=True) if "delta" in e.type]
            return whole.output_text, "".join(deltas)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_every_field_is_known(server: RunningServer) -> None:
    openais = get_type_hints(ResponseCreateParamsBase) | get_type_hints(ResponseCreateParamsStreaming)
    assert {"model", "stream", "background"} < openais.keys()
    unsupported = ResponsesRequest.unsupported
    assert openais.keys() <= ResponsesRequest.model_fields.keys() | unsupported.keys()
    nulls = dict.fromkeys(openais.keys() - {"max_output_tokens", "input"})
    neutral = {name: field.neutral[-1] for name, field in unsupported.items() if field.neutral}
    for fields in (nulls, neutral):
        server.client.post("/responses", body={"input": "Hi", "max_output_tokens": 1, **fields}, cast_to=object)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "input=[] is not possible"),
        ({"input": [{"type": "reasoning", "id": "a"}]}, "input.0.type", "'reasoning' is not supported"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0.type", "'item_reference' is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "'input_image'"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"background": True}, "background", "keeps no responses"),
        ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
        ({"truncation": "auto"}, "truncation", "truncation='auto'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'web_search'"),
        ({"tool_choice": {"type": "function", "name": "a"}}, "tool_choice", "tool_choice needs tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "'reasoning.encrypted_content'"),
        ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
        ({"n": 2}, "n", "n=2 is not possible"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens=0 is not possible"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}}, None, "llguidance"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(
    server: RunningServer, fields: dict[str, Any], param: str | None, message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.post("/responses", body={"input": "Hi", "stream": stream, **fields}, cast_to=object)
    assert message in caught.value.body["message"]
    if param is not None:
        assert caught.value.body["param"] == param


def test_a_stream_that_takes_too_long_fails(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), request_timeout=0.05) as running:
        events = events_of(running, {"input": "Hi", "ignore_eos": True})
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    assert "longer than the server allows" in events[-1].response.error.message
