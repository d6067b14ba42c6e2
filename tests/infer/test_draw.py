"""The operator `draw` against the sampler's PyTorch operations, which define its results, and its refusals.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_te_infer.decode.greedy import GreedyWorkspace, take_likeliest
from llama_te_infer.ops.draw import draw
from llama_te_infer.ops.greedy import NO_TOKEN
from llama_te_infer.runner import sampler
from llama_te_infer.runner.sampler import RowSampling, sample
from llama_te_infer.runner.stopping import StopRule
from llama_te_infer.sampling_params import SamplingParams

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]  # the sampler converts the last one
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.9]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
)


def arguments(rows: int = 3, vocabulary: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(rows, vocabulary, generator=generator),
        "numbers": torch.tensor([[1.0, 0.9, 0.1]] * rows),
        "integers": torch.tensor([[7, 4, 5]] * rows),
        "tokens": torch.zeros(rows, dtype=torch.int64),
    }


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    params=st.lists(PARAMS, min_size=1, max_size=4),
    vocabulary=st.sampled_from([1, 2, 7, 100, 3001]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    special=st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]),
    are_whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_tokens_are_those_of_pytorchs_operations(
    params: list[SamplingParams],
    vocabulary: int,
    dtype: torch.dtype,
    scale: float,
    special: float | None,
    are_whole: bool,
    seed: int,
) -> None:
    """Also with many equal logits, with infinite ones and NaN, and where nothing is left to draw."""
    generator = torch.Generator().manual_seed(seed)
    sampling, rows = RowSampling(len(params), vocabulary, "cpu"), range(len(params))
    for row in rows:
        sampling.set(row, params[row], seed + row, [0], StopRule.of(params[row], []))
    logits_BV = torch.randn(len(params), vocabulary, generator=generator) * scale
    if are_whole:
        logits_BV = logits_BV.round()
    if special is not None:
        logits_BV[0, torch.randint(vocabulary, (1 + vocabulary // 3,), generator=generator)] = special
    logits_BV = logits_BV.to(dtype)
    position_B = torch.randint(2**31, (len(params),), generator=generator)
    needs = sampling.needs(rows)._replace(random=True)
    found_B = sample(logits_BV, sampling, position_B, needs).token_B
    choice_BV = sampler._randomize(logits_BV, sampling, position_B, slice(len(params)), needs.filtered)
    expected_B = torch.empty_like(found_B)
    take_likeliest(choice_BV, expected_B, GreedyWorkspace(len(params), "cpu"))
    assert found_B.tolist() == expected_B.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary_and_rows_that_lie_apart(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    wide_BV = (torch.randn(4, 50_000, generator=generator) * 3).to(dtype)
    params = [
        SamplingParams(max_tokens=9, **fields) for fields in ({"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.02}, {})
    ]
    sampling = RowSampling(4, 49_152, "cpu")
    for row, each in enumerate(params):
        sampling.set(row, each, row, [0], StopRule.of(each, []))
    for position in range(20):
        position_B = torch.full((4,), position)
        found_B = sample(wide_BV[:, :49_152], sampling, position_B, sampling.needs(range(4))).token_B
        choice_BV = sampler._randomize(wide_BV[:, :49_152], sampling, position_B, slice(4), True)
        assert found_B.tolist() == choice_BV.argmax(1).tolist()


def test_frequencies_follow_the_softmax_of_what_is_left() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    count = 20_000
    given = arguments(count, 5) | {"logits": logits_V.expand(count, 5)}
    given["numbers"] = torch.tensor([[0.7, 1.0, 0.0]]).repeat(count, 1)
    given["integers"] = torch.stack([torch.arange(count), torch.full((count,), 3), torch.full((count,), 11)], dim=1)
    draw(**given)
    expected_V = (logits_V[:3] / 0.7).softmax(0)
    shares_V = given["tokens"].bincount(minlength=5) / count
    assert not shares_V[3:].any()
    # 4 standard deviations of a share
    assert ((shares_V[:3] - expected_V).abs() < 4 * (expected_V * (1 - expected_V) / count).sqrt()).all()


@pytest.mark.parametrize(
    ("numbers", "integers"),
    [
        ([torch.nan, 0.5, 0.1], [0, 3, 0]),
        ([-1.0, 0.5, 0.1], [0, 3, 0]),
        ([1.0, torch.nan, torch.nan], [0, 3, 0]),
        ([1.0, -torch.inf, 0.0], [0, 3, 0]),
        ([1.0, -1.0, 0.0], [-(2**63), -5, 2**63 - 1]),
        ([1e-38, 0.5, 0.1], [2**63 - 1, 2**40, -1]),
        ([torch.inf, 0.5, 2.0], [0, 0, 0]),
    ],
)
def test_values_that_no_request_has(numbers: list[float], integers: list[int]) -> None:
    given = arguments(1) | {"numbers": torch.tensor([numbers]), "integers": torch.tensor([integers])}
    draw(**given)
    assert given["tokens"].item() in {*range(8), NO_TOKEN}


def test_no_rows() -> None:
    none = {name: tensor[:0] for name, tensor in arguments().items()}
    draw(**none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(3, 8).double()}, "logits is float64: allowed are bfloat16, float16, float32."),
        ({"logits": torch.randn(3)}, "logits"),
        ({"logits": torch.randn(3, 0)}, "there must be a token to draw"),
        ({"numbers": torch.zeros(3, 2)}, "numbers"),
        ({"numbers": torch.zeros(3, 3).double()}, "numbers"),
        ({"numbers": torch.zeros(3, 6)[:, ::2]}, "numbers"),
        ({"integers": torch.zeros(2, 3).long()}, "integers"),
        ({"integers": torch.zeros(3, 3).int()}, "integers"),
        ({"tokens": torch.zeros(3).int()}, "tokens"),
        ({"tokens": torch.zeros(1).long().expand(3)}, "tokens"),
    ],
)
def test_refusals(change: dict[str, torch.Tensor], message: str) -> None:
    given = arguments() | change
    with pytest.raises(ValueError, match=message):
        draw(**given)


def test_tokens_may_not_share_memory_with_what_is_read() -> None:
    given = arguments()
    given["tokens"] = given["integers"][0]
    with pytest.raises(ValueError, match="tokens"):
        draw(**given)


def test_torch_agrees_with_the_schema() -> None:
    torch.library.opcheck(torch.ops.llama_te.draw.default, tuple(arguments().values()))
