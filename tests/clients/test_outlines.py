"""outlines constrains the text of both models in the same way."""

from __future__ import annotations

import json
from typing import Any, Literal

import outlines
import pytest
from outlines.types import JsonSchema, Regex

from clients.conftest import Pair

PROMPTS = ["The sky is", "Two and two make a number", "Yes"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
}


TYPES = {
    "regex": Regex(r"[0-9]{3}-[a-f]{4}"),
    "choice": Literal["blue", "green", "red"],
    "JSON schema": JsonSchema(json.dumps(SCHEMA)),
}


@pytest.mark.parametrize("backend", ["outlines_core", "llguidance"])
@pytest.mark.parametrize("kind", TYPES)
def test_constrained_text(kind: str, backend: str, pair: Pair, tokenizer: Any) -> None:
    output_type = TYPES[kind]
    expected, ours = (outlines.from_transformers(model, tokenizer) for model in pair)
    options = {"max_new_tokens": 40, "do_sample": False, "backend": backend}
    for prompt in PROMPTS:
        text = ours(prompt, output_type, **options)
        assert text == expected(prompt, output_type, **options)
    batch = ours.batch(PROMPTS, output_type, **options)
    assert batch == expected.batch(PROMPTS, output_type, **options)
    assert batch[0] == ours(PROMPTS[0], output_type, **options)


def test_several_samples_and_beams(pair: Pair, tokenizer: Any) -> None:
    digits = Regex("[0-9]{6}")
    expected, ours = (outlines.from_transformers(model, tokenizer) for model in pair)
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    texts = ours(PROMPTS[0], digits, **options)
    assert texts == expected(PROMPTS[0], digits, **options)
    assert len(set(texts)) == 3 and all(text.isdigit() and len(text) == 6 for text in texts)
