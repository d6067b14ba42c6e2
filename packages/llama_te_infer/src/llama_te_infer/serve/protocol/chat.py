"""The request of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from .sampling import SamplingFields
from .strict import PartsOf
from .tokens import ChatFields
from .tools import ToolChoice
from .unsupported import FOR_ALL, FOR_CHATS, Unsupported


class ChatRequest(SamplingFields, ChatFields):
    """Answer a conversation."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = FOR_ALL | FOR_CHATS

    messages: PartsOf[dict[str, Any]] = Field(min_length=1)
    tool_choice: ToolChoice | None = Field(None, description="auto by default: the model decides.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, description="Most likely tokens to report at each position; with logprobs.")
    prompt_logprobs: int | None = Field(None, description="The same for the prompt; not for streams.")
    max_tokens: int | None = Field(None, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, description="Most tokens to write; as many as fit by default.")
    prediction: dict[str, Any] | None = Field(None, description="It changes no answer.")
