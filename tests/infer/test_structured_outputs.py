"""Texts of a given form: JSON schemas, regular expressions, choices and grammars, in all ways to choose tokens.

The model has random weights, so nothing but the form makes its texts valid. Its vocabulary is larger than the
tokenizer's, whose tokens cross the borders of what a form names.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import jsonschema
import llguidance.hf
import numpy as np
import pydantic
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Completion, Engine, RequestOutput, SamplingParams, StructuredOutputs
from llama_te_infer.engine import grammars
from llama_te_infer.engine.grammars import MAX_GRAMMARS, GrammarCompiler
from llama_te_infer.runner import grammar, mask_workers
from llama_te_infer.runner.grammar import TokenMasks
from llama_te_infer.runner.sampler import RowSampling, SamplingNeeds, sample, unpacked
from llama_te_infer.runner.stopping import StopRule
from llama_te_infer.structured_outputs import GrammarError

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
    ({"json": "[" * 60_000}, "structured_outputs has a json that is no JSON: "),
    ({"regex": ""}, "structured_outputs has regex='', which is not possible: give a text that is not empty."),
    ({"regex": b"a"}, "structured_outputs has regex=b'a', which is not possible"),
    ({"grammar": ["start: A"]}, "structured_outputs has grammar=['start: A'], which is not possible"),
    ({"choice": "yes"}, "structured_outputs has choice='yes', which is not possible: give a list of texts."),
    ({"choice": []}, "structured_outputs has choice=(), which is not possible: give at least one text"),
    ({"choice": ["a", ""]}, "structured_outputs has choice=('a', ''), which is not possible"),
    ({"json_object": False}, "structured_outputs has json_object=False, which is not possible: give True, or leave"),
    ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace=True, which is not possible: it is for"),
    ({"json": "{}", "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern=' ', which is not"),
    ({"regex": "a" * 70_000}, "structured_outputs has regex of 70,000 characters, but 65,536 is the limit"),
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


# --- JSON schemas -----------------------------------------------------------------------------------------------------

FORMATS = ["date", "date-time", "time", "uuid", "ipv4", "ipv6", "email"]
CHECKED = jsonschema.FormatChecker(["uuid", "ipv4", "ipv6", "email"])
DAY, TIME = r"\d{4}-\d\d-\d\d", r"\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"
# llguidance knows the form of dates and times, but not the length of each month.
for name, pattern in (("date", DAY), ("time", TIME), ("date-time", f"{DAY}[Tt ]{TIME}")):

    @CHECKED.checks(name)
    def has_format(value: object, pattern: str = pattern) -> bool:
        return not isinstance(value, str) or re.fullmatch(pattern, value, re.I) is not None


PATTERNS = ["^[A-Z]{2}-[0-9]{1,4}$", "^(red|green|blue)( (light|dark))?$", "^[a-z]+@[a-z]+\\.(com|org)$", "^x"]


def random_schema(random: Random, depth: int = 0, definitions: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a schema of the kinds that users write; deeper ones are simpler."""
    low = random.randint(-20, 20)
    simple: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": random.choice(["string", "integer", "number", "boolean", "null"])},
        lambda: {"type": "integer", "minimum": low, "maximum": low + random.choice([0, 7, 1000])},
        lambda: {"type": "number", "exclusiveMinimum": low, "maximum": low + 2.5},
        lambda: {"type": "integer", "multipleOf": random.choice([5, 7])},
        lambda: {"type": "string", "minLength": random.randint(0, 3), "maxLength": random.randint(3, 9)},
        lambda: {"type": "string", "pattern": random.choice(PATTERNS)},
        lambda: {"type": "string", "format": random.choice(FORMATS)},
        lambda: {"enum": random.sample(["a", "b", "é\n", 1, -2.5, None, True], random.randint(1, 4))},
        lambda: {"const": random.choice(["x", {"a": [1, None]}, [], 3])},
        lambda: {"type": random.sample(["string", "integer", "null"], 2)},
    ]
    if definitions:
        simple.append(lambda: {"$ref": f"#/$defs/{random.choice(definitions)}"})
    if depth >= 3 or random.random() < 0.1 * depth:
        return random.choice(simple)()

    def inner() -> dict[str, Any]:
        return random_schema(random, depth + 1, definitions)

    def some_object() -> dict[str, Any]:
        names = random.sample(["name", "age", "first name", "größe", 'a"b', "tags", "x"], random.randint(1, 4))
        properties = {name: {"description": "one of them", **inner()} for name in names}
        required = random.sample(names, random.randint(0, len(names)))
        more = random.choice([False, False, False, {"type": "integer"}])
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}

    least = random.randint(0, 2)
    return random.choice(
        [
            some_object,
            some_object,
            lambda: {"type": "array", "items": inner(), "minItems": least, "maxItems": least + random.randint(0, 2)},
            lambda: {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2},
            lambda: {"anyOf": [inner() for _ in range(random.randint(2, 3))]},
            *simple[:2],
        ]
    )()


def random_schemas(count: int) -> list[dict[str, Any]]:
    schemas = []
    for seed in range(count):
        random = Random(seed)
        schema = random_schema(random, definitions=("leaf", "tree"))
        tree = {"value": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"$ref": "#/$defs/tree"}}
        of_tree = {"type": "object", "properties": tree, "required": ["value"], "additionalProperties": False}
        schemas.append(schema | {"$defs": {"leaf": random_schema(random, 3), "tree": of_tree}})
    return schemas


class Kind(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = pydantic.Field(9, ge=0, le=9)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: str = pydantic.Field(max_length=8)
    chip: uuid.UUID | None = None


class Owner(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: Annotated[str, pydantic.StringConstraints(pattern="^[A-Z][a-z]{1,9}$")]
    size: Kind
    pets: list[Cat | Dog] = pydantic.Field(max_length=2)
    best: Cat | Dog = pydantic.Field(discriminator="kind")
    scores: dict[str, int] = {}
    position: tuple[float, float]
    friend: Owner | None = None


MODELS: list[type[pydantic.BaseModel]] = [Cat, Dog, Owner]


def test_answers_validate_under_200_random_schemas(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Engine(model, tokenizer, max_batch_size=48, page_size=16)
    schemas = random_schemas(200)
    # Without whitespace, since a random model writes little else where it may.
    each = [
        params(StructuredOutputs(json=schema, disable_any_whitespace=seed % 4 > 0), seed=seed, max_tokens=300)
        for seed, schema in enumerate(schemas)
    ]
    outputs = engine.generate(["hello"] * len(each), each)
    stopped = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.error is None
        (completion,) = output.outputs
        if completion.finish_reason == "stop":
            stopped += 1
            jsonschema.Draft202012Validator(schema, format_checker=CHECKED).validate(json.loads(completion.text))
    assert stopped > 150


@pytest.mark.parametrize("model_class", MODELS, ids=lambda each: each.__name__)
def test_answers_are_pydantic_models(engine: Engine, model_class: type[pydantic.BaseModel]) -> None:
    form = StructuredOutputs(json=model_class.model_json_schema(), disable_any_whitespace=True)
    stopped = 0
    for fields in ({"n": 4, "max_tokens": 400}, {"num_beams": 4, "n": 2}, {"temperature": 0}):
        for completion in complete(engine, form, **fields).outputs:
            if completion.finish_reason == "stop":
                stopped += 1
                model_class.model_validate_json(completion.text)
    assert stopped > 0


# --- oracles ----------------------------------------------------------------------------------------------------------

FORM = StructuredOutputs(
    json={"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["yes", "no", 12]}}}},
    disable_any_whitespace=True,
)


def test_greedy_tokens_are_those_of_a_plain_loop(engine: Engine, model: Any) -> None:
    """The loop masks the logits as transformers' logits processors do, with llguidance's own view of the tokenizer."""
    tokens = llguidance.hf.from_tokenizer(engine.tokenizer, n_vocab=model.config.vocab_size)
    assert tokens.eos_token == EOS
    for prompt in ("hello", "abc 12:30", "yes"):
        matcher = llguidance.LLMatcher(
            tokens, llguidance.LLMatcher.grammar_from_json_schema(FORM.json, overrides={"whitespace_flexible": False})
        )
        ids, written = engine.tokenizer(prompt)["input_ids"], []
        while not written or (written[-1] != EOS and not matcher.is_stopped() and len(written) < 60):
            logits_V = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].detach()
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            logits_V[torch.from_numpy(bits[: len(logits_V)] == 0)] = -torch.inf
            written.append(int(logits_V.argmax()))
            assert matcher.consume_token(written[-1])
        assert one(engine, FORM, prompt, temperature=0, max_tokens=60).token_ids == written


def test_log_probabilities_are_the_models_own(engine: Engine, model: Any) -> None:
    for fields in ({}, {"num_beams": 3}):
        completion = one(engine, FORM, logprobs=2, **fields)
        ids = engine.tokenizer("hello")["input_ids"]
        logits_SV = model(input_ids=torch.tensor([ids + completion.token_ids]), use_cache=False).logits[0]
        logprob_SV = logits_SV.detach().log_softmax(-1)[len(ids) - 1 : -1]
        assert completion.logprobs is not None
        for here, token, logprob_V in zip(completion.logprobs, completion.token_ids, logprob_SV, strict=True):
            assert here.logprob == pytest.approx(float(logprob_V[token]), abs=1e-4)
            assert here.top[0] == (int(logprob_V.argmax()), pytest.approx(float(logprob_V.max()), abs=1e-4))


def test_drawn_tokens_have_the_probabilities_of_the_allowed_ones() -> None:
    vocab_size, rows = 77, 4000
    torch.manual_seed(0)
    logits_V = torch.randn(vocab_size) * 2
    allowed = [3, 32, 76]
    sampling = RowSampling(rows, vocab_size, "cpu")
    drawing = SamplingParams()
    for row in range(rows):
        sampling.set(row, drawing, row, [1], StopRule.of(drawing, ()))
    words = [sum(1 << (token % 32) for token in allowed if token // 32 == word) for word in range(3)]
    bits_MW = torch.tensor([words] * (rows - 1), dtype=torch.int64).to(torch.int32)
    masks = TokenMasks(torch.arange(-1, rows - 1, dtype=torch.int32), bits_MW)
    sampled = sample(
        logits_V.repeat(rows, 1), sampling, torch.ones(rows, dtype=torch.int32), SamplingNeeds(random=True), masks
    )
    share_3 = torch.stack([(sampled.token_B[1:] == token).float().mean() for token in allowed])
    expected_3 = logits_V[allowed].softmax(0)
    assert share_3.sum() == pytest.approx(1)
    assert torch.allclose(share_3, expected_3, atol=4 * float((expected_3 * (1 - expected_3) / rows).sqrt().max()))
    free = sample(logits_V[None], sampling, torch.ones(1, dtype=torch.int32), SamplingNeeds(random=True))
    assert sampled.token_B[0] == free.token_B[0]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 259, 1000])
def test_masks_are_unpacked_for_any_vocabulary(vocab_size: int) -> None:
    torch.manual_seed(0)
    allowed_MV = torch.rand(3, vocab_size) < 0.5
    packed = np.packbits(allowed_MV.numpy(), axis=1, bitorder="little")
    bits_MW = torch.from_numpy(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).view(np.int32))
    assert torch.equal(unpacked(bits_MW, vocab_size), allowed_MV)


# --- the batch --------------------------------------------------------------------------------------------------------


def test_other_rows_of_the_batch_keep_their_texts(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = [SamplingParams(max_tokens=30, **way) for way in ({"temperature": 0}, {"seed": 3}, {"num_beams": 2})]
    formed = [params(FORM, max_tokens=30, **way) for way in ({"temperature": 0}, {"num_beams": 3}, {"top_k": 9})]
    prompts = ["hello", "yes no", "12:30", "abc", "no", "ab"]
    engine = Engine(model, tokenizer, max_batch_size=12, page_size=8)
    together = engine.generate(prompts, [*plain, *formed])
    alone = [engine.generate(prompt, its)[0] for prompt, its in zip(prompts, [*plain, *formed], strict=True)]
    assert [output.outputs for output in together] == [
        [dataclasses.replace(each, score=pytest.approx(each.score)) for each in output.outputs] for output in alone
    ]


def test_preempted_texts_go_on_in_their_form(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    form = StructuredOutputs(regex="[xz]{24}")
    ways: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"num_beams": 2}, {"temperature": 0}]
    each = [params(form, **way, max_tokens=24) for way in ways]
    roomy = Engine(model, tokenizer, page_size=4)
    tight = Engine(model, tokenizer, page_size=4, total_num_pages=15, max_batch_size=8)
    preempted = []
    preempt = tight.scheduler._preempt
    tight.scheduler._preempt = lambda: preempted.append(1) or preempt()  # type: ignore[func-returns-value, method-assign]
    first, second = (
        [output.outputs[0].text for output in engine.generate(["abc"] * 4, each)] for engine in (roomy, tight)
    )
    assert first == second and preempted
    assert all(re.fullmatch("[xz]{24}", text) for text in first)


def test_stop_strings_and_stop_tokens_end_texts_inside_the_form(engine: Engine) -> None:
    form = StructuredOutputs(choice=["hello", "help"])
    for fields in ({}, {"num_beams": 2}):
        stopped = one(engine, form, stop="e", **fields)
        assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("h", "stop", "e")
    tool = engine.tokenizer.convert_tokens_to_ids("<|tool|>")
    # A stop token that is no part of the form follows where the form lets the text end, and nowhere else.
    ended = one(engine, StructuredOutputs(regex="x{5}z*"), stop_token_ids=[tool], logit_bias={tool: 100})
    assert (ended.text, ended.stop_reason) == ("xxxxx", tool)


def test_the_form_holds_until_max_tokens(engine: Engine) -> None:
    completion = one(engine, StructuredOutputs(regex="[ab]{50}"), max_tokens=7)
    assert completion.finish_reason == "length" and re.fullmatch("[ab]*", completion.text)


def test_a_complete_text_ends_before_min_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing may take the end for logits that are not finite, and forget cached prefixes.
    monkeypatch.setattr(engine, "_clean", lambda: pytest.fail("all logits are finite"))
    completion = one(engine, StructuredOutputs(choice=["xz"]), min_tokens=9)
    assert (completion.text, completion.finish_reason) == ("xz", "stop")


def test_fewer_beams_end_where_the_form_has_fewer_texts(engine: Engine) -> None:
    outputs = complete(engine, StructuredOutputs(regex="[xz]"), num_beams=4, n=4).outputs
    assert sorted(completion.text for completion in outputs) == ["x", "z"]
    assert [completion.index for completion in outputs] == [0, 1]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_contradiction_ends_its_own_request(engine: Engine) -> None:
    x = engine.tokenizer.convert_tokens_to_ids("x")
    contradictions = [
        params(StructuredOutputs(choice=["yes"]), allowed_token_ids=[x, EOS]),
        params(StructuredOutputs(regex="x"), bad_words=["x"]),
        params(StructuredOutputs(regex="x{1,9}y"), allowed_token_ids=[x]),
    ]
    outputs = engine.generate(["hello"] * 4, [*contradictions, params(StructuredOutputs(choice=["no"]))])
    for output in outputs[:3]:
        assert output.outputs[0].finish_reason == "error" and isinstance(output.error, GrammarError)
        assert "the grammar allows no token here that allowed_token_ids, bad_words and min_" in str(output.error)
    assert outputs[3].outputs[0].text == "no"


def test_what_contradicts_the_form_within_a_text_ends_its_own_request(model: Any, tokenizer: Any) -> None:
    """Bad words of several tokens leave nothing after some tokens; so do stop tokens before `min_tokens`."""
    engine = Engine(model, tokenizer, max_batch_size=8, page_size=4)
    x, z = tokenizer.convert_tokens_to_ids(["x", "z"])
    prompt = "abc " * 9
    free = params(StructuredOutputs(regex="[xz]{9}"), seed=1)
    engine.generate(prompt, free)
    contradictions = [
        params(StructuredOutputs(choice=["xz"]), bad_words=["xz"]),
        params(StructuredOutputs(choice=["xz"]), bad_words=["xz"], temperature=0),
        params(StructuredOutputs(regex="x[xz]{5}"), bad_words=["xx", "xzz", "zx"]),
        params(
            StructuredOutputs(regex="[xz]{9}"),
            bad_words=["xxx", "xz", "zzz", "zx"],
            allowed_token_ids=[x, z, EOS],
            n=2,
        ),
        params(StructuredOutputs(choice=["xz"]), stop_token_ids=[z], min_tokens=5),
        params(StructuredOutputs(choice=["xz"]), stop_token_ids=[z], min_tokens=5, num_beams=2),
    ]
    ids = [engine.submit(prompt, each) for each in [*contradictions, free]]
    outputs: dict[int, RequestOutput] = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    for request_id in ids[:-1]:
        output = outputs[request_id]
        assert output.outputs[0].finish_reason == "error" and isinstance(output.error, GrammarError)
        assert "the grammar allows no token here that allowed_token_ids, bad_words and min_tokens" in str(output.error)
    assert outputs[ids[2]].outputs[0].text == "xz" and outputs[ids[0]].outputs[0].text == "x"
    (again,) = engine.generate(prompt, free)
    assert outputs[ids[-1]].outputs == again.outputs
    assert again.num_cached_tokens > 0, "the prefix cache has forgotten nothing"


def test_bad_words_within_a_form_leave_the_rest_of_it(engine: Engine) -> None:
    for seed in range(20):
        text = one(engine, StructuredOutputs(regex="[xz]{2}"), bad_words=["xz", "zz"], seed=seed).text
        assert text in ("xx", "zx")
    x = engine.tokenizer.convert_tokens_to_ids("x")
    form = StructuredOutputs(regex="(xa|z){3}")
    for fields in ({}, {"num_beams": 3}):
        stopped = one(engine, form, stop_token_ids=[x], min_tokens=3, **fields)
        assert (stopped.text, stopped.finish_reason) == ("zzz", "stop")


def test_without_a_tokenizer_or_llguidance_forms_are_refused(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = params(StructuredOutputs(regex="a"))
    with pytest.raises(ValueError, match="structured_outputs has regex, which needs text, but the engine has no token"):
        Engine(model).submit([5], form)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"structured_outputs needs llguidance: pip install 'llama-te-infer\["):
        Engine(model, tokenizer).submit("a", form)


def test_a_grammar_that_takes_long_is_refused(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MAX_SECONDS", 0)
    with pytest.raises(GrammarError, match="structured_outputs has regex that takes 0.0 s before the first token, and"):
        Engine(model, tokenizer).submit("a", params(StructuredOutputs(regex="a")))


def test_preparing_says_nothing_where_forms_are_not_possible(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(model).grammars.prepare()
    compiler = Engine(model, tokenizer).grammars
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "llguidance", None)
        compiler.prepare()
    compiler.prepare()
    monkeypatch.setattr(grammars, "_tokens_of", lambda *_: pytest.fail("the tokenizer has been prepared"))
    compiler.prepare()
    compiler.compile(StructuredOutputs(regex="a"))


def ambiguous(rules: int) -> StructuredOutputs:
    """First xz, behind which any text has so many parses that a mask takes seconds."""
    pairs = " | ".join(f"s{first} s{second}" for first in range(rules) for second in range(rules))
    return StructuredOutputs(
        grammar='start: "x" "z" s0\n' + "\n".join(f"s{rule}: {pairs} | /[a-z]/" for rule in range(rules))
    )


@pytest.mark.parametrize("way", ["sampled", "beams"])
def test_a_text_whose_masks_take_too_long_ends_alone(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The first mask has x alone. The second one takes more than a second, in which all others would wait."""
    monkeypatch.setattr(mask_workers, "SECONDS_IN_RESERVE", 0.1)
    engine, prompt = Engine(model, tokenizer, max_batch_size=8, page_size=4), "abc " * 9
    others = [params(StructuredOutputs(regex="[xz]{60}"), seed=1), SamplingParams(max_tokens=60, temperature=0)]
    expected = [engine.generate(prompt, each)[0].outputs[0].text for each in others]
    ids = [engine.submit(prompt, each) for each in [*others, params(ambiguous(9), **WAYS[way])]]
    outputs: dict[int, RequestOutput] = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    assert [outputs[request_id].outputs[0].text for request_id in ids[:2]] == expected
    slow = outputs[ids[2]]
    assert isinstance(slow.error, GrammarError) and slow.outputs[0].finish_reason == "error"
    assert "llguidance needs too long for the next token of this text" in str(slow.error)
    (again,) = engine.generate(prompt, others[1])
    assert again.num_cached_tokens > 0


@pytest.mark.parametrize("way", ["sampled", "several", "beams"])
def test_masks_that_take_long_together_end_their_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(mask_workers, "SECONDS_OF_A_MASK", -0.02)  # as if each took so much longer
    form = StructuredOutputs(regex="[xz]{200}")
    slow, quick = engine.generate(["hello"] * 2, [params(form, **WAYS[way]), params(StructuredOutputs(choice=["no"]))])
    assert "llguidance needs too long for the next token" in str(slow.error) and quick.outputs[0].text == "no"
    assert {completion.finish_reason for completion in slow.outputs} == {"error"}
    assert all(len(completion.token_ids) <= 50 for completion in slow.outputs)


def test_the_time_for_tokens_counts_too(tokenizer: PreTrainedTokenizerFast) -> None:
    def spin(_: Any) -> int:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        return 1

    compiled = GrammarCompiler(tokenizer, len(tokenizer), [EOS]).compile(StructuredOutputs(regex="x*"))
    text = compiled.begin(StopRule.of(SamplingParams(), [EOS]), mask_workers.Allowance())
    text.matcher = SimpleNamespace(
        consume_token=spin, validate_tokens=spin, is_stopped=lambda: False, rollback=lambda count: True
    )
    text.add(5)
    assert text.accepts(5) and not text.is_complete_with(5)
    assert text.allowance.seconds < mask_workers.SECONDS_IN_RESERVE - 3 * 0.03


def test_a_first_mask_that_takes_long_is_refused(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "SECONDS_IN_RESERVE", 0)
    with pytest.raises(
        GrammarError, match="structured_outputs has regex that takes 0.0 s for the first token, and 0 s"
    ):
        Engine(model, tokenizer).submit("a", params(StructuredOutputs(regex="a")))


def test_a_grammar_is_compiled_once(model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: Any) -> None:
    compiled: list[StructuredOutputs] = []
    compile_form = GrammarCompiler._compile

    def note(self: GrammarCompiler, form: StructuredOutputs) -> Any:
        compiled.append(form)
        return compile_form(self, form)

    monkeypatch.setattr(GrammarCompiler, "_compile", note)
    engine = Engine(model, tokenizer)
    for _ in range(2):
        engine.generate(["a", "b"], params(StructuredOutputs(json={"const": 1})))
        with pytest.raises(GrammarError):
            engine.generate("a", params(StructuredOutputs(regex="(")))
    assert compiled == [StructuredOutputs(json={"const": 1}), StructuredOutputs(regex="(")]
    for number in range(MAX_GRAMMARS):
        engine.grammars.compile(StructuredOutputs(regex=f"a{{{number + 1}}}"))
    engine.grammars.compile(StructuredOutputs(json={"const": 1}))
    assert len(compiled) == MAX_GRAMMARS + 3


@pytest.mark.parametrize("vocab_size", [447, 448, 449])
def test_a_model_may_have_more_tokens_than_its_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Masks have words of 32 tokens: the vocabulary may fill its last word or not."""
    compiled = GrammarCompiler(tokenizer, vocab_size, [EOS]).compile(StructuredOutputs(regex="x*"))
    assert not compiled.is_empty()
    text = compiled.begin(StopRule.of(SamplingParams(), [EOS]), mask_workers.Allowance())
    allowed_V = unpacked(grammar.compute_masks([None, text], False), vocab_size)
    assert allowed_V[0].all()
    assert tokenizer.convert_ids_to_tokens(allowed_V[1].nonzero().flatten().tolist()) == ["<|end|>", "x"]
