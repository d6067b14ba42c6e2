"""Strict tools that the model may call: the text is free until it calls one, and then the arguments fit the schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from transformers import PreTrainedTokenizerFast

from llama_te_infer import Engine
from llama_te_infer.engine.grammars import GrammarCompiler
from llama_te_infer.engine.tokenization import special_tokens_of
from llama_te_infer.serve.protocol.tools import AllowedToolsChoice, Tool, ToolChoice
from llama_te_infer.serve.tools import ToolUse
from llama_te_infer.structured_outputs import StructuredOutputs
from serving.conftest import RunningServer, serving
from serving.test_tools import LLAMA, LONGEST, MESSAGES, SCHEMA, ask, calls_of, joined

OTHER = {"type": "function", "function": {"name": "look.up-x", "parameters": SCHEMA}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "clock.now-1", "strict": True}}
FITS = '{"city": "Rome", "days": 3}'


def grammar_of(tools: list[Any], choice: ToolChoice | None = None) -> str | None:
    return ToolUse.of([Tool.model_validate(tool) for tool in tools], choice).strict_grammar([256, 257, 258])


@pytest.fixture(scope="module")
def tool_server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    with serving(make_engine(LONGEST), chat_template=LLAMA) as running:
        yield running


@pytest.fixture(scope="module")
def matcher(byte_tokenizer: PreTrainedTokenizerFast) -> Any:
    assert set(special_tokens_of(byte_tokenizer).values()) == {256, 257, 258}
    grammar = grammar_of([WEATHER, OTHER, NOW])
    assert grammar is not None
    return GrammarCompiler(byte_tokenizer, 259, [257]).compile(StructuredOutputs(grammar=grammar)).matcher


def length_that_fits(matcher: Any, tokens: list[int]) -> int:
    """Return how many of the tokens the grammar takes; -1 if it takes all and more must follow."""
    own = matcher.deep_copy()
    for index, token in enumerate(tokens):
        if not own.validate_tokens([token]):
            return index
        own.consume_token(token)
    return len(tokens) if own.is_accepting() else -1


@pytest.mark.parametrize(
    "text",
    [
        "",
        'Some text, { "name": 3 } and {"name": "weathers", "parameters": {"city": 4}} and\n[] "weather" é漢😀\r\n',
        'An example of another function: {"name": "look.up-x", "parameters": {"city": 4}}',
        f'{{"name": "weather", "parameters": {FITS}}}',
        f'Wait.\n{{ "type": "function", "id": "1",\n"name":"weather","arguments":{FITS}}} and so on',
        f'<tool_call>\n{{"name": "weather", "arguments": {FITS}}}\n</tool_call>\n<tool_call>\n'
        '{"name": "clock.now-1", "arguments": {}}\n</tool_call>',
        f'{{"name": "weather", "parameters": {FITS}}}; {{"name": "clock.now-1", "parameters": {{}}}}',
        f'[{{"name": "weather", "parameters": {FITS}}}, {{"name": "clock.now-1", "parameters": {{}}}}]',
        "[weather(city=4)]",  # this form is not forced
    ],
)
def test_what_the_model_may_write(matcher: Any, byte_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert length_that_fits(matcher, tokens) == len(tokens)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"name": "weather", "parameters": {"city": "', 'Paris"'),
        ('{"name": "weather", "parameters": {"', 'days": 3}}'),
        ('{"name": "weather", "parameters": {"city": "Rome", "days": 3', "3}}"),
        ('{"name": "weather"', "}"),
        ('A text. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"', "}}"),
        (f'{{"name": "weather", "parameters": {FITS}}}; {{"name": "clock.now-1", "parameters": {{', '"a": 1}}'),
        ('{"id": "a", "type": "function", "name": "weather", "parameters": {"city": "Rome", "days": ', '"3"}}'),
    ],
)
def test_what_it_may_not(matcher: Any, byte_tokenizer: PreTrainedTokenizerFast, text: str, rest: str) -> None:
    begin, end = (byte_tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, rest))
    assert length_that_fits(matcher, begin + end) == len(begin)


def test_a_call_that_has_begun_does_not_end(matcher: Any, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ('{"name": "weather"', '{"name": "weather", "parameters": {"city": "Rome"'):
        assert length_that_fits(matcher, byte_tokenizer(text, add_special_tokens=False)["input_ids"]) == -1


def test_special_tokens_in_free_text(matcher: Any, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Such as the tag that Llama 3 writes before a call. Within a call there is none."""
    begin = byte_tokenizer('a{"name": "clock.now-1", "parameters": {', add_special_tokens=False)["input_ids"]
    end = byte_tokenizer("}} b", add_special_tokens=False)["input_ids"]
    assert length_that_fits(matcher, [256, *begin, *end, 258]) == len(begin) + len(end) + 2
    assert length_that_fits(matcher, [*begin, 256]) == len(begin)


def test_a_tokenizer_without_special_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    grammar = ToolUse.of([Tool.model_validate(NOW)]).strict_grammar([])
    assert GrammarCompiler(byte_tokenizer, 259, [257]).compile(StructuredOutputs(grammar=grammar))


def test_schemas_that_are_too_long(tool_server: RunningServer) -> None:
    wide = {"type": "object", "properties": {f"argument{index}": {"type": "string"} for index in range(2000)}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": wide, "strict": True}}]
    found = httpx.post(f"{tool_server.url}/v1/chat/completions", json={"messages": MESSAGES, "tools": tools}).json()
    assert found["error"]["param"] == "tools" and "leave out strict" in found["error"]["message"]


def test_no_grammar_without_strict_functions() -> None:
    assert grammar_of([OTHER]) is None
    chosen: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [OTHER | {"function": {"name": "look.up-x"}}]},
    }
    assert grammar_of([OTHER, WEATHER], AllowedToolsChoice.model_validate(chosen)) is None


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}])
def test_a_call_over_http(tool_server: RunningServer, monkeypatch: pytest.MonkeyPatch, fields: Any) -> None:
    """The tiny model would never begin a call, so its text begins with one."""
    write = ToolUse.strict_grammar

    def begun(self: ToolUse, special_tokens: Any) -> str:
        grammar = write(self, special_tokens)
        assert grammar is not None
        head = "head0: " + json.dumps('{"name": "weather"')
        lines = [head if line.startswith("head0") else line for line in grammar.split("\n")]
        return "\n".join(["start: call0", *lines[1:]])

    monkeypatch.setattr(ToolUse, "strict_grammar", begun)
    arguments: Any = {"tools": [WEATHER], "max_tokens": 300, **fields}
    (choice,) = ask(tool_server.client, **arguments, seed=1).choices
    ((name, found),) = calls_of(choice.message)
    assert (name, choice.finish_reason) == ("weather", "tool_calls")
    jsonschema.validate(found, SCHEMA)
    _, calls, _ = joined(ask(tool_server.client, **arguments, seed=1, stream=True))[0]
    assert [(name, json.loads(text)) for _, name, text in calls] == [(name, found)]
    response = tool_server.client.responses.create(
        model="tiny", input="Hi", tools=[{"type": "function", **WEATHER["function"]}]
    )
    assert response.output[0].type == "function_call"
    jsonschema.validate(json.loads(response.output[0].arguments), SCHEMA)


def test_a_form_of_the_text_stays(tool_server: RunningServer) -> None:
    (choice,) = ask(tool_server.client, tools=[WEATHER], extra_body={"structured_outputs": {"choice": ["yes"]}}).choices
    assert choice.message.content == "yes"
