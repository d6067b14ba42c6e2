"""Requests that clients should not send: each is refused quickly, in OpenAI's shape, with the field's name."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from llama_te_infer import Engine
from llama_te_infer.serve import server as serve_server
from serving.conftest import RunningServer, serving

JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "a"}]
MANY = 400_000


def refusal(server: RunningServer, path: str, content: bytes | dict[str, Any], status: int = 400) -> dict[str, Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = httpx.post(f"{server.url}{path}", content=body, headers=JSON, timeout=60)
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1000
    return error


def many(item: str, last: str) -> bytes:
    return f"{item},".encode() * MANY + last.encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", b"[%s]" % many("1", '"a"')),
        ("prompt", b"[%s]" % many('"a"', "1")),
        ("prompt", b"[%s]" % many("[1]", "1")),
        ("prompt", b"[%s]" % many("{}", "1")),
        ("stop", b"[%s]" % many("1", "1")),
        ("stop_token_ids", b"[%s]" % many('"a"', "1")),
        ("stop_token_ids", b"[%s]" % many("1", "-1")),
        ("bad_words", b"[%s]" % many('"a"', '""')),
    ],
)
def test_long_lists_with_something_wrong_take_little_memory(server: RunningServer, field: str, value: bytes) -> None:
    body = {"prompt": b'"a"', "max_tokens": b"1", field: value}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refusal(
        server, "/v1/completions", b"{%s}" % b",".join(b'"%s":%s' % (k.encode(), v) for k, v in body.items())
    )
    assert error["param"].split(".")[0] == field and field in error["message"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "kilobytes"


def test_many_unknown_fields_are_not_listed(server: RunningServer) -> None:
    body = ",".join(f'"k{number}":1' for number in range(20_000))
    assert "20,000 fields" in refusal(server, "/v1/completions", f'{{"prompt":"a",{body}}}'.encode())["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m" * 10**6}, "model"),
        ({"k" * 10**6: 1}, None),
        ({"temperature": "1" * 10**6}, "temperature"),
        ({"stop": ["a" * 10**6]}, "stop"),
        ({"logit_bias": {"a" * 10**6: 1}}, "logit_bias"),
        ({"prompt": [1, 2, "a"]}, "prompt"),
    ],
)
def test_long_values_are_not_sent_back(server: RunningServer, body: dict[str, Any], param: str | None) -> None:
    error = refusal(server, "/v1/completions", {"prompt": "a", **body}, 404 if "model" in body else 400)
    assert param is None or (error["param"] == param and param in error["message"])


def test_the_type_that_fits_furthest_is_named(server: RunningServer) -> None:
    error = refusal(server, "/v1/completions", {"prompt": [1, 2, "a"]})
    assert error["message"] == "prompt='a' is not possible: Input should be a valid integer."


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "messages", "tokenizer", "most", "self", "tools", "add_generation_prompt"]
)
def test_variables_of_the_template_cannot_replace_its_options(server: RunningServer, name: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        error = refusal(server, path, {"messages": MESSAGES, "chat_template_kwargs": {name: 1}})
        assert error["param"] == "chat_template_kwargs" and repr(name) in error["message"]


def test_what_a_template_refuses_concerns_the_messages(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True}
    assert refusal(server, "/v1/chat/completions", body)["param"] == "messages"


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    server: RunningServer, add_special_tokens: bool
) -> None:
    body = {"prompt": "a" * 10**6, "add_special_tokens": add_special_tokens}
    for path in ("/v1/completions", "/tokenize"):
        assert "more tokens than max_sequence_length=512" in refusal(server, path, body)["message"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Type": "text/plain"}, "Content-Type='text/plain' is not possible: send JSON"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "send JSON as application/json"),
        ({}, "Content-Type='' is not possible"),
        ({**JSON, "Content-Encoding": "gzip"}, "Content-Encoding='gzip' is not possible"),
    ],
)
def test_other_formats(server: RunningServer, headers: dict[str, str], message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415 and message in answer.json()["error"]["message"]


def test_json_with_a_character_set(server: RunningServer) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    content = b'{"prompt": "a", "max_tokens": 1}'
    assert httpx.post(f"{server.url}/v1/completions", content=content, headers=headers).status_code == 200


def test_wrong_methods_are_told_the_right_one(server: RunningServer) -> None:
    answer = httpx.get(f"{server.url}/v1/completions")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_a_full_queue_is_told_before_the_body_is_read(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(max_batch_size=1), max_requests=1) as server:
        long = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
        first = threading.Thread(
            target=httpx.post, args=(f"{server.url}/v1/completions",), kwargs={"json": long, "timeout": 60}
        )
        first.start()
        while server.engine.num_requests == 0:
            time.sleep(0.001)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            answer = httpx.post(f"{server.url}{path}", content=b"no JSON", headers=JSON)
            assert answer.status_code == 429 and answer.headers["Retry-After"]
        first.join()


def test_bodies_that_arrive_together_fill_a_bounded_memory(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_server, "BODIES_AT_A_TIME", 0.0001)
    answer = httpx.post(f"{server.url}/tokenize", content=b"a" * 100_000, headers=JSON)
    assert answer.status_code == 429 and "too many long requests" in answer.json()["error"]["message"]


def test_methods_that_clients_make_up_are_counted_as_one(server: RunningServer) -> None:
    for number in range(3):
        assert httpx.request(f"MADE-UP-{number}", f"{server.url}/version").status_code == 405
    text = httpx.get(f"{server.url}/metrics").text
    assert "MADE-UP" not in text and 'method="other"' in text
