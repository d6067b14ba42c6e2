"""Checks of the fused loss's Triton kernels on a chunk of logits, for Triton's interpreter and for a GPU.

Shapes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn import functional as F

from llama_te_core.loss.linear_cross_entropy import _statistics, _write_gradient

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INF = math.inf


@dataclass(frozen=True)
class Kernels:
    """The kernels, and the allowed error against PyTorch's numbers.

    Attributes:
        module: `llama_te_core.loss.kernels`.
        device: The device that the kernels run on.
        tolerance: The relative error for each computing dtype, before the result is rounded to the logits' dtype.
        rounds: Whether a conversion to bfloat16 rounds; Triton's interpreter truncates.
    """

    module: ModuleType
    device: str
    tolerance: dict[torch.dtype, float]
    rounds: bool

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor, atol: float = 0.0) -> None:
        """Allow one step of a 16-bit number more: two nearly equal values may be rounded to different neighbours."""
        assert actual.dtype == expected.dtype
        precise = torch.promote_types(actual.dtype, torch.float32)
        info = torch.finfo(actual.dtype)
        step, smallest = (info.eps, info.smallest_normal * info.eps) if actual.dtype != precise else (0.0, 0.0)
        torch.testing.assert_close(
            actual.to(precise),
            expected.to(precise),
            rtol=self.tolerance[precise] + step,
            # exp may return 0 in place of a subnormal number.
            atol=atol + smallest + torch.finfo(precise).smallest_normal,
            equal_nan=True,
        )
        if actual.dtype != precise and (self.rounds or actual.dtype != torch.bfloat16) and actual.numel() > 1000:
            assert ((actual != expected) & ~expected.isnan()).float().mean() <= 0.01  # few values may differ


@dataclass
class Chunk:
    """Logits, and for each token a target and whether it is owned."""

    logits_CV: torch.Tensor
    target_C: torch.Tensor
    owned_C: torch.Tensor


def make_chunk(
    tokens: int, vocabulary: int, dtype: torch.dtype, device: str, spread: float = 3.0, mean: float = 0.0
) -> Chunk:
    """Make random logits and targets, the same each time."""
    generator = torch.Generator(device).manual_seed(tokens * 10000 + vocabulary)
    logits_CV = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64, device=device)
    return Chunk(
        (spread * logits_CV + mean).to(dtype),
        torch.randint(vocabulary, (tokens,), generator=generator, device=device),
        torch.rand(tokens, generator=generator, device=device) < 0.7,
    )


def assert_like_pytorch(kernels: Kernels, chunk: Chunk, z_loss: float) -> None:
    """Statistics leave the logits alone; gradients of each third token, an ignored one, are 0."""
    before_CV = chunk.logits_CV.clone()
    peak_C, sum_C = kernels.module.statistics(chunk.logits_CV)
    assert torch.equal(chunk.logits_CV, before_CV)
    expected_peak_C, expected_sum_C = _statistics(before_CV)
    assert torch.equal(peak_C, expected_peak_C)
    kernels.assert_close(sum_C, expected_sum_C)

    factor_C = (1 + 2 * z_loss * (peak_C + sum_C.log())) / sum_C
    factor_C[::3] = 0
    owned_C = chunk.owned_C & (factor_C != 0)
    expected_CV = before_CV
    _write_gradient(expected_CV, peak_C, factor_C, chunk.target_C, owned_C)
    kernels.module.write_gradient(chunk.logits_CV, peak_C, factor_C, chunk.target_C, owned_C)
    assert (chunk.logits_CV[factor_C == 0] == 0).all()
    at_CV = F.one_hot(chunk.target_C, before_CV.shape[1]).bool() & owned_C[:, None]
    kernels.assert_close(chunk.logits_CV[~at_CV], expected_CV[~at_CV])
    # Where the probability is close to 1, subtracting 1 leaves mostly the probability's error.
    error = 2 * kernels.tolerance[peak_C.dtype]
    kernels.assert_close(chunk.logits_CV[at_CV], expected_CV[at_CV], atol=error)


def assert_like_pytorch_on_what_is_no_number(kernels: Kernels, vocabulary: int, dtype: torch.dtype) -> None:
    """A logit of -inf has probability 0. A row with NaN, with inf, or with -inf alone gives NaN; no other row does."""
    chunk = make_chunk(7, vocabulary, dtype, kernels.device)
    logits_CV = chunk.logits_CV
    logits_CV[0, ::2] = -INF
    logits_CV[1, :] = -INF
    logits_CV[2, vocabulary // 2] = math.nan
    logits_CV[3, -1] = INF
    logits_CV[4, :-1] = -INF  # the first blocks are all -inf
    logits_CV[5, 1:] = -INF  # the last blocks are all -inf
    peak_C, sum_C = kernels.module.statistics(logits_CV)
    exact_C = logits_CV.double().logsumexp(1)
    finite_C = exact_C.isfinite()
    assert finite_C.tolist() == [True, False, False, False, True, True, True]
    logsumexp_C = peak_C + sum_C.log()
    torch.testing.assert_close(logsumexp_C[finite_C].double(), exact_C[finite_C], atol=1e-6, rtol=1e-6)
    assert peak_C[1].isfinite() and sum_C[1] == 0 and logsumexp_C[1] == -INF
    assert sum_C[2:4].isnan().all()
    expected_peak_C, expected_sum_C = _statistics(logits_CV)
    kernels.assert_close(sum_C, expected_sum_C)
    number_C = ~expected_peak_C.isnan()
    assert torch.equal(peak_C[number_C], expected_peak_C[number_C])

    expected_CV = logits_CV.clone()
    for write, written_CV in ((kernels.module.write_gradient, logits_CV), (_write_gradient, expected_CV)):
        write(written_CV, peak_C, 1 / sum_C, chunk.target_C, chunk.owned_C)
    kernels.assert_close(logits_CV, expected_CV, atol=2 * kernels.tolerance[peak_C.dtype])
    assert logits_CV[1:4].isnan().all() and logits_CV[finite_C].isfinite().all()
    others_V = torch.arange(0, vocabulary, 2, device=kernels.device) != chunk.target_C[0]
    assert (logits_CV[0, ::2][others_V] == 0).all()


def assert_shards_are_as_good_as_the_whole(kernels: Kernels, borders: list[int], dtype: torch.dtype) -> None:
    """Shards of any size, with and without the target, one of them all -inf."""
    chunk = make_chunk(6, borders[-1], dtype, kernels.device, spread=50.0)
    chunk.logits_CV[0, borders[1] :] = -INF
    first, last = [0, *borders[1:-1]], [border - 1 for border in borders[1:]]
    target_C = torch.tensor([*first, *last, *first, *last][:6], device=kernels.device)
    pairs = list(itertools.pairwise(borders))
    shards = [chunk.logits_CV[:, begin:end].contiguous() for begin, end in pairs]
    peak_C, sum_C = kernels.module.statistics(chunk.logits_CV)
    own_peaks, own_sums = zip(*map(kernels.module.statistics, shards), strict=True)
    assert torch.equal(torch.stack(own_peaks).amax(0), peak_C)
    shares = [own_sum * (own_peak - peak_C).exp() for own_peak, own_sum in zip(own_peaks, own_sums, strict=True)]
    kernels.assert_close(torch.stack(shares).sum(0), sum_C)

    everywhere_C = torch.ones_like(target_C, dtype=torch.bool)
    kernels.module.write_gradient(chunk.logits_CV, peak_C, 1 / sum_C, target_C, everywhere_C)
    for (begin, end), shard_CV in zip(pairs, shards, strict=True):
        owned_C = (target_C >= begin) & (target_C < end)
        assert owned_C.any() and not owned_C.all()
        kernels.module.write_gradient(shard_CV, peak_C, 1 / sum_C, (target_C - begin).masked_fill(~owned_C, 0), owned_C)
        assert torch.equal(shard_CV, chunk.logits_CV[:, begin:end])


def assert_wider_rows_are_left_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    """Logits may be columns of wider rows."""
    chunk = make_chunk(3, 50, dtype, kernels.device)
    wide_CV = F.pad(chunk.logits_CV, (7, 9), value=1000.0)
    logits_CV = wide_CV[:, 7:57]
    statistics = kernels.module.statistics(logits_CV)
    peak_C, sum_C = kernels.module.statistics(chunk.logits_CV)
    assert torch.equal(statistics[0], peak_C) and torch.equal(statistics[1], sum_C)
    for written_CV in (logits_CV, chunk.logits_CV):
        kernels.module.write_gradient(written_CV, peak_C, 1 / sum_C, chunk.target_C, chunk.owned_C)
    assert torch.equal(logits_CV, chunk.logits_CV)
    assert (wide_CV[:, :7] == 1000).all() and (wide_CV[:, 57:] == 1000).all()
