"""Text of a sequence while its tokens come in, one by one, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first tokens of a character of several tokens are decoded to


class Detokenizer:
    """Turns tokens into text.

    Only the last tokens are decoded again with each new one: from the start of the piece before the last one that was
    readable, because some tokenizers write a token differently at the beginning of a text (without its space).

    Args:
        tokenizer: A tokenizer of transformers; with `None` the text is empty.
        stop: Strings that end the text.

    Attributes:
        text: What is readable, up to a stop string.
        stopped_by: The stop string that was found.
    """

    def __init__(self, tokenizer: Any | None = None, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""
        self.stopped_by: str | None = None
        self._tokens: list[int] = []
        self._piece = 0  # where the last readable piece begins
        self._readable = 0  # and where it ends
        self._given = 0  # characters that `take` has given out

    def add(self, token: int, may_stop: bool = True) -> None:
        """Take one token more, and look for stop strings that end with it, if the text may end."""
        if self.tokenizer is None:
            return
        self._tokens.append(token)
        known, text = self._decode(self._readable), self._decode(len(self._tokens))
        if len(text) > len(known) and not text.endswith(_UNFINISHED):
            self._piece, self._readable = self._readable, len(self._tokens)
            self._append(text[len(known) :], may_stop)

    def end(self) -> None:
        """The tokens are all there: characters that are not whole stay as they are decoded."""
        if self.tokenizer is not None and self.stopped_by is None:
            self._append(self._decode(len(self._tokens))[len(self._decode(self._readable)) :], False)
            self._readable = len(self._tokens)

    def take(self, is_whole: bool) -> str:
        """The text since the last call; what may be the beginning of a stop string only when the text is whole."""
        end = len(self.text) if is_whole else len(self.text) - self._beginning_of_stop()
        given, self._given = self._given, max(end, self._given)
        return self.text[given : self._given]

    def _decode(self, end: int) -> str:
        assert self.tokenizer is not None
        text: str = self.tokenizer.decode(self._tokens[self._piece : end], skip_special_tokens=True)
        return text

    def _append(self, piece: str, may_stop: bool) -> None:
        before = len(self.text)
        self.text += piece
        found = []
        for string in self.stop if may_stop else ():
            place = self.text.find(string, max(0, before - len(string) + 1))
            if place >= 0:
                found.append((place, string))
        if found:
            place, self.stopped_by = min(found, key=lambda pair: pair[0])
            self.text = self.text[:place]

    def _beginning_of_stop(self) -> int:
        """Characters at the text's end that a stop string begins with."""
        longest = 0
        for string in self.stop:
            for count in range(min(len(string) - 1, len(self.text)), longest, -1):
                if self.text.endswith(string[:count]):
                    longest = count
                    break
        return longest
