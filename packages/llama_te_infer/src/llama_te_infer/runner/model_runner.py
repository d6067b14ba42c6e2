"""Launches the steps that the scheduler plans.

Shapes: B running and beginning rows, V vocabulary, G searches, N beams of each, P pages per row.
"""

from __future__ import annotations

from typing import Any

import torch

from ..decode.backend import DecodeBackend
from ..decode.prefill import FusedPrefill
from ..kv_cache.engine_cache import EngineCache
from ..transfers import to_device
from .beam_search import BeamStep, select_beams
from .grammar import GrammarText, TokenMasks, compute_masks
from .logprobs import Logprobs
from .plan import Plan
from .prefill import Prefill
from .results import Pending, Search
from .sampler import SamplingNeeds, sample, unpacked
from .sequence import Request, Sequence
from .state import DecodeState


class ModelRunner:
    """Launches steps.

    Args:
        model: An `NVLlamaForCausalLM` in evaluation mode.
        cache: Of this model.
        decode: The backend of decoding steps. It may be replaced between steps.
        fused_prefill: See `Prefill`. It may be replaced between steps.
    """

    def __init__(
        self, model: Any, cache: EngineCache, decode: DecodeBackend, fused_prefill: FusedPrefill | None = None
    ) -> None:
        self.cache, self.decode = cache, decode
        self.prefill = Prefill(model, cache, fused_prefill)
        self.state = DecodeState(cache.max_batch_size, cache, model.lm_head.out_features)

    def launch(self, plan: Plan, previous: Pending | None = None) -> Pending:
        """Start a step. Returns at once on a GPU, unless texts have grammars or beams stop strings.

        Args:
            plan: The step.
            previous: The step before, whose tokens advance grammars.
        """
        state, running = self.state, len(plan.running)
        if plan.cleared:
            self.cache.clear_pages(plan.cleared)
        state.move(plan.moves, running)
        state.add_pages([(_row(sequence), index, page) for sequence, index, page in plan.new_pages])
        state.lengths = plan.starts
        pending = Pending([(_row(s), s) for s in [*plan.running, *plan.beginning] if not s.request.has_beams])
        if self._is_plain(plan):
            self.decode.advance(state, running)
            # The next step overwrites the state. On a GPU the copy to the host is made before.
            token_B = state.token_R[:running]
            pending.token_B = token_B if token_B.is_cuda else token_B.clone()
        else:
            self._launch_any(plan, pending, previous)
        if self.cache.device.type == "cuda":
            pending.send_back()
        return pending

    def _is_plain(self, plan: Plan) -> bool:
        """Return whether the step only takes the running rows' likeliest tokens."""
        if plan.chunks or plan.copies or plan.beginning or not plan.running:
            return False
        greedy = self.state.sampling.needs(range(len(plan.running))) == SamplingNeeds()
        return greedy and not any(s.request.has_beams or s.grammar is not None for s in plan.running)

    def _launch_any(self, plan: Plan, pending: Pending, previous: Pending | None) -> None:
        state, running = self.state, len(plan.running)
        logits = []
        if running:
            logits.append(self.decode(state, running))
            state.count_step(running)
        if plan.chunks:
            logits_BV, pending.prompts = self.prefill(plan.chunks)
            logits.append(logits_BV)
        if plan.copies:
            self.cache.copy_pages(plan.copies)
        if plan.beginning:
            state.begin(plan.beginning)
        if plan.lengths:
            logits_BV = logits[0] if len(logits) == 1 else torch.cat(logits)
            self._choose(logits_BV, plan, pending, self._masks(len(logits_BV), plan, previous))

    def _masks(self, rows: int, plan: Plan, previous: Pending | None) -> TokenMasks | None:
        """Return the tokens that texts with grammars may write; `None` if there are no such texts."""
        texts = [(_row(s), s.grammar) for s in [*plan.running, *plan.beginning] if s.grammar is not None]
        if texts and previous is not None:
            # The host waits for the last tokens, and the device computes the logits of this step meanwhile.
            previous.result()
        texts = [(row, text) for row, text in texts if not text.is_complete]  # the others have just ended
        if not texts:
            return None
        bits_MW = self._bits([text for _, text in texts])
        index = [-1] * rows
        for number, (row, _) in enumerate(texts):
            index[row] = number
        return TokenMasks(to_device(index, torch.int32, self.cache.device), bits_MW)

    def _bits(self, texts: list[GrammarText | None]) -> torch.Tensor:
        return compute_masks(texts, self.cache.device.type == "cuda").to(self.cache.device, non_blocking=True)

    def _choose(self, logits_BV: torch.Tensor, plan: Plan, pending: Pending, masks: TokenMasks | None) -> None:
        """Choose the next token of each row, and the beam that each beam continues."""
        state, rows = self.state, len(logits_BV)
        if pending.sequences:
            needs = state.sampling.needs(range(rows))
            sampled = sample(logits_BV, state.sampling, state.length_R[:rows], needs, masks)
            pending.token_B = sampled.token_B
            if sampled.logprob_B is not None:
                pending.logprobs = Logprobs(sampled.logprob_B, sampled.top_logprob_BK, sampled.top_token_BK)
            state.token_R[:rows] = sampled.token_B
        by_beams: dict[int, list[Search]] = {}
        for sequences, is_new in ((plan.running, False), (plan.beginning, True)):
            for request in dict.fromkeys(s.request for s in sequences if s.request.has_beams):
                beam_rows = [_row(sequence) for sequence in request.sequences]
                search = Search(request, beam_rows, plan.lengths[beam_rows[0]], is_new)
                by_beams.setdefault(len(beam_rows), []).append(search)
        for searches in by_beams.values():
            pending.searches.append((searches, self._search(logits_BV, searches, pending)))

    def _search(self, logits_BV: torch.Tensor, searches: list[Search], pending: Pending) -> BeamStep:
        """Take one step of searches with the same number of beams."""
        state, device = self.state, logits_BV.device
        row_GN = to_device([search.rows for search in searches], torch.int64, device)
        rules = [search.request.stop for search in searches]
        most = max(len(rule.end_tokens) for rule in rules)
        end_tokens = [[*rule.end_tokens, *[-1] * (most - len(rule.end_tokens))] for rule in rules]
        too_short = [not s.request.stop.may_end(s.length - len(s.request.prompt)) for s in searches]

        def text_ends(token_GC: torch.Tensor, source_GC: torch.Tensor) -> torch.Tensor:
            # The device waits for the host: only the host knows texts, and the beams depend on which of them end.
            columns = zip(searches, token_GC.tolist(), source_GC.tolist(), strict=True)
            ends = [_text_ends(search.request, tokens, sources, pending) for search, tokens, sources in columns]
            return to_device(ends, torch.bool, device)

        wanted = [s.request.params.logprobs for s in searches if s.request.params.logprobs is not None]
        grammars = [
            text
            for search in searches
            for text in (search.request.beam_texts.grammars if search.request.beam_texts else [None] * len(search.rows))
        ]
        allowed_GBV = None
        if any(text is not None for text in grammars):
            allowed_GBV = unpacked(self._bits(grammars), logits_BV.shape[1]).unflatten(0, row_GN.shape)
            for number, text in enumerate(grammars):
                if text is not None and text.error is not None:
                    pending.failed.append((searches[number // row_GN.shape[1]].request, text.error))
        step = select_beams(
            logits_BV[row_GN],
            state.score_R[row_GN],
            to_device(end_tokens, torch.int64, device),
            to_device(too_short, torch.bool, device) if any(too_short) else None,
            text_ends if any(search.request.beam_texts is not None for search in searches) else None,
            max(wanted, default=None),
            allowed_GBV,
        )
        state.token_R[row_GN] = step.token_GB
        state.score_R[row_GN] = step.score_GB
        running = [index for index, search in enumerate(searches) if not search.is_new]  # all beams of a new one agree
        if running:
            search_G = to_device(running, torch.int64, device)
            row_B = row_GN[search_G].flatten()
            beams = row_GN.shape[1]
            first_G1 = torch.arange(0, len(running) * beams, beams, device=device)[:, None]
            table_BP = state.page_table_RP[row_B]
            lengths = [searches[index].length for index in running for _ in range(beams)]
            self.cache.reorder(table_BP, (step.source_GB[search_G] + first_G1).flatten(), lengths)
            state.page_table_RP[row_B] = table_BP
        return step


def _text_ends(request: Request, tokens: list[int], sources: list[int], pending: Pending) -> list[bool]:
    """Return which candidates' texts end. An exception, such as the tokenizer's, concerns this request alone."""
    if request.beam_texts is not None:
        try:
            return request.beam_texts.ends(tokens, sources)
        except Exception as error:  # of any kind
            pending.failed.append((request, error))
    return [False] * len(tokens)


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None
    return sequence.row
