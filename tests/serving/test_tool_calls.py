"""Calls in texts: every format, cut into any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_te_infer.serve.tool_calls import TOOL_FORMATS, Arguments, CallBegin, Part, Text, ToolCallParser

NAMES = ("f", "get_weather", "g.h-i")


def parse(pieces: list[str], formats: Any = TOOL_FORMATS) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls."""
    parser = ToolCallParser(NAMES, formats)
    parts: list[Part] = [part for piece in pieces for part in parser.feed(piece)] + parser.end()
    text, calls = "", []
    for part in parts:
        match part:
            case Text(more):
                text += more
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Arguments(index, more):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + more)
    assert parser.num_calls == len(calls)
    return text, calls


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (' {"type": "function", "name": "f", "parameters": {}}\n', "", [("f", "{}")]),
        ('{"parameters": {"a": "}"}, "name": "f"}', "", [("f", '{"a": "}"}')]),
        ('{"name": "f"}', "", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}', "", [("f", "{}")] * 2),
        ('{"name": "f", "parameters": {}}\n{"name": "f", "arguments": {}}', "", [("f", "{}")] * 2),
        ('[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]', "", [("f", "{}")] * 2),
        ('<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        ('Look:\n{"name": "f", "parameters": {}}\nThere.', "Look:\nThere.", [("f", "{}")]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>', "", [("f", '{"a": [1]}')]),
        ('Look: <tool_call>{"arguments": {}, "name": "f"}</tool_call> so', "Look: so", [("f", "{}")]),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ('[f(a=1, b="x"), get_weather()]', "", [("f", '{"a": 1, "b": "x"}'), ("get_weather", "{}")]),
        ("[f(a=[1, (2,), {'b': None}], c=-01.e5)]", "", [("f", '{"a": [1, [2], {"b": null}], "c": -1.0e5}')]),
        (r"""[f(a='\'"\n\x41\u00e9\q')]""", "", [("f", r"""{"a": "'\"\nAé\\q"}""")]),
        ("[f(a=Paris)]", "", [("f", '{"a": "Paris"}')]),
        ("<|python_tag|>[g.h-i(a=1)]", "", [("g.h-i", '{"a": 1}')]),
        # None of these is a call.
        ('{"name": "other", "parameters": {}}', None, []),
        ('{"name": "f", "parameters": 5}', None, []),
        ('Say {"name": "f", "parameters": {}}', None, []),
        ('{"answer": {"name": "f", "parameters": {}}}', None, []),
        ("[1, 2, 3]", None, []),
        ("[f(1)]", None, []),
        ("[other(a=1)]", None, []),
        ("<|python_tag|>import os", None, []),
        ("  \n", None, []),
        ("<tool_", None, []),
        # A text that was cut off keeps what is there.
        ('{"name": "f", "parameters": {"a": "b', "", [("f", '{"a": "b')]),
        ("[f(a=1, b='x", "", [("f", '{"a": 1, "b": "x')]),
        ('{"name": "f", "param', None, []),
        ('<tool_call>{"name": "f", "arguments": {}}</tool', "", [("f", "{}")]),
        ('{"name": "f", "parameters": {}} {"na', ' {"na', [("f", "{}")]),
    ],
)  # fmt: skip
def test_a_text(text: str, rest: str | None, calls: list[tuple[str, str]]) -> None:
    assert parse([text]) == parse(list(text)) == (text if rest is None else rest, calls)


@pytest.mark.parametrize(
    ("formats", "found"), [(("llama3_json",), "j"), (("hermes",), "h"), (("pythonic",), "p"), (TOOL_FORMATS, "jhp")]
)
def test_formats_that_the_operator_leaves_out_are_text(formats: Any, found: str) -> None:
    texts = {
        "j": '{"name": "f", "parameters": {}}',
        "h": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "p": "[f()]",
    }
    for key, text in texts.items():
        assert parse([text], formats) == (("", [("f", "{}")]) if key in found else (text, []))


SYNTAX = st.sampled_from(
    [
        *('{"name": "f"', ', "parameters": {', '"a": 1', "}", "}}", "[", "]", "<tool_call>", "</tool_call>", "["),
        *("<|python_tag|>", "[f(", "a=", "'b'", ")", ", ", "; ", "\n", '"', "\\", "{", "(", " ", "get_weather", "1e5"),
    ]
)
TEXTS = st.lists(SYNTAX | st.text(max_size=4), max_size=20).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.data())
def test_pieces_do_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text])
    assert parse(pieces) == whole
    if not whole[1]:
        assert whole[0] == text, "a text without calls stays as it is"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=5), VALUES, max_size=3)), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None)
@given(CALLS, st.booleans(), st.sampled_from(["; ", "\n", "list"]))
def test_arguments_in_json_survive(calls: list[tuple[str, dict[str, Any]]], is_ascii: bool, between: str) -> None:
    objects = [json.dumps({"name": name, "parameters": arguments}, ensure_ascii=is_ascii) for name, arguments in calls]
    tags = [f"<tool_call>\n{each}\n</tool_call>" for each in objects]
    text = f"[{', '.join(objects)}]" if between == "list" else between.join(objects)
    for written in (text, "\n".join(tags)):
        rest, found = parse([written])
        assert rest == "" and [(name, json.loads(arguments)) for name, arguments in found] == calls


IDENTIFIERS = st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True)
PYTHON_CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(IDENTIFIERS, VALUES, max_size=3)), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None)
@given(PYTHON_CALLS)
def test_arguments_in_python_survive(calls: list[tuple[str, dict[str, Any]]]) -> None:
    written = [f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls]
    rest, found = parse([f"[{', '.join(written)}]"])
    assert rest == "" and [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(
    "text", ["[f(a=" + "[" * 3000, '{"name": "f", "parameters": ' + "[" * 3000, "{" * 3000, "[" * 3000]
)
def test_deep_brackets(text: str) -> None:
    parse([text])


def test_parts_of_one_piece_are_joined() -> None:
    parser = ToolCallParser(NAMES)
    found = parser.feed('A\n{"name": "f", "parameters": {"a": "\\n"}}') + parser.end()
    assert found == [Text("A"), CallBegin(0, "f"), Arguments(0, '{"a": "\\n"}')]
