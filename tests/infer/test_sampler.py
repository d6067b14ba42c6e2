"""The sampler draws tokens by the rules of transformers' processors, and each token depends on its own row alone.

Shapes: B rows, V vocabulary, N draws, K reported tokens.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_te_infer.ops.greedy import NO_TOKEN
from llama_te_infer.runner.logprobs import largest
from llama_te_infer.runner.sampler import RowSampling, Sampled, SamplingNeeds, gumbel_noise, keep_likely, sample
from llama_te_infer.runner.stopping import StopRule
from llama_te_infer.sampling_params import SamplingParams

SETTINGS = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
GREEDY = SamplingParams(temperature=0)
EOS = [2]


def set_row(
    sampling: RowSampling,
    row: int,
    params: SamplingParams,
    seed: int,
    tokens: Sequence[int],
    prompt_length: int | None = None,
) -> None:
    sampling.set(row, params, seed, tokens, StopRule.of(params, EOS), prompt_length)


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.sampled_from([0, 0, 4]),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 0, 1, 3, 10, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    stop_token_ids=st.sampled_from([(), (5, 7)]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@pytest.fixture(scope="module", autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_logits(*shape: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], tokens: Sequence[list[int]]
) -> Sampled:
    """Sample one step of a new batch; the new tokens' positions are behind the given tokens."""
    sampling = RowSampling(len(params), logits_BV.shape[1], "cpu")
    for row in range(len(params)):
        set_row(sampling, row, params[row], seeds[row], tokens[row])
    position_B = torch.tensor([len(row) for row in tokens], dtype=torch.int32)
    return sample(logits_BV, sampling, position_B, sampling.needs(range(len(params))))


def processed(logits_V: torch.Tensor, params: SamplingParams, tokens: list[int], prompt_length: int) -> torch.Tensor:
    """The logits that transformers draws from, in float32 as there."""
    ids_1S, scores_1V = torch.tensor([tokens]), logits_V.float()[None]
    processors: list[Any] = []
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        ending = torch.tensor(sorted(StopRule.of(params, EOS).end_tokens))
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, params.min_tokens, ending))
    if params.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            processors.append(MinPLogitsWarper(params.min_p))
    for processor in processors:
        scores_1V = processor(ids_1S, scores_1V)
    return scores_1V[0]


def noise_of(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    table = RowSampling(1, vocab_size, "cpu").token_hash_V
    return gumbel_noise(torch.tensor([seed]), torch.tensor([position]), table)[0]


def check_frequencies(token_N: torch.Tensor, probability_V: torch.Tensor) -> None:
    """Check by chi-square within four standard deviations; tokens with fewer than ten expected draws form one class."""
    assert bool((probability_V[token_N] > 0).all()), "a token without probability was drawn"
    count_V = token_N.bincount(minlength=len(probability_V)).double()
    expected_V = probability_V.double() * len(token_N)
    often_V = expected_V >= 10
    counts = torch.cat([count_V[often_V], count_V[~often_V].sum()[None]])
    expected = torch.cat([expected_V[often_V], expected_V[~often_V].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom) + 1e-9


# --- penalties, biases and forbidden tokens, against plain numpy ------------------------------------------------------


def plainly_changed(
    logits_V: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    written: list[int],
    bad_words: list[list[int]],
) -> np.ndarray:
    """The logits that vLLM's sampler would draw from, before the temperature; in float64."""
    changed_V = logits_V.astype(np.float64)
    for token in range(len(changed_V)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            changed_V[token] = -np.inf
        changed_V[token] += (params.logit_bias or {}).get(token, 0)
    for word in bad_words:
        if len(word) == 1 or written[-(len(word) - 1) :] == word[:-1]:
            changed_V[word[-1]] = -np.inf
    if len(written) < params.min_tokens:
        changed_V[[*params.stop_token_ids, *EOS]] = -np.inf
    for token in {*prompt, *written}:
        factor = params.repetition_penalty
        changed_V[token] = changed_V[token] * factor if changed_V[token] < 0 else changed_V[token] / factor
    for token in set(written):
        changed_V[token] -= params.frequency_penalty * written.count(token) + params.presence_penalty
    return changed_V


CHANGING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
    min_tokens=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.6, -0.3, 2.0]),
    logit_bias=st.sampled_from([None, None, {3: 4.0, 7: -100, 11: 2.5}]),
    allowed_token_ids=st.sampled_from([None, None, (1, 3, 4, 6, 7, 9)]),
    stop_token_ids=st.sampled_from([(), (5, 7)]),
)
WORDS = st.sampled_from([[], [], [[3]], [[4, 4], [9, 6]], [[1], [3, 4, 3], [6, 6]]])


@settings(SETTINGS, max_examples=25)
@given(
    requests=st.lists(st.tuples(CHANGING, WORDS), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    moves=st.booleans(),
)
def test_tokens_are_the_best_of_plainly_changed_logits(
    requests: list[tuple[SamplingParams, list[list[int]]]], seed: int, moves: bool
) -> None:
    """Several steps, in which a row starts over as after a preemption, and rows move."""
    rows, vocab_size, steps = len(requests), 17, 8
    prompts = [random_logits(3 + row, seed=row).mul(5).long().remainder(vocab_size).tolist() for row in range(rows)]
    written: list[list[int]] = [[] for _ in range(rows)]
    sampling = RowSampling(rows + 1, vocab_size, "cpu")
    order = list(range(rows))  # the request of each row

    def start(row: int, request: int) -> None:
        params, words = requests[request]
        tokens = prompts[request] + written[request]
        sampling.set(row, params, request, tokens, StopRule.of(params, EOS), len(prompts[request]), words)

    for row in range(rows):
        start(row, row)
    for step in range(steps):
        if step == 3:
            start(0, order[0])
        if step == 5 and moves:
            sampling.move(rows, 0)
            sampling.move(0, rows - 1)
            sampling.move(rows - 1, rows)
            sampling.clear(rows)
            order[0], order[-1] = order[-1], order[0]
        logits_BV = random_logits(rows, vocab_size, seed=seed + 100 * step, scale=1.0)
        position_B = torch.tensor([len(prompts[request]) + step for request in order], dtype=torch.int32)
        token_B = sample(logits_BV, sampling, position_B, sampling.needs(range(rows))).token_B
        for row, request in enumerate(order):
            params, words = requests[request]
            expected_V = plainly_changed(logits_BV[row].numpy(), params, prompts[request], written[request], words)
            if params.temperature > 0:
                noise_V = noise_of(request, int(position_B[row]), vocab_size).double().numpy()
                expected_V = expected_V / params.temperature + noise_V
            token = int(token_B[row])
            assert expected_V[token] >= expected_V.max() - 1e-4, "another token is better"
            written[request].append(token)


def test_rows_have_their_own_bad_words() -> None:
    """Rows behind the batch have words, too."""
    sampling, params = RowSampling(4, 8, "cpu"), GREEDY
    for row in range(4):
        words = [[row, 7], [row, 6], [2, 2, row + 1]] if row != 1 else []
        sampling.set(row, params, row, [0, row], StopRule.of(params, EOS), 1, words)
    logits_BV = torch.arange(8.0).repeat(3, 1)
    found = sample(logits_BV, sampling, torch.full((3,), 2, dtype=torch.int32), sampling.needs(range(3)))
    assert found.token_B.tolist() == [5, 7, 5]


def test_unused_penalties_cost_nothing() -> None:
    sampling = RowSampling(2, 9, "cpu")
    set_row(sampling, 0, SamplingParams(temperature=0.5, skip_special_tokens=False), 1, [1, 2])
    assert sampling.needs([0, 1]) == SamplingNeeds(random=True)
    assert sampling.bias_RV is sampling.count_RV is sampling.recent_RL is None


# --- tokens that may be drawn -----------------------------------------------------------------------------------------


@SETTINGS
@given(params=PARAMS, seed=st.integers(0, 2**20), vocab_size=st.sampled_from([8, 31, 200, 1000]))
def test_a_draw_is_the_best_of_processed_logits_and_noise(params: SamplingParams, seed: int, vocab_size: int) -> None:
    choose = random.Random(seed)
    logits_V = random_logits(vocab_size, seed=seed)
    tokens = [choose.randrange(vocab_size) for _ in range(9)]
    prompt_length = choose.randint(1, 9)
    sampling = RowSampling(1, vocab_size, "cpu")
    set_row(sampling, 0, params, seed, tokens, prompt_length=prompt_length)
    chosen = sample(logits_V[None], sampling, torch.tensor([9], dtype=torch.int32), sampling.needs([0])).token_B.item()
    scores_V = processed(logits_V, params, tokens, prompt_length).double()
    if params.temperature > 0:
        scores_V += noise_of(seed, 9, vocab_size)
    assert chosen == scores_V.argmax().item()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.5},
        {"temperature": 0.6, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7, "temperature": 1.4, "top_k": 30, "top_p": 0.7, "min_p": 0.15, "min_tokens": 3},
    ],
    ids=str,
)
def test_the_order_of_filters_is_that_of_generate(
    tiny_llama: Callable[..., PreTrainedModel], fields: dict[str, Any]
) -> None:
    model = tiny_llama(num_hidden_layers=1)
    prompt = [5, 77, 31, 200]
    names = {"min_tokens": "min_new_tokens"}
    output = model.generate(
        torch.tensor([prompt]),
        do_sample=True,
        max_new_tokens=4,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **{"top_k": 0, **{names.get(name, name): value for name, value in fields.items()}},
    )
    tokens = prompt + output.sequences[0, len(prompt) :].tolist()
    for step, (scores_1V, logits_1V) in enumerate(zip(output.scores, output.logits, strict=True)):
        position = len(prompt) + step
        sampling = RowSampling(1, 257, "cpu")
        set_row(sampling, 0, SamplingParams(**fields), 5, tokens[:position], prompt_length=len(prompt))
        position_B = torch.tensor([position], dtype=torch.int32)
        chosen = sample(logits_1V, sampling, position_B, sampling.needs([0])).token_B.item()
        assert chosen == (scores_1V[0].double() + noise_of(5, position, 257)).argmax().item()


@st.composite
def likely_cases(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[float], list[float]]:
    rows, vocab_size = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    # Multiples of 1/4: equal logits are common, as they are in bfloat16.
    logit = st.one_of(st.integers(-30, 12).map(lambda value: value / 4), st.just(-math.inf))
    logits = [draw(st.lists(logit, min_size=vocab_size, max_size=vocab_size)) for _ in range(rows)]
    for row in logits:
        row[draw(st.integers(0, vocab_size - 1))] = draw(st.integers(-30, 12)) / 4  # one at least can be drawn
    return (
        logits,
        [draw(st.integers(1, vocab_size)) for _ in range(rows)],
        [draw(st.sampled_from([1.0, 0.25, 0.5, 0.75, 0.9, 1e-4])) for _ in range(rows)],
        [draw(st.sampled_from([0.0, 0.25, 1e-3, 0.7, 1.0])) for _ in range(rows)],
    )


@SETTINGS
@given(case=likely_cases())
def test_kept_tokens_in_float64(case: tuple[list[list[float]], list[int], list[float], list[float]]) -> None:
    logits, top_ks, top_ps, min_ps = case
    columns = [torch.tensor(values)[:, None] for values in (top_ks, top_ps, min_ps)]
    kept_BV = keep_likely(torch.tensor(logits), *columns)
    for row, (logits_V, top_k, top_p, min_p) in enumerate(zip(logits, top_ks, top_ps, min_ps, strict=True)):
        order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
        weights = [math.exp(logits_V[token] - logits_V[order[0]]) for token in order]
        passed = [logits_V[token] >= logits_V[order[top_k - 1]] for token in order]
        total = sum(weight for weight, is_in in zip(weights, passed, strict=True) if is_in)
        kept, before = set(), 0.0
        for token, weight, is_in in zip(order, weights, passed, strict=True):
            if is_in and (before < top_p * total or top_p == 1) and weight >= min_p and weight > 0:
                kept.add(token)
            before += weight * is_in
        expected_V = [logit if token in kept else -math.inf for token, logit in enumerate(logits_V)]
        assert kept_BV[row].tolist() == expected_V


# --- how often ------------------------------------------------------------------------------------------------------

DRAWS = 20_000


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=12),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.4, min_tokens=9),
    ],
    ids=lambda params: f"T={params.temperature} k={params.top_k} p={params.top_p}",
)
@pytest.mark.parametrize("varied", ["position", "seed"])
def test_frequencies(params: SamplingParams, varied: str) -> None:
    vocab_size, prompt = 300, [3, 5, 8, 13]
    logits_V = random_logits(vocab_size, seed=1)
    probability_V = torch.softmax(processed(logits_V, params, prompt, len(prompt)).double(), dim=0)
    sampling, varies = RowSampling(DRAWS, vocab_size, "cpu"), varied == "position"
    for row in range(DRAWS):
        # With a longer prompt no position here is far enough to end.
        set_row(sampling, row, params, 1234 if varies else row, prompt, prompt_length=10**9 if varies else None)
    position_N = torch.arange(DRAWS, dtype=torch.int32) if varies else torch.full((DRAWS,), 4, dtype=torch.int32)
    found = sample(logits_V.expand(DRAWS, -1), sampling, position_N, sampling.needs([0]))
    check_frequencies(found.token_B, probability_V)


def test_neighbouring_draws_are_independent() -> None:
    """Pairs of tokens: of successive positions, of successive seeds, and of the noise of successive tokens."""
    sampling = RowSampling(1, 4, "cpu")
    place_N, fixed_N = torch.arange(DRAWS), torch.full((DRAWS,), 6)
    uniform_PP = torch.full((16,), 1 / 16)
    for seed_N, position_N in ((fixed_N, place_N), (place_N, fixed_N)):
        noise_N4 = gumbel_noise(seed_N, position_N, sampling.token_hash_V)
        token_N = noise_N4.argmax(dim=1)
        check_frequencies(token_N[0:-1:2] * 4 + token_N[1::2], uniform_PP)
        quarter_N4 = (torch.exp(-torch.exp(-noise_N4.double())) * 4).long()
        check_frequencies(quarter_N4[:, 0] * 4 + quarter_N4[:, 1], uniform_PP)


def test_noise_follows_its_distribution_into_the_tail() -> None:
    table = RowSampling(1, 100_000, "cpu").token_hash_V
    noise = gumbel_noise(torch.arange(40), torch.arange(40), table).double().flatten()
    assert bool(noise.isfinite().all())
    # In a large vocabulary the tail decides, where P(noise > x) = 1 - exp(-exp(-x)).
    for x in (-2.0, 0.0, 3.0, 6.0, 9.0, 11.0):
        expected = -math.expm1(-math.exp(-x)) * len(noise)
        spread = math.sqrt(expected * (1 - expected / len(noise)))
        assert abs((noise > x).sum().item() - expected) < 4 * spread


def test_the_noise_of_a_seed_stays_what_it_is() -> None:
    """A seed that users wrote down gives the same tokens for ever."""
    table = RowSampling(1, 3, "cpu").token_hash_V
    assert table.tolist() == [1753845952, -787275391, 1408362973]
    expected = [
        [-0.07044942, 0.84006929, 2.89103341],
        [0.00142533, 3.24164248, 3.59292912],
        [0.90225267, 2.19789362, 0.89081538],
    ]
    noise_BV = gumbel_noise(torch.tensor([0, 1, 2**63 - 1]), torch.tensor([0, 1, 131_072]), table)
    torch.testing.assert_close(noise_BV, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_noise_is_finite_where_the_hash_is_largest() -> None:
    """A uniform number of 1 would make noise of -inf, which is no better than a token that must not be drawn."""
    # Invert the hash from 31 bits of ones, for the row's key 0: the last shift, the factor, the earlier shift.
    product = 0x7FFF8000 * pow(0x846CA68B, -1, 2**32) % 2**32
    entry = product ^ (product >> 15) ^ (product >> 30)
    table = torch.tensor([entry], dtype=torch.int64).int()
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), table).item()
    assert noise == pytest.approx(-math.log(24 * math.log(2)), rel=1e-5)


# --- independence of the batch ----------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[SamplingParams], list[int], list[list[int]], torch.Tensor, list[int]]:
    rows, vocab_size, seed = draw(st.integers(1, 6)), draw(st.sampled_from([16, 65, 500])), draw(st.integers(0, 2**20))
    choose = random.Random(seed)
    tokens = [[choose.randrange(vocab_size) for _ in range(choose.randint(1, 12))] for _ in range(rows)]
    logits_BV = random_logits(rows, vocab_size, seed=seed)
    logits_BV = logits_BV.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    return (
        [draw(PARAMS) for _ in range(rows)],
        [choose.randrange(2**63) for _ in range(rows)],
        tokens,
        logits_BV,
        draw(st.permutations(range(rows))),
    )


def check_row(batch: Sampled, row: int, alone: Sampled) -> None:
    assert batch.token_B[row] == alone.token_B[0]
    if alone.logprob_B is not None:
        assert batch.logprob_B is not None
        # One rounding of a float32 sum, whose order may change with the batch.
        torch.testing.assert_close(batch.logprob_B[row], alone.logprob_B[0], rtol=1e-6, atol=1e-6)
    if alone.top_token_BK is not None:
        assert batch.top_token_BK is not None and torch.equal(batch.top_token_BK[row], alone.top_token_BK[0])


@SETTINGS
@given(batch=batches())
def test_a_row_does_not_depend_on_its_batch(
    batch: tuple[list[SamplingParams], list[int], list[list[int]], torch.Tensor, list[int]],
) -> None:
    params, seeds, tokens, logits_BV, order = batch
    together = draw(logits_BV, params, seeds, tokens)
    shuffled = draw(
        logits_BV[order],
        *([values[row] for row in order] for values in (params, seeds, tokens)),  # type: ignore[arg-type]
    )
    for row in range(len(params)):
        alone = draw(logits_BV[row : row + 1], [params[row]], [seeds[row]], [tokens[row]])
        check_row(together, row, alone)
        check_row(shuffled, order.index(row), alone)


@SETTINGS
@given(params=PARAMS, seed=st.integers(0, 2**20), cut=st.integers(1, 11))
def test_a_sequence_that_is_computed_again_goes_on_alike(params: SamplingParams, seed: int, cut: int) -> None:
    logits_SV = random_logits(12, 40, seed=seed)
    prompt = [1, 9, 9, 20]

    def write(sampling: RowSampling, row: int, tokens: list[int], count: int) -> None:
        for _ in range(count):
            logits_BV = logits_SV[len(tokens) - len(prompt)].expand(3, -1)
            position_B = torch.full((3,), len(tokens), dtype=torch.int32)
            result = sample(logits_BV, sampling, position_B, sampling.needs(range(3)))
            tokens.append(int(result.token_B[row]))

    whole, again = list(prompt), list(prompt)
    sampling = RowSampling(3, 40, "cpu")
    set_row(sampling, 0, params, seed, prompt)
    write(sampling, 0, whole, 12)
    sampling.clear(0)
    set_row(sampling, 1, params, seed, prompt)
    write(sampling, 1, again, cut)
    sampling.clear(1)
    set_row(sampling, 2, params, seed, again, prompt_length=len(prompt))
    write(sampling, 2, again, 12 - cut)
    assert again == whole
    for position in range(len(prompt), 16):  # transformers agrees at each position
        scores_V = processed(logits_SV[position - len(prompt)], params, whole[:position], len(prompt)).double()
        if params.temperature > 0:
            scores_V += noise_of(seed, position, 40)
        assert whole[position] == scores_V.argmax().item()
    if params.min_tokens:
        assert not {*whole[len(prompt) : len(prompt) + params.min_tokens]} & {*StopRule.of(params, EOS).end_tokens}


def test_a_row_moves_with_all_that_it_is() -> None:
    params = SamplingParams(temperature=0.8, top_k=9, repetition_penalty=1.5, min_tokens=4, logprobs=2)
    logits_1V = random_logits(1, 30, seed=4)
    sampling = RowSampling(3, 30, "cpu")
    set_row(sampling, 2, params, 77, [3, 4])
    sampling.move(0, 2)
    sampling.clear(2)
    assert sampling.needs([0]) == SamplingNeeds(random=True, filtered=True, masked=True, top_logprobs=20)
    assert sampling.needs([1, 2]) == SamplingNeeds()
    result = sample(logits_1V, sampling, torch.tensor([2], dtype=torch.int32), sampling.needs([0]))
    check_row(result, 0, draw(logits_1V, [params], [77], [[3, 4]]))
    assert sampling.seen_RV is not None and sampling.ending_RV is not None
    assert sampling.seen_RV[0].nonzero()[:, 0].tolist() == sorted({3, 4, int(result.token_B)})
    assert sampling.ending_RV[0].nonzero()[:, 0].tolist() == EOS
    # A row drops the record of its earlier sequence when it goes to the next sequence.
    set_row(sampling, 0, SamplingParams(repetition_penalty=2.0, ignore_eos=True), 1, [8])
    assert sampling.seen_RV[0].nonzero()[:, 0].tolist() == [8]
    assert not bool(sampling.ending_RV[0].any())


# --- greedy rows, and logits of all kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "other",
    [GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(repetition_penalty=2.0)],
    ids=["greedy", "random", "filtered", "masked"],
)
def test_greedy_takes_the_lowest_of_equals(dtype: torch.dtype, other: SamplingParams) -> None:
    for seed in range(20):
        logits_BV = random_logits(5, 700, seed=seed).round().clamp(max=5).to(dtype)
        expected = [row.index(max(row)) for row in logits_BV.tolist()]
        assert all(row.count(max(row)) > 1 for row in logits_BV.tolist())
        result = draw(logits_BV, [GREEDY, GREEDY, other, GREEDY, GREEDY], [seed] * 5, [[1]] * 5)
        for row in (0, 1, 3, 4):
            assert result.token_B[row] == expected[row]


@SETTINGS
@given(params=PARAMS, seed=st.integers(0, 2**20), left=st.integers(1, 3))
def test_only_possible_tokens_are_drawn(params: SamplingParams, seed: int, left: int) -> None:
    """Most logits are -inf, and the others far apart."""
    logits_V = torch.full((64,), -torch.inf)
    choose = random.Random(seed)
    possible = choose.sample(range(8, 64), left)
    logits_V[possible] = torch.tensor([choose.uniform(-1e4, 1e4) for _ in possible])
    result = draw(logits_V[None], [params], [seed], [[1, possible[0]]])
    assert int(result.token_B) in possible
    if result.logprob_B is not None:
        assert not bool(result.logprob_B.isnan().any())
    if result.top_logprob_BK is not None:
        assert not bool(result.top_logprob_BK.isnan().any())


@SETTINGS
@given(
    params=PARAMS,
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**20),
    bad=st.sampled_from(["one NaN", "negative NaN", "all NaN", "all -inf", "one inf", "NaN and inf"]),
)
def test_a_row_without_finite_logits_gets_no_token(
    params: SamplingParams, dtype: torch.dtype, seed: int, bad: str
) -> None:
    """The rows before and behind get the same as without it."""
    logits_BV = random_logits(3, 64, seed=seed).to(dtype)
    arguments = [params, params, params], [seed, seed + 1, seed + 2], [[1], [9], [3]]
    alone = draw(logits_BV, *arguments)
    place = 9 + seed % 55  # no token that ends a text
    if bad.startswith("all"):
        logits_BV[1] = float(bad.removeprefix("all "))
    else:
        logits_BV[1, place] = torch.inf if bad == "one inf" else -torch.nan if bad == "negative NaN" else torch.nan
        if bad == "NaN and inf":
            logits_BV[1, 8] = torch.inf
    together = draw(logits_BV, *arguments)
    assert together.token_B.tolist() == [int(alone.token_B[0]), NO_TOKEN, int(alone.token_B[2])]
    for one, other in zip(alone[1:], together[1:], strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one[[0, 2]], other[[0, 2]])


def test_parameters_that_forbid_every_token_give_no_token() -> None:
    params = [SamplingParams(allowed_token_ids=[2], min_tokens=3, temperature=t) for t in (0, 1)]
    assert draw(random_logits(2, 16, seed=1), params, [1, 2], [[1], [1]]).token_B.tolist() == [NO_TOKEN] * 2


def test_logits_are_left_as_they_are() -> None:
    logits_BV = random_logits(2, 50, seed=3)
    before = logits_BV.clone()
    params = SamplingParams(top_k=3, repetition_penalty=1.5, min_tokens=2, logprobs=5)
    draw(logits_BV, [params, params], [1, 2], [[1], [2]])
    assert torch.equal(logits_BV, before)


# --- log-probabilities ----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model() -> None:
    logits_BV = random_logits(3, 90, seed=8).to(torch.bfloat16)
    params = [
        SamplingParams(temperature=0.3, top_k=2, repetition_penalty=3.0, min_tokens=2, logprobs=0),
        SamplingParams(temperature=0, logprobs=4),
        SamplingParams(),
    ]
    result = draw(logits_BV, params, [1, 2, 3], [[4], [5], [6]])
    expected_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    assert result.logprob_B is not None and result.top_logprob_BK is not None and result.top_token_BK is not None
    assert result.logprob_B.dtype == torch.float32 and result.token_B.dtype == torch.int64
    # Float32's spacing at the size of these numbers, 16 at most, is 1e-6.
    close = {"rtol": 0.0, "atol": 4e-6}
    token_B1 = result.token_B[:, None]
    torch.testing.assert_close(result.logprob_B.double(), expected_BV.gather(1, token_B1)[:, 0], **close)
    assert result.top_token_BK.shape == (3, 20)
    torch.testing.assert_close(result.top_logprob_BK.double(), expected_BV.gather(1, result.top_token_BK), **close)
    for row, logits_V in enumerate(logits_BV.tolist()):
        order = sorted(range(90), key=lambda token: (-logits_V[token], token))
        assert result.top_token_BK[row].tolist() == order[:20]


@SETTINGS
@given(params=PARAMS, seed=st.integers(0, 2**20), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_log_probabilities_after_all_parameters(params: SamplingParams, seed: int, dtype: torch.dtype) -> None:
    logits_BV = random_logits(2, 90, seed=seed).to(dtype)
    tokens = [seed % 90, seed % 7, 3]
    wanted = dataclasses.replace(params, logprobs=20, logprobs_mode="processed")
    result = draw(logits_BV, [wanted, SamplingParams(top_k=9, logprobs=20)], [seed, 2], [tokens, [5]])
    plain = draw(logits_BV, [params, SamplingParams(top_k=9)], [seed, 2], [tokens, [5]])
    assert torch.equal(result.token_B, plain.token_B)
    assert result.logprob_B is not None and result.top_logprob_BK is not None and result.top_token_BK is not None
    processed_V = processed(logits_BV[0].float(), params, tokens, len(tokens))
    expected_BV = torch.stack([processed_V.double(), logits_BV[1].double()]).log_softmax(dim=-1)
    # Float32's spacing at the size of these numbers, 64 at most, is 4e-6.
    close = {"rtol": 0.0, "atol": 2e-5}
    chosen_B = expected_BV.gather(1, result.token_B[:, None])[:, 0]
    torch.testing.assert_close(result.logprob_B.double(), chosen_B, **close)
    torch.testing.assert_close(result.top_logprob_BK.double(), expected_BV.gather(1, result.top_token_BK), **close)
    assert result.top_logprob_BK[0].exp().sum() <= 1 + 1e-4
    assert torch.equal(result.top_token_BK[1], largest(logits_BV[1:].float(), 20)[1][0])


def test_rows_keep_their_kind_of_log_probabilities_when_they_move() -> None:
    sampling = RowSampling(2, 9, "cpu")
    params = SamplingParams(temperature=0.5, logprobs=0, logprobs_mode="processed")
    set_row(sampling, 1, params, 1, [1, 2])
    sampling.move(0, 1)
    sampling.clear(1)
    assert sampling.is_processed_R.tolist() == [True, False]
    assert sampling.needs([0, 1]) == SamplingNeeds(random=True, top_logprobs=0, processed=True)
    sampling.clear(0)
    assert sampling.is_processed_R.tolist() == [False, False]


def test_a_vocabulary_smaller_than_what_is_reported() -> None:
    result = draw(random_logits(1, 6, seed=1), [SamplingParams(logprobs=20)], [1], [[4]])
    assert result.top_token_BK is not None and sorted(result.top_token_BK[0].tolist()) == list(range(6))


@SETTINGS
@given(data=st.data(), rows=st.integers(1, 3), columns=st.integers(1, 30))
def test_largest_is_a_stable_sort(data: st.DataObject, rows: int, columns: int) -> None:
    value = st.one_of(
        st.sampled_from([0.0, -0.0, -1.5, 2.0, -math.inf, math.inf]), st.floats(width=32, allow_nan=False)
    )
    values = data.draw(st.lists(st.lists(value, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    count = data.draw(st.integers(0, columns))
    value_BK, index_BK = largest(torch.tensor(values, dtype=torch.float32), count)
    for row, numbers in enumerate(values):
        order = sorted(range(columns), key=lambda index: -numbers[index])[:count]
        assert index_BK[row].tolist() == order
        assert value_BK[row].tolist() == [numbers[index] for index in order]


# --- needs of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "needs"),
    [
        (GREEDY, SamplingNeeds()),
        (SamplingParams(temperature=0, top_k=4, top_p=0.5, min_p=0.1), SamplingNeeds()),
        (SamplingParams(), SamplingNeeds(random=True)),
        (SamplingParams(top_k=4), SamplingNeeds(random=True, filtered=True)),
        (SamplingParams(top_p=0.9), SamplingNeeds(random=True, filtered=True)),
        (SamplingParams(min_p=0.1), SamplingNeeds(random=True, filtered=True)),
        (SamplingParams(temperature=0, repetition_penalty=1.1), SamplingNeeds(masked=True)),
        (SamplingParams(temperature=0, min_tokens=1), SamplingNeeds(masked=True)),
        (SamplingParams(temperature=0, min_tokens=1, ignore_eos=True), SamplingNeeds()),
        (SamplingParams(temperature=0, min_tokens=1, ignore_eos=True, stop_token_ids=[4]), SamplingNeeds(masked=True)),
        (SamplingParams(temperature=0, logprobs=0), SamplingNeeds(top_logprobs=0)),
        (SamplingParams(temperature=0, logprobs=1), SamplingNeeds(top_logprobs=20)),
        (SamplingParams(logprobs_mode="processed"), SamplingNeeds(random=True)),
        (
            SamplingParams(temperature=0, logprobs=0, logprobs_mode="processed"),
            SamplingNeeds(top_logprobs=0, processed=True),
        ),
    ],
    ids=str,
)
def test_needs(params: SamplingParams, needs: SamplingNeeds) -> None:
    sampling = RowSampling(3, 20, "cpu")
    set_row(sampling, 1, params, 0, [3])
    assert sampling.needs([1]) == sampling.needs(range(3)) == needs
    assert sampling.needs([0, 2]) == sampling.needs([]) == SamplingNeeds()
    assert (sampling.seen_RV is not None) == needs.masked
    result = sample(torch.zeros(3, 20), sampling, torch.ones(3, dtype=torch.int32), sampling.needs(range(3)))
    assert (result.logprob_B is None) == (needs.top_logprobs is None)
    assert (result.top_token_BK is None) == (not needs.top_logprobs)
    sampling.clear(1)
    assert sampling.needs(range(3)) == SamplingNeeds()


def test_needs_of_several_rows_are_put_together() -> None:
    sampling = RowSampling(4, 20, "cpu")
    set_row(sampling, 0, SamplingParams(logprobs=0), 0, [3])
    set_row(sampling, 1, SamplingParams(temperature=0, logprobs=3), 0, [3])
    set_row(sampling, 2, SamplingParams(repetition_penalty=2.0), 0, [3])
    set_row(sampling, 3, SamplingParams(top_p=0.5), 0, [3])
    assert sampling.needs(range(4)) == SamplingNeeds(random=True, filtered=True, masked=True, top_logprobs=20)
    assert sampling.needs([0, 2]) == SamplingNeeds(random=True, masked=True, top_logprobs=0)


@pytest.mark.parametrize(
    ("token_ids", "params", "message"),
    [
        ([3, 20], GREEDY, "token_ids: 20 is not in the vocabulary, which is 0 to 19. Take the model's own tokenizer."),
        ([-1, 3], GREEDY, "token_ids: -1 is not in the vocabulary"),
        ([3], SamplingParams(stop_token_ids=[25]), "the tokens that end a sequence: 25 is not in the vocabulary"),
    ],
)
def test_tokens_outside_the_vocabulary(token_ids: list[int], params: SamplingParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_row(RowSampling(1, 20, "cpu"), 0, params, 0, token_ids)


def test_nothing_depends_on_what_is_in_the_tensors() -> None:
    """On the meta device tensors hold nothing, so a shape or a branch that needs their values is an error."""
    sampling = RowSampling(4, 50, "meta")
    params = SamplingParams(top_k=3, top_p=0.9, repetition_penalty=1.5, min_tokens=2, logprobs=5)
    set_row(sampling, 0, params, 1, [3])
    sampling.move(1, 0)
    sampling.clear(0)
    logits_BV = torch.empty(4, 50, dtype=torch.bfloat16, device="meta")
    position_B = torch.empty(4, dtype=torch.int32, device="meta")
    for needs in (SamplingNeeds(), SamplingNeeds(random=True), sampling.needs(range(4))):
        result = sample(logits_BV, sampling, position_B, needs)
        assert result.token_B.shape == (4,)
    assert result.top_token_BK is not None and result.top_token_BK.shape == (4, 20)
