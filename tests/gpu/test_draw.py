"""The operator `draw` on the GPU: against PyTorch's operations and the CPU, in any batch, in CUDA graphs.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from infer.draw_oracle import Case, assert_same_choices, cases
from llama_te_infer.ops.draw import draw
from llama_te_infer.runner.sampler import RowSampling
from llama_te_infer.runner.stopping import StopRule
from llama_te_infer.sampling_params import SamplingParams

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Clusters of 8, 4 and 2 blocks, and of one, on a GPU of 132 multiprocessors; in the last case not all run at once.
ROWS = (1, 2, 16, 17, 33, 66, 67, 132, 133, 300)
FIELDS = (
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {},
    {"top_p": 0.95},
    {"top_p": 0.05, "temperature": 2.0},
    {"top_k": 50},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 20_000, "top_p": 0.5, "temperature": 3.0},
    {"min_p": 0.05, "top_p": 0.99},
    {"logit_bias": {3: 2.0}, "frequency_penalty": 0.5, "presence_penalty": 0.5, "min_tokens": 3},
)


def some_params(rows: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=9, **FIELDS[row % len(FIELDS)]) for row in range(rows)]  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases([1, 2, 7, 100, 3001, 20_000], DTYPES))
def test_tokens_are_those_of_pytorchs_operations(case: Case) -> None:
    assert_same_choices(*case.on("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_real_vocabulary_and_rows_that_lie_apart(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    wide_BV = (torch.randn(rows, 130_000, generator=generator, device="cuda") * 3).to(dtype)
    for position in (3, 1000):
        position_B = torch.full((rows,), position, dtype=torch.int32, device="cuda")
        assert_same_choices(wide_BV[:, :128_256], some_params(rows), position_B)


def chosen(logits_BV: torch.Tensor, params: list[SamplingParams], position: int) -> list[int]:
    rows, vocabulary = logits_BV.shape
    sampling = RowSampling(rows, vocabulary, logits_BV.device)
    for row in range(rows):
        sampling.set(row, params[row], row, [0, 5], StopRule.of(params[row], [7]), 1)
    token_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    position_B = torch.full((rows,), position, dtype=torch.int32, device=logits_BV.device)
    run(logits_BV, sampling, position_B, token_B)
    return token_B.tolist()


def run(logits_BV: torch.Tensor, sampling: RowSampling, position_B: torch.Tensor, token_B: torch.Tensor) -> None:
    tables = (sampling.bias_RV, sampling.seen_RV, sampling.ending_RV, sampling.count_RV)
    draw(logits_BV, sampling.number_RF, sampling.integer_RF, position_B, *tables, None, None, token_B)


def test_a_row_has_the_same_token_in_any_batch_and_on_the_cpu() -> None:
    rows, params = max(ROWS), some_params(max(ROWS))
    logits_BV = torch.randn(rows, 32_000, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()
    all_B = chosen(logits_BV.cuda(), params, 9)
    for count in ROWS:
        assert chosen(logits_BV[:count].cuda(), params[:count], 9) == all_B[:count]
    # The exponential function of the CPU may differ in its last bit, and so the token at which top-p ends.
    on_host_B = chosen(logits_BV, params, 9)
    assert sum(one != other for one, other in zip(all_B, on_host_B, strict=True)) <= 1


def test_in_a_graph() -> None:
    rows, params = 40, some_params(40)
    sampling = RowSampling(rows, 5000, "cuda")
    for row in range(rows):
        sampling.set(row, params[row], row, [0, 5], StopRule.of(params[row], [7]), 1)
    logits_BV = torch.randn(rows, 5000, device="cuda") * 3
    position_B = torch.full((rows,), 2, dtype=torch.int32, device="cuda")
    token_B = torch.empty(rows, dtype=torch.int64, device="cuda")
    warm_up = RowSampling(rows, 5000, "cuda")
    run(logits_BV, warm_up, position_B, token_B)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(logits_BV, sampling, position_B, token_B)
    for position in (2, 3, 4):
        position_B.fill_(position)
        # The tokens that the graph has recorded so far change the next choice, so the copy has them, too.
        copy = RowSampling(rows, 5000, "cuda")
        for row in range(rows):
            copy.set(row, params[row], row, [0, 5], StopRule.of(params[row], [7]), 1)
        for name in ("seen_RV", "count_RV"):
            getattr(copy, name).copy_(getattr(sampling, name))
        graph.replay()
        expected_B = torch.empty_like(token_B)
        run(logits_BV, copy, position_B, expected_B)
        assert token_B.tolist() == expected_B.tolist()
        assert torch.equal(sampling.seen_RV, copy.seen_RV) and torch.equal(sampling.count_RV, copy.count_RV)  # type: ignore[arg-type]
