"""Texts of a given form over HTTP, and the errors of forms that are not possible."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from llama_te_infer import AsyncEngine, Engine, SamplingParams, StructuredOutputs
from llama_te_infer.engine.grammars import GrammarCompiler
from llama_te_infer.serve.engine_process.messages import Refused, Submit, encode, from_engine, from_server
from llama_te_infer.structured_outputs import GrammarError
from serving.conftest import RunningServer, serving

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}, "sex": {"enum": ["f", "m", None]}},
    "required": ["age", "sex"],
    "additionalProperties": False,
}
OF_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
COMPACT = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}


def test_a_chat_answers_in_the_schema(server: RunningServer) -> None:
    answer = server.client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=300, seed=1, n=2, response_format=OF_SCHEMA
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_a_stream_has_the_text_of_the_whole_answer(server: RunningServer) -> None:
    request: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 100, "seed": 2, "extra_body": COMPACT}
    whole = server.client.chat.completions.create(**request).choices[0]
    parts = [chunk.choices[0] for chunk in server.client.chat.completions.create(**request, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content or ""), SCHEMA)


@pytest.mark.parametrize("more", [{}, {"use_beam_search": True, "best_of": 3}, {"temperature": 0}])
def test_completions_take_each_form(server: RunningServer, more: dict[str, Any]) -> None:
    def text(**fields: Any) -> str:
        body = {"model": "tiny", "prompt": "Is it?", "max_tokens": 150, "seed": 3, **more, **fields}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        written: str = choice["text"]
        return written

    jsonschema.validate(json.loads(text(**COMPACT)), SCHEMA)
    assert re.fullmatch("[a-z]{2}[0-9]{3}", text(structured_outputs={"regex": "[a-z]{2}[0-9]{3}"}))
    assert text(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert text(structured_outputs={"grammar": 'start: "a" ("b" | "c")'}) in ("ab", "ac")
    assert text(structured_outputs={"grammar": 'root ::= "a" [bc]'}) in ("ab", "ac")
    spaced = text(structured_outputs={"json": '{"const": {"a": [1]}}', "whitespace_pattern": " "})
    assert json.loads(spaced) == {"a": [1]} and " " in spaced


def test_any_json_object_and_any_text(server: RunningServer) -> None:
    of_any_text: Any = {"type": "text"}
    one = server.client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=9, seed=1, response_format=of_any_text
    )
    other = server.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, seed=1)
    assert one.choices[0].message.content == other.choices[0].message.content
    answer = server.client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, seed=1, response_format={"type": "json_object"}
    )
    assert (answer.choices[0].message.content or "").startswith("{")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json"}}, "response_format.type", "response_format.type='json' is not possible"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "response_format has type='json_schema' without"),
    (
        {"response_format": {**OF_SCHEMA, "type": "text"}},
        "response_format",
        "response_format has type='text' with json",
    ),
    ({"response_format": OF_SCHEMA, **COMPACT}, "structured_outputs", "structured_outputs has a form, and response_fo"),
    ({"structured_outputs": {}}, "structured_outputs", "structured_outputs has no form: give exactly one of json"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "structured_outputs has regex and"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs has regex that llguidance ref"),
    ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs", "structured_outputs has json that llguid"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "is no field of this requ"),
    ({"guided_json": SCHEMA}, "guided_json", "guided_json is no field of this request: leave it out."),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_is_not_possible_is_refused_with_status_400(
    server: RunningServer, fields: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": stream, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


@pytest.fixture
def remembering(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    """A server with a prefix cache."""
    with serving(make_engine()) as server:
        yield server


def test_a_request_that_contradicts_itself_is_told_so(remembering: RunningServer) -> None:
    server = remembering
    prompt = "a" * 20
    a, b, c = server.engine.tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    for fields in (
        {"structured_outputs": {"choice": ["ab", "ac"]}, "allowed_token_ids": [b, c, 257]},
        {"structured_outputs": {"choice": ["ab"]}, "bad_words": ["ab"]},
        {"structured_outputs": {"choice": ["ab"]}, "bad_words": ["ab"], "allowed_token_ids": [a, b, c]},
        {"structured_outputs": {"choice": ["ab"]}, "stop_token_ids": [b], "min_tokens": 5},
    ):
        for stream in (False, True):
            body = {"prompt": prompt, "stream": stream, **fields}
            answer = httpx.post(f"{server.url}/v1/completions", json=body)
            assert "the grammar allows no token here that allowed_token_ids, bad_words and min_tokens" in answer.text
            assert answer.status_code == (200 if stream else 400)
            assert '"type":"invalid_request_error"' in answer.text.replace(" ", "")
    usage = httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0, "the prefix cache has forgotten nothing"


def test_a_grammar_that_takes_long_delays_no_other_request(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_compile, compiles = threading.Event(), threading.Event()
    compile_form = GrammarCompiler._compile

    def slow(self: GrammarCompiler, form: StructuredOutputs) -> Any:
        compiles.set()
        assert may_compile.wait(30)
        return compile_form(self, form)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    params = SamplingParams(structured_outputs=StructuredOutputs(choice=["yes"]))

    async def main() -> None:
        async with AsyncEngine(make_engine()) as engine:
            waiting = asyncio.ensure_future(engine.generate("a", params))
            given_up = asyncio.ensure_future(engine.generate("a", params))
            await asyncio.to_thread(compiles.wait, 30)
            other = await engine.generate("b", SamplingParams(max_tokens=5, seed=1))
            assert len(other.outputs[0].token_ids) == 5 and not waiting.done()
            given_up.cancel()
            may_compile.set()
            assert (await waiting).outputs[0].text == "yes"
            assert await engine.drain(30) and engine.num_requests == 0

    asyncio.run(main())


def test_forms_and_their_errors_pass_between_processes() -> None:
    for form in (StructuredOutputs(json=SCHEMA), StructuredOutputs(choice=["a", "b"]), StructuredOutputs(regex="a")):
        sent = Submit(3, [1, 2], SamplingParams(structured_outputs=form), 0.5)
        assert from_server.decode(encode(sent)[4:]) == sent
    refused = from_engine.decode(encode(Refused(3, GrammarError("structured_outputs has it")))[4:])
    assert isinstance(refused, Refused) and type(refused.error) is GrammarError
    assert str(refused.error) == "structured_outputs has it"
