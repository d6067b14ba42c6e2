"""The request of `/v1/responses`, without state: the client sends the whole conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from ...structured_outputs import StructuredOutputs
from .sampling import SamplingFields
from .strict import OnlyFalse, Strict
from .tools import AllowedTools, AllowedToolsChoice, Function, FunctionName, Tool, ToolChoice, ToolName
from .unsupported import FOR_ALL, FOR_RESPONSES, Unsupported

INCLUDES_LOGPROBS = "message.output_text.logprobs"


class FunctionType(Strict):
    """The type of a tool. As the last base of a class its field is checked first, so it names what is refused."""

    type: Literal["function"]


class FunctionTool(Function, FunctionType):
    """A function that the model may call."""

    def in_chat(self) -> Tool:
        """Return it as chats have it."""
        fields = {name: getattr(self, name) for name in Function.model_fields}
        return Tool(type="function", function=Function(**fields))


class FunctionChoice(FunctionName):
    """A function by its name."""

    type: Literal["function"]

    def in_chat(self) -> ToolName:
        """Return it as chats have it."""
        return ToolName(type="function", function=FunctionName(name=self.name))


class AllowedFunctions(Strict):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1)

    def in_chat(self) -> AllowedToolsChoice:
        """Return it as chats have it."""
        tools = [tool.in_chat() for tool in self.tools]
        return AllowedToolsChoice(type=self.type, allowed_tools=AllowedTools(mode=self.mode, tools=tools))


class TextFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: str
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="Changes nothing: the text always fits the schema.")


class TextConfig(Strict):
    """The form of the text."""

    format: TextFormat | JsonSchemaFormat | None = Field(None, discriminator="type")
    verbosity: Literal["medium"] | None = Field(None, description="A message can ask for short or long answers.")

    def structured_outputs(self) -> StructuredOutputs | None:
        """Return the form as the engine takes it; `None` for any text.

        Raises:
            ValueError: The schema cannot be used.
        """
        if isinstance(self.format, JsonSchemaFormat):
            return StructuredOutputs(json=self.format.json_schema)
        is_object = self.format is not None and self.format.type == "json_object"
        return StructuredOutputs(json_object=True) if is_object else None


class ResponseStreamOptions(Strict):
    """Options of a stream."""

    include_obfuscation: OnlyFalse | None = Field(None, description="Only false: no event has padding.")


class ResponsesRequest(SamplingFields):
    """Answer a conversation."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = FOR_ALL | FOR_RESPONSES

    input: str | list[dict[str, Any]] = Field(
        description="A user's message, or items: messages, function_call and function_call_output."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1, description="Most tokens to write; as many as fit by default.")
    tools: list[FunctionTool] | None = Field(None, description="Functions; no hosted tools.")
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions | None = Field(
        None, description="auto by default: the model decides."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")
    text: TextConfig | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(
        None, description=f"Most likely tokens at each position; with {INCLUDES_LOGPROBS}."
    )
    truncation: Literal["disabled"] | None = Field(None, description="Only disabled: a long prompt is refused.")

    n: int | None = Field(None, ge=1, le=1)
    return_token_ids: OnlyFalse | None = None
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]

    def chat_tools(self) -> list[Tool]:
        """Return the tools as chats have them."""
        return [tool.in_chat() for tool in self.tools or ()]

    def chat_tool_choice(self) -> ToolChoice | None:
        """Return the choice of tools as chats have it."""
        return self.tool_choice.in_chat() if isinstance(self.tool_choice, Strict) else self.tool_choice
