"""Tests the fused loss's Triton kernels in Triton's interpreter, against PyTorch's passes and in the whole loss.

Shapes: C tokens of a chunk, T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from core.cross_entropy_oracle import (
    DTYPES,
    Kernels,
    assert_like_pytorch,
    assert_like_pytorch_on_what_is_no_number,
    assert_shards_are_as_good_as_the_whole,
    assert_wider_rows_are_left_alone,
    make_chunk,
)
from llama_te_core import linear_cross_entropy

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux alone"),
    # The interpreter computes with NumPy, which warns of each inf and NaN. Masked columns have some too.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

SETTINGS = settings(max_examples=60, deadline=None, database=None, derandomize=True)
# The bounds allow for exp's error, and for a sum of up to 5,000 terms in another order. Measured: 3.3e-7 and 4.2e-16.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 2e-15}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The kernels in Triton's interpreter."""
    # Triton reads the variable when it is imported, and transformers may have imported it already.
    assert os.environ.get("TRITON_INTERPRET") == "1", "start pytest with TRITON_INTERPRET=1, as nox -s tests does"
    from llama_te_core.loss import kernels as cross_entropy_kernels

    return Kernels(cross_entropy_kernels, "cpu", TOLERANCE, rounds=False)


@pytest.fixture
def interpreted_loss(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `linear_cross_entropy` run the kernels on the CPU."""
    passes = (kernels.module.statistics, kernels.module.write_gradient)
    monkeypatch.setattr(sys.modules["llama_te_core.loss.linear_cross_entropy"], "_passes", lambda device: passes)


@SETTINGS
@given(
    tokens=st.integers(1, 5),
    vocabulary=st.one_of(st.integers(1, 70), st.sampled_from([4095, 4096, 4097, 5003])),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 3.0, 100.0]),
    mean=st.sampled_from([0.0, -1000.0, 1000.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_they_do_what_pytorch_does(kernels, tokens, vocabulary, dtype, spread, mean, z_loss):
    assert_like_pytorch(kernels, make_chunk(tokens, vocabulary, dtype, "cpu", spread, mean), z_loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [11, 4099])
def test_what_is_no_number(kernels, vocabulary, dtype):
    assert_like_pytorch_on_what_is_no_number(kernels, vocabulary, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("borders", [[0, 4, 12], [0, 1, 12], [0, 6, 7, 6 + 4099]])
def test_shards(kernels, borders, dtype):
    assert_shards_are_as_good_as_the_whole(kernels, borders, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_wider_rows(kernels, dtype):
    assert_wider_rows_are_left_alone(kernels, dtype)


# --- the whole loss ---------------------------------------------------------------------------------------------------


def problem(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make hidden states [T, E], a head [V, E], and labels [T]. The first label and each third after it are ignored."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden_TE = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    weight_VE = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_T[::3] = -100
    return hidden_TE.to(dtype).requires_grad_(), weight_VE.to(dtype).requires_grad_(), labels_T


def plain_loss(logits_TV: torch.Tensor, labels_T: torch.Tensor, z_loss: float, num_items: int | None) -> torch.Tensor:
    counted_T = labels_T != -100
    loss = F.cross_entropy(logits_TV, labels_T, reduction="sum")
    loss = loss + z_loss * logits_TV[counted_T].logsumexp(-1).square().sum()
    return loss / (counted_T.sum() if num_items is None else num_items)


@pytest.mark.usefixtures("interpreted_loss")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(13, 11), (2, 1), (5, 4097)])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"num_items": 5}])
def test_the_loss_and_its_gradients(dtype, tolerance, tokens, vocabulary, options: dict[str, Any]):
    # Measured: 2.8e-15 and 1.2e-6. In float32 the error comes from the logits, the product with the head.
    hidden_TE, weight_VE, labels_T = problem(tokens, vocabulary, dtype)
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=4, **options)
    loss.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TE, weight_VE)]
    expected = plain_loss(exact[0] @ exact[1].T, labels_T, **{"z_loss": 0.0, "num_items": None, **options})
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=tolerance)
    for tensor, exactly in zip((hidden_TE, weight_VE), exact, strict=True):
        assert (tensor.grad.double() - exactly.grad).norm() <= tolerance * max(exactly.grad.norm(), 1)


@pytest.mark.usefixtures("interpreted_loss")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    hidden_TE, weight_VE, labels_T = problem(40, 500, dtype)
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=1e-2, chunk_tokens=3)
    loss.backward()
    logits_TV = F.linear(hidden_TE, weight_VE).detach()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TE, weight_VE)]
    rounded_TV = exact[0] @ exact[1].T
    rounded_TV = rounded_TV + (logits_TV.double() - rounded_TV).detach()  # the head's logits, but float64 gradients
    expected = plain_loss(rounded_TV, labels_T, 1e-2, None)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-6)
    for tensor, exactly in zip((hidden_TE, weight_VE), exact, strict=True):
        # There are three roundings. Two err by half an epsilon at most; the interpreter's may err by a whole epsilon.
        # Measured: 0.65 epsilon of bfloat16 and 0.37 of float16.
        error = (tensor.grad.double() - exactly.grad).norm() / exactly.grad.norm()
        assert error <= torch.finfo(dtype).eps


@pytest.mark.usefixtures("interpreted_loss")
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_without_a_label(tokens):
    hidden_TE, weight_VE, labels_T = problem(tokens, 11, torch.float32)
    loss = linear_cross_entropy(hidden_TE, weight_VE, torch.full_like(labels_T, -100), z_loss=0.1, num_items=4)
    loss.backward()
    assert loss == 0 and (hidden_TE.grad == 0).all() and (weight_VE.grad == 0).all()


@pytest.mark.usefixtures("interpreted_loss")
def test_nan_is_not_lost():
    hidden_TE, weight_VE, labels_T = problem(5, 11, torch.float32)
    with torch.no_grad():
        hidden_TE[1, 2] = math.nan
    assert labels_T[1] != -100
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=2)
    loss.backward()
    assert loss.isnan() and weight_VE.grad.isnan().all()
    assert hidden_TE.grad.isnan().any(1).tolist() == [False, True, False, False, False]
