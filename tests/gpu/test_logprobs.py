"""The operator `logprobs` on the GPU: against PyTorch's operations, and in any batch.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from llama_te_infer.runner import logprobs as ways

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("vocabulary", [1, 31, 513, 49_152, 128_256])
@pytest.mark.parametrize("rows", [1, 5, 40, 100, 256])
def test_the_results_are_those_of_pytorchs_operations(
    rows: int, vocabulary: int, count: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    wide_BV = (torch.randn(rows, vocabulary + 8, generator=generator, device="cuda") * 3).to(dtype)
    logits_BV, count = wide_BV[:, :vocabulary], min(count, vocabulary)
    if rows > 2:
        logits_BV[1] = torch.nan
        logits_BV[2, vocabulary // 2] = torch.inf
    token_B = torch.randint(vocabulary, (rows,), generator=generator, device="cuda")
    found = ways._by_operator(logits_BV, token_B, count)
    expected = ways._by_pytorch(logits_BV, token_B, count)
    exact_B = logits_BV.double().log_softmax(1).gather(1, token_B[:, None])[:, 0].float()
    torch.testing.assert_close(found.logprob_B, exact_B, rtol=2e-7, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.top_logprob_BK, expected.top_logprob_BK, rtol=2e-7, atol=2e-6, equal_nan=True)
    finite_B = found.logprob_B.isfinite()
    assert found.top_token_BK is not None and expected.top_token_BK is not None
    assert torch.equal(found.top_token_BK[finite_B], expected.top_token_BK[finite_B])
    alone = ways._by_operator(logits_BV[:1], token_B[:1], count)
    for of_batch, of_row in zip(found, alone, strict=True):
        assert of_batch is not None and of_row is not None and torch.equal(of_batch[:1], of_row)
