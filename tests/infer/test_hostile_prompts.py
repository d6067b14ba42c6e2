"""Prompts, stop strings and chats that would take all memory or time, or that a tokenizer fails for, are refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.test_hostile_documents import MEBIBYTE, memory_of
from llama_te_infer import SamplingParams
from llama_te_infer.engine.detokenizer import Detokenizer
from llama_te_infer.engine.tokenization import (
    MAX_BAD_WORD_CHARACTERS,
    MAX_STOP_CHARACTERS,
    special_stops_of,
    tokens_of_bad_words,
    tokens_of_chats,
    tokens_of_prompt,
    tokens_of_prompts,
)


def test_a_prompt_of_100_mb_is_refused_at_once(smollm2_tokenizer: Any) -> None:
    text = "the end of " * (100 * MEBIBYTE // 11)

    def refuse() -> None:
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"prompt has 104,857,5\d\d bytes, and a token .* at most \d+: .*=8192"):
            tokens_of_prompt(text, smollm2_tokenizer, 8192)
        assert time.monotonic() - begin < 5

    assert memory_of(refuse) < 256 * MEBIBYTE  # tokenized as a whole it takes 12 GB


def test_a_long_prompt_is_counted_in_pieces(smollm2_tokenizer: Any) -> None:
    text = "the end of " * (8 * MEBIBYTE // 11)

    def refuse() -> None:
        with pytest.raises(
            ValueError, match=r"prompts\[1\] has 8,388,\d\d\d characters and more than 2\d\d,\d\d\d tok"
        ):
            tokens_of_prompts(["a", text], smollm2_tokenizer, 200_000)
        with pytest.raises(ValueError, match="the text of messages has 8,388"):
            tokens_of_chats([{"role": "user", "content": text}], smollm2_tokenizer, 200_000)

    assert memory_of(refuse) < 256 * MEBIBYTE


def test_a_long_prompt_that_fits_is_read(smollm2_tokenizer: Any) -> None:
    text = "the end of " * 50_000
    tokens = tokens_of_prompt(text, smollm2_tokenizer, 200_000)
    assert tokens == smollm2_tokenizer(text)["input_ids"]
    assert len(tokens) <= 200_000


def test_a_prompt_with_half_a_character_is_refused(smollm2_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] has a lone surrogate at character 2"):
        tokens_of_prompts(["a", "ab\ud83d"], smollm2_tokenizer)


@pytest.mark.parametrize("count", [1, 50])
def test_stop_strings_and_bad_words_are_limited(smollm2_tokenizer: Any, count: int) -> None:
    stops = ["x" * (MAX_STOP_CHARACTERS // count)] * count
    special_stops_of(SamplingParams(stop=stops), {})
    with pytest.raises(
        ValueError, match=r"stop has .* strings with .* characters together, but at most 64 strings with 4,096"
    ):
        special_stops_of(SamplingParams(stop=[*stops, "x" * 97]), {})
    words = ["x" * (MAX_BAD_WORD_CHARACTERS // count)] * count
    tokens_of_bad_words(words, smollm2_tokenizer)
    with pytest.raises(
        ValueError, match=r"bad_words has .* strings with .* characters together, but at most 256 strings with 16,384"
    ):
        tokens_of_bad_words([*words, "x" * 385], smollm2_tokenizer)
    with pytest.raises(ValueError, match="stop has 65 strings"):
        special_stops_of(SamplingParams(stop=["x"] * 65), {})
    with pytest.raises(ValueError, match="bad_words has 257 strings"):
        tokens_of_bad_words(["x"] * 257, smollm2_tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_chat_template_that_fails_is_an_error_of_its_request(
    smollm2_tokenizer: Any, template: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"messages do not fit the chat template: .*{message}"):
        tokens_of_chats([{"role": "user", "content": "a"}], smollm2_tokenizer, chat_template=template)


def test_a_panic_of_the_tokenizer_is_an_error_of_its_request(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.normalizer = normalizers.Replace("", "a")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="the tokenizer has panicked"):
        tokens_of_prompt("text", tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has panicked"):
        tokens_of_bad_words(["text"], tokenizer)


def test_a_panic_of_the_decoder_is_an_error_of_its_request() -> None:
    backend = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str())
    backend["decoder"] = {"type": "Strip", "content": "a", "start": 9, "stop": 9}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    with pytest.raises(ValueError, match="the tokenizer has panicked"):
        Detokenizer(tokenizer).add(0)
