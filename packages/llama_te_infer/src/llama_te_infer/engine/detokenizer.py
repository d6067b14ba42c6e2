"""The text of a sequence whose tokens arrive one by one, and the stop string that appears in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from llama_te_core.compat.tokenizers import panics_as_errors
from llama_te_core.compat.transformers import list_decoder

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # tokenizers decode the first tokens of a character to it
# A character has four bytes at most, so more tokens that cannot be read are no text. They are decoded once: a model can
# write thousands, and would be decoded from their beginning with each.
_MOST_UNFINISHED = 8
_LAST = 3  # tokens that may still begin a character


class Detokenizer:
    """Turns tokens into text.

    With each new token only the last tokens are decoded again. Decoding starts one readable piece early, because some
    tokenizers write a token differently at the beginning of a text (without its space).

    Args:
        tokenizer: A tokenizer of transformers; with `None` the text is empty.
        stop: Strings that end the text.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop: Keep the stop string that ends the text in it.

    Attributes:
        text: The readable text, up to a stop string, or to its end with `include_stop`.
        stopped_by: The stop string that has appeared.
    """

    def __init__(
        self,
        tokenizer: Any | None = None,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.skip_special_tokens, self.include_stop = skip_special_tokens, include_stop
        self.text = ""
        self.stopped_by: str | None = None
        self._tokens: list[int] = []
        self._decode_list = None if tokenizer is None else list_decoder(tokenizer)
        self._piece = 0  # the index of the last readable piece's first token
        self._readable = 0  # the index behind its last token
        self._given = 0  # characters that `take` has returned

    def copy(self) -> Detokenizer:
        """Return a text that continues in its own way."""
        other = copy.copy(self)
        other._tokens = list(self._tokens)
        return other

    def add(self, token: int, may_stop: bool = True) -> None:
        """Add one token. If the text may end, look for stop strings that end with it."""
        if self.tokenizer is None:
            return
        self._tokens.append(token)
        with panics_as_errors():
            known, text = self._decode(self._readable), self._decode(len(self._tokens))
        if len(text) > len(known) and not text.endswith(_UNFINISHED):
            self._piece, self._readable = self._readable, len(self._tokens)
            self._append(text[len(known) :], may_stop)
        elif len(self._tokens) - self._readable > _MOST_UNFINISHED:
            end = len(self._tokens) - _LAST
            with panics_as_errors():
                text = self._decode(end)
            self._piece, self._readable = self._readable, end
            self._append(text[len(known) :], may_stop)

    def add_end(self, string: str) -> None:
        """Add the stop string of a special token, which decoding may leave out. No tokens follow."""
        self.end()
        self.text += string
        self.stopped_by = string

    def end(self) -> None:
        """Complete the text: no tokens follow. Incomplete characters stay as the tokenizer decodes them."""
        if self.tokenizer is not None and self.stopped_by is None:
            with panics_as_errors():
                known, text = self._decode(self._readable), self._decode(len(self._tokens))
            self._append(text[len(known) :], False)
            self._readable = len(self._tokens)

    def take(self, is_whole: bool) -> str:
        """Return the text since the last call.

        Until the text is whole, the possible beginning of a stop string at its end is left out.
        """
        is_final = is_whole or self.include_stop
        end = len(self.text) if is_final else len(self.text) - self._beginning_of_stop()
        given, self._given = self._given, max(end, self._given)
        return self.text[given : self._given]

    def _decode(self, end: int) -> str:
        assert self._decode_list is not None
        return self._decode_list(self._tokens[self._piece : end], skip_special_tokens=self.skip_special_tokens)

    def _append(self, piece: str, may_stop: bool) -> None:
        before = len(self.text)
        self.text += piece
        found = []
        for string in self.stop if may_stop else ():
            start = self.text.find(string, max(0, before - len(string) + 1))
            if start >= 0:
                found.append((start, string))
        if found:
            start, self.stopped_by = min(found, key=lambda pair: pair[0])
            self.text = self.text[: start + len(self.stopped_by) if self.include_stop else start]

    def _beginning_of_stop(self) -> int:
        """Return how many characters at the text's end are the beginning of a stop string."""
        longest = 0
        for string in self.stop:
            for count in range(min(len(string) - 1, len(self.text)), longest, -1):
                if self.text.endswith(string[:count]):
                    longest = count
                    break
        return longest
