"""Choosing the next token of each row of a batch, on the device.

A drawn token depends on its row's seed, its place in its sequence and its logits alone: random numbers are a hash of
the seed, the place and the token's id, and nothing is summed in an order that depends on the batch. So a request gets
the same tokens in any row of any batch, and when it is computed again.

Shapes: R rows, B rows that take part, V vocabulary, K most likely tokens that are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..ops import library
from ..ops.greedy import greedy
from ..sampling_params import MAX_LOGPROBS, SamplingParams


class SamplingNeeds(NamedTuple):
    """What `sample` has to do for a batch, known on the host: a CUDA graph is captured for each that occurs.

    Attributes:
        random: Some row draws its token.
        filtered: Some row draws from a part of the vocabulary only; takes a sort.
        masked: Some row has a repetition penalty, or may not end yet.
        top_logprobs: How many of the most likely tokens are reported: 0, or the limit, so that kinds are few; `None`
            where not even the chosen token's log-probability is.
    """

    random: bool = False
    filtered: bool = False
    masked: bool = False
    top_logprobs: int | None = None


class Sampled(NamedTuple):
    """What `sample` chose. Log-probabilities are the model's own, in float32, `None` where nobody needs them.

    Attributes:
        token_B: int64.
        logprob_B: Of the chosen tokens.
        top_logprob_BK: Of the most likely tokens, in descending order; K is the limit, or V where that is less.
        top_token_BK: int64, these tokens; of equally likely ones the lower id comes first.
    """

    token_B: torch.Tensor
    logprob_B: torch.Tensor | None = None
    top_logprob_BK: torch.Tensor | None = None
    top_token_BK: torch.Tensor | None = None


class RowSampling:
    """The sampling parameters of rows, as tensors on the device. A row that was not set, or was cleared, is greedy.

    Changes are copies that the host does not wait for, in the order of the current stream.

    Args:
        rows: Rows there are, R.
        vocab_size: V.
        device: Of the tensors.

    Attributes:
        seen_RV: bool, the tokens that a row's prompt and output have. Kept for rows with a repetition penalty or
            `min_tokens` only, and `None` until the first such row is set.
        ending_RV: bool, the tokens that would end a row; likewise.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.rows, self.vocab_size, self.device = rows, vocab_size, torch.device(device)
        # One table for each type, so that a row is set by two copies.
        self._number_RF = torch.zeros(rows, 4, dtype=torch.float32, device=device)
        self._integer_RF = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        self.temperature_R, self.top_p_R, self.min_p_R, self.repetition_penalty_R = self._number_RF.unbind(1)
        self.seed_R, self.top_k_R, self.min_length_R = self._integer_RF.unbind(1)
        self.seen_RV: torch.Tensor | None = None
        self.ending_RV: torch.Tensor | None = None
        self.best_R = torch.zeros(rows, dtype=torch.int64, device=device)  # memory of the kernel `greedy`
        self.ticket_R = torch.zeros(rows, dtype=torch.int32, device=device)
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
        eos_token_ids: Sequence[int],
        prompt_length: int | None = None,
    ) -> None:
        """Give a row to a sequence.

        Args:
            row: Which.
            params: The request's parameters.
            seed: Of the sequence, from 0 to 2**63 - 1; `params.seed` is not looked at.
            token_ids: The prompt, with what was written after it if the sequence goes on.
            eos_token_ids: The model's EOS tokens.
            prompt_length: Tokens of the prompt; all of `token_ids` by default.

        Raises:
            ValueError: A token is not in the vocabulary.
        """
        ending = params.ending_tokens(eos_token_ids)
        for name, tokens in (("token_ids", token_ids), ("the tokens that end a sequence", ending)):
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name}: {token} is not in the vocabulary, which is 0 to {self.vocab_size - 1}. Take the "
                        "model's own tokenizer."
                    )
        may_not_end = params.min_tokens > 0 and len(ending) > 0
        prompt_length = len(token_ids) if prompt_length is None else prompt_length
        self._write(
            row,
            [params.temperature, params.top_p, params.min_p, params.repetition_penalty],
            [
                seed,
                min(params.top_k, self.vocab_size) or self.vocab_size,
                prompt_length + params.min_tokens if may_not_end else 0,
            ],
        )
        random = params.temperature > 0
        self._needs[row] = SamplingNeeds(
            random=random,
            filtered=random and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
            masked=may_not_end or params.repetition_penalty != 1,
            top_logprobs=MAX_LOGPROBS if params.logprobs else params.logprobs,
        )
        if self._needs[row].masked:
            self._mark(row, token_ids, ending)

    def move(self, to: int, source: int) -> None:
        """Make a row what another one is; that one stays."""
        self._number_RF[to].copy_(self._number_RF[source])
        self._integer_RF[to].copy_(self._integer_RF[source])
        self._needs[to] = self._needs[source]
        if self._needs[to].masked:
            assert self.seen_RV is not None and self.ending_RV is not None
            self.seen_RV[to].copy_(self.seen_RV[source])
            self.ending_RV[to].copy_(self.ending_RV[source])

    def clear(self, row: int) -> None:
        """Make a row greedy, which asks the least of a batch."""
        self._write(row, [0.0, 1.0, 0.0, 1.0], [0, self.vocab_size, 0])
        self._needs[row] = SamplingNeeds()

    def needs(self, rows: Iterable[int]) -> SamplingNeeds:
        """What a batch of these rows needs."""
        kinds = {self._needs[row] for row in rows}
        return SamplingNeeds(
            random=any(kind.random for kind in kinds),
            filtered=any(kind.filtered for kind in kinds),
            masked=any(kind.masked for kind in kinds),
            top_logprobs=max((kind.top_logprobs for kind in kinds if kind.top_logprobs is not None), default=None),
        )

    def _write(self, row: int, numbers: list[float], integers: list[int]) -> None:
        self._number_RF[row].copy_(self._on_host(numbers, torch.float32), non_blocking=True)
        self._integer_RF[row].copy_(self._on_host(integers, torch.int64), non_blocking=True)

    def _mark(self, row: int, token_ids: Sequence[int], ending: Sequence[int]) -> None:
        if self.seen_RV is None or self.ending_RV is None:
            self.seen_RV = torch.zeros(self.rows, self.vocab_size, dtype=torch.bool, device=self.device)
            self.ending_RV = torch.zeros_like(self.seen_RV)
        for marked_RV, tokens in ((self.seen_RV, token_ids), (self.ending_RV, ending)):
            index = self._on_host(tokens, torch.int64).to(self.device, non_blocking=True)
            marked_RV[row].zero_().index_fill_(0, index, True)

    def _on_host(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        # The GPU reads pinned memory by itself; PyTorch does not give it away before that has happened.
        return torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")


def sample(
    logits_BV: torch.Tensor,
    sampling: RowSampling,
    position_B: torch.Tensor,
    needs: SamplingNeeds,
    row_B: torch.Tensor | None = None,
) -> Sampled:
    """Choose the next token of each row. Can be captured in a CUDA graph; does not wait for the device.

    Args:
        logits_BV: bfloat16, float16 or float32; left as they are.
        sampling: The rows' parameters. Which tokens were seen is updated, where rows need it.
        position_B: int32 or int64, the place of the new token in its sequence: how many tokens come before it.
        needs: `sampling.needs` of these rows, or more.
        row_B: int64, the rows that take part, each once; the first B by default.
    """
    rows = slice(len(logits_BV)) if row_B is None else row_B
    choice_BV = logits_BV
    if needs.masked:
        choice_BV = _mask(choice_BV, sampling, position_B, rows)
    if needs.random:
        choice_BV = _randomize(choice_BV, sampling, position_B, rows, needs.filtered)
    token_B = torch.empty(len(choice_BV), dtype=torch.int64, device=choice_BV.device)
    take_likeliest(choice_BV, token_B, sampling)

    if needs.masked:
        assert sampling.seen_RV is not None
        row_B = torch.arange(len(token_B), device=token_B.device) if row_B is None else row_B
        sampling.seen_RV.view(-1).index_fill_(0, row_B * sampling.vocab_size + token_B, True)
    if needs.top_logprobs is None:
        return Sampled(token_B)
    logprob_BV = logits_BV.float().log_softmax(dim=-1)
    logprob_B = logprob_BV.gather(1, token_B[:, None])[:, 0]
    if needs.top_logprobs == 0:
        return Sampled(token_B, logprob_B)
    return Sampled(token_B, logprob_B, *largest(logprob_BV, min(needs.top_logprobs, sampling.vocab_size)))


def take_likeliest(
    choice_BV: torch.Tensor, token_B: torch.Tensor, sampling: RowSampling, length_B: torch.Tensor | None = None
) -> None:
    """Write the largest element of each row, the first of equal ones, and count it.

    Args:
        choice_BV: Of rows 0, 1, ...
        token_B: int64, gets them.
        sampling: Has memory for a kernel.
        length_B: int32; 1 is added to those that are not 0, which rows that only fill up a batch have.
    """
    takes_kernel = choice_BV.is_cuda and choice_BV.dtype == torch.bfloat16 and choice_BV.shape[1] % 8 == 0
    if takes_kernel and choice_BV.is_contiguous() and library.available("cuda"):
        rows = len(choice_BV)
        greedy(choice_BV, token_B, length_B, sampling.best_R[:rows], sampling.ticket_R[:rows])
        return
    torch.argmax(choice_BV, dim=-1, out=token_B)
    if length_B is not None:
        length_B.add_(length_B > 0)


def largest(value_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest float32 values of each row in descending order, equal ones in ascending order of their index.

    `torch.topk` leaves the order of equal ones open, and which of them it takes; in bfloat16 logits many are equal.

    Returns:
        Values [B, count] and their indices, int64.
    """
    bits_BV = (value_BV + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    # Integers in the order of the numbers: a negative number's bits ascend where the number descends.
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)
    last_first_V = torch.arange(2**32 - 1, 2**32 - 1 - value_BV.shape[-1], -1, device=value_BV.device)
    key_BK = ((order_BV.long() << 32) | last_first_V).topk(count, dim=-1).values
    index_BK = (2**32 - 1) - (key_BK & (2**32 - 1))
    return value_BV.gather(-1, index_BK), index_BK


def _mask(
    logits_BV: torch.Tensor, sampling: RowSampling, position_B: torch.Tensor, rows: slice | torch.Tensor
) -> torch.Tensor:
    """Logits in float32, with the repetition penalty, and without the tokens that would end a row too early."""
    assert sampling.seen_RV is not None and sampling.ending_RV is not None
    logits_BV = logits_BV.float()
    penalty_B1 = sampling.repetition_penalty_R[rows, None]
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    logits_BV = torch.where(sampling.seen_RV[rows], penalized_BV, logits_BV)
    may_not_end_B = position_B < sampling.min_length_R[rows]
    return logits_BV.masked_fill(sampling.ending_RV[rows] & may_not_end_B[:, None], -torch.inf)


def _randomize(
    logits_BV: torch.Tensor,
    sampling: RowSampling,
    position_B: torch.Tensor,
    rows: slice | torch.Tensor,
    filtered: bool,
) -> torch.Tensor:
    """Float32 [B, V] whose largest element is the token drawn (the Gumbel-max trick), or a greedy row's best."""
    temperature_B1 = sampling.temperature_R[rows, None]
    is_random_B1 = temperature_B1 > 0
    scaled_BV = logits_BV.float() / torch.where(is_random_B1, temperature_B1, 1.0)
    if filtered:  # the best token of a greedy row passes every filter
        scaled_BV = keep_likely(
            scaled_BV, sampling.top_k_R[rows, None], sampling.top_p_R[rows, None], sampling.min_p_R[rows, None]
        )
    noise_BV = gumbel_noise(sampling.seed_R[rows], position_B, sampling.token_hash_V)
    return scaled_BV.add_(noise_BV.mul_(is_random_B1))


def keep_likely(
    logits_BV: torch.Tensor, top_k_B1: torch.Tensor, top_p_B1: torch.Tensor, min_p_B1: torch.Tensor
) -> torch.Tensor:
    """Top-k, then top-p of what is left, then min-p: what is not kept becomes -inf. See `SamplingParams`.

    Args:
        logits_BV: float32.
        top_k_B1: int64, from 1 to V. Tokens as likely as the k-th one are kept too.
        top_p_B1: float32; of equally likely tokens the lower id is kept first.
        min_p_B1: float32.
    """
    logit_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    weight_BV = (logit_BV - logit_BV[:, :1]).exp()  # probabilities over the largest one
    keep_BV = logit_BV >= logit_BV.gather(1, top_k_B1 - 1)
    # In whole numbers, because their sum is the same in every order: a kept token must not depend on the batch.
    share_BV = (weight_BV * 2.0**32).long().mul_(keep_BV)
    sum_BV = share_BV.cumsum(dim=-1)
    limit_B1 = (sum_BV[:, -1:] * top_p_B1.double()).ceil().long()
    keep_BV &= (sum_BV - share_BV < limit_B1) | (top_p_B1 >= 1)
    keep_BV &= weight_BV >= min_p_B1
    return torch.full_like(logits_BV, -torch.inf).scatter_(1, token_BV, logit_BV.masked_fill_(~keep_BV, -torch.inf))


def gumbel_noise(seed_B: torch.Tensor, position_B: torch.Tensor, token_hash_V: torch.Tensor) -> torch.Tensor:
    """Float32 [B, V] with the standard Gumbel distribution, a function of (seed, position, token) alone.

    The seed and the position make a well mixed key of 64 bits, once per row; a few steps per token mix it with the
    token's hash. Integers wrap around alike on all devices.

    Args:
        seed_B: int64.
        position_B: int32 or int64.
        token_hash_V: int32, see `RowSampling`.
    """
    key_B = seed_B * _SEED_STEP + position_B.long() * _POSITION_STEP
    # The finalizer of splitmix64. PyTorch shifts signs in, so they are taken out.
    key_B = (key_B ^ ((key_B >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    key_B = (key_B ^ ((key_B >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB, 64)
    key_B = key_B ^ ((key_B >> 31) & (2**33 - 1))
    low_B1, high_B1 = key_B[:, None].view(torch.int32).split(1, dim=1)

    hash_BV = (token_hash_V ^ low_B1).mul_(high_B1 | 1)
    hash_BV.bitwise_xor_((hash_BV >> 15).bitwise_and_(2**17 - 1)).mul_(_signed(0x846CA68B, 32))
    hash_BV.bitwise_xor_(hash_BV >> 16).bitwise_and_(2**31 - 1)

    # Exponential noise of a uniform number u is -log(1 - u). The smallest win, so u has its full precision near 0.
    uniform_BV = hash_BV.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


def _hash_tokens(vocab_size: int, device: torch.device) -> torch.Tensor:
    """int32 [V]: the part of a token's hash that no row changes."""
    hash_V = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        hash_V = (hash_V ^ ((hash_V >> shift) & (2 ** (32 - shift) - 1))) * _signed(factor, 32)
    return hash_V ^ ((hash_V >> 16) & (2**16 - 1))


def _signed(value: int, bits: int) -> int:
    """The signed integer with the bits of an unsigned one."""
    return value - (1 << bits) if value >> (bits - 1) else value


# Odd and unrelated, so that neighbouring seeds and positions never make one key.
_SEED_STEP = _signed(0xD1342543DE82EF95, 64)
_POSITION_STEP = _signed(0x9E3779B97F4A7C15, 64)
