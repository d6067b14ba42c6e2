"""The steps that an engine runs before its first requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ..decode.buckets import BUCKETS
from ..sampling_params import SamplingParams

TOKENS = 3  # that follow a prompt: the step that reads it chooses the first one

_GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, seed=0)
_DRAWN = replace(_GREEDY, temperature=1.0, top_p=0.9)


class WarmUp(NamedTuple):
    """Requests that run together.

    Attributes:
        prompts: Their tokens.
        params: Of all of them.
    """

    prompts: list[list[int]]
    params: SamplingParams


def warm_ups(max_batch_size: int, prefill_budget: int, max_sequence_length: int) -> Iterator[WarmUp]:
    """Return requests for each kind of step: prompts of many lengths, and batches of the sizes that are captured.

    Args:
        max_batch_size: Most sequences of a batch.
        prefill_budget: Most tokens of prompts that a step reads.
        max_sequence_length: Most tokens of a sequence that fit the cache.
    """
    longest = min(prefill_budget, max_sequence_length - TOKENS)
    if longest < 1:
        return
    length = 1
    while length < longest:
        yield WarmUp([[0] * length], _GREEDY)
        length *= 2
    for rows in sorted({1, *(size for size in BUCKETS if size < max_batch_size), max_batch_size}):
        yield WarmUp([[0] * max(1, min(prefill_budget // rows, longest))] * rows, _GREEDY)
        yield WarmUp([[0]] * rows, _DRAWN)
