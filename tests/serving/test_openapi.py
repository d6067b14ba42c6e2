"""`/openapi.json` is a valid schema that describes every endpoint, its body and its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from serving.conftest import RunningServer


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    ],
)
def test_answers_and_streams_have_the_media_types_of_the_schema(
    schema: Any, server: RunningServer, path: str, body: dict[str, Any]
) -> None:
    described = schema["paths"][path]["post"]["responses"]["200"]["content"]
    found = []
    for stream in (False, True):
        answer = httpx.post(f"{server.url}{path}", json={**body, "stream": stream})
        found.append(answer.headers["content-type"].partition(";")[0])
    assert found == list(described)
