"""The values that sampling parameters take and refuse, and their messages."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from llama_te_infer.sampling_params import SamplingParams

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens=0 is not possible: give an integer of at least 1, or None for as many as fit."),
    ({"max_tokens": 2.0}, "max_tokens=2.0 is not possible: give an integer of at least 1, or None"),
    ({"max_tokens": True}, "max_tokens=True is not possible: give an integer of at least 1, or None"),
    ({"min_tokens": -1}, "min_tokens=-1 is not possible: give an integer from 0 to max_tokens=128."),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is not possible: give an integer from 0 to max_tokens=4."),
    ({"temperature": -0.5}, "temperature=-0.5 is not possible: give 0 for the most likely token each time"),
    ({"temperature": 1e-9}, "temperature=1e-09 is not possible: .* or a number of at least 1e-06."),
    ({"temperature": float("inf")}, "temperature=inf is not possible"),
    ({"temperature": float("nan")}, "temperature=nan is not possible"),
    ({"temperature": "hot"}, "temperature='hot' is not possible"),
    ({"top_k": -1}, "top_k=-1 is not possible: give a number of tokens, or 0 for all."),
    ({"top_p": 0.0}, "top_p=0.0 is not possible: give a number above 0 and at most 1, 1 for all."),
    ({"top_p": 1.1}, "top_p=1.1 is not possible"),
    ({"min_p": -0.1}, "min_p=-0.1 is not possible: give a number from 0, for all, to 1."),
    ({"min_p": 1.1}, "min_p=1.1 is not possible"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not possible: give a number from 0.0001 to 10000"),
    *[({"repetition_penalty": value}, "repetition_penalty=.* is not possible") for value in (1e-40, 9e-5, 2e4, 1e308)],
    ({"stop": ""}, "stop=\\(''\\,\\) is not possible: give strings that are not empty."),
    ({"stop": ["a", 7]}, "stop=\\('a', 7\\) is not possible: give strings that are not empty."),
    ({"stop": 7}, "stop=7 is not possible: give a string or several."),
    ({"stop_token_ids": 7}, "stop_token_ids=7 is not possible: give a list of token ids."),
    ({"stop_token_ids": [3, -1]}, "stop_token_ids=\\(3, -1\\) is not possible: give token ids from 0 on."),
    ({"stop_token_ids": "end"}, "stop_token_ids='end' is not possible: give a list of token ids."),
    ({"presence_penalty": 2.1}, "presence_penalty=2.1 is not possible: give a number from -2 to 2; 0 changes nothing."),
    ({"frequency_penalty": -3}, "frequency_penalty=-3 is not possible: give a number from -2 to 2"),
    ({"logit_bias": [3]}, "logit_bias=\\[3\\] is not possible: give a dict from token ids to numbers."),
    (
        {"logit_bias": {3: 101}},
        "logit_bias={3: 101} is not possible: give token ids from 0 on, each with a number from",
    ),
    ({"logit_bias": {"3": 1}}, "logit_bias={'3': 1} is not possible: give token ids from 0 on"),
    (
        {"allowed_token_ids": []},
        "allowed_token_ids=\\(\\) is not possible: give at least one token id from 0 on, or None",
    ),
    ({"allowed_token_ids": 3}, "allowed_token_ids=3 is not possible: give a list of token ids."),
    ({"bad_words": [" "]}, "bad_words=\\(' ',\\) is not possible: give words that are not empty."),
    ({"bad_words": 5}, "bad_words=5 is not possible: give a word or several."),
    ({"skip_special_tokens": 0}, "skip_special_tokens=0 is not possible: give True or False."),
    ({"include_stop_str_in_output": None}, "include_stop_str_in_output=None is not possible: give True or False."),
    ({"ignore_eos": 1}, "ignore_eos=1 is not possible: give True or False."),
    (
        {"seed": -1},
        "seed=-1 is not possible: give an integer from 0 to 2\\*\\*63 - 1, or None for a new one each time.",
    ),
    ({"seed": 2**63}, "seed=9223372036854775808 is not possible"),
    ({"logprobs": 21}, "logprobs=21 is not possible: give a number of tokens from 0 to 20, or None to report nothing."),
    ({"logprobs": True}, "logprobs=True is not possible"),
    ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode='processed_logprobs' is not possible: give \"raw\" or"),
    (
        {"num_beams": 3, "temperature": 0, "logprobs_mode": "processed"},
        "logprobs_mode='processed' is not possible: beam search reports the model's own",
    ),
    ({"prompt_logprobs": 21}, "prompt_logprobs=21 is not possible: give a number of tokens from 0 to 20, or None"),
    ({"prompt_logprobs": True}, "prompt_logprobs=True is not possible"),
    ({"n": 0}, "n=0 is not possible: give an integer of at least 1."),
    ({"n": 2, "temperature": 0}, "n=2 is not possible: with temperature=0 all continuations are equal"),
    ({"num_beams": 0}, "num_beams=0 is not possible: give an integer of at least 1, 1 for no beam search."),
    ({"num_beams": 2, "length_penalty": 5.5}, "length_penalty=5.5 is not possible: give a number from -5 to 5."),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping='always' is not possible: give True, False or"),
    ({"length_penalty": 2.0}, "length_penalty=2.0 is not possible: it is for beam search; leave it out, or give num_b"),
    ({"early_stopping": "never"}, "early_stopping='never' is not possible: it is for beam search; leave it out"),
    ({"num_beams": 3, "temperature": 0.7}, "temperature=0.7 is not possible: beam search draws nothing, so leave it"),
    ({"num_beams": 3, "top_k": 5}, "top_k=5 is not possible: .* leave it out with num_beams=3."),
    ({"num_beams": 3, "top_p": 0.9}, "top_p=0.9 is not possible: .* leave it out with num_beams=3."),
    ({"num_beams": 3, "min_p": 0.1}, "min_p=0.1 is not possible: .* leave it out with num_beams=3."),
    ({"num_beams": 3, "repetition_penalty": 1.2}, "repetition_penalty=1.2 is not possible: it would change the scores"),
    ({"num_beams": 3, "presence_penalty": 1}, "presence_penalty=1 is not possible: it would change the scores"),
    ({"num_beams": 3, "logit_bias": {3: 1}}, "logit_bias={3: 1} is not possible: it would change the scores of beams"),
    ({"num_beams": 3, "allowed_token_ids": [3]}, "allowed_token_ids=\\(3,\\) is not possible: it would change the"),
    ({"num_beams": 3, "bad_words": "x"}, "bad_words=\\('x',\\) is not possible: it would change the scores"),
    ({"num_beams": 3, "n": 4}, "n=4 is not possible: beam search has no more results than beams; num_beams=3."),
    # Integers are integers: nothing is rounded, and no text is read.
    *[
        ({name: value}, f"{name}={re.escape(repr(value))} is not possible")
        for name in ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n", "num_beams")
        for value in (1.5, 1.0, "1", True, np.float32(1), np.True_, torch.tensor(1.0), torch.tensor([1, 2]), [1])
    ],
    *[
        ({name: [value]}, f"{name}=.* is not possible: give ")
        for name in ("stop_token_ids", "allowed_token_ids")
        for value in (1.9, "5", True, None, -1, np.float64(3), torch.tensor(True), [3])
    ],
    *[
        ({name: value}, f"{name}=.* is not possible")
        for name in ("stop_token_ids", "allowed_token_ids")
        for value in ("5", b"5", 5)
    ],
    *[({"logit_bias": {key: 1.0}}, "logit_bias=.* is not possible: give ") for key in (1.9, "5", True, -1, None)],
    *[
        ({"logit_bias": {5: bias}}, "logit_bias=.* is not possible: give ")
        for bias in (math.nan, math.inf, "1", None, True)
    ],
    *[
        ({name: value}, f"{name}=.* is not possible")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for value in (math.nan, math.inf, -math.inf, "1", True, 10**400, None, torch.tensor(1.0))
    ],
    *[
        ({"num_beams": 2, "length_penalty": value}, "length_penalty=.* is not possible")
        for value in (math.nan, math.inf, "1")
    ],
]

TAKEN: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0, "top_p": 0.5, "seed": 3},
    {"max_tokens": 1, "min_tokens": 1},
    {"top_k": 1, "top_p": 1, "min_p": 1, "repetition_penalty": 0.5, "seed": 2**63 - 1, "logprobs": 20},
    {"n": 5, "stop": ["a", "b"], "stop_token_ids": range(3), "ignore_eos": True, "prompt_logprobs": 20},
    {"num_beams": 4, "n": 4, "length_penalty": -5, "early_stopping": "never", "min_tokens": 3},
    {"max_tokens": None, "min_tokens": 1000, "presence_penalty": -2, "frequency_penalty": 2.0},
    {"logit_bias": {3: -100, 4: 1.5}, "allowed_token_ids": (3, 4), "bad_words": ("a", "b c")},
    {"num_beams": 4, "stop": ("x",), "logprobs": 3, "skip_special_tokens": False, "include_stop_str_in_output": True},
    {"num_beams": 4, "temperature": 0, "early_stopping": True, "stop_token_ids": [4], "seed": 1},
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**fields)


@pytest.mark.parametrize("fields", TAKEN, ids=str)
def test_what_is_taken(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == {
        name: tuple(value) if name.startswith("stop") else value for name, value in fields.items()
    }
    assert SamplingParams(**fields) == params and hash(SamplingParams(**fields)) == hash(params)


def test_integers_of_numpy_and_torch_become_plain_ones() -> None:
    plain = SamplingParams(max_tokens=7, seed=3, n=2, stop_token_ids=(4, 5), logit_bias={6: 1.0})
    tokens = np.array([4, 5]), torch.tensor([4, 5]), [np.uint8(4), torch.tensor(5)]
    for integer, stop_token_ids in zip((np.int64, np.uint8, torch.tensor), tokens, strict=True):
        params = SamplingParams(
            max_tokens=integer(7),
            seed=integer(3),
            n=integer(2),
            stop_token_ids=stop_token_ids,
            logit_bias={integer(6): 1.0},
        )
        assert params == plain and hash(params) == hash(plain)
        assert {type(token) for token in (params.max_tokens, *params.stop_token_ids, *(params.logit_bias or ()))} == {
            int
        }


def test_values_are_fixed() -> None:
    params = SamplingParams(stop="end")
    assert params.stop == ("end",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="top_k=-3"):
        dataclasses.replace(params, top_k=-3)
