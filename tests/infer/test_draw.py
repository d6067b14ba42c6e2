"""The operator `draw` against the sampler's PyTorch operations, which define its results, and its refusals.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from infer.draw_oracle import Case, assert_same_choices, cases
from llama_te_infer.ops.draw import BIASED, COUNTED, MASKED, draw
from llama_te_infer.ops.greedy import NO_TOKEN
from llama_te_infer.sampling_params import SamplingParams

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]  # the sampler converts the last one


def arguments(rows: int = 3, vocabulary: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(rows, vocabulary, generator=generator),
        "numbers": torch.tensor([[1.0, 0.9, 0.1, 1.5, 0.1, 0.2]] * rows),
        "integers": torch.tensor([[7, 4, 0, BIASED + MASKED + COUNTED]] * rows),
        "positions": torch.arange(rows, dtype=torch.int32),
        "bias": torch.randn(rows, vocabulary, generator=generator),
        "seen": torch.rand(rows, vocabulary, generator=generator) < 0.5,
        "ending": torch.rand(rows, vocabulary, generator=generator) < 0.5,
        "counts": torch.randint(4, (rows, vocabulary), generator=generator, dtype=torch.int32),
        "mask_index": torch.full((rows,), -1, dtype=torch.int32),
        "masks": torch.full((1, -(-vocabulary // 32)), 0x55555555, dtype=torch.int32),
        "tokens": torch.zeros(rows, dtype=torch.int64),
    }


NO_TABLES: dict[str, Any] = dict.fromkeys(("bias", "seen", "ending", "counts", "mask_index", "masks"))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases([1, 2, 7, 100, 3001], DTYPES))
def test_tokens_are_those_of_pytorchs_operations(case: Case) -> None:
    assert_same_choices(*case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary_and_rows_that_lie_apart(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    wide_BV = (torch.randn(6, 50_000, generator=generator) * 3).to(dtype)
    fields: list[dict[str, Any]] = [
        *({"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.02}, {}),
        *({"top_k": 20, "top_p": 0.95}, {"top_k": 20_000, "top_p": 0.5, "temperature": 3.0}),
    ]
    params = [SamplingParams(max_tokens=9, **each) for each in fields]
    for position in range(10):
        assert_same_choices(wide_BV[:, :49_152], params, torch.full((6,), position, dtype=torch.int32))


def test_frequencies_follow_the_softmax_of_what_is_left() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    count = 20_000
    given = arguments(count, 5) | NO_TABLES | {"logits": logits_V.expand(count, 5)}
    given["numbers"] = torch.tensor([[0.7, 1.0, 0.0, 1.0, 0.0, 0.0]]).repeat(count, 1)
    given["integers"] = torch.tensor([[0, 3, 0, 0]]).repeat(count, 1)
    given["integers"][:, 0] = torch.arange(count)
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
@pytest.mark.parametrize("tables", [0, 7, 2**63 - 1, -1])
@pytest.mark.parametrize("penalty", [0.0, torch.nan, torch.inf])
def test_values_that_no_request_has(numbers: list[float], integers: list[int], tables: int, penalty: float) -> None:
    given = arguments(1) | {"integers": torch.tensor([[*integers, tables]])}
    given["numbers"] = torch.tensor([[*numbers, *[penalty] * 3]])
    for index in (-1, 0, 1, 2**31 - 1, -(2**31)):
        given["mask_index"][:] = index
        draw(**given)
        assert given["tokens"].item() in {*range(8), NO_TOKEN}


def test_a_row_without_a_token_is_not_recorded() -> None:
    given = arguments() | {"logits": torch.full((3, 8), torch.nan)}
    before = {name: given[name].clone() for name in ("seen", "counts")}
    draw(**given)
    assert given["tokens"].tolist() == [NO_TOKEN] * 3
    assert all(torch.equal(given[name], table) for name, table in before.items())


def test_tables_that_a_row_does_not_need_do_not_count() -> None:
    given = arguments()
    given["integers"][:, 3] = 0
    before = {name: given[name].clone() for name in ("seen", "counts")}
    plain = arguments() | NO_TABLES
    draw(**given)
    draw(**plain)
    assert given["tokens"].tolist() == plain["tokens"].tolist()
    assert all(torch.equal(given[name], table) for name, table in before.items())


def test_no_rows() -> None:
    none = {name: tensor[:0] for name, tensor in arguments().items()}
    draw(**none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(3, 8).double()}, "logits is float64: allowed are bfloat16, float16, float32."),
        ({"logits": torch.randn(3)}, "logits"),
        ({"logits": torch.randn(3, 0)}, "there must be a token"),
        ({"numbers": torch.zeros(3, 3)}, "numbers"),
        ({"numbers": torch.zeros(3, 6).double()}, "numbers"),
        ({"numbers": torch.zeros(3, 12)[:, ::2]}, "numbers"),
        ({"integers": torch.zeros(2, 4).long()}, "integers has R=2 rows, and logits B=3: R must be at least B."),
        ({"integers": torch.zeros(3, 4).int()}, "integers"),
        ({"positions": torch.zeros(3).long()}, "positions is int64; it must be int32."),
        ({"bias": torch.zeros(3, 7)}, "bias"),
        ({"seen": torch.zeros(3, 8)}, "seen is float32; it must be bool."),
        ({"seen": None}, "one of seen and ending is None: pass both or neither."),
        ({"ending": None}, "one of seen and ending is None: pass both or neither."),
        ({"ending": torch.zeros(2, 8).bool()}, "ending"),
        ({"counts": torch.zeros(3, 8).long()}, "counts"),
        ({"counts": torch.zeros(1, 8).int().expand(3, 8)}, "counts"),
        ({"masks": None}, "one of mask_index and masks is None: pass both or neither."),
        ({"mask_index": torch.zeros(2).int()}, "mask_index"),
        ({"masks": torch.zeros(3, 0).int()}, "masks has W=0 words: they have no bits for all V=8 tokens."),
        ({"tokens": torch.zeros(3).int()}, "tokens"),
        ({"tokens": torch.zeros(1).long().expand(3)}, "tokens"),
    ],
)
def test_refusals(change: dict[str, torch.Tensor], message: str) -> None:
    given = arguments() | change
    with pytest.raises(ValueError, match=message):
        draw(**given)


@pytest.mark.parametrize(("written", "read"), [("tokens", "integers"), ("seen", "ending"), ("counts", "bias")])
def test_what_is_written_shares_no_memory_with_what_is_read(written: str, read: str) -> None:
    given = arguments(4, 32)
    given[written] = given[read].view(given[written].dtype).flatten()[: given[written].numel()].view_as(given[written])
    with pytest.raises(ValueError, match=written):
        draw(**given)


def test_torch_agrees_with_the_schema() -> None:
    torch.library.opcheck(torch.ops.llama_te.draw.default, tuple(arguments().values()))
