"""The sampler's two ways to choose tokens beside each other.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from llama_te_infer.ops.greedy import NO_TOKEN
from llama_te_infer.runner import sampler
from llama_te_infer.runner.grammar import TokenMasks
from llama_te_infer.runner.sampler import RowSampling
from llama_te_infer.runner.stopping import StopRule
from llama_te_infer.sampling_params import SamplingParams

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.9]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    min_tokens=st.sampled_from([0, 0, 4]),
    logit_bias=st.sampled_from([None, None, {0: 3.0, 6: -1.5}]),
)


class Case(NamedTuple):
    """What the sampler chooses from; see `assert_same_choices`."""

    logits_BV: torch.Tensor
    params: list[SamplingParams]
    position_B: torch.Tensor
    masks: TokenMasks | None
    seed: int

    def on(self, device: str) -> Case:
        """Return the case with tensors on another device."""
        masks = None if self.masks is None else TokenMasks(*(tensor.to(device) for tensor in self.masks))
        return self._replace(logits_BV=self.logits_BV.to(device), position_B=self.position_B.to(device), masks=masks)


@st.composite
def cases(draw: st.DrawFn, vocabularies: Sequence[int], dtypes: Sequence[torch.dtype]) -> Case:
    """Also with many equal logits, with infinite ones and NaN, and where nothing is left to draw."""
    params = draw(st.lists(PARAMS, min_size=1, max_size=4))
    rows, vocabulary, seed = len(params), draw(st.sampled_from(vocabularies)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(rows, vocabulary, generator=generator) * draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    if draw(st.booleans()):
        logits_BV = logits_BV.round()
    special = draw(st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]))
    if special is not None:
        logits_BV[0, torch.randint(vocabulary, (1 + vocabulary // 3,), generator=generator)] = special
    position_B = torch.randint(2**31, (rows,), generator=generator, dtype=torch.int32) >> draw(st.sampled_from([0, 29]))
    masks = None
    if draw(st.booleans()):
        bits_MW = torch.randint(-(2**31), 2**31, (2, 1 + vocabulary // 32), generator=generator, dtype=torch.int32)
        masks = TokenMasks(torch.randint(-1, 2, (rows,), generator=generator, dtype=torch.int32), bits_MW)
    return Case(logits_BV.to(draw(st.sampled_from(dtypes))), params, position_B, masks, seed)


def assert_same_choices(
    logits_BV: torch.Tensor,
    params: list[SamplingParams],
    position_B: torch.Tensor,
    masks: TokenMasks | None = None,
    seed: int = 0,
) -> None:
    """Choose twice by the operator and by PyTorch's operations, which define its results. Compare tokens and records.

    Args:
        logits_BV: On the device of the operator.
        params: Each row's.
        position_B: See `sample`.
        masks: See `sample`.
        seed: Of the first row; each further row's is one more.
    """
    rows, vocabulary = logits_BV.shape
    found: list[list[Any]] = []
    for way in (sampler._choose_by_operator, sampler._choose_by_pytorch):
        sampling = RowSampling(rows, vocabulary, logits_BV.device)
        for row in range(rows):
            bias = params[row].logit_bias
            kept = {token: value for token, value in (bias or {}).items() if token < vocabulary}
            own = dataclasses.replace(params[row], logit_bias=kept or None)
            sampling.set(row, own, seed + row, [0, vocabulary - 1], StopRule.of(own, [vocabulary // 2]), 1)
        results: list[Any] = []
        for _ in range(2):
            token_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
            way(logits_BV, sampling, position_B, sampling.needs(range(rows)), masks, token_B)
            results.append(token_B.tolist())
        for row, tokens in enumerate(zip(*results[:2], strict=True)):
            if NO_TOKEN not in tokens:
                needs = sampling.needs([row])
                results.append(sampling.seen_RV[row].tolist() if needs.masked else None)
                results.append(sampling.count_RV[row].tolist() if needs.counted else None)
        found.append(results)
    assert found[0] == found[1]
