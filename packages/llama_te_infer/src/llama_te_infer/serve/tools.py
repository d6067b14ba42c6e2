"""Which tools the model may call in an answer, which form a required call has, and how calls are found in its text."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..structured_outputs import StructuredOutputs
from .errors import ApiError
from .protocol.tools import AllowedToolsChoice, Function, Tool, ToolChoice, ToolName
from .tool_calls import CALL_END_TAG, CALL_TAG, TOOL_FORMATS, Part, Text, ToolCallParser, ToolFormat

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# JSON as models write it, without white space that could go on for ever.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request.

    Attributes:
        functions: All of them; the prompt shows them.
        callable: Those that the model may call.
        mode: Whether it may call them, must, or must not.
        is_parallel: Whether it may write several calls.
    """

    functions: tuple[Function, ...] = ()
    callable: tuple[Function, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    is_parallel: bool = True

    @classmethod
    def of(
        cls, tools: Sequence[Tool] | None, choice: ToolChoice | None = None, parallel: bool | None = None
    ) -> ToolUse:
        """Return the tools of a request, from the fields of a chat.

        Args:
            tools: All tools.
            choice: The field `tool_choice`.
            parallel: The field `parallel_tool_calls`.

        Raises:
            ApiError: The fields contradict each other.
        """
        functions = tuple(tool.function for tool in tools or ())
        if not functions:
            if choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice needs tools: give tools, or leave tool_choice out.", "tool_choice")
            return cls()
        _check_names([function.name for function in functions])
        for index, function in enumerate(functions):
            _check_schema(function, f"tools.{index}.function.parameters")
        mode: Literal["none", "auto", "required"]
        match choice:
            case ToolName():
                return cls(functions, _chosen([choice], functions), "required", is_parallel=False)
            case AllowedToolsChoice():
                mode, chosen = choice.allowed_tools.mode, _chosen(choice.allowed_tools.tools, functions)
            case _:
                mode, chosen = choice or "auto", functions
        return cls(functions, chosen, mode, parallel is not False)

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates expect them; `None` if the prompt shows none."""
        if self.mode == "none":
            return None
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    "description": function.description or "",
                    "parameters": function.parameters or {"type": "object", "properties": {}},
                },
            }
            for function in self.functions
        ]

    def strict_grammar(self, special_tokens: Iterable[int]) -> str | None:
        """Return the grammar of a text that may call tools, in llguidance's variant of Lark.

        The text is free until the model has written the name of a strict function as its formats in JSON have it. Then
        the arguments must fit the function's schema. `None` if no function that the model may call is strict.

        Args:
            special_tokens: Those of the tokenizer, which no expression matches.
        """
        strict = [function for function in self.callable if function.strict]
        if not strict:
            return None
        parts = [f"call{index}" for index in range(len(strict))]
        if tokens := ",".join(map(str, sorted(special_tokens))):
            parts.append(f"TEXT <[{tokens}]>")
        lines = [
            f"start: ({' | '.join(parts)})* TEXT",
            r"TEXT: /(.|\n)*/",
            r'KEY: /[ \n]?,[ \n]?"(parameters|arguments)"[ \n]?:[ \n]?/',
            r"END: /[ \n]?\}/",
        ]
        space = r"[ \t\r\n]*"
        for index, function in enumerate(strict):
            others = f'("(type|id)"{space}:{space}"[^"]*"{space},{space})*'
            name = f'"name"{space}:{space}"{re.escape(function.name)}"'
            lines.append(rf"head{index}[lazy]: /(.|\n)*\{{{space}{others}{name}/")
            lines.append(f"call{index}: head{index} KEY arguments{index} END")
            lines.append(f"arguments{index}: %json {json.dumps(_compact(function))}")
        return "\n".join(lines)

    def grammar(self, tool_format: ToolFormat, answer: Mapping[str, Any] | None = None) -> str | None:
        """Return the grammar of the text, in llguidance's variant of Lark; `None` if it may be any text.

        Args:
            tool_format: "hermes" for its tags and names of fields, or anything else for Llama 3's JSON.
            answer: A JSON schema of the text, if the model calls no tool.
        """
        if self.mode == "none" or (self.mode == "auto" and answer is None):
            return None
        is_hermes = tool_format == "hermes"
        key, between = ("arguments", "\n") if is_hermes else ("parameters", "; ")
        begin, end = json.dumps(CALL_TAG + "\n"), json.dumps("\n" + CALL_END_TAG)
        call = f"{begin} call {end}" if is_hermes else "call"
        more = f" ({json.dumps(between)} {call})*" if self.is_parallel else ""
        names = [f"call{index}" for index in range(len(self.callable))]
        lines = [f"calls: {call}{more}", f"call: {' | '.join(names)}"]
        for index, function in enumerate(self.callable):
            head = f'{{"name": {json.dumps(function.name)}, "{key}": '
            lines.append(f'call{index}: {json.dumps(head)} arguments{index} "}}"')
            lines.append(f"arguments{index}: %json {json.dumps(_compact(function))}")
        if self.mode == "auto":
            return "\n".join(["start: calls | answer", f"answer: %json {json.dumps(answer)}", *lines])
        return "\n".join(["start: calls", *lines])


def _compact(function: Function) -> dict[str, Any]:
    """Return the schema of a function's arguments."""
    return {"type": "object", **(function.parameters or NO_ARGUMENTS), "x-guidance": _COMPACT}


def schema_of(form: StructuredOutputs) -> dict[str, Any] | None:
    """Return the JSON schema of a form; `None` if the form is no JSON."""
    if form.json_object:
        return {"type": "object"}
    schema: dict[str, Any] | None = None if form.json is None else json.loads(str(form.json))
    return schema


class AnswerReader:
    """Reads the text of one answer as it comes.

    Args:
        tools: The tools of the request.
        formats: The formats of calls that the operator allows; a required call may have any.

    Attributes:
        num_calls: The calls that have begun.
    """

    def __init__(self, tools: ToolUse, formats: Iterable[ToolFormat]) -> None:
        names = [function.name for function in tools.callable]
        is_required = tools.mode == "required"
        self._parser = None if tools.mode == "none" else ToolCallParser(names, TOOL_FORMATS if is_required else formats)
        self._most_calls = math.inf if tools.is_parallel else 1
        self.num_calls: int | float = 0

    def read(self, text: str, is_end: bool) -> list[Part]:
        """Return the parts that a further piece of the text completes."""
        if self._parser is None:
            return [Text(text)] if text else []
        parts = self._parser.feed(text)
        if is_end:
            parts += self._parser.end()
        self.num_calls = min(self._parser.num_calls, self._most_calls)
        return [part for part in parts if isinstance(part, Text) or part.index < self._most_calls]


def new_call_id() -> str:
    """Return a new id of a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _check_names(names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ApiError(400, f"tools has two functions {name!r}: give each a name of its own.", "tools")


def _check_schema(function: Function, place: str) -> None:
    kind = (function.parameters or {}).get("type", "object")
    if kind != "object":
        raise ApiError(400, f"{place}.type={kind!r} is not possible: arguments are an object, by name.", place)


def _chosen(tools: Iterable[ToolName], functions: Sequence[Function]) -> tuple[Function, ...]:
    by_name = {function.name: function for function in functions}
    chosen = []
    for tool in tools:
        name = tool.function.name
        if name not in by_name:
            listed = ", ".join(by_name)
            raise ApiError(400, f"tool_choice names {name!r}, but tools has {listed}: name one of them.", "tool_choice")
        chosen.append(by_name[name])
    return tuple(chosen)
