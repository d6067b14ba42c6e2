"""Finds tool calls in a text as its characters come.

It knows these formats:

- JSON: `{"name": "f", "parameters": {"a": 1}}` at the beginning of a line, several in a list, or with ";" between them.
- Hermes: `<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>`.
- Pythonic: `[f(a=1), g(b="x")]` at the beginning of a line.

Llama 3 may write `<|python_tag|>` before the first and the last of them.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import Literal

ToolFormat = Literal["llama3_json", "hermes", "pythonic"]
TOOL_FORMATS: tuple[ToolFormat, ...] = ("llama3_json", "hermes", "pythonic")

PYTHON_TAG, CALL_TAG, CALL_END_TAG = "<|python_tag|>", "<tool_call>", "</tool_call>"
_ARGUMENTS = ("parameters", "arguments")
_OTHER_KEYS = ("type", "id")
_LONGEST_STRING = 512  # characters of a name or a key, with escapes
_LONGEST_WORD = 4096  # characters of a number or a word
_DEEPEST = 64  # lists and dicts in each other
_BETWEEN_CALLS = " \t\r\n;,"
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_ESCAPE_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True)
class Text:
    """A part of a text that is no tool call."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A tool call whose name is complete; `index` counts the calls of the text."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """A further part of the arguments of a call; all of them together are a JSON object, unless the text is cut off."""

    index: int
    text: str


Part = Text | CallBegin | Arguments
Reader = Generator[None, str, None]
StringReader = Generator[None, str, str]


class _NoCallError(Exception):
    """What looked like a call is none."""


class ToolCallParser:
    """Splits a text into tool calls and other text.

    What is no call of a known tool stays text. White space next to calls and what separates them is left out. The parts
    do not depend on how the text is cut into pieces.

    Args:
        names: The tools' names.
        formats: The formats to look for.
    """

    def __init__(self, names: Iterable[str], formats: Iterable[ToolFormat] = TOOL_FORMATS) -> None:
        self._names, self._formats = frozenset(names), frozenset(formats)
        # Of calls without a tag.
        self._first_characters = ("{[" if "llama3_json" in self._formats else "") + "[" * ("pythonic" in self._formats)
        self.num_calls = 0
        self._parts: list[Part] = []
        self._ahead = ""  # the next character, if it has been looked at
        self._held: list[str] = []  # characters that are text if no call comes of them
        self._is_line_empty = True  # whether only white space is before them in their line
        self._is_in_call = False  # whether they are syntax of a call that has begun
        self._reader = self._read_all()
        next(self._reader)

    def feed(self, text: str) -> list[Part]:
        """Return the parts that a further piece of the text completes."""
        for character in text:
            self._reader.send(character)
        return self._take_parts()

    def end(self) -> list[Part]:
        """Return the last parts."""
        self._reader.close()
        self._held += self._ahead
        self._ahead = ""
        is_rest_of_calls = self.num_calls > 0 and all(character in _BETWEEN_CALLS for character in self._held)
        if not self._is_in_call and not is_rest_of_calls:
            self._release()
        return self._take_parts()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _take_parts(self) -> list[Part]:
        """Return the parts so far, with neighbours of one kind as one part."""
        parts, self._parts = self._parts, []
        joined: list[Part] = []
        for kind, group in itertools.groupby(parts, lambda part: (type(part), getattr(part, "index", None))):
            first, *more = group
            if isinstance(first, CallBegin) or not more:
                joined += [first, *more]
            else:
                text = "".join(part.text for part in (first, *more) if not isinstance(part, CallBegin))
                joined.append(Text(text) if kind[0] is Text else replace(first, text=text))
        return joined

    def _release(self) -> None:
        """Turn what is held into text."""
        text = "".join(self._held)
        self._held = []
        line = text.rpartition("\n")
        self._is_line_empty = (self._is_line_empty or bool(line[1])) and not line[2].strip()
        if text:
            self._parts.append(Text(text))

    def _begin_call(self, name: str) -> None:
        self._held, self._is_in_call = [], True
        self._parts.append(CallBegin(self.num_calls, name))
        self.num_calls += 1

    def _add_arguments(self, text: str) -> None:
        self._held = []
        self._parts.append(Arguments(self.num_calls - 1, text))

    def _end_call(self) -> None:
        """Note that what has been read is complete, and what follows may be text."""
        self._held, self._is_in_call, self._is_line_empty = [], False, True

    # --- characters: each of these functions is a coroutine that waits for the next one -------------------------------

    def _peek(self) -> StringReader:
        if not self._ahead:
            self._ahead = yield
        return self._ahead

    def _next(self) -> StringReader:
        character = yield from self._peek()
        self._ahead = ""
        self._held.append(character)
        return character

    def _skip(self, characters: str = " \t\r\n") -> Reader:
        while (yield from self._peek()) in characters:
            yield from self._next()

    def _expect(self, text: str) -> Reader:
        for expected in text:
            if (yield from self._peek()) != expected:
                raise _NoCallError
            yield from self._next()

    # --- the text -----------------------------------------------------------------------------------------------------

    def _read_all(self) -> Reader:
        while True:
            try:
                if (yield from self._is_trigger()):
                    yield from self._read_calls()
                else:
                    yield from self._read_text()
            except _NoCallError:
                self._is_in_call = False
                self._release()

    def _read_text(self) -> Reader:
        character = yield from self._next()
        # White space waits, since it is left out before a call.
        if not character.isspace():
            self._release()

    def _is_trigger(self) -> Generator[None, str, bool]:
        character = yield from self._peek()
        if character == "<":
            return True
        is_line_empty = self._is_line_empty or "\n" in self._held
        return is_line_empty and character in self._first_characters

    def _read_calls(self) -> Reader:
        """Read calls until something else follows."""
        while True:
            first = yield from self._peek()
            if first == "<":
                first = yield from self._read_tag()
            if first == "{":
                yield from self._read_json_call()
            elif first == "[":
                yield from self._read_list()
            self._end_call()
            yield from self._skip(_BETWEEN_CALLS)
            if not (yield from self._is_trigger()):
                raise _NoCallError

    def _read_tag(self) -> StringReader:
        """Read a tag and, if it stands around a call, the call; return the first character of a call that follows."""
        yield from self._expect("<")
        if (yield from self._peek()) == "|" and self._first_characters:
            yield from self._expect(PYTHON_TAG[1:])
            yield from self._skip()
            if (first := (yield from self._peek())) not in self._first_characters:
                raise _NoCallError
            return first
        if "hermes" not in self._formats:
            raise _NoCallError
        yield from self._expect(CALL_TAG[1:])
        yield from self._skip()
        yield from self._read_object()
        self._held = []  # a tag that does not follow leaves the call as it is
        yield from self._skip()
        yield from self._expect(CALL_END_TAG)
        return ""

    def _read_json_call(self) -> Reader:
        if "llama3_json" not in self._formats:
            raise _NoCallError
        yield from self._read_object()

    def _read_list(self) -> Reader:
        yield from self._expect("[")
        yield from self._skip()
        while True:
            if (yield from self._peek()) == "{":
                yield from self._read_json_call()
            else:
                yield from self._read_python_call()
            yield from self._skip()
            if (yield from self._peek()) == "]":
                yield from self._next()
                return
            self._end_call()
            yield from self._expect(",")
            yield from self._skip()

    # --- calls in JSON ------------------------------------------------------------------------------------------------

    def _read_object(self) -> Reader:
        """Read `{"name": ..., "parameters": {...}}`, with its keys in any order."""
        name: str | None = None
        arguments: str | None = None
        yield from self._expect("{")
        while True:
            yield from self._skip()
            key = yield from self._read_string()
            yield from self._skip()
            yield from self._expect(":")
            yield from self._skip()
            if key == "name" and name is None:
                name = yield from self._read_string()
                if name not in self._names:
                    raise _NoCallError
                if arguments is not None:
                    self._begin_call(name)
                    self._add_arguments(arguments)
            elif key in _ARGUMENTS and arguments is None:
                if (yield from self._peek()) != "{":
                    raise _NoCallError
                if name is not None:
                    self._begin_call(name)
                arguments = yield from self._read_arguments(are_known=name is not None)
            elif key in _OTHER_KEYS:
                yield from self._read_string()
            else:
                raise _NoCallError
            yield from self._skip()
            if (yield from self._peek()) == "}":
                break
            yield from self._expect(",")
        if name is None:
            raise _NoCallError
        yield from self._next()
        if arguments is None:
            self._begin_call(name)
            self._add_arguments("{}")

    def _read_string(self) -> StringReader:
        yield from self._expect('"')
        content = ""
        while (character := (yield from self._next())) != '"':
            content += character
            if character == "\\":
                content += yield from self._next()
            if len(content) > _LONGEST_STRING:
                raise _NoCallError
        try:
            return str(json.loads(f'"{content}"'))
        except ValueError:
            raise _NoCallError from None

    def _read_arguments(self, are_known: bool) -> StringReader:
        """Read an object up to its last bracket; pass it on as it comes if the call's name is known."""
        content: list[str] = []
        depth, is_string = 0, False
        while True:
            part = yield from self._next()
            if part == "\\" and is_string:
                part += yield from self._next()
            elif part == '"':
                is_string = not is_string
            elif not is_string:
                depth += (part in "{[") - (part in "}]")
            content.append(part)
            if are_known:
                self._add_arguments(part)
            if depth == 0:
                return "".join(content)

    # --- calls in Python ----------------------------------------------------------------------------------------------

    def _read_python_call(self) -> Reader:
        if "pythonic" not in self._formats:
            raise _NoCallError
        name = yield from self._read_name("(")
        if name not in self._names:
            raise _NoCallError
        yield from self._expect("(")
        yield from self._skip()
        is_first = True
        while (yield from self._peek()) != ")":
            key = yield from self._read_name("=")
            yield from self._expect("=")
            yield from self._skip()
            if is_first:
                self._begin_call(name)
            self._add_arguments(("{" if is_first else ", ") + json.dumps(key) + ": ")
            is_first = False
            yield from self._read_value()
            yield from self._skip()
            if (yield from self._peek()) != ")":
                yield from self._expect(",")
                yield from self._skip()
        yield from self._next()
        if is_first:
            self._begin_call(name)
        self._add_arguments("{}" if is_first else "}")

    def _read_name(self, end: str) -> StringReader:
        """Read an identifier, with dots, up to `end`."""
        name = ""
        while (character := (yield from self._peek())) not in f"{end} \t\r\n":
            if not (character.isalnum() or character in "_.-") or len(name) == _LONGEST_STRING:
                raise _NoCallError
            name += yield from self._next()
        yield from self._skip()
        if not name or (yield from self._peek()) != end:
            raise _NoCallError
        return name

    def _read_value(self, depth: int = 0) -> Reader:
        """Read a literal, and pass it on as JSON."""
        first = yield from self._peek()
        if depth == _DEEPEST:
            raise _NoCallError
        if first in "\"'":
            yield from self._read_python_string()
        elif first in "[(":
            yield from self._read_items("]" if first == "[" else ")", "[]", depth)
        elif first == "{":
            yield from self._read_items("}", "{}", depth)
        else:
            yield from self._read_word()

    def _read_items(self, end: str, brackets: str, depth: int) -> Reader:
        yield from self._next()
        self._add_arguments(brackets[0])
        yield from self._skip()
        is_first = True
        while (yield from self._peek()) != end:
            if not is_first:
                self._add_arguments(", ")
            is_first = False
            if brackets == "{}":
                if (yield from self._peek()) not in "\"'":
                    raise _NoCallError  # JSON has no other keys
                yield from self._read_python_string()
                yield from self._skip()
                yield from self._expect(":")
                self._add_arguments(": ")
                yield from self._skip()
            yield from self._read_value(depth + 1)
            yield from self._skip()
            if (yield from self._peek()) != end:
                yield from self._expect(",")
                yield from self._skip()
        yield from self._next()
        self._add_arguments(brackets[1])

    def _read_python_string(self) -> Reader:
        quote = yield from self._next()
        self._add_arguments('"')
        while (character := (yield from self._next())) != quote:
            if character == "\\":
                escape = character + (yield from self._next())
                for _ in range(_ESCAPE_DIGITS.get(escape[1], 0)):
                    escape += yield from self._next()
                try:
                    character = str(ast.literal_eval(f'"{escape}"'))
                except (SyntaxError, ValueError):
                    character = escape
            self._add_arguments(_in_json(character))
        self._add_arguments('"')

    def _read_word(self) -> Reader:
        """Read a number or a name; what is neither becomes a string, since models forget quotes."""
        word = ""
        while (character := (yield from self._peek())) not in ",)]}:" and not character.isspace():
            word += yield from self._next()
            if len(word) > _LONGEST_WORD:
                raise _NoCallError
        if not word:
            raise _NoCallError
        if word in _WORDS:
            self._add_arguments(_WORDS[word])
        elif _NUMBER.fullmatch(word):
            self._add_arguments(_json_number(word))
        else:
            self._add_arguments(f'"{_in_json(word)}"')


def _in_json(text: str) -> str:
    """Return a text as it stands in a JSON string: in Unicode, but for surrogates, which no encoding has."""
    has_surrogates = any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(text, ensure_ascii=has_surrogates)[1:-1]


def _json_number(word: str) -> str:
    """Return Python's number as JSON writes it: without a plus, leading zeros and bare points."""
    match = _NUMBER.fullmatch(word)
    assert match is not None
    whole, _, fraction = match[1].partition(".")
    sign = "-" if word[0] == "-" else ""
    return sign + (whole.lstrip("0") or "0") + (f".{fraction or '0'}" if "." in match[1] else "") + (match[3] or "")
