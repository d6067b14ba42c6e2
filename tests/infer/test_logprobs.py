"""The operator `logprobs` against float64 and the sampler's PyTorch operations, and its refusals.

Shapes: B rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_te_infer.ops.logprobs import logprobs
from llama_te_infer.runner import logprobs as ways
from llama_te_infer.runner.logprobs import concatenated, token_logprobs

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]  # the last one is converted


def arguments(rows: int = 3, vocabulary: int = 8, count: int = 2) -> dict[str, Any]:
    return {
        "logits": torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)),
        "tokens": torch.arange(rows) % vocabulary,
        "logprobs": torch.zeros(rows),
        "top_logprobs": torch.zeros(rows, count),
        "top_tokens": torch.zeros(rows, count, dtype=torch.int64),
    }


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 3),
    vocabulary=st.sampled_from([1, 2, 7, 100, 3001]),
    count=st.sampled_from([0, 1, 5, 20, 5000]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 0.3, 3.0, 300.0]),
    special=st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]),
    are_whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_results_are_those_of_pytorchs_operations(
    rows: int,
    vocabulary: int,
    count: int,
    dtype: torch.dtype,
    scale: float,
    special: float | None,
    are_whole: bool,
    seed: int,
) -> None:
    """Also with many equal logits, with infinite ones and NaN."""
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(rows, vocabulary, generator=generator) * scale
    if are_whole:
        logits_BV = logits_BV.round()
    if special is not None:
        logits_BV[0, torch.randint(vocabulary, (1 + vocabulary // 3,), generator=generator)] = special
    logits_BV = logits_BV.to(dtype)
    token_B = torch.randint(vocabulary, (rows,), generator=generator)
    found = token_logprobs(logits_BV, token_B, count)
    exact_BV = logits_BV.float().double().log_softmax(1)
    exact_B = exact_BV.gather(1, token_B[:, None])[:, 0].float()
    torch.testing.assert_close(found.logprob_B, exact_B, rtol=2e-7, atol=1e-6, equal_nan=True)
    if count == 0:
        assert found.top_logprob_BK is found.top_token_BK is None
        return
    assert found.top_logprob_BK is not None and found.top_token_BK is not None
    expected = ways._by_pytorch(logits_BV, token_B, min(count, vocabulary))
    torch.testing.assert_close(found.top_logprob_BK, expected.top_logprob_BK, rtol=2e-7, atol=2e-6, equal_nan=True)
    finite_B = found.top_logprob_BK[:, 0].isfinite()
    assert expected.top_token_BK is not None
    assert torch.equal(found.top_token_BK[finite_B], expected.top_token_BK[finite_B])
    assert torch.equal(finite_B, ~exact_BV[:, 0].isnan())


def test_a_large_vocabulary_and_rows_that_lie_apart() -> None:
    wide_BV = torch.randn(4, 300_000, generator=torch.Generator().manual_seed(1)).bfloat16() * 2
    logits_BV = wide_BV[:, :262_144]
    token_B = torch.tensor([0, 262_143, 5, 99])
    found = token_logprobs(logits_BV, token_B, 20)
    exact_BV = logits_BV.double().log_softmax(1)
    exact_B = exact_BV.gather(1, token_B[:, None])[:, 0]
    torch.testing.assert_close(found.logprob_B.double(), exact_B, rtol=0, atol=2e-6)
    assert found.top_logprob_BK is not None
    torch.testing.assert_close(found.top_logprob_BK.double(), exact_BV.topk(20).values, rtol=0, atol=2e-6)


def test_results_put_together() -> None:
    logits_BV = torch.randn(5, 9)
    token_B = torch.arange(5)
    for count in (0, 3):
        whole = token_logprobs(logits_BV, token_B, count)
        parts = [token_logprobs(logits_BV[i : i + 2], token_B[i : i + 2], count) for i in (0, 2, 4)]
        for one, other in zip(concatenated(parts), whole, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("token", [-1, 8, 2**40, -(2**63)])
def test_a_token_outside_the_vocabulary(token: int) -> None:
    given = arguments()
    given["tokens"][1] = token
    logprobs(**given)
    assert given["logprobs"].isnan().tolist() == [False, True, False]


def test_no_rows() -> None:
    logprobs(**{name: tensor[:0] for name, tensor in arguments().items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(3, 8).double()}, "logits is float64: allowed are bfloat16, float16, float32."),
        ({"logits": torch.randn(3, 0)}, "there must be a token"),
        ({"tokens": torch.zeros(2).long()}, "tokens"),
        ({"tokens": torch.zeros(3).int()}, "tokens is int32; it must be int64."),
        ({"logprobs": torch.zeros(3).double()}, "logprobs is float64; it must be float32."),
        ({"logprobs": torch.zeros(1).expand(3)}, "logprobs"),
        ({"top_logprobs": torch.zeros(3, 9), "top_tokens": torch.zeros(3, 9).long()}, "logits has only V=8 tokens"),
        ({"top_tokens": torch.zeros(3, 3).long()}, "top_tokens"),
        ({"top_logprobs": torch.zeros(2, 3).T}, "top_logprobs"),
    ],
)
def test_refusals(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprobs(**(arguments() | change))


def test_results_may_not_share_memory() -> None:
    given = arguments()
    given["logprobs"] = given["top_logprobs"].view(-1)[:3]
    with pytest.raises(ValueError, match="logprobs"):
        logprobs(**given)


def test_torch_agrees_with_the_schema() -> None:
    torch.library.opcheck(torch.ops.llama_te.logprobs.default, tuple(arguments().values()))
