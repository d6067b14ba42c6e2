"""The tools that a request offers to the model, and which of them the model may or must call."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .strict import Strict


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object; no arguments by default.")
    strict: bool | None = Field(
        None, description="Calls that the model chooses fit the schema, too. Calls that are required always do."
    )


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of a function."""

    name: str


class ToolName(Strict):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """Some of the tools, and whether the model must call one of them."""

    mode: Literal["auto", "required"]
    tools: list[ToolName] = Field(min_length=1)


class AllowedToolsChoice(Strict):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | ToolName | AllowedToolsChoice
