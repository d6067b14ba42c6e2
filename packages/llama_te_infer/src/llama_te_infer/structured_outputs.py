"""The form that a text must have: JSON, a regular expression, one of some choices, or a grammar."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MAX_CHARACTERS = 1 << 16  # of a form

Kind = Literal["json", "regex", "choice", "grammar", "json_object"]
_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object")


class GrammarError(ValueError):
    """A grammar that llguidance refuses, or with which a text cannot go on."""


@dataclass(frozen=True)
class StructuredOutputs:
    r"""The form that a text must have. Give exactly one of the first five.

    The fields have the names of vLLM's `StructuredOutputsParams`. llguidance checks the form when a request is
    submitted, and computes which tokens may follow.

    Attributes:
        json: A JSON schema, as a dict or its text. Becomes a text.
        regex: A regular expression that matches the whole text, in the syntax of Rust's `regex`; `\d`, `\w` and `\s`
            are ASCII's.
        choice: Texts, one of which is written. Becomes a tuple.
        grammar: A context-free grammar, in llguidance's variant of Lark's syntax, or in llama.cpp's GBNF.
        json_object: `True` for any JSON object.
        disable_any_whitespace: No whitespace between the parts of JSON.
        whitespace_pattern: A regular expression of the whitespace between the parts of JSON.

    Raises:
        ValueError: None or several of them are given, or one has another type or is too long.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {' and '.join(given) or 'no form'}: give exactly one of {', '.join(_KINDS)}."
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            is_list = isinstance(self.choice, Sequence) and not isinstance(self.choice, str | bytes)
            self._need("choice", is_list, "give a list of texts")
            object.__setattr__(self, "choice", tuple(self.choice))
            is_right = len(self.choice) > 0 and all(isinstance(text, str) and text for text in self.choice)
            self._need("choice", is_right, "give at least one text; texts are not empty")
        for name in ("regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            self._need(name, text is None or (isinstance(text, str) and text != ""), "give a text that is not empty")
        self._need("json_object", self.json_object in (None, True), "give True, or leave it out")
        self._need("disable_any_whitespace", isinstance(self.disable_any_whitespace, bool), "give True or False")
        if self.kind not in ("json", "json_object"):
            for name in ("disable_any_whitespace", "whitespace_pattern"):
                self._need(name, not getattr(self, name), f"it is for JSON; leave it out with {self.kind}")
        self._need(
            "whitespace_pattern",
            self.whitespace_pattern is None or not self.disable_any_whitespace,
            "leave it out with disable_any_whitespace=True",
        )
        self._check_texts()

    @property
    def kind(self) -> Kind:
        """Which of the five is given."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    def _check_texts(self) -> None:
        texts = [*(self.choice or ()), *(getattr(self, name) for name in ("json", "regex", "grammar"))]
        texts = [text for text in (*texts, self.whitespace_pattern) if text is not None]
        length = sum(map(len, texts))
        if length > MAX_CHARACTERS:
            raise ValueError(
                f"structured_outputs has {self.kind} of {length:,} characters, but {MAX_CHARACTERS:,} is the limit: "
                "give a shorter one."
            )
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"structured_outputs has {self.kind} with a lone surrogate at character {error.start}, which is "
                    "half of one."
                ) from error

    def _need(self, name: str, condition: bool, what_to_do: str) -> None:
        if not condition:
            text = repr(getattr(self, name))
            shown = text if len(text) < 100 else f"{text[:97]}..."
            raise ValueError(f"structured_outputs has {name}={shown}, which is not possible: {what_to_do}.")


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, str | Mapping):
        raise ValueError(
            f"structured_outputs has a json of {type(schema).__name__}: give a JSON schema as a dict or a text, "
            "such as a pydantic model's model_json_schema()."
        )
    try:
        if isinstance(schema, Mapping):
            return json_format.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
        if len(schema) <= MAX_CHARACTERS:
            json_format.loads(schema)
        return schema
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs has a json that is no JSON: {error}.") from error
