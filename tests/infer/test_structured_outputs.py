"""Texts of a given form: JSON schemas, regular expressions, choices and grammars, in all ways to choose tokens.

The model has random weights, so nothing but the form makes its texts valid. Its vocabulary is larger than the
tokenizer's, whose tokens cross the borders of what a form names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Completion, Engine, RequestOutput, SamplingParams, StructuredOutputs

EOS = 0
TEXTS = [
    '{"name": "Ada Lovelace", "age": 36, "tags": ["a", "b"], "is_known": true, "nothing": null}',
    "yes no maybe hello help helpful 2024-05-17 12:30 127.0.0.1 ada@example.com abc ab abcabc",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bytes_and_words = Tokenizer(models.BPE())
    bytes_and_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_and_words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=401, special_tokens=["<|end|>", "<|tool|>"], initial_alphabet=alphabet, show_progress=False
    )
    bytes_and_words.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_and_words, eos_token="<|end|>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer) + 20, "initializer_range": 0.3, "num_hidden_layers": 1}
    config = LlamaConfig(**{**TINY, **fields, "max_position_embeddings": 512, "eos_token_id": EOS})
    return convert_llama_hf_to_te(LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(model, tokenizer, max_batch_size=8, page_size=8)


def params(form: StructuredOutputs, **fields: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=form, **{"max_tokens": 200, "seed": 5, **fields})


def complete(engine: Engine, form: StructuredOutputs, prompt: str = "hello", **fields: Any) -> RequestOutput:
    (output,) = engine.generate(prompt, params(form, **fields))
    assert output.error is None
    return output


def one(engine: Engine, form: StructuredOutputs, prompt: str = "hello", **fields: Any) -> Completion:
    (completion,) = complete(engine, form, prompt, **fields).outputs
    return completion


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "filtered": {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": -0.5},
    "bias": {"logit_bias": {5: 100, EOS: 100, 401: 100}},
    "min_tokens": {"min_tokens": 3},
    "ignore_eos": {"ignore_eos": True},
    "several": {"n": 3},
    "beams": {"num_beams": 4, "n": 3},
    "beams that ignore EOS": {"num_beams": 3, "ignore_eos": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_form_of_one_text_gives_this_text(engine: Engine, way: str) -> None:
    text = 'Say "hello", Zoë \N{GRINNING FACE}\n'
    forms = [
        StructuredOutputs(choice=[text]),
        StructuredOutputs(regex=re.escape(text).replace('\\"', '"')),
        StructuredOutputs(grammar=f"start: {json.dumps(text)}"),
        StructuredOutputs(grammar=f"root ::= {json.dumps(text, ensure_ascii=False)}"),
        StructuredOutputs(json={"const": text}, disable_any_whitespace=True),
    ]
    for form in forms:
        for completion in complete(engine, form, **WAYS[way]).outputs:
            written = json.loads(completion.text) if form.json else completion.text
            assert written == text
            assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "pattern", ["[a-c]{3,9}", "(yes|no|maybe)( (yes|no|maybe)){1,3}", "a*b?", r"\d{4}-\d\d-\d\d", "(ab|abc)+c"]
)
def test_a_regular_expression_matches_the_whole_text(engine: Engine, pattern: str, way: str) -> None:
    for prompt in ("hello", "no", "12"):
        for completion in complete(engine, StructuredOutputs(regex=pattern), prompt, **WAYS[way]).outputs:
            if completion.finish_reason == "stop":
                assert re.fullmatch(pattern, completion.text, re.ASCII)
            else:
                assert completion.finish_reason == "length" and way != "min_tokens"


@pytest.mark.parametrize("way", WAYS)
def test_one_of_the_choices_is_written(engine: Engine, way: str) -> None:
    choices = ["hello", "help", "helpful", "no", "\N{SNOWMAN} or not"]
    for prompt in ("hello", "abc", "12:30"):
        for completion in complete(engine, StructuredOutputs(choice=choices), prompt, **WAYS[way]).outputs:
            assert completion.text in choices and completion.finish_reason == "stop"


REFUSED_FORMS: list[tuple[dict[str, Any], str]] = [
    ({}, "structured_outputs has no form: give exactly one of json, regex, choice, grammar, json_object."),
    ({"json": {}, "regex": "a"}, "structured_outputs has json and regex: give exactly one of json,"),
    ({"json": 7}, "structured_outputs has a json of int: give a JSON schema as a dict or a text"),
    ({"json": '{"type": '}, "structured_outputs has a json that is no JSON: Expecting value"),
    ({"json": {"const": {1}}}, "structured_outputs has a json that is no JSON: Object of type set is not"),
    ({"json": "[" * 100_000}, "structured_outputs has a json that is no JSON: "),
    ({"regex": ""}, "structured_outputs has regex='', which is not possible: give a text that is not empty."),
    ({"regex": b"a"}, "structured_outputs has regex=b'a', which is not possible"),
    ({"grammar": ["start: A"]}, "structured_outputs has grammar=['start: A'], which is not possible"),
    ({"choice": "yes"}, "structured_outputs has choice='yes', which is not possible: give a list of texts."),
    ({"choice": []}, "structured_outputs has choice=(), which is not possible: give at least one text"),
    ({"choice": ["a", ""]}, "structured_outputs has choice=('a', ''), which is not possible"),
    ({"json_object": False}, "structured_outputs has json_object=False, which is not possible: give True, or leave"),
    ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace=True, which is not possible: it is for"),
    ({"json": "{}", "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern=' ', which is not"),
    ({"regex": "a" * 300_000}, "structured_outputs has regex of 300,000 characters, but 262,144 is the limit"),
    ({"choice": ["a", "\ud800"]}, "structured_outputs has choice with a lone surrogate at character 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_FORMS)
def test_what_is_no_form_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StructuredOutputs(**fields)


def test_forms_are_plain_and_equal_by_value() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": ["é", None, 1.5]}}}
    form = StructuredOutputs(json=schema)
    assert form == StructuredOutputs(json=schema) and hash(form) == hash(StructuredOutputs(json=schema))
    assert json.loads(form.json) == schema and list(json.loads(form.json)["properties"]) == ["b", "a"]  # type: ignore[arg-type]
    assert StructuredOutputs(choice=["a", "b"]).choice == ("a", "b")
    assert StructuredOutputs(**dataclasses.asdict(form)) == form
    with pytest.raises(ValueError, match="structured_outputs={'regex': 'a'} is not possible: give a StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


REFUSED_GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a(b"}, "structured_outputs has regex that llguidance refuses: .*unclosed group"),
    ({"json": {"type": "strin"}}, "structured_outputs has json that llguidance refuses: .*strin"),
    ({"json": {"not": {"type": "string"}}}, 'structured_outputs has json that llguidance refuses: .*"not"'),
    ({"json": {"minLength": 5, "maxLength": 2, "type": "string"}}, "minLength .* is greater than maxLength"),
    ({"json": {"$ref": "#/$defs/missing"}}, "structured_outputs has json that llguidance refuses: .*missing"),
    ({"json": "7"}, "structured_outputs has json that llguidance refuses"),
    ({"grammar": "start: missing"}, "structured_outputs has grammar that llguidance refuses: .*missing"),
    ({"grammar": "root ::= missing"}, "structured_outputs has grammar that llguidance refuses: .*missing"),
    ({"grammar": "root ::= ("}, "structured_outputs has grammar that llguidance refuses"),
    ({"json_object": True, "whitespace_pattern": "("}, "structured_outputs has json_object that llguidance refuses"),
    ({"regex": "()"}, "structured_outputs has regex that llguidance refuses: no text but the empty one fits"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_GRAMMARS)
def test_what_llguidance_refuses_is_refused_at_submit(engine: Engine, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        engine.submit("hello", params(StructuredOutputs(**fields)))
    assert not engine.has_unfinished
