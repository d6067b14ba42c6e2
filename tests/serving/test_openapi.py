"""`/openapi.json` is a valid schema that describes every endpoint, its body and its errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from llama_te_infer import Engine
from serving.conftest import RunningServer, serving


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> Any:
    return httpx.get(f"{server.url}/openapi.json").json()


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        part = list(part.values())
    for each in part if isinstance(part, list) else ():
        yield from references(each)


def test_the_schema_is_valid_and_every_reference_leads_somewhere(schema: Any) -> None:
    validate(schema)
    found = set(references(schema))
    assert "#/components/schemas/StreamOptions" in found
    for reference in found:
        part = schema
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
    assert "$defs" not in json.dumps(schema)


def test_metrics_are_text(schema: Any, server: RunningServer) -> None:
    assert schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"] == {
        "text/plain": {"schema": {"type": "string"}}
    }
    assert httpx.get(f"{server.url}/metrics").headers["Content-Type"].startswith("text/plain")


def test_every_endpoint_has_a_description_and_openais_errors(schema: Any, server: RunningServer) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": 1})
    error = {"$ref": "#/components/schemas/Error", "components": schema["components"]}
    Draft202012Validator(error).validate(answer.json())
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (method, path)
            assert operation["responses"]["4XX"] == {"$ref": "#/components/responses/Error"}
            assert ("requestBody" in operation) == (method == "post")


# --- answers ----------------------------------------------------------------------------------------------------------


def without_more_fields(schema: Any) -> Any:
    """Return the schema, but no answer may have fields that it does not describe."""
    schema = copy.deepcopy(schema)
    for component in schema["components"]["schemas"].values():
        if "properties" in component:
            component["additionalProperties"] = False
    return schema


@pytest.fixture(scope="module")
def exact(schema: Any) -> Any:
    return without_more_fields(schema)


def check(schema: Any, path: str, answer: httpx.Response) -> None:
    """Compare an answer, or each event of a stream, with the schema."""
    assert answer.status_code == 200, answer.text
    operation = next(iter(schema["paths"][path].values()))
    media_type = answer.headers["content-type"].partition(";")[0]
    described = operation["responses"]["200"]["content"][media_type]["schema"]
    validator = Draft202012Validator(described | {"components": schema["components"]})
    if media_type == "application/json":
        validator.validate(answer.json())
        return
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    contents = [json.loads(line) for line in lines if line != "[DONE]"]
    assert len(contents) > 1
    for content in contents:
        validator.validate(content)


TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True}),
        ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1, "stop": ["a", "e"], "max_tokens": 200}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
        (
            "/v1/chat/completions",
            {
                "messages": MESSAGES,
                "tools": [{"type": "function", "function": TOOL}],
                "tool_choice": "required",
                "parallel_tool_calls": False,
                "max_tokens": 100,
            },
        ),
        ("/v1/responses", {"input": "a"}),
        (
            "/v1/responses",
            {
                "input": "a",
                "instructions": "b",
                "top_logprobs": 1,
                "include": ["message.output_text.logprobs"],
                "text": {"format": {"type": "json_object"}},
                "ignore_eos": True,
            },
        ),
        (
            "/v1/responses",
            {
                "input": "a",
                "tools": [{"type": "function", **TOOL}],
                "tool_choice": {"type": "function", "name": "f"},
                "parallel_tool_calls": False,
                "max_output_tokens": 100,
            },
        ),
    ],
)
def test_generated_answers_fit_the_schema(
    exact: Any, server: RunningServer, path: str, body: dict[str, Any], stream: bool
) -> None:
    fields = {"max_tokens": 16} if path != "/v1/responses" else {"max_output_tokens": 16}
    if stream and path != "/v1/responses":
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}  # type: ignore[assignment]
    sent = {**fields, "seed": 1, **body, "stream": stream}
    check(exact, path, httpx.post(f"{server.url}{path}", json=sent, timeout=60))


def test_prompt_logprobs_of_a_chat_fit_the_schema(exact: Any, server: RunningServer) -> None:
    path = "/v1/chat/completions"
    body = {"messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    check(exact, path, httpx.post(f"{server.url}{path}", json=body))


def test_streams_that_fail_fit_the_schema(exact: Any, make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), request_timeout=0.05) as running:
        for path, fields, failure in (
            ("/v1/completions", {"prompt": "a", "max_tokens": 400}, '"error"'),
            ("/v1/responses", {"input": "a", "max_output_tokens": 400}, "response.failed"),
        ):
            answer = httpx.post(f"{running.url}{path}", json={"ignore_eos": True, "stream": True, **fields})
            assert failure in answer.text
            check(exact, path, answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/models", None),
        ("/health", None),
        ("/ready", None),
        ("/version", None),
    ],
)
def test_other_answers_fit_the_schema(exact: Any, server: RunningServer, path: str, body: Any) -> None:
    check(exact, path, httpx.request("GET" if body is None else "POST", f"{server.url}{path}", json=body))


def test_a_model_fits_the_schema(exact: Any, server: RunningServer) -> None:
    check(exact, "/v1/models/{name}", httpx.get(f"{server.url}/v1/models/tiny"))


def test_every_answer_is_described(schema: Any) -> None:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            for content in operation["responses"]["200"]["content"].values():
                assert content["schema"] and "title" not in content["schema"], path
