"""The requests of `/tokenize` and `/detokenize`, as vLLM's server has them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..errors import ApiError
from .sampling import ListOf, PartsOf, Strict


class ChatFields(Strict):
    """A conversation, and how the chat template writes it."""

    messages: PartsOf[dict[str, Any]] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = Field(None, description="End the prompt with the beginning of an answer.")
    continue_final_message: bool | None = Field(None, description="Continue the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the template.")
    documents: PartsOf[dict[str, Any]] | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages, with contents of several texts as one text, as chat templates want them.

        Raises:
            ApiError: A content has other parts than texts.
        """
        return [
            {**message, "content": _joined(message["content"], f"messages.{index}.content")}
            if isinstance(message.get("content"), list)
            else message
            for index, message in enumerate(self.messages or ())
        ]


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


def _joined(parts: list[Any], place: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            found = f"the type {kind!r}" if isinstance(kind, str) else "no type"
            raise ApiError(
                400,
                f'{place}.{index} has {found}: give text alone, such as {{"type": "text", "text": "Hello"}}.',
                f"{place}.{index}",
            )
        texts.append(part[kind])
    return "\n".join(texts)
