"""Calls of tools through the official client, and what chat templates get."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from llama_te_infer import Engine
from llama_te_infer.serve.messages import for_template
from llama_te_infer.serve.protocol.tools import Tool
from llama_te_infer.serve.tools import ToolUse
from llama_te_infer.structured_outputs import StructuredOutputs
from serving.conftest import RunningServer, serving

LONGEST = 1024  # tokens, which are bytes
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
# A small template with the structure of Llama 3.1's.
LLAMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is not none or system is defined %}
    {{- '<|system|>' + (system or '') }}
    {%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- for document in documents or [] %}{{- document.text }}{%- endfor %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length > 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|assistant|>{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|ipython|>' + message.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content | trim + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine(LONGEST)


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    with serving(make_engine(LONGEST), chat_template=LLAMA) as running:
        yield running


@pytest.fixture
def writes(engine: Engine) -> Iterator[Callable[..., OpenAI]]:
    """Starts a server whose model writes a given text; the one before ends."""
    with ExitStack() as running:

        def start(text: str, **settings: Any) -> OpenAI:
            running.close()
            params = {"structured_outputs": StructuredOutputs(choice=(text,))} if text else {}
            fields = {"default_params": params, "chat_template": LLAMA, **settings}
            return running.enter_context(serving(engine, **fields)).client

        yield start


def ask(client: OpenAI, **fields: Any) -> Any:
    arguments: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 150}
    return client.chat.completions.create(**{**arguments, **fields})


def joined(chunks: Any) -> dict[int, tuple[str, list[tuple[str, str, str]], str | None]]:
    """Return each choice of a stream: its content, its calls and its finish reason."""
    choices: dict[int, tuple[str, list[tuple[str, str, str]], str | None]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            content, calls, reason = choices.get(choice.index, ("", [], None))
            for part in choice.delta.tool_calls or []:
                if part.id is not None:
                    assert part.index == len(calls) and part.type == "function"
                    calls.append((part.id, part.function.name, ""))
                identity, name, arguments = calls[part.index]
                calls[part.index] = (identity, name, arguments + part.function.arguments)
            content += choice.delta.content or ""
            choices[choice.index] = (content, calls, choice.finish_reason or reason)
    return choices


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
            },
            {"now"},
        ),
    ],
)
def test_required_calls_fit_their_schemas(tool_server: RunningServer, choice: Any, names: set[str]) -> None:
    for seed in range(2):
        fields: Any = {"tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
        (found,) = ask(tool_server.client, **fields).choices
        assert found.finish_reason == "tool_calls" and found.message.content is None
        ((name, arguments),) = calls_of(found.message)
        assert name in names
        jsonschema.validate(arguments, SCHEMA if name == "weather" else {"type": "object", "maxProperties": 0})
        content, calls, reason = joined(ask(tool_server.client, **fields, stream=True))[0]
        assert (content, reason) == ("", "tool_calls")
        assert [(name, json.loads(text)) for _, name, text in calls] == calls_of(found.message)


def test_a_template_without_tools_gets_hermes_calls(writes: Callable[..., OpenAI]) -> None:
    client = writes('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', chat_template=None)
    (choice,) = ask(client, tools=TOOLS[1:]).choices
    assert calls_of(choice.message) == [("now", {})]
    grammar = ToolUse.of([Tool.model_validate(TOOLS[1])], "required", False).grammar("hermes")
    client = writes("", chat_template=None, default_params={"structured_outputs": StructuredOutputs(grammar=grammar)})
    (choice,) = ask(client, tools=TOOLS[1:], max_tokens=100).choices
    assert calls_of(choice.message) == [("now", {})]


CALLS = '{"name": "weather", "parameters": {"city": "Zürich", "days": 2}}; {"name": "now", "parameters": {}}'
FOUND = [("weather", {"city": "Zürich", "days": 2}), ("now", {})]


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        (CALLS, None, FOUND),
        ('[weather(city="Zürich", days=2), now()]', None, FOUND),
        ('Look. <tool_call>{"name": "now", "arguments": {}}</tool_call>', "Look.", [("now", {})]),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ],
)
def test_calls_that_the_model_chooses(
    writes: Callable[..., OpenAI], text: str, content: str | None, found: list[tuple[str, Any]]
) -> None:
    client = writes(text)
    (choice,) = ask(client).choices
    assert calls_of(choice.message) == found and choice.message.content == content
    assert choice.finish_reason == ("tool_calls" if found else "stop")
    streamed, calls, reason = joined(ask(client, stream=True))[0]
    assert (streamed, reason) == (content or "", choice.finish_reason)
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == found
    assert len({identity for identity, _, _ in calls}) == len(calls)
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as events:
        final = events.get_final_completion().choices[0]
    assert final.message.content == content and calls_of(final.message) == found
    # Without tools, and with the choice of none, it is a text.
    assert ask(client, tool_choice="none").choices[0].message.content == text
    assert ask(client, tools=None).choices[0].message.content == text


def test_a_stream_of_calls_and_its_end_by_length(writes: Callable[..., OpenAI]) -> None:
    client = writes(CALLS)
    for index in range(2):  # two choices, each with its own calls
        content, calls, reason = joined(ask(client, n=2, stream=True))[index]
        assert (content, len(calls), reason) == ("", 2, "tool_calls")
    (choice,) = ask(client, max_tokens=60).choices
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    assert '{"city": "Zürich", "days": 2}'.startswith(call.function.arguments) and call.function.arguments
    assert joined(ask(client, max_tokens=60, stream=True))[0][1][0][2] == call.function.arguments
    (alone,) = ask(client, parallel_tool_calls=False).choices
    assert calls_of(alone.message) == FOUND[:1]
    with_logprobs = ask(client, logprobs=True, stream=True, stream_options={"include_usage": True})
    chunks = list(with_logprobs)
    tokens = [
        each
        for chunk in chunks
        for each in (chunk.choices[0].logprobs.content if chunk.choices and chunk.choices[0].logprobs else [])
    ]
    assert len(tokens) == chunks[-1].usage.completion_tokens, "each token has its log-probability"


def test_the_operator_chooses_the_formats(writes: Callable[..., OpenAI]) -> None:
    client = writes(CALLS, tool_formats=("hermes",))
    assert ask(client).choices[0].message.content == CALLS
    with pytest.raises(openai.BadRequestError, match='tool_choice="auto" is turned off'):
        ask(writes(CALLS, tool_formats=()))


class Weather(BaseModel):
    """How the weather is."""

    city: Literal["Rome", "Bern"]
    days: int


def test_pydantic_tools(tool_server: RunningServer) -> None:
    answer = tool_server.client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
        seed=1,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def calling(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [call]}]


NO_SCHEMA = {"type": "object", "properties": {"b": {"type": "x"}}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [tool("a"), tool("a")]}, "tools", "tools has two functions 'a'"),
        ({"tools": [tool("a b")]}, "tools.0.function.name", "'a b'"),
        ({"tools": [tool("a", parameters={"type": "array"})]}, "tools.0.function.parameters", "type='array'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'web_search'"),
        ({"tool_choice": tool("b"), "tools": [tool("a")]}, "tool_choice", "tool_choice names 'b', but tools has a"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"tool_choice": "sometimes", "tools": [tool("a")]}, "tool_choice", "'sometimes'"),
        ({"tools": [tool("a", parameters=NO_SCHEMA)], "tool_choice": "required"}, None, "llguidance refuses"),
        ({"messages": calling({"id": "c"})}, "messages.0.tool_calls.0", "is no call of a function"),
        ({"messages": calling(tool("a", arguments="[1]"))}, "messages.0.tool_calls.0", "no JSON object"),
        ({"messages": calling({**tool("a"), "id": []})}, "messages.0.tool_calls.0.id", "is no text"),
        ({"messages": [{"role": "tool", "tool_call_id": {}}]}, "messages.0.tool_call_id", "is no text"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages.0", "audio is not supported"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "'tokenize', which is no variable"),
    ],
)
def test_what_is_refused(tool_server: RunningServer, fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tool_server.client.post("/chat/completions", body={"messages": MESSAGES, **fields}, cast_to=object)
    assert message in caught.value.body["message"]
    if param is not None:
        assert caught.value.body["param"] == param


# --- chat templates ---------------------------------------------------------------------------------------------------

TALK: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
    {"role": "user", "content": "Weather?", "name": "ann"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
            {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Sun"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "3 pm"}]},
    {"role": "assistant", "content": "It is sunny.", "tool_calls": []},
]


def prompt_of(running: RunningServer, **fields: Any) -> str:
    """Return the prompt of a conversation."""
    post = running.client.with_options(base_url=running.url).post
    tokens: Any = post("/tokenize", body=fields, cast_to=object)
    text: Any = post("/detokenize", body={"tokens": tokens["tokens"]}, cast_to=object)
    return str(text["prompt"])


def test_a_template_of_llamas_kind(tool_server: RunningServer) -> None:
    now = {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}}
    prompt = prompt_of(tool_server, messages=TALK, tools=[now])
    now["function"]["parameters"] = {"type": "object"}
    shown = json.dumps({**now})
    assert prompt == (
        f"<|bos|><|system|>Be\nbrief.{shown}<|end|><|user|>Weather?<|end|>"
        '<|assistant|>{"name": "weather", "parameters": {"city": "Zürich"}}<|end|><|ipython|>"Sun"<|end|>'
        '<|assistant|>{"name": "now", "parameters": {}}<|end|><|ipython|>"3 pm"<|end|>'
        "<|assistant|>It is sunny.<|end|><|assistant|>"
    )
    documents = [{"text": "A fact."}]
    assert "A fact." in prompt_of(tool_server, messages=MESSAGES, documents=documents)
    assert prompt_of(tool_server, messages=MESSAGES, add_generation_prompt=False).endswith("Hi<|end|>")
    last = [*MESSAGES, {"role": "assistant", "content": "It"}]
    assert prompt_of(tool_server, messages=last, continue_final_message=True).endswith("<|assistant|>It")


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_a_prompt_has_the_bos_that_its_template_writes(engine: Engine, bos: str) -> None:
    with serving(engine, chat_template=bos + "{% for m in messages %}{{ m.content }}{% endfor %}") as running:
        assert prompt_of(running, messages=MESSAGES) == ("<|bos|>Hi" if bos else "Hi")


def test_a_template_without_tools_gets_texts() -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    messages = for_template(TALK, "{{ messages }}", tools)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "user", "assistant"]
    assert messages[0]["content"].startswith("Be\nbrief.\n\nYou can call functions.")
    assert json.dumps(tools[0]) in messages[0]["content"]
    assert messages[2]["content"].startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n')
    assert messages[3]["content"] == "<tool_response>\nSun\n</tool_response>"
    assert not any("tool_calls" in message for message in messages)
    assert for_template(MESSAGES, "{{ messages }}", tools)[0]["role"] == "system"
    assert for_template(MESSAGES, "{{ messages }}", None) == MESSAGES


def test_a_template_that_knows_more_gets_more() -> None:
    messages = for_template(TALK, "tools tool_calls developer", None)
    assert messages[0]["role"] == "developer" and messages[1]["name"] == "ann"
    assert [call["function"]["arguments"] for call in messages[2]["tool_calls"]] == [{"city": "Zürich"}, {}]
    assert [message.get("name") for message in messages[3:5]] == ["weather", "now"]
    assert messages[2]["content"] == "" and "audio" not in messages[2] and "tool_calls" not in messages[5]
