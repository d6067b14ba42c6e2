"""Turns the messages of a request into those that chat templates expect."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError
from .tool_calls import CALL_END_TAG, CALL_TAG

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ONE_CALL = "only supports single tool-calls at once"  # with these words templates of Llama 3 refuse several calls
_WITHOUT_TOOLS = """You can call functions. Each line between the tags describes one:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON:
{begin}
{{"name": "...", "arguments": {{...}}}}
{end}"""


def for_template(
    messages: Sequence[Mapping[str, Any]], template: str, tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return messages as a chat template expects them.

    Content becomes one text, and the arguments of calls become dicts. A message of role "developer" gets the role
    "system", if the template does not know the former. The answer of a tool gets the tool's name. If the template does
    not write tools, a system message describes them, and calls and their answers become texts.

    Args:
        messages: Of the request.
        template: The source of the template.
        tools: The tools that the prompt shows.

    Raises:
        ApiError: A message has something that is no text, or damaged calls.
    """
    names: dict[str, str] = {}
    prepared = [_prepared(message, f"messages.{index}", names) for index, message in enumerate(messages)]
    if "developer" not in template:
        for message in prepared:
            if message["role"] == "developer":
                message["role"] = "system"
    if not writes_tools(template):
        return _without_tools(prepared, tools)
    return _one_call_each(prepared) if _ONE_CALL in template else prepared


def writes_tools(template: str) -> bool:
    """Return whether a chat template writes tools and calls."""
    return "tools" in template and "tool_calls" in template


def _prepared(message: Mapping[str, Any], place: str, names: dict[str, str]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise ApiError(400, f'{place}.role={role!r} is not possible: give a role such as "user".', f"{place}.role")
    prepared = {key: value for key, value in message.items() if value is not None}
    for key in ("audio", "function_call"):
        if key in prepared:
            raise ApiError(400, f"{place}.{key} is not supported: leave it out.", place)
    refusal = prepared.pop("refusal", None)
    prepared["content"] = text_of(message.get("content") or refusal or "", f"{place}.content")
    calls = prepared.pop("tool_calls", None)
    if calls:
        prepared["tool_calls"] = [
            _call(call, f"{place}.tool_calls.{index}", names) for index, call in enumerate(_list(calls, place))
        ]
    identity = _id(prepared, "tool_call_id", place)
    if role == "tool" and identity in names:
        prepared.setdefault("name", names[identity])
    return prepared


def _id(fields: Mapping[str, Any], name: str, place: str) -> str | None:
    identity = fields.get(name)
    if identity is not None and not isinstance(identity, str):
        raise ApiError(400, f"{place}.{name} is no text: give the id of a call.", f"{place}.{name}")
    return identity


def text_of(content: Any, place: str) -> str:
    """Return the text of a content: a text, or a list of parts with texts, joined by line ends.

    Args:
        content: Of a message.
        place: Its name in the request.

    Raises:
        ApiError: The content has something else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{place} is neither a text nor a list of parts: give one of them.", place)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            found = f"the type {kind!r}" if isinstance(kind, str) else "no type"
            here = f"{place}.{index}"
            message = f'{here} has {found}: give text alone, such as {{"type": "text", "text": "Hello"}}.'
            raise ApiError(400, message, here)
        texts.append(text)
    return "\n".join(texts)


def _list(calls: Any, place: str) -> list[Any]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{place}.tool_calls is no list.", place)
    return calls


def _call(call: Any, place: str, names: dict[str, str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{place} is no call of a function: give its name and arguments.", place)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{place}.function.arguments is no JSON object: give one, as a text.", place)
    identity = _id(call, "id", place)
    if identity is not None:
        names[identity] = function["name"]
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each call a message of its own, with the tool's answer behind it."""
    separate: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Any]] = {}
    for index, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if len(calls) > 1:
            following = itertools.takewhile(lambda each: each["role"] == "tool", messages[index + 1 :])
            answers = {each["tool_call_id"]: each for each in following if "tool_call_id" in each}
            for call in calls:
                separate.append({**message, "tool_calls": [call]})
                if call.get("id") in answers:
                    separate.append(answers[call["id"]])
        elif not any(message is each for each in answers.values()):
            separate.append(message)
    return separate


def _without_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Return messages for a template that writes contents alone, with calls in Hermes' format."""
    plain = []
    for message in messages:
        content = message["content"]
        calls = [
            f"{CALL_TAG}\n{_json({key: call['function'][key] for key in ('name', 'arguments')})}\n{CALL_END_TAG}"
            for call in message.get("tool_calls", ())
        ]
        if calls:
            content = "\n".join([*filter(None, [content]), *calls])
        role = message["role"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        plain.append({**rest, "role": role, "content": content})
    if tools:
        text = _WITHOUT_TOOLS.format(tools="\n".join(map(_json, tools)), begin=CALL_TAG, end=CALL_END_TAG)
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] = "\n\n".join([*filter(None, [plain[0]["content"]]), text])
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
