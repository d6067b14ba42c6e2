"""The number of tokens that a request read and wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: Tokens of its prompts.
        completion: Tokens of its answers, the ones that ended them included.
        cached: Tokens of its prompts that came from the prefix cache; `None` before it has ended.
    """

    prompt: int
    completion: int = 0
    cached: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        total = self.prompt + self.completion
        tokens = {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}
        return tokens if self.cached is None else {**tokens, "prompt_tokens_details": {"cached_tokens": self.cached}}
