"""The fields that give texts a form: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...structured_outputs import StructuredOutputs
from .strict import Strict


class JsonSchema(Strict):
    """A JSON schema, as OpenAI's API writes it."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The text keeps to the schema in any case.")


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def form(self) -> StructuredOutputs | None:
        """Return the form for the engine; `None` for any text.

        Raises:
            ValueError: A schema is missing, or there is one for another type.
        """
        schema = None if self.json_schema is None else self.json_schema.json_schema
        if (self.type == "json_schema") != (schema is not None):
            raise ValueError(
                f"response_format has type={self.type!r} {'without' if schema is None else 'with'} "
                'json_schema.schema: give {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}.'
            )
        if self.type == "text":
            return None
        return StructuredOutputs(json_object=True) if schema is None else StructuredOutputs(json=schema)


class StructuredOutputsFields(Strict):
    """vLLM's `StructuredOutputsParams`: exactly one of the first five."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="In llguidance's variant of Lark's syntax, or in llama.cpp's GBNF.")
    json_object: bool | None = None
    disable_any_whitespace: bool | None = Field(None, description="No whitespace between the parts of JSON.")
    whitespace_pattern: str | None = Field(None, description="A regular expression of that whitespace.")

    def form(self) -> StructuredOutputs:
        """Return the form for the engine.

        Raises:
            ValueError: None or several are given, or one is not possible.
        """
        given = {name: value for name, value in self.model_dump(by_alias=True).items() if value is not None}
        return StructuredOutputs(**given)


def form_of(response_format: ResponseFormat | None, structured_outputs: StructuredOutputsFields | None) -> Any:
    """Return the form that a request asks for; `None` for any text.

    Raises:
        ValueError: It asks for two forms, or for one that is not possible.
    """
    form = None if response_format is None else response_format.form()
    if structured_outputs is None:
        return form
    if form is not None:
        raise ValueError(
            "structured_outputs has a form, and response_format another one: leave one of the two fields out."
        )
    return structured_outputs.form()
