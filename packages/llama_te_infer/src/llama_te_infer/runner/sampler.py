"""Choosing the next token of each row of a batch, on the device.

A drawn token depends only on its row's seed, its position in the sequence and its logits. Random numbers are a hash of
the seed, the position and the token's id, and the order of every sum is independent of the batch. So a request gets the
same tokens in any row of any batch, and again after a preemption.

Shapes: R rows, B rows of the batch, V vocabulary, K most likely tokens to report, N bad words, L tokens before the last
one of the longest bad word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..decode.greedy import GreedyWorkspace, take_likeliest
from ..ops.draw import BIASED, COUNTED, MASKED, draw
from ..sampling_params import MAX_LOGPROBS, SamplingParams
from .grammar import TokenMasks
from .logprobs import samples_by_operators, token_logprobs
from .stopping import StopRule


class SamplingNeeds(NamedTuple):
    """The kinds of work that `sample` has to do for a batch. The host knows them.

    Attributes:
        random: At least one row draws its token.
        filtered: At least one row draws from a part of the vocabulary, which needs a sort.
        masked: At least one row has a repetition penalty, or may not end yet.
        biased: At least one row has a bias on logits, allowed tokens, or a forbidden token.
        counted: At least one row has a presence or frequency penalty.
        bad_words: At least one row has a bad word of several tokens.
        top_logprobs: The number of most likely tokens to report: 0 or the limit, which keeps the combinations few.
            `None` if no log-probability is reported, not even the chosen token's.
        processed: At least one row reports log-probabilities after its parameters.
    """

    random: bool = False
    filtered: bool = False
    masked: bool = False
    biased: bool = False
    counted: bool = False
    bad_words: bool = False
    top_logprobs: int | None = None
    processed: bool = False


class Sampled(NamedTuple):
    """The tokens that `sample` chose, and log-probabilities in float32; `None` if no row needs them.

    A row's log-probabilities are the model's own, or those after its parameters: see `SamplingParams.logprobs_mode`.

    Attributes:
        token_B: int64; `NO_TOKEN` of a row whose logits are not finite, or whose parameters forbid all tokens.
        logprob_B: The chosen tokens' log-probabilities.
        top_logprob_BK: The highest log-probabilities, in descending order; K is the limit, or V if V is less.
        top_token_BK: int64, their tokens; among equally likely tokens the lower id comes first.
    """

    token_B: torch.Tensor
    logprob_B: torch.Tensor | None = None
    top_logprob_BK: torch.Tensor | None = None
    top_token_BK: torch.Tensor | None = None


class BadWords(NamedTuple):
    """Bad words of several tokens. The last token gets no probability where the others precede it.

    Attributes:
        row_N: int64, the row that may not write the word.
        before_NL: int64, its tokens before the last one, behind as many -1 as are missing.
        last_N: int64, its last token.
    """

    row_N: torch.Tensor
    before_NL: torch.Tensor
    last_N: torch.Tensor


class RowSampling:
    """The rows' sampling parameters, as tensors on the device. A row without parameters is greedy.

    Each change is a copy on the current stream; the host does not wait for it.

    Args:
        rows: R.
        vocab_size: V.
        device: The device of the tensors.

    Attributes:
        number_RF: float32, the numbers that `ops.draw` takes.
        integer_RF: int64, the integers that `ops.draw` takes.
        seen_RV: bool, the tokens of a row's prompt and output. Only rows with a repetition penalty or `min_tokens` have
            entries; `None` until the first such row is set.
        ending_RV: bool, the tokens that would end a row. The same rows have entries.
        bias_RV: float32, numbers to add to the logits, -inf for tokens that a row may not write. `None` until a row
            needs it, as the following ones.
        count_RV: int32, how often each token is in a row's output.
        recent_RL: int64, the last tokens of a row's output, -1 in front of the first one.
        is_processed_R: bool, whether a row reports log-probabilities after its parameters.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.rows, self.vocab_size, self.device = rows, vocab_size, torch.device(device)
        # One table for each type: two copies then set a row.
        self.number_RF = torch.zeros(rows, 6, dtype=torch.float32, device=device)
        self.integer_RF = torch.zeros(rows, 4, dtype=torch.int64, device=device)
        self.temperature_R, self.top_p_R, self.min_p_R, *penalties = self.number_RF.unbind(1)
        self.repetition_penalty_R, self.presence_penalty_R, self.frequency_penalty_R = penalties
        self.seed_R, self.top_k_R, self.min_length_R, _ = self.integer_RF.unbind(1)
        self.seen_RV: torch.Tensor | None = None
        self.ending_RV: torch.Tensor | None = None
        self.bias_RV: torch.Tensor | None = None
        self.count_RV: torch.Tensor | None = None
        self.recent_RL: torch.Tensor | None = None
        self.is_processed_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self._words: list[list[list[int]]] = [[] for _ in range(rows)]  # bad words of several tokens
        self._word_table: BadWords | None = None  # of all rows; `None` after a change
        self.greedy_workspace = GreedyWorkspace(rows, device)
        self.token_hash_V = _hash_tokens(vocab_size, self.device)
        self._needs = [SamplingNeeds()] * rows
        for row in range(rows):
            self.clear(row)

    def set(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        token_ids: Sequence[int],
        stop: StopRule,
        prompt_length: int | None = None,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        """Give a row to a sequence.

        Args:
            row: The row.
            params: The request's parameters.
            seed: The sequence's seed, from 0 to 2**63 - 1. This method does not read `params.seed`.
            token_ids: The prompt and the tokens written so far.
            stop: The sequence's stop rule.
            prompt_length: Tokens of the prompt; by default all of `token_ids`.
            bad_words: The tokens of each word of `params.bad_words`.

        Raises:
            ValueError: A token is not in the vocabulary.
        """
        ending = stop.end_tokens
        for name, tokens in (
            ("token_ids", token_ids),
            ("the tokens that end a sequence", ending),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words", [token for word in bad_words for token in word]),
        ):
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name}: {token} is not in the vocabulary, which is 0 to {self.vocab_size - 1}. Take the "
                        "model's own tokenizer."
                    )
        prompt_length = len(token_ids) if prompt_length is None else prompt_length
        random = params.temperature > 0
        single = [word[0] for word in bad_words if len(word) == 1]
        self._set_words(row, [list(word) for word in bad_words if len(word) > 1])
        needs = SamplingNeeds(
            random=random,
            filtered=random and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
            masked=stop.forbids_end_tokens or params.repetition_penalty != 1,
            biased=bool(params.logit_bias or single) or params.allowed_token_ids is not None,
            counted=params.presence_penalty != 0 or params.frequency_penalty != 0,
            bad_words=bool(self._words[row]),
            top_logprobs=MAX_LOGPROBS if params.logprobs else params.logprobs,
            processed=params.logprobs is not None and params.logprobs_mode == "processed",
        )
        self._write(
            row,
            [
                params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            ],
            [
                seed,
                min(params.top_k, self.vocab_size) or self.vocab_size,
                prompt_length + stop.min_tokens if stop.forbids_end_tokens else 0,
                BIASED * needs.biased + MASKED * needs.masked + COUNTED * needs.counted,
            ],
        )
        self._set_needs(row, needs)
        if self._needs[row].masked:
            self._mark(row, token_ids, ending)
        if self._needs[row].biased:
            self._bias(row, params, single)
        if self._needs[row].counted:
            self._count(row, token_ids[prompt_length:])
        if self._needs[row].bad_words:
            self._keep_recent(row, token_ids[prompt_length:])

    def move(self, to: int, source: int) -> None:
        """Copy another row's parameters to a row."""
        self.number_RF[to].copy_(self.number_RF[source])
        self.integer_RF[to].copy_(self.integer_RF[source])
        self._set_needs(to, self._needs[source])
        if self._needs[to].masked:
            assert self.seen_RV is not None and self.ending_RV is not None
            self.seen_RV[to].copy_(self.seen_RV[source])
            self.ending_RV[to].copy_(self.ending_RV[source])
        for needed, table in (
            (self._needs[to].biased, self.bias_RV),
            (self._needs[to].counted, self.count_RV),
            (self._needs[to].bad_words, self.recent_RL),
        ):
            if needed:
                assert table is not None
                table[to].copy_(table[source])
        self._set_words(to, self._words[source])

    def clear(self, row: int) -> None:
        """Make a row greedy, the mode with the least work."""
        self._write(row, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [0, self.vocab_size, 0, 0])
        self._set_words(row, [])
        self._set_needs(row, SamplingNeeds())

    def needs(self, rows: Iterable[int]) -> SamplingNeeds:
        """Return the kinds of work that a batch of these rows needs."""
        kinds = {self._needs[row] for row in rows}
        return SamplingNeeds(
            random=any(kind.random for kind in kinds),
            filtered=any(kind.filtered for kind in kinds),
            masked=any(kind.masked for kind in kinds),
            biased=any(kind.biased for kind in kinds),
            counted=any(kind.counted for kind in kinds),
            bad_words=any(kind.bad_words for kind in kinds),
            top_logprobs=max((kind.top_logprobs for kind in kinds if kind.top_logprobs is not None), default=None),
            processed=any(kind.processed for kind in kinds),
        )

    def word_table(self) -> BadWords:
        """Return the bad words of several tokens, of all rows."""
        if self._word_table is None:
            assert self.recent_RL is not None
            width = self.recent_RL.shape[1]
            rows = [row for row, words in enumerate(self._words) for _ in words]
            words = [word for words in self._words for word in words]
            before = [[-1] * (width - len(word) + 1) + word[:-1] for word in words]
            self._word_table = BadWords(
                *(
                    self._on_host(values, torch.int64).to(self.device, non_blocking=True)
                    for values in (rows, before, [word[-1] for word in words])
                )
            )
        return self._word_table

    def _set_needs(self, row: int, needs: SamplingNeeds) -> None:
        if self._needs[row].biased and not needs.biased:
            assert self.bias_RV is not None
            self.bias_RV[row].zero_()  # parameters make the other tables' old entries harmless
        if self._needs[row].processed != needs.processed:
            self.is_processed_R[row].fill_(needs.processed)
        self._needs[row] = needs

    def _set_words(self, row: int, words: list[list[int]]) -> None:
        if self._words[row] or words:
            self._words[row], self._word_table = words, None

    def _bias(self, row: int, params: SamplingParams, forbidden: Sequence[int]) -> None:
        if self.bias_RV is None:
            self.bias_RV = torch.zeros(self.rows, self.vocab_size, dtype=torch.float32, device=self.device)
        bias_V = self.bias_RV[row].zero_()
        if params.allowed_token_ids is not None:
            bias_V.fill_(-torch.inf).index_fill_(0, self._indices(params.allowed_token_ids), 0.0)
        if params.logit_bias:
            value_T = self._on_host(list(params.logit_bias.values()), torch.float32)
            bias_V.index_add_(0, self._indices(params.logit_bias), value_T.to(self.device, non_blocking=True))
        if forbidden:
            bias_V.index_fill_(0, self._indices(forbidden), -torch.inf)

    def _count(self, row: int, written: Sequence[int]) -> None:
        if self.count_RV is None:
            self.count_RV = torch.zeros(self.rows, self.vocab_size, dtype=torch.int32, device=self.device)
        token_T = self._indices(written)
        self.count_RV[row].zero_().index_add_(0, token_T, torch.ones_like(token_T, dtype=torch.int32))

    def _keep_recent(self, row: int, written: Sequence[int]) -> None:
        width = max(len(word) for word in self._words[row]) - 1
        if self.recent_RL is None:
            self.recent_RL = torch.full((self.rows, width), -1, dtype=torch.int64, device=self.device)
        elif width > self.recent_RL.shape[1]:
            # The words of other rows are shorter, so nobody misses the earlier tokens.
            self.recent_RL = F.pad(self.recent_RL, (width - self.recent_RL.shape[1], 0), value=-1)
            self._word_table = None
        width = self.recent_RL.shape[1]
        last = [*[-1] * width, *written][-width:]
        self.recent_RL[row].copy_(self._on_host(last, torch.int64), non_blocking=True)

    def _indices(self, tokens: Iterable[int]) -> torch.Tensor:
        return self._on_host(list(tokens), torch.int64).to(self.device, non_blocking=True)

    def _write(self, row: int, numbers: list[float], integers: list[int]) -> None:
        self.number_RF[row].copy_(self._on_host(numbers, torch.float32), non_blocking=True)
        self.integer_RF[row].copy_(self._on_host(integers, torch.int64), non_blocking=True)

    def _mark(self, row: int, token_ids: Sequence[int], ending: Collection[int]) -> None:
        if self.seen_RV is None or self.ending_RV is None:
            self.seen_RV = torch.zeros(self.rows, self.vocab_size, dtype=torch.bool, device=self.device)
            self.ending_RV = torch.zeros_like(self.seen_RV)
        for marked_RV, tokens in ((self.seen_RV, token_ids), (self.ending_RV, ending)):
            marked_RV[row].zero_().index_fill_(0, self._indices(tokens), True)

    def _on_host(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        # The GPU reads pinned memory by itself, and PyTorch reuses that memory only after the GPU has read it.
        return torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")


def sample(
    logits_BV: torch.Tensor,
    sampling: RowSampling,
    position_B: torch.Tensor,
    needs: SamplingNeeds,
    masks: TokenMasks | None = None,
) -> Sampled:
    """Choose the next token of each of the first B rows. Does not wait for the device.

    Args:
        logits_BV: bfloat16, float16, float32 or float64; `sample` does not change them.
        sampling: The rows' parameters. `sample` adds the new tokens to its record of seen tokens, where rows need it.
        position_B: int32, the position of the new token in its sequence: the number of tokens before it.
        needs: The result of `sampling.needs` for these rows, or a superset.
        masks: The tokens that some rows of the logits may write.
    """
    choice_BV = _forbid_words(logits_BV, sampling) if needs.bad_words else logits_BV
    reported_BV = logits_BV
    if needs.processed:  # before the choice adds its tokens to the tables
        processed_BV = _process(choice_BV, sampling, position_B, needs, masks).float()
        reported_BV = torch.where(sampling.is_processed_R[: len(logits_BV), None], processed_BV, logits_BV.float())
    token_B = torch.empty(len(choice_BV), dtype=torch.int64, device=choice_BV.device)
    choose = _choose_by_operator if samples_by_operators(choice_BV.device) else _choose_by_pytorch
    choose(choice_BV, sampling, position_B, needs, masks, token_B)
    if needs.bad_words:
        assert sampling.recent_RL is not None
        recent_BL = sampling.recent_RL[: len(token_B)]
        recent_BL.copy_(torch.cat([recent_BL[:, 1:], token_B[:, None]], dim=1))
    if needs.top_logprobs is None:
        return Sampled(token_B)
    return Sampled(token_B, *token_logprobs(reported_BV, token_B, needs.top_logprobs))


def _choose_by_operator(
    choice_BV: torch.Tensor,
    sampling: RowSampling,
    position_B: torch.Tensor,
    needs: SamplingNeeds,
    masks: TokenMasks | None,
    token_B: torch.Tensor,
) -> None:
    """Write the chosen tokens to `token_B` and record them, in one launch."""
    if needs._replace(bad_words=False, top_logprobs=None, processed=False) == SamplingNeeds() and masks is None:
        take_likeliest(choice_BV, token_B, sampling.greedy_workspace)
        return
    draw(
        choice_BV.float() if choice_BV.dtype == torch.float64 else choice_BV,
        sampling.number_RF,
        sampling.integer_RF,
        position_B,
        sampling.bias_RV if needs.biased else None,
        sampling.seen_RV if needs.masked else None,
        sampling.ending_RV if needs.masked else None,
        sampling.count_RV if needs.counted else None,
        None if masks is None else masks.index_B,
        None if masks is None else masks.bits_MW,
        token_B,
    )


def _choose_by_pytorch(
    choice_BV: torch.Tensor,
    sampling: RowSampling,
    position_B: torch.Tensor,
    needs: SamplingNeeds,
    masks: TokenMasks | None,
    token_B: torch.Tensor,
) -> None:
    """Write the chosen tokens to `token_B` and record them. Defines what the operator computes."""
    choice_BV = _process(choice_BV, sampling, position_B, needs, masks)
    if needs.random:  # the largest element is the drawn token: the Gumbel-max trick
        rows = slice(len(choice_BV))
        noise_BV = gumbel_noise(sampling.seed_R[rows], position_B, sampling.token_hash_V)
        choice_BV = choice_BV + noise_BV.mul_(sampling.temperature_R[rows, None] > 0)
    take_likeliest(choice_BV, token_B, sampling.greedy_workspace)
    if needs.masked or needs.counted:
        known_B = token_B.clamp(min=0)  # a row with NO_TOKEN ends, so its records may be wrong
        place_B = torch.arange(len(token_B), device=token_B.device) * sampling.vocab_size + known_B
        if needs.masked:
            assert sampling.seen_RV is not None
            sampling.seen_RV.view(-1).index_fill_(0, place_B, True)
        if needs.counted:
            assert sampling.count_RV is not None
            sampling.count_RV.view(-1).index_add_(0, place_B, torch.ones_like(place_B, dtype=torch.int32))


def _process(
    logits_BV: torch.Tensor,
    sampling: RowSampling,
    position_B: torch.Tensor,
    needs: SamplingNeeds,
    masks: TokenMasks | None,
) -> torch.Tensor:
    """Return logits after all parameters of the rows, which rejected tokens leave with -inf."""
    rows = slice(len(logits_BV))
    if masks is not None:
        allowed_MV = unpacked(masks.bits_MW, sampling.vocab_size)
        allowed_BV = allowed_MV[masks.index_B.clamp(min=0)] | (masks.index_B < 0)[:, None]
        logits_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
    if needs.biased:
        assert sampling.bias_RV is not None
        logits_BV = logits_BV.float() + sampling.bias_RV[rows]
    if needs.masked:
        logits_BV = _mask(logits_BV, sampling, position_B)
    if needs.counted:
        assert sampling.count_RV is not None
        count_BV = sampling.count_RV[rows]
        logits_BV = logits_BV.float() - sampling.frequency_penalty_R[rows, None] * count_BV
        logits_BV -= sampling.presence_penalty_R[rows, None] * (count_BV > 0)
    return _draw_from(logits_BV, sampling, needs.filtered) if needs.random else logits_BV


def unpacked(bits_MW: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return masks of tokens, bool [M, V].

    Args:
        bits_MW: int32, 32 tokens in each number, the lowest bit first.
        vocab_size: V.
    """
    byte_MX = bits_MW.view(torch.uint8)  # the hosts and GPUs that run this are little-endian
    shift_8 = torch.arange(8, dtype=torch.uint8, device=bits_MW.device)
    return ((byte_MX[:, :, None] >> shift_8) & 1).bool().flatten(1)[:, :vocab_size]


def _forbid_words(logits_BV: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """Return float32 logits in which a token that would complete a bad word has -inf."""
    assert sampling.recent_RL is not None
    row_N, before_NL, last_N = sampling.word_table()
    matches_N = ((sampling.recent_RL[row_N] == before_NL) | (before_NL < 0)).all(dim=1) & (row_N < len(logits_BV))
    added_N = torch.where(matches_N, -torch.inf, 0.0)
    place_N = row_N.clamp(max=len(logits_BV) - 1)
    return logits_BV.float().index_put((place_N, last_N), added_N, accumulate=True)


def _mask(logits_BV: torch.Tensor, sampling: RowSampling, position_B: torch.Tensor) -> torch.Tensor:
    """Return float32 logits with the repetition penalty. Tokens that would end a row too early get -inf."""
    assert sampling.seen_RV is not None and sampling.ending_RV is not None
    rows = slice(len(logits_BV))
    logits_BV = logits_BV.float()
    penalty_B1 = sampling.repetition_penalty_R[rows, None]
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = torch.where(sampling.seen_RV[rows], penalized_BV, logits_BV)
    may_not_end_B = position_B < sampling.min_length_R[rows]
    return logits_BV.masked_fill(sampling.ending_RV[rows] & may_not_end_B[:, None], -torch.inf)


def _draw_from(logits_BV: torch.Tensor, sampling: RowSampling, filtered: bool) -> torch.Tensor:
    """Return float32 logits of the probabilities with which rows draw. A greedy row keeps its own."""
    rows = slice(len(logits_BV))
    temperature_B1 = sampling.temperature_R[rows, None]
    is_random_B1 = temperature_B1 > 0
    # Training multiplies by 1 / temperature too (TRL's trainers), so both compute the same probabilities.
    scaled_BV = logits_BV.float() * (1.0 / torch.where(is_random_B1, temperature_B1, 1.0))
    if not filtered:
        return scaled_BV
    likely_BV = keep_likely(
        scaled_BV, sampling.top_k_R[rows, None], sampling.top_p_R[rows, None], sampling.min_p_R[rows, None]
    )
    return torch.where(is_random_B1, likely_BV, scaled_BV)


def keep_likely(
    logits_BV: torch.Tensor, top_k_B1: torch.Tensor, top_p_B1: torch.Tensor, min_p_B1: torch.Tensor
) -> torch.Tensor:
    """Apply top-k, then top-p, then min-p: each sets the logits it rejects to -inf. See `SamplingParams`.

    Args:
        logits_BV: float32.
        top_k_B1: int64, from 1 to V. Tokens as likely as the k-th one stay too.
        top_p_B1: float32; among equally likely tokens the lower id counts first.
        min_p_B1: float32.
    """
    logit_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    weight_BV = (logit_BV - logit_BV[:, :1]).exp()  # probabilities divided by the largest one
    keep_BV = logit_BV >= logit_BV.gather(1, top_k_B1 - 1)
    # Integer sums are the same in every order, so the kept tokens do not depend on the batch.
    share_BV = (weight_BV * 2.0**32).long().mul_(keep_BV)
    sum_BV = share_BV.cumsum(dim=-1)
    limit_B1 = (sum_BV[:, -1:] * top_p_B1.double()).ceil().long()
    keep_BV &= (sum_BV - share_BV < limit_B1) | (top_p_B1 >= 1)
    keep_BV &= weight_BV >= min_p_B1
    keep_BV &= logit_BV[:, :1].isfinite()  # otherwise the weights mean nothing
    return torch.full_like(logits_BV, -torch.inf).scatter_(1, token_BV, logit_BV.masked_fill_(~keep_BV, -torch.inf))


def gumbel_noise(seed_B: torch.Tensor, position_B: torch.Tensor, token_hash_V: torch.Tensor) -> torch.Tensor:
    """Return float32 [B, V] with the standard Gumbel distribution, a function of (seed, position, token) alone.

    The seed and the position make a well mixed key of 64 bits, once per row. A few steps per token mix the key with the
    token's hash. Integers wrap around in the same way on all devices.

    Args:
        seed_B: int64.
        position_B: int32 or int64.
        token_hash_V: int32, from `RowSampling`.
    """
    key_B = seed_B * _SEED_STEP + position_B.long() * _POSITION_STEP
    # The finalizer of splitmix64. PyTorch's right shift copies the sign bit, so masks remove the copies.
    key_B = (key_B ^ ((key_B >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    key_B = (key_B ^ ((key_B >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB, 64)
    key_B = key_B ^ ((key_B >> 31) & (2**33 - 1))
    low_B1, high_B1 = key_B[:, None].view(torch.int32).split(1, dim=1)

    hash_BV = (token_hash_V ^ low_B1).mul_(high_B1 | 1)
    hash_BV.bitwise_xor_((hash_BV >> 15).bitwise_and_(2**17 - 1)).mul_(_signed(0x846CA68B, 32))
    hash_BV.bitwise_xor_(hash_BV >> 16).bitwise_and_(2**31 - 1)

    # Exponential noise of a uniform number u is -log(1 - u). The smallest noise wins, so u needs full precision near 0.
    uniform_BV = hash_BV.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


def _hash_tokens(vocab_size: int, device: torch.device) -> torch.Tensor:
    """Return the part of each token's hash that is the same for all rows, int32 [V]."""
    hash_V = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        hash_V = (hash_V ^ ((hash_V >> shift) & (2 ** (32 - shift) - 1))) * _signed(factor, 32)
    return hash_V ^ ((hash_V >> 16) & (2**16 - 1))


def _signed(value: int, bits: int) -> int:
    """Return the signed integer with the bits of an unsigned one."""
    return value - (1 << bits) if value >> (bits - 1) else value


# Odd and unrelated numbers, so that neighbouring seeds and positions never make the same key.
_SEED_STEP = _signed(0xD1342543DE82EF95, 64)
_POSITION_STEP = _signed(0x9E3779B97F4A7C15, 64)
