"""The server answers the bodies that users' libraries send: recorded ones, with shorter texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from llama_te_infer import Engine
from serving.conftest import RunningServer, serving
from serving.test_tools import LLAMA

CITY = {
    "properties": {"city": {"title": "City", "type": "string"}},
    "required": ["city"],
    "title": "weather_args",
    "type": "object",
    "additionalProperties": False,
}
PERSON = {
    "description": "A person.",
    "properties": {
        "name": {"maxLength": 5, "title": "Name", "type": "string"},
        "age": {"maximum": 150, "minimum": 0, "title": "Age", "type": "integer"},
        "sex": {"anyOf": [{"enum": ["f", "m"], "type": "string"}, {"type": "null"}], "default": None, "title": "Sex"},
    },
    "required": ["name", "age", "sex"],
    "title": "Person",
    "type": "object",
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "Weather.", "parameters": CITY, "strict": True}
CALL = {"function": {"arguments": '{"city": "Rome"}', "name": "weather"}, "id": "call_d1b4", "type": "function"}
ANSWER = {"role": "tool", "tool_call_id": "call_d1b4", "content": "20 C"}
USER = {"role": "user", "content": "Weather in Rome?"}

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "litellm 1.110, the answer of a tool": (
        "chat/completions",
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {**ANSWER, "name": "weather"}],
            "temperature": 0,
            "max_tokens": 4,
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ),
    "openai-agents 0.24, the answer of a tool": (
        "chat/completions",
        {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWER],
            "max_tokens": 4,
            "parallel_tool_calls": False,
            "temperature": 0.0,
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ),
    "openai-agents 0.24, the answer of a tool in items": (
        "responses",
        {
            "include": [],
            "input": [
                USER,
                {
                    "arguments": '{"city": "Rome"}',
                    "call_id": "call_d1b4",
                    "name": "weather",
                    "type": "function_call",
                    "id": "fc_dc72",
                    "status": "completed",
                },
                {"call_id": "call_d1b4", "output": "20 C", "type": "function_call_output"},
            ],
            "max_output_tokens": 4,
            "parallel_tool_calls": False,
            "tools": [{"type": "function", **WEATHER}],
        },
    ),
    "openai-agents 0.24, no tools": (
        "responses",
        {"include": [], "input": [{"content": "Hello", "role": "user"}], "max_output_tokens": 4, "tools": []},
    ),
    "langchain-openai 1.7, a second question": (
        "responses",
        {
            "input": [
                {"content": "Hello", "role": "user", "type": "message"},
                {
                    "type": "message",
                    "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
                    "role": "assistant",
                    "id": "msg_31e1",
                },
                {"content": "And?", "role": "user", "type": "message"},
            ],
            "max_output_tokens": 4,
            "stream": False,
            "temperature": 0.0,
        },
    ),
    "langchain-openai 1.7, a text": (
        "completions",
        {
            "prompt": ["Hello"],
            "frequency_penalty": 0,
            "logprobs": None,
            "max_tokens": 4,
            "n": 1,
            "presence_penalty": 0,
            "seed": None,
            "temperature": 0.7,
            "top_p": 1,
        },
    ),
    "instructor 1.17, a form and a tool": (
        "responses",
        {
            "input": [{"role": "user", "content": "Ann is a woman of 30."}],
            "max_output_tokens": 200,
            "temperature": 0,
            "text": {"format": {"type": "json_schema", "name": "Person", "strict": True, "schema": PERSON}},
            "tool_choice": {"type": "function", "name": "Person"},
            "tools": [{"type": "function", "name": "Person", "parameters": PERSON, "description": "A person."}],
        },
    ),
    "pydantic-ai 2.38, a tool for the result": (
        "responses",
        {
            "input": [{"role": "user", "content": "Ann is a woman of 30."}],
            "max_output_tokens": 200,
            "stream": False,
            "temperature": 0,
            "tool_choice": "required",
            "tools": [{"name": "final_result", "parameters": PERSON, "type": "function", "strict": False}],
        },
    ),
}


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    with serving(make_engine(2048), chat_template=LLAMA) as running:
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_the_server_answers(tool_server: RunningServer, name: str) -> None:
    path, body = BODIES[name]
    answer = httpx.post(f"{tool_server.url}/v1/{path}", json={"model": "tiny", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    if "tool_choice" in body:
        assert answer.json()["output"][0]["type"] == "function_call"
