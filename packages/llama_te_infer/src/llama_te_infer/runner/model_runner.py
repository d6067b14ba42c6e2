"""Computes the steps that the scheduler plans: launches them on the device, and hands out what comes back.

What one step needs of the one before (tokens, lengths, pages, scores of beams) stays on the device, so that a step can
be launched before the results of the last one are known. Only changes are sent there: rows that move or begin, new
pages.

Shapes: R rows there may be, B rows that run, P pages of a row, M chunks of prompts, S columns of a padded batch, E
hidden size, V vocabulary, G searches, N beams of each, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from ..engine.scheduler import Chunk, Plan
from ..engine.sequence import Request, Sequence
from ..kv_cache.engine_cache import EngineCache, send
from .beam_search import BeamStep, first_scores, select_beams
from .sampler import RowSampling, SamplingNeeds, sample

LOGITS_AT_ONCE = 256  # tokens of a prompt whose logits are in memory together


class DecodeState:
    """The running rows on the device. Rows behind them have no tokens, and the dump page in all places.

    Args:
        rows: R.
        cache: Whose pages the rows have.
        vocab_size: V.

    Attributes:
        token_R: int64, the last token of each row, which is not in the cache.
        length_R: int32, tokens in the cache, and so the last token's position.
        score_R: float32, of beams.
        page_table_RP: int32.
        sampling: The rows' sampling parameters.
        lengths: What is in `length_R` for the rows that run, on the host.
    """

    def __init__(self, rows: int, cache: EngineCache, vocab_size: int) -> None:
        self.token_R = torch.zeros(rows, dtype=torch.int64, device=cache.device)
        self.length_R = torch.zeros(rows, dtype=torch.int32, device=cache.device)
        self.score_R = torch.zeros(rows, dtype=torch.float32, device=cache.device)
        self.page_table_RP = cache.make_page_table()
        self.sampling = RowSampling(rows, vocab_size, cache.device)
        self.lengths: list[int] = []
        self._dump_page = cache.dump_page

    def move(self, moves: Items[tuple[int, int]], rows: int) -> None:
        """Put rows in the places of others, and leave only the first `rows`.

        Args:
            moves: Pairs of a row and the row whose content it gets; no row is in two pairs.
            rows: Rows that go on.
        """
        if moves:
            to_M, source_M = send(list(zip(*moves, strict=True)), torch.int64, self.token_R.device)
            for tensor in (self.token_R, self.length_R, self.score_R, self.page_table_RP):
                tensor[to_M] = tensor[source_M]
            for to, source in moves:
                self.sampling.move(to, source)
        vacated = slice(rows, len(self.lengths))
        if rows < len(self.lengths):
            self.token_R[vacated] = 0
            self.length_R[vacated] = 0
            self.page_table_RP[vacated] = self._dump_page
            for row in range(rows, len(self.lengths)):
                self.sampling.clear(row)

    def add_pages(self, new_pages: Items[tuple[int, int, int]]) -> None:
        """Write into the page table: triples of a row, a place there and a page."""
        if new_pages:
            width = self.page_table_RP.shape[1]
            entries = [[row * width + place for row, place, _ in new_pages], [page for _, _, page in new_pages]]
            place_N, page_N = send(entries, torch.int64, self.token_R.device)
            self.page_table_RP.view(-1)[place_N] = page_N.int()

    def begin(self, sequences: Items[Sequence]) -> None:
        """Let sequences whose prompts are in the cache have the rows behind the running ones; tokens follow."""
        width = self.page_table_RP.shape[1]
        rows = [
            [*sequence.pages, *[self._dump_page] * (width - len(sequence.pages)), sequence.cached]
            for sequence in sequences
        ]
        first = sequences[0].row
        assert first is not None
        row_BX = send(rows, torch.int32, self.token_R.device)
        self.page_table_RP[first : first + len(rows)] = row_BX[:, :-1]
        self.length_R[first : first + len(rows)] = row_BX[:, -1]
        for sequence in sequences:
            assert sequence.row is not None
            request = sequence.request
            if not request.has_beams:
                self.sampling.set(
                    sequence.row,
                    request.params,
                    _seed(request, sequence.index),
                    sequence.tokens,
                    request.ending_tokens,
                    len(request.prompt),
                )
            elif sequence.index == 0:
                beams = len(request.sequences)
                self.score_R[sequence.row : sequence.row + beams] = first_scores(1, beams, self.score_R.device)[0]


class DecodeStep(Protocol):
    """One way to compute a step of decoding."""

    def __call__(self, state: DecodeState, rows: int) -> torch.Tensor:
        """Store keys and values of the first rows' last tokens; returns the logits [rows, V] of what follows.

        Args:
            state: Left as it is; with `rows` lengths on the host.
            rows: B.
        """
        ...

    def advance(self, state: DecodeState, rows: int) -> None:
        """Compute a step after which each row takes its likeliest token.

        `state` gets the tokens, and 1 is added to the rows' lengths on the device.

        Args:
            state: See above.
            rows: B.
        """
        ...


class ModelDecode:
    """A step of decoding by the model's own forward pass.

    Args:
        model: An `NVLlamaForCausalLM`.
        cache: The engine's.
    """

    def __init__(self, model: Any, cache: EngineCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, state: DecodeState, rows: int) -> torch.Tensor:
        """See `DecodeStep`."""
        # Quantized products take certain numbers of tokens. Packed ones are filled up by the model.
        multiple = padded_multiple(self.model)
        filled = -(-rows // multiple) * multiple
        starts = state.lengths + [0] * (filled - rows)
        self.cache.open_rows(state.page_table_RP, starts, [1] * filled)
        output = self.model.model(input_ids=state.token_R[:filled, None], past_key_values=self.cache)
        return self.model.lm_head(output.last_hidden_state[:rows, 0])

    def advance(self, state: DecodeState, rows: int) -> None:
        """See `DecodeStep`."""
        state.token_R[:rows] = self(state, rows).argmax(dim=-1)
        state.length_R[:rows] += 1


class BeamResult(NamedTuple):
    """What a step did to the beams of one search.

    Attributes:
        request: The search's.
        length: Tokens of each beam in the cache, which it then kept of its source.
        sources: For each beam the beam that it goes on from.
        candidate_tokens: See `BeamHistory.add`.
        candidate_sources: See there.
        candidate_scores: See there.
    """

    request: Request
    length: int
    sources: list[int]
    candidate_tokens: list[int]
    candidate_sources: list[int]
    candidate_scores: list[float]


class StepResult(NamedTuple):
    """What a step chose.

    Attributes:
        tokens: Of each sequence that is no beam, its next token.
        logprobs: Of these tokens; `None` where nobody asked.
        top: Of the most likely tokens at these places, pairs of a token and its log-probability.
        beams: Of each search.
        prompt_logprobs: A request, a place in its prompt, and the log-probabilities of the tokens from there on.
    """

    tokens: list[tuple[Sequence, int]]
    logprobs: list[float] | None
    top: list[list[tuple[int, float]]] | None
    beams: list[BeamResult]
    prompt_logprobs: list[tuple[Request, int, list[float]]]


@dataclass
class Pending:
    """A step that was launched. Its tensors are on their way to the host."""

    sequences: list[tuple[int, Sequence]]  # that are no beams, with their rows
    token_B: torch.Tensor | None = None
    logprob_B: torch.Tensor | None = None
    top_logprob_BK: torch.Tensor | None = None
    top_token_BK: torch.Tensor | None = None
    searches: list[tuple[list[_Search], BeamStep]] = field(default_factory=list)
    prompts: list[tuple[Request, int, torch.Tensor]] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None

    def result(self) -> StepResult:
        """Wait until the device has done the step, and read what it chose."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = [row for row, _ in self.sequences]
        tokens = [] if self.token_B is None else self.token_B.tolist()
        logprobs = None if self.logprob_B is None else self.logprob_B.tolist()
        top = None
        if self.top_token_BK is not None and self.top_logprob_BK is not None:
            pairs = zip(self.top_token_BK.tolist(), self.top_logprob_BK.tolist(), strict=True)
            top = [list(zip(*pair, strict=True)) for pair in pairs]
        return StepResult(
            tokens=[(sequence, tokens[row]) for row, sequence in self.sequences],
            logprobs=None if logprobs is None else [logprobs[row] for row in rows],
            top=None if top is None else [top[row] for row in rows],
            beams=[result for searches, step in self.searches for result in _beam_results(searches, step)],
            prompt_logprobs=[(request, place, logprob_T.tolist()) for request, place, logprob_T in self.prompts],
        )


class _Search(NamedTuple):
    request: Request
    rows: list[int]
    length: int
    is_new: bool


class ModelRunner:
    """Launches steps.

    Args:
        model: An `NVLlamaForCausalLM` in evaluation mode.
        cache: Of this model.
        decode: How steps of decoding are computed; through the model by default.
    """

    def __init__(self, model: Any, cache: EngineCache, decode: DecodeStep | None = None) -> None:
        self.model, self.cache = model, cache
        self.decode: DecodeStep = ModelDecode(model, cache) if decode is None else decode
        self.state = DecodeState(cache.max_batch_size, cache, model.lm_head.out_features)
        self._prompt_table_RP = cache.make_page_table()

    def launch(self, plan: Plan) -> Pending:
        """Start a step; returns at once on a GPU."""
        state, running = self.state, len(plan.running)
        state.move(plan.moves, running)
        state.add_pages([(_row(sequence), place, page) for sequence, place, page in plan.new_pages])
        state.lengths = list(plan.starts)
        if self._is_plain(plan):
            self.decode.advance(state, running)
            state.lengths = [start + 1 for start in plan.starts]
            pending = Pending([(_row(sequence), sequence) for sequence in plan.running])
            # A copy where it is not copied to the host anyway: the next step writes into the state.
            token_B = state.token_R[:running]
            pending.token_B = token_B if token_B.is_cuda else token_B.clone()
            return self._send_back(pending)
        logits = []
        if running:
            logits.append(self.decode(state, running))
            state.length_R[:running] += 1
        pending = Pending([(_row(s), s) for s in [*plan.running, *plan.beginning] if not s.request.has_beams])
        if plan.chunks:
            logits.append(self._read_prompts(plan.chunks, pending))
        if plan.copies:
            self.cache.copy_pages(plan.copies)
        if plan.beginning:
            state.begin(plan.beginning)
        state.lengths = [start + 1 for start in plan.starts] + [sequence.cached for sequence in plan.beginning]
        if state.lengths:
            self._choose(logits[0] if len(logits) == 1 else torch.cat(logits), plan, pending)
        return self._send_back(pending)

    def _is_plain(self, plan: Plan) -> bool:
        """Whether all that is to do is to take the running rows' likeliest tokens."""
        if plan.chunks or plan.copies or plan.beginning or not plan.running:
            return False
        greedy = self.state.sampling.needs(range(len(plan.running))) == SamplingNeeds()
        return greedy and not any(sequence.request.has_beams for sequence in plan.running)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _read_prompts(self, chunks: list[Chunk], pending: Pending) -> torch.Tensor:
        """Compute chunks; returns the logits [rows, V] for the rows that begin."""
        last: dict[int, torch.Tensor] = {}
        for group in alike(chunks):
            for chunk, hidden_SE in zip(group, self._forward(group), strict=True):
                if chunk.beginning:
                    last[id(chunk)] = hidden_SE[-1]
                if chunk.sequence.request.params.prompt_logprobs:
                    self._score_prompt(chunk, hidden_SE, pending)
        beginning = [chunk for chunk in chunks if chunk.beginning]
        if not beginning:
            return torch.empty(0, self.model.lm_head.out_features, device=self.cache.device, dtype=self.cache.dtype)
        logits_MV = self.model.lm_head(torch.stack([last[id(chunk)] for chunk in beginning]))
        rows = [place for place, chunk in enumerate(beginning) for _ in chunk.beginning]
        if len(rows) == len(beginning):
            return logits_MV
        return logits_MV[send(rows, torch.int64, logits_MV.device)]

    def _forward(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """The last hidden states [tokens, E] of each chunk, computed as one padded batch."""
        rows, new = len(chunks), [len(chunk.tokens) for chunk in chunks]
        multiple = padded_multiple(self.model)
        width = -(-max(new) // multiple) * multiple
        pages = self._prompt_table_RP.shape[1]
        # One copy: the chunks' tokens, then their pages.
        sent = [
            [
                *chunk.tokens,
                *[0] * (width - len(chunk.tokens)),
                *chunk.sequence.pages,
                *[self.cache.dump_page] * (pages - len(chunk.sequence.pages)),
            ]
            for chunk in chunks
        ]
        sent_BX = send(sent, torch.int32, self.cache.device)
        self._prompt_table_RP[:rows] = sent_BX[:, width:]
        self.cache.open_rows(self._prompt_table_RP, [chunk.start for chunk in chunks], new)
        mask_BS = None
        if sum(new) < rows * width:
            new_B = self.cache.cu_seqlens_q[: rows + 1].diff()
            mask_BS = torch.arange(width, device=self.cache.device) < new_B[:, None]
        output = self.model.model(
            input_ids=sent_BX[:, :width].long(), attention_mask=mask_BS, past_key_values=self.cache
        )
        return [hidden_SE[:count] for hidden_SE, count in zip(output.last_hidden_state, new, strict=True)]

    def _score_prompt(self, chunk: Chunk, hidden_SE: torch.Tensor, pending: Pending) -> None:
        """Log-probabilities of the prompt's tokens that follow the chunk's."""
        following = chunk.sequence.request.prompt[chunk.start + 1 : chunk.start + 1 + len(chunk.tokens)]
        if not following:
            return
        token_S = send(following, torch.int64, self.cache.device)
        pieces = []
        for start in range(0, len(following), LOGITS_AT_ONCE):
            piece_S = token_S[start : start + LOGITS_AT_ONCE]
            logits_SV = self.model.lm_head(hidden_SE[start : start + len(piece_S)])
            pieces.append(logits_SV.float().log_softmax(dim=-1).gather(1, piece_S[:, None])[:, 0])
        pending.prompts.append((chunk.sequence.request, chunk.start + 1, torch.cat(pieces)))

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _choose(self, logits_BV: torch.Tensor, plan: Plan, pending: Pending) -> None:
        """Choose the next token of each row, and tell each beam what it goes on from."""
        state, rows = self.state, len(logits_BV)
        if pending.sequences:
            needs = state.sampling.needs(range(rows))
            sampled = sample(logits_BV, state.sampling, state.length_R[:rows], needs)
            pending.token_B, pending.logprob_B, pending.top_logprob_BK, pending.top_token_BK = sampled
            state.token_R[:rows] = sampled.token_B
        by_beams: dict[int, list[_Search]] = {}
        for sequences, is_new in ((plan.running, False), (plan.beginning, True)):
            for request in dict.fromkeys(s.request for s in sequences if s.request.has_beams):
                beam_rows = [_row(sequence) for sequence in request.sequences]
                search = _Search(request, beam_rows, state.lengths[beam_rows[0]], is_new)
                by_beams.setdefault(len(beam_rows), []).append(search)
        for searches in by_beams.values():
            pending.searches.append((searches, self._search(logits_BV, searches)))

    def _search(self, logits_BV: torch.Tensor, searches: list[_Search]) -> BeamStep:
        """One step of searches with the same number of beams."""
        state, device = self.state, logits_BV.device
        row_GN = send([search.rows for search in searches], torch.int64, device)
        most = max(len(search.request.ending_tokens) for search in searches)
        ending = [[*s.request.ending_tokens, *[-1] * (most - len(s.request.ending_tokens))] for s in searches]
        too_short = [s.length - len(s.request.prompt) < s.request.params.min_tokens for s in searches]
        step = select_beams(
            logits_BV[row_GN],
            state.score_R[row_GN],
            send(ending, torch.int64, device),
            send(too_short, torch.bool, device) if any(too_short) else None,
        )
        state.token_R[row_GN] = step.token_GB
        state.score_R[row_GN] = step.score_GB
        going_on = [place for place, search in enumerate(searches) if not search.is_new]  # new ones are all alike
        if going_on:
            place_G = send(going_on, torch.int64, device)
            row_B = row_GN[place_G].flatten()
            beams = row_GN.shape[1]
            first_G1 = torch.arange(0, len(going_on) * beams, beams, device=device)[:, None]
            table_BP = state.page_table_RP[row_B]
            lengths = [searches[place].length for place in going_on for _ in range(beams)]
            self.cache.reorder(table_BP, (step.source_GB[place_G] + first_G1).flatten(), lengths)
            state.page_table_RP[row_B] = table_BP
        return step

    # --- back to the host ---------------------------------------------------------------------------------------------

    def _send_back(self, pending: Pending) -> Pending:
        """Start copies to the host of what a step chose; into pinned memory, which is what makes them not wait."""
        if self.cache.device.type != "cuda":
            return pending

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

        for name in ("token_B", "logprob_B", "top_logprob_BK", "top_token_BK"):
            tensor = getattr(pending, name)
            setattr(pending, name, None if tensor is None else to_host(tensor))
        pending.searches = [(searches, BeamStep(*map(to_host, step))) for searches, step in pending.searches]
        pending.prompts = [(request, place, to_host(logprob_T)) for request, place, logprob_T in pending.prompts]
        pending.arrived = torch.cuda.Event()
        pending.arrived.record()
        return pending


def alike(chunks: Items[Chunk]) -> list[list[Chunk]]:
    """Chunks in groups of which each has less padding than tokens: no chunk is less than half as long as another."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: -len(chunk.tokens)):
        if groups and 2 * len(chunk.tokens) >= len(groups[-1][0].tokens):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def padded_multiple(model: Any) -> int:
    """What the number of tokens of a padded batch has to be a multiple of; packed tokens are filled up by the model."""
    return model.model.precision.token_multiple() if model.config.attn_input_format == "bshd" else 1


def _beam_results(searches: list[_Search], step: BeamStep) -> list[BeamResult]:
    lists = (step.source_GB, step.candidate_token_GC, step.candidate_source_GC, step.candidate_score_GC)
    columns = zip(*(tensor.tolist() for tensor in lists), strict=True)
    return [
        BeamResult(search.request, search.length, *column) for search, column in zip(searches, columns, strict=True)
    ]


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None
    return sequence.row


def _seed(request: Request, index: int) -> int:
    """The seed of one of a request's sequences; the first one has the request's own."""
    return (request.seed + index * 0x9E3779B97F4A7C15) % 2**63
