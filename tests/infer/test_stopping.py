"""The stop rule: which tokens and strings end a text, and from which length on."""

from __future__ import annotations

from typing import Any

import pytest

from llama_te_infer.runner.sequence import Request
from llama_te_infer.runner.stopping import Ending, StopRule
from llama_te_infer.sampling_params import SamplingParams


def rule(eos: list[int], **fields: Any) -> StopRule:
    return StopRule.of(SamplingParams(**fields), eos)


def test_end_tokens_are_stop_tokens_and_eos() -> None:
    assert rule([2, 3]).end_tokens == {2, 3}
    assert rule([]).end_tokens == set()
    assert rule([2, 3, 2], stop_token_ids=[7, 2]).end_tokens == {7, 2, 3}
    assert rule([2, 3], stop_token_ids=[7, 2], ignore_eos=True).end_tokens == {7, 2}


@pytest.mark.parametrize(
    ("token", "written", "stop_string", "expected"),
    [
        (5, 3, None, None),
        (2, 3, None, Ending("stop", 2)),
        (2, 1, None, None),  # too short
        (5, 3, "end", Ending("stop", "end")),
        (2, 3, "end", Ending("stop", 2)),  # the token is not a part of the text
        (5, 6, None, Ending("length")),
        (2, 6, None, Ending("stop", 2)),
        (5, 6, "end", Ending("stop", "end")),
    ],
)
def test_the_ending_of_a_text(token: int, written: int, stop_string: str | None, expected: Ending | None) -> None:
    stop = rule([2], min_tokens=2, max_tokens=6, stop="end")
    assert stop.ending(token, written, stop_string) == expected


def test_end_tokens_are_forbidden_before_min_tokens_only() -> None:
    assert rule([2], min_tokens=2).forbids_end_tokens
    assert not rule([], min_tokens=2).forbids_end_tokens
    assert not rule([2]).forbids_end_tokens
    assert [rule([2], min_tokens=2).may_end(written) for written in range(4)] == [False, False, True, True]


def test_a_sequence_is_launched_whole_when_its_last_token_is_chosen() -> None:
    request = Request(0, [5, 6, 7], SamplingParams(max_tokens=2))
    (sequence,) = request.sequences
    found = []
    for cached in range(3, 6):
        sequence.cached = cached
        found.append(sequence.is_launched_whole)
    assert found == [False, True, True]
