"""The requests of `/tokenize` and `/detokenize`, as vLLM's server has them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .strict import ListOf, PartsOf, Strict
from .tools import Tool


class ChatFields(Strict):
    """A conversation, and how the chat template writes it."""

    messages: PartsOf[dict[str, Any]] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = Field(None, description="End the prompt with the beginning of an answer.")
    continue_final_message: bool | None = Field(None, description="Continue the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the template.")
    documents: PartsOf[dict[str, Any]] | None = None
    tools: PartsOf[Tool] | None = None


class TokenizeRequest(ChatFields):
    """A text or a conversation to tokenize."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Tokens to decode."""

    model: str | None = None
    tokens: ListOf[int]
