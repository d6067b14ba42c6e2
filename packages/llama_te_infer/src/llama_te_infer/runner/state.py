"""The running batch in the device's memory.

Shapes: R rows allocated, P pages per row, M moved rows, N entries, B beginning rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from ..decode.inputs import StepInputs
from ..kv_cache.engine_cache import EngineCache
from ..transfers import to_device
from .beam_search import first_scores
from .sampler import RowSampling
from .sequence import Request, Sequence


class DecodeState(StepInputs):
    """The running rows on the device. The rows behind them have no tokens, and the padding page in all entries.

    A step needs tokens, lengths, pages and scores of the step before. They stay on the device, so that a step can be
    launched before the host knows the results of the last one. The host sends changes only.

    Args:
        rows: R.
        cache: The cache that holds the rows' pages.
        vocab_size: V.

    Attributes:
        score_R: float32, scores of beams.
        sampling: The rows' sampling parameters.
    """

    def __init__(self, rows: int, cache: EngineCache, vocab_size: int) -> None:
        table_RP = cache.make_page_table()
        super().__init__(
            torch.zeros(rows, dtype=torch.int64, device=cache.device),
            torch.zeros(rows, dtype=torch.int32, device=cache.device),
            table_RP,
        )
        self.page_table_RP: torch.Tensor = table_RP
        self.score_R = torch.zeros(rows, dtype=torch.float32, device=cache.device)
        self.sampling = RowSampling(rows, vocab_size, cache.device)
        self._padding_page = cache.padding_page
        self._occupied = 0  # rows with tokens: the first ones

    def move(self, moves: Items[tuple[int, int]], rows: int) -> None:
        """Move rows, and keep only the first `rows`.

        Args:
            moves: Pairs of a row and the row whose content it gets; no row is in two pairs.
            rows: Rows that continue.
        """
        if moves:
            to_M, source_M = to_device(list(zip(*moves, strict=True)), torch.int64, self.token_R.device)
            for tensor in (self.token_R, self.length_R, self.score_R, self.page_table_RP):
                tensor[to_M] = tensor[source_M]
            for to, source in moves:
                self.sampling.move(to, source)
        if rows < self._occupied:
            vacated = slice(rows, self._occupied)
            self.token_R[vacated] = 0
            self.length_R[vacated] = 0
            self.page_table_RP[vacated] = self._padding_page
            for row in range(rows, self._occupied):
                self.sampling.clear(row)
        self._occupied = rows

    def add_pages(self, new_pages: Items[tuple[int, int, int]]) -> None:
        """Write entries of the page table: triples of a row, the entry's index there and a page."""
        if new_pages:
            width = self.page_table_RP.shape[1]
            entries = [[row * width + index for row, index, _ in new_pages], [page for _, _, page in new_pages]]
            entry_N, page_N = to_device(entries, torch.int64, self.token_R.device)
            self.page_table_RP.view(-1)[entry_N] = page_N.int()

    def begin(self, sequences: Items[Sequence]) -> None:
        """Give the rows behind the running ones to sequences whose prompts are in the cache. Their tokens follow."""
        width = self.page_table_RP.shape[1]
        rows = [
            [*sequence.pages, *[self._padding_page] * (width - len(sequence.pages)), sequence.cached]
            for sequence in sequences
        ]
        first = sequences[0].row
        assert first is not None
        row_BX = to_device(rows, torch.int32, self.token_R.device)
        self.page_table_RP[first : first + len(rows)] = row_BX[:, :-1]
        self.length_R[first : first + len(rows)] = row_BX[:, -1]
        self._occupied = first + len(rows)
        for sequence in sequences:
            assert sequence.row is not None
            request = sequence.request
            if not request.has_beams:
                self.sampling.set(
                    sequence.row,
                    request.params,
                    _seed(request, sequence.index),
                    sequence.tokens,
                    request.stop,
                    len(request.prompt),
                    request.bad_words,
                )
            elif sequence.index == 0:
                beams = len(request.sequences)
                self.score_R[sequence.row : sequence.row + beams] = first_scores(1, beams, self.score_R.device)[0]


def _seed(request: Request, index: int) -> int:
    """Return the seed of one of a request's sequences; the first one has the request's own."""
    return (request.seed + index * 0x9E3779B97F4A7C15) % 2**63
