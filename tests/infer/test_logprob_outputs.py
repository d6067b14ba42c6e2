"""Log-probabilities in outputs: bytes until somebody reads them, and the same values then."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import tracemalloc

import pytest
import torch

from llama_te_infer import Completion, RequestOutput, TokenLogprobs
from llama_te_infer.engine.logprobs import LogprobRecords, read_record, record_of, records_of
from llama_te_infer.runner.logprobs import Logprobs

LOGPROBS = Logprobs(
    torch.tensor([-0.1, -2.7, float("nan")])[:2],
    torch.tensor([[-0.1, -2.7, -3.1], [-0.3, -1.5, -torch.inf]]),
    torch.tensor([[5, 131_071, 0], [7, 2, 3]]),
)


def expected(count: int) -> list[TokenLogprobs]:
    """What the objects were when each step made them."""
    rows = zip(*(tensor.tolist() for tensor in LOGPROBS if tensor is not None), strict=True)
    return [TokenLogprobs(logprob, tuple(zip(tokens, top, strict=True))[:count]) for logprob, top, tokens in rows]


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_records_have_the_values_of_the_device(count: int) -> None:
    records, whole = records_of(LOGPROBS, count), LogprobRecords(count)
    for record in records:
        whole.append(record)
    assert whole.read() == list(map(read_record, records)) == expected(count)
    assert [record_of(each.logprob, each.top, count) for each in expected(20)] == records
    assert {len(record) for record in records} == {4 + 8 * count}


def test_impossible_tokens_are_left_out_where_a_request_wants_it() -> None:
    first, last = map(read_record, records_of(LOGPROBS, 3, drop_impossible=True))
    assert first == expected(3)[0] and last == TokenLogprobs(expected(3)[1].logprob, expected(2)[1].top)


def test_a_part_of_a_prompt_replaces_the_same_part_of_an_earlier_reading() -> None:
    prompt = LogprobRecords(2, before=1)
    prompt.write(1, records_of(LOGPROBS, 2))
    prompt.write(3, records_of(LOGPROBS, 2))
    assert len(prompt) == 5
    prompt.write(1, records_of(LOGPROBS, 2)[1:])  # after a preemption
    prompt.write(2, records_of(LOGPROBS, 2)[:1])
    first, second = expected(2)
    assert prompt.read() == [None, second, first, first, second] and len(prompt) == 5


def unread() -> RequestOutput:
    records = LogprobRecords(3)
    for record in records_of(LOGPROBS, 3):
        records.append(record)
    prompt = LogprobRecords(3, before=1)
    prompt.write(1, records_of(LOGPROBS, 3))
    return RequestOutput(0, [1, 2, 3], [Completion(0, [5, 7], "", "stop", None, records)], prompt)


def test_an_output_has_lists_whoever_looks_at_it() -> None:
    (completion,) = (output := unread()).outputs
    assert type(completion.logprobs) is list and completion.logprobs is completion.logprobs == expected(3)
    assert output.prompt_logprobs == [None, *expected(3)]
    read = RequestOutput(0, [1, 2, 3], [Completion(0, [5, 7], "", "stop", logprobs=expected(3))], [None, *expected(3)])
    assert unread() == read and repr(unread()) == repr(read)
    assert dataclasses.asdict(unread()) == dataclasses.asdict(read)
    assert pickle.loads(pickle.dumps(unread())) == copy.deepcopy(unread()) == read
    assert dataclasses.replace(unread(), request_id=1) == dataclasses.replace(read, request_id=1)
    assert Completion(0, [], "", "stop").logprobs is None and RequestOutput(0, [], []).prompt_logprobs is None


def test_a_text_keeps_nothing_of_other_texts() -> None:
    """Its own 44 bytes a token, with a list's reserve for growth, while the steps' results had 256 rows."""
    rows, steps, count = 256, 400, 5
    step = Logprobs(torch.zeros(rows), torch.zeros(rows, 20), torch.zeros(rows, 20, dtype=torch.int64))
    kept = LogprobRecords(count)
    kept.append(records_of(step, count)[0])
    objects = len(gc.get_objects())
    tracemalloc.start()
    for _ in range(steps):
        kept.append(records_of(step, count)[0])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 1.25 * steps * (4 + 8 * count)
    assert len(gc.get_objects()) < objects + steps // 10
