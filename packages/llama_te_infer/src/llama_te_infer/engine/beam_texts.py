"""The texts of a beam search, so that stop strings end beams."""

from __future__ import annotations

from collections.abc import Sequence

from ..runner.stopping import StopRule
from .detokenizer import Detokenizer


class StoppingTexts:
    """The texts of the beams of one search. An implementation of `BeamTexts`.

    Args:
        num_beams: Beams of the search.
        stop: The search's stop rule.
        empty: A text without tokens.
    """

    def __init__(self, num_beams: int, stop: StopRule, empty: Detokenizer) -> None:
        self.stop = stop
        self._beams = [empty] * num_beams
        self._written = 0

    def ends(self, tokens: Sequence[int], sources: Sequence[int]) -> list[bool]:
        """See `BeamTexts`."""
        self._written += 1
        texts = [self._beams[source].copy() for source in sources]
        ended = []
        for token, text in zip(tokens, texts, strict=True):
            is_end = token in self.stop.end_tokens
            if not is_end:
                text.add(token, self.stop.may_end(self._written))
            ended.append(is_end or text.stopped_by is not None)
        best = sorted(range(len(texts)), key=lambda i: ended[i])  # stable, as on the device
        self._beams = [texts[i] for i in best[: len(self._beams)]]
        return [text.stopped_by is not None for text in texts]
