"""The request of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from pydantic import Field

from .sampling import SamplingFields
from .strict import ListOf, PartsOf
from .unsupported import FOR_ALL, FOR_COMPLETIONS, Unsupported


class CompletionRequest(SamplingFields):
    """Continue one prompt or several."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = FOR_ALL | FOR_COMPLETIONS

    prompt: str | PartsOf[str] | ListOf[int] | PartsOf[ListOf[int]] = Field(
        description="A text, token ids, or a list of either; a text gets the special tokens that the tokenizer adds."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(None, description="Report so many most likely tokens at each position.")
    max_tokens: int | None = Field(16, description="Most tokens to write; with echo, 0 scores the prompt alone.")
    prompt_logprobs: int | None = Field(None, description="As echo with logprobs, beside the text.")
    add_special_tokens: bool | None = Field(None, description="false: the text gets no special tokens.")

    @property
    def scores_alone(self) -> bool:
        """Whether the prompt is scored and nothing is written."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts.

        Raises:
            ValueError: There is none.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ValueError("prompt=[] is not possible: give a text, token ids, or a list of either.")
        if isinstance(prompt[0], int):
            return [prompt]
        return cast("list[str | list[int]]", prompt)
