"""The texts of a beam search, so that stop strings and complete grammars end beams."""

from __future__ import annotations

from collections.abc import Sequence

from ..runner.grammar import GrammarText
from ..runner.stopping import StopRule
from .detokenizer import Detokenizer


class StoppingTexts:
    """The texts of the beams of one search. An implementation of `BeamTexts`.

    Args:
        num_beams: Beams of the search.
        stop: The search's stop rule.
        empty: A text without tokens.
        grammar: Such a text in the search's grammar.
    """

    def __init__(self, num_beams: int, stop: StopRule, empty: Detokenizer, grammar: GrammarText | None = None) -> None:
        self.stop = stop
        self.grammars = [grammar] * num_beams
        self._has_grammar = grammar is not None
        self._beams = [empty] * num_beams
        self._written = 0

    def ends(self, tokens: Sequence[int], sources: Sequence[int]) -> list[bool]:
        """See `BeamTexts`."""
        self._written += 1
        completes = [self._completes_grammar(token, source) for token, source in zip(tokens, sources, strict=True)]
        # Without stop strings nobody reads the texts.
        texts = [self._beams[source].copy() for source in sources] if self.stop.stop_strings else []
        stopped = [False] * len(tokens)
        for i, text in enumerate(texts):
            if tokens[i] not in self.stop.end_tokens:
                text.add(tokens[i], self.stop.may_end(self._written))
                stopped[i] = text.stopped_by is not None
        text_ends = [complete or stop for complete, stop in zip(completes, stopped, strict=True)]
        ended = [end or token in self.stop.end_tokens for end, token in zip(text_ends, tokens, strict=True)]
        best = sorted(range(len(tokens)), key=lambda i: ended[i])[: len(self._beams)]  # stable, as on the device
        if texts:
            self._beams = [texts[i] for i in best]
        if self._has_grammar:
            self.grammars = [None if ended[i] else self._continued(tokens[i], sources[i]) for i in best]
        return text_ends

    def _completes_grammar(self, token: int, source: int) -> bool:
        grammar = self.grammars[source]
        if grammar is None or token in self.stop.end_tokens or not grammar.accepts(token):
            return False
        return grammar.is_complete_with(token)

    def _continued(self, token: int, source: int) -> GrammarText | None:
        """Return the text of a beam; `None` for one that fills up the beams and is not in the grammar."""
        grammar = self.grammars[source]
        if grammar is None or not grammar.accepts(token):
            return None
        continued = grammar.copy()
        continued.add(token)
        return continued
