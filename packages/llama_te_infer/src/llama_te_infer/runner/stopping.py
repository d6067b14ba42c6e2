"""The one rule that decides when a text ends, for texts and for beams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


NOT_FINITE = "logits are not finite: the model computed NaN or infinity for this text"
"""Why a request without a next token ends."""


class Ending(NamedTuple):
    """Why a text has ended.

    Attributes:
        finish_reason: See `Completion`.
        stop_reason: See `Completion`.
    """

    finish_reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class StopRule:
    """When a text ends: with an end token, where a stop string appears, with its grammar, or at `max_tokens` tokens.

    Before a text has `min_tokens` tokens, neither a token nor a string ends it. The sampler and the selection of beams
    therefore give end tokens no probability while `may_end` of the tokens written so far is false. Every count is a
    count of tokens behind the prompt.

    Attributes:
        end_tokens: EOS and stop tokens, and stop strings that are special tokens; each once.
        stop_strings: Strings that end a text where they appear in it.
        min_tokens: Tokens before the text may end.
        max_tokens: Most tokens.
        special_strings: The stop strings that are special tokens, by token.
    """

    end_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    min_tokens: int
    max_tokens: int
    special_strings: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, params: SamplingParams, eos_token_ids: Sequence[int], special_stops: Mapping[str, int] | None = None
    ) -> StopRule:
        """Return the rule of a request.

        Args:
            params: The request's parameters; `max_tokens` is a number.
            eos_token_ids: The model's EOS tokens.
            special_stops: The strings of `params.stop` that are special tokens, and their ids.
        """
        assert params.max_tokens is not None
        special = {token: string for string, token in (special_stops or {}).items()}
        tokens = frozenset([*params.stop_token_ids, *special, *(() if params.ignore_eos else eos_token_ids)])
        strings = tuple(string for string in params.stop if string not in special.values())
        return cls(tokens, strings, params.min_tokens, params.max_tokens, special)

    @property
    def forbids_end_tokens(self) -> bool:
        """Whether some end token has no probability at first."""
        return self.min_tokens > 0 and len(self.end_tokens) > 0

    def may_end(self, written: int) -> bool:
        """Return whether a token or a string may end a text of `written` tokens."""
        return written >= self.min_tokens

    def is_complete(self, written: int) -> bool:
        """Return whether a text of `written` tokens gets no more tokens."""
        return written >= self.max_tokens

    def ends_with(self, token: int, written: int) -> bool:
        """Return whether a text of `written` tokens ends with its last token."""
        return token in self.end_tokens and self.may_end(written)

    def ending(
        self, token: int, written: int, stop_string: str | None, completes_grammar: bool = False
    ) -> Ending | None:
        """Return why a text ends; `None` if it continues.

        Args:
            token: Its last token.
            written: Its tokens, the last one included.
            stop_string: The stop string that has appeared in it.
            completes_grammar: Whether its grammar lets no token follow.
        """
        if self.ends_with(token, written):
            return Ending("stop", self.special_strings.get(token, token))
        if stop_string is not None:
            return Ending("stop", stop_string)
        if completes_grammar:
            return Ending("stop")
        return Ending("length") if self.is_complete(written) else None
