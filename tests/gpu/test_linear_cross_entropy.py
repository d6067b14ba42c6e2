"""The fused loss on the GPU: its Triton kernels against PyTorch's passes, and the whole loss against float64.

Shapes: C tokens of a chunk, T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
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
from llama_te_core.loss import kernels as cross_entropy_kernels
from llama_te_core.loss.linear_cross_entropy import _passes

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

LLAMA = 128256
# In float32 the kernels multiply an argument by log₂(e) and round it before they take a power of 2: 2⁻²⁴ of up to 126.
KERNELS = Kernels(cross_entropy_kernels, "cuda", {torch.float32: 1e-5, torch.float64: 1e-14}, rounds=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def problem(
    tokens: int, vocabulary: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, E], a head [V, E] whose logits spread by about 3, and labels [T], a tenth of them ignored."""
    hidden_TE = torch.randn(tokens, size, device="cuda").to(dtype).requires_grad_()
    weight_VE = (3 * torch.randn(vocabulary, size, device="cuda") / size**0.5).to(dtype).requires_grad_()
    labels_T = torch.randint(vocabulary, (tokens,), device="cuda")
    labels_T[torch.rand(tokens, device="cuda") < 0.1] = -100
    return hidden_TE, weight_VE, labels_T


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_a_gpu_runs_the_kernels():
    passes = _passes(torch.device("cuda"))
    assert passes == (cross_entropy_kernels.statistics, cross_entropy_kernels.write_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spread", "mean"), [(3.0, 0.0), (30.0, 0.0), (3.0, -1000.0)])
@pytest.mark.parametrize("vocabulary", [1, 11, 4096, 5003, 16032, LLAMA])
def test_the_kernels_do_what_pytorch_does(vocabulary, spread, mean, dtype):
    assert_like_pytorch(KERNELS, make_chunk(65, vocabulary, dtype, "cuda", spread, mean), z_loss=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [11, 5003, LLAMA])
def test_what_is_no_number(vocabulary, dtype):
    assert_like_pytorch_on_what_is_no_number(KERNELS, vocabulary, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("borders", [[0, 4, 12], [0, 16032, 16033, LLAMA]])
def test_shards(borders, dtype):
    assert_shards_are_as_good_as_the_whole(KERNELS, borders, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_wider_rows(dtype):
    assert_wider_rows_are_left_alone(KERNELS, dtype)


def test_a_chunk_of_more_than_2_31_logits():
    tokens = 2**31 // LLAMA + 2
    logits_CV = torch.zeros(tokens, LLAMA, device="cuda", dtype=torch.bfloat16)
    logits_CV[-1] = torch.randn(LLAMA, device="cuda")
    last_1V = logits_CV[-1:].clone()
    peak_C, sum_C = cross_entropy_kernels.statistics(logits_CV)
    peak_1, sum_1 = cross_entropy_kernels.statistics(last_1V)
    assert torch.equal(peak_C[-1:], peak_1) and torch.equal(sum_C[-1:], sum_1)
    target_C = torch.full((tokens,), 3, device="cuda")
    owned_C = torch.ones(tokens, device="cuda", dtype=torch.bool)
    cross_entropy_kernels.write_gradient(logits_CV, peak_C, 1 / sum_C, target_C, owned_C)
    cross_entropy_kernels.write_gradient(last_1V, peak_1, 1 / sum_1, target_C[:1], owned_C[:1])
    assert torch.equal(logits_CV[-1:], last_1V)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocabulary", "size"), [(1, 16, 64), (300, 5003, 64), (700, LLAMA, 256)])
def test_against_float64(measured: Callable[[str, float, float], None], dtype, tokens, vocabulary, size):
    hidden_TE, weight_VE, labels_T = problem(tokens, vocabulary, size, dtype)
    labels_T[-1] = 5  # one label remains
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=1e-3, chunk_tokens=256)
    loss.backward()

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TE, weight_VE)]
    logits_TV = exact[0] @ exact[1].T
    with torch.no_grad():  # the head's own rounding of logits is not the loss's error
        error_TV = torch.cat([(part @ weight_VE.T).double() for part in hidden_TE.split(256)]) - logits_TV
    logits_TV = logits_TV + error_TV
    counted_T = labels_T != -100
    expected = F.cross_entropy(logits_TV, labels_T) + 1e-3 * logits_TV[counted_T].logsumexp(1).square().mean()
    expected.backward()

    # Three roundings to 16 bits of at most half an epsilon; float32's and float64's own errors grow with the sums.
    bound = torch.finfo(dtype).eps * (1.5 if dtype.itemsize == 2 else 50)
    what = f"{str(dtype).removeprefix('torch.')}, {tokens} x {vocabulary}"
    loss_bound = 1e-6 if dtype != torch.float64 else 1e-14
    measured(f"loss, {what}", relative(loss, expected), loss_bound)
    measured(f"gradient of hidden, {what}", relative(hidden_TE.grad, exact[0].grad), bound)
    measured(f"gradient of weight, {what}", relative(weight_VE.grad, exact[1].grad), bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_labels_ignored(dtype):
    hidden_TE, weight_VE, labels_T = problem(20, 5003, 64, dtype)
    loss = linear_cross_entropy(hidden_TE, weight_VE, torch.full_like(labels_T, -100), z_loss=0.1, num_items=4)
    loss.backward()
    assert loss == 0 and (hidden_TE.grad == 0).all() and (weight_VE.grad == 0).all()


def test_the_same_bits_every_time():
    hidden_TE, weight_VE, labels_T = problem(3000, LLAMA, 256, torch.bfloat16)
    results = []
    for _ in range(3):
        loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=1e-4)
        results.append((loss, *torch.autograd.grad(loss, (hidden_TE, weight_VE))))
    for again in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], again, strict=True))


def test_it_does_not_wait_for_the_gpu():
    hidden_TE, weight_VE, labels_T = problem(300, 5003, 64, torch.bfloat16)
    items = (labels_T != -100).sum()
    linear_cross_entropy(hidden_TE, weight_VE, labels_T, num_items=items).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden_TE, weight_VE, labels_T, num_items=items, chunk_tokens=128).backward()
        linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=128).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_what_the_docstring_says(measured: Callable[[str, float, float], None]):
    """Llama 3 1B's head in a step of 16,384 tokens."""
    tokens, size, chunk_tokens = 16384, 2048, 2048
    hidden_TE, weight_VE, labels_T = problem(tokens, LLAMA, size, torch.bfloat16)
    linear_cross_entropy(hidden_TE, weight_VE, labels_T).backward()  # cuBLAS takes its workspace
    hidden_TE.grad = weight_VE.grad = None
    logits, hidden, head = 2 * chunk_tokens * LLAMA, 2 * tokens * size, 2 * LLAMA * size

    def peak(before: int) -> float:
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=chunk_tokens)
    # A few numbers for each token, and one chunk of the hidden states' gradient before the copy to its place.
    beside = 100 * tokens + 2 * chunk_tokens * size + 2**20
    measured("GB in the forward pass", peak(before), (logits + hidden + 2 * head + beside) / 1e9)
    kept = torch.cuda.memory_allocated() - before
    measured("GB from the forward to the backward pass", kept / 1e9, (hidden + 2 * head + 100 * tokens + 2**20) / 1e9)
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    measured("GB in the backward pass", peak(before), (2 * hidden + 3 * head + 100 * tokens + 2**20) / 1e9)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=chunk_tokens)
    measured("GB of the loss alone", peak(before), (logits + 100 * tokens + 2**20) / 1e9)


def test_a_group_of_one_changes_no_bit(group_of_one):
    hidden_TE, weight_VE, labels_T = problem(300, 5003, 64, torch.bfloat16)
    results = []
    for group in (None, group_of_one):
        loss = linear_cross_entropy(
            hidden_TE, weight_VE, labels_T, z_loss=1e-2, chunk_tokens=128, vocabulary_group=group
        )
        results.append((loss, *torch.autograd.grad(loss, (hidden_TE, weight_VE))))
    assert all(torch.equal(alone, shared) for alone, shared in zip(*results, strict=True))


BAD_LABEL = """
import torch
from llama_te_core import linear_cross_entropy
hidden, weight = torch.randn(4, 64, device="cuda"), torch.randn(50, 64, device="cuda")
linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 50, 3], device="cuda"))
torch.cuda.synchronize()
"""


def test_a_label_that_is_no_token_is_an_assertion_on_the_device():
    # A separate process, since it cannot use its GPU after the error.
    run = subprocess.run([sys.executable, "-c", BAD_LABEL], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "device-side assert" in run.stderr
