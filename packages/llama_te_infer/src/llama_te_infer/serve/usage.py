"""The number of tokens that a request read and wrote."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: Tokens of its prompts.
        completion: Tokens of its answers, the ones that ended them included.
    """

    prompt: int
    completion: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return OpenAI's object."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}
