"""A step that fails: what clients get, what `/health` says, and when the server ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from llama_te_infer import Engine
from llama_te_infer.engine import loop
from llama_te_infer.runner.model_runner import ModelRunner
from serving.conftest import serving

BODY: dict[str, Any] = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
REASON = "The request has ended, since a step of the engine failed: CUDA out of memory"


def fail_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step fail after so many that succeed."""
    launch = ModelRunner.launch
    count = 0

    def launch_or_fail(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > steps:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(*arguments)

    monkeypatch.setattr(ModelRunner, "launch", launch_or_fail)


def events_of(answer: httpx.Response) -> list[str]:
    return [each.removeprefix("data: ") for each in answer.text.strip().split("\n\n")]


def listens(url: str) -> bool:
    try:
        return httpx.get(f"{url}/version", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def test_a_failed_step_ends_requests_with_a_500_and_health_is_red_until_one_succeeds(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_engine()) as server:
        url = f"{server.url}/v1/completions"
        with monkeypatch.context() as patch:
            fail_after(3, patch)
            *chunks, error, done = events_of(httpx.post(url, json={**BODY, "stream": True}, timeout=60))
            assert chunks and "choices" in chunks[0], "the stream had begun"
            assert json.loads(error)["error"] == {
                "message": REASON,
                "type": "server_error",
                "param": None,
                "code": None,
            }
            assert done == "[DONE]"
            whole = httpx.post(url, json=BODY, timeout=60)
            assert whole.status_code == 500 and whole.json()["error"]["message"] == REASON
            several = httpx.post(url, json={**BODY, "prompt": ["a", "b"], "n": 2}, timeout=60)
            assert several.status_code == 500
            red = httpx.get(f"{server.url}/health")
            assert red.status_code == 503 and "OutOfMemoryError" in red.json()["error"]["message"]
            assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503, "no step has succeeded yet"
        assert httpx.post(url, json={**BODY, "max_tokens": 2}, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/ready").status_code == 200
        assert server.engine.num_requests == 0


def test_a_lost_gpu_ends_the_server(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(make_engine()) as server:
        fail_after(3, monkeypatch)
        monkeypatch.setattr(loop, "has_lost_device", lambda device: True)
        answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": True}, timeout=60)
        *_, error, done = events_of(answer)
        assert json.loads(error)["error"]["message"] == REASON and done == "[DONE]"
        for _ in range(600):
            if not listens(server.url):
                break
            time.sleep(0.05)
        assert not listens(server.url)
        assert not server.engine.is_alive
