"""Two replicas on Ray Serve: they share the load, one may be lost, and one that ends finishes what it has begun."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import StreamingResponse

from llama_te_infer import Engine, SamplingParams
from llama_te_infer.serve.ray import (
    ATTEMPTS,
    Arguments,
    Beginning,
    HttpRequest,
    Ingress,
    Replica,
    _parse,
    app,
    application,
    prompt_of,
)
from llama_te_infer.serve.streams import KEEP_ALIVE

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
OPTIONS: dict[str, Any] = {"served_model_name": "tiny", "max_batch_size": 2, "page_size": 8}


@pytest.fixture(scope="module")
def folder(make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    engine = make_engine()
    engine.model.save_pretrained(path)
    engine.tokenizer.save_pretrained(path)
    return path


# --- the ingress ------------------------------------------------------------------------------------------------------


class Answer:
    """The answer of a replica: parts, and an error at the end or none."""

    def __init__(self, *parts: Beginning | bytes, error: Exception | None = None) -> None:
        self._parts, self._error, self.is_cancelled = iter(parts), error, False

    def __aiter__(self) -> AsyncIterator[Beginning | bytes]:
        return self

    async def __anext__(self) -> Beginning | bytes:
        for part in self._parts:
            return part
        if self._error is None:
            raise StopAsyncIteration
        if isinstance(self._error, TimeoutError):
            await asyncio.sleep(100)
        raise self._error

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A handle for replicas that give prepared answers."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers, self.requests = iter(answers), []
        self.answer = self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, request: HttpRequest) -> Answer:
        self.requests.append(request)
        return next(self.answers)


def request_of(body: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "method": "POST", "path": "/llama/v1/completions", "root_path": "/llama"}
    return Request({**scope, "query_string": b"a=b", "headers": [(b"x", b"y")]}, receive)


def ask(*answers: Answer, body: bytes = b"{}") -> tuple[int, bytes, Handle]:
    handle = Handle(answers)

    async def main() -> tuple[int, bytes]:
        response = await Ingress(handle, 100, True)(request_of(body))
        if isinstance(response, StreamingResponse):
            return response.status_code, b"".join([part async for part in response.body_iterator])
        return response.status_code, response.body

    return *asyncio.run(main()), handle


def lost() -> ActorDiedError:
    return ActorDiedError()


def begins(body: bytes, status: int = 200) -> Beginning:
    return Beginning(status, [(b"content-type", b"text/event-stream")], body)


def test_a_request_passes_through() -> None:
    status, body, handle = ask(Answer(begins(b"one", 201), b"two"), body=b'{"prompt": "Hello"}')
    assert (status, body) == (201, b"onetwo")
    expected = HttpRequest("POST", "/v1/completions", b"a=b", [(b"x", b"y")], b'{"prompt": "Hello"}', "Hello")
    assert handle.requests == [expected]


@pytest.mark.parametrize("parts", [[], [begins(KEEP_ALIVE), KEEP_ALIVE * 2]])
def test_a_request_without_an_answer_is_repeated(parts: list[Beginning | bytes]) -> None:
    status, body, handle = ask(Answer(*parts, error=lost()), Answer(begins(b"one"), b"two"))
    assert (status, body.replace(KEEP_ALIVE, b"")) == (200, b"onetwo")
    assert body.count(KEEP_ALIVE) == 3 * bool(parts) and len(handle.requests) == 2


def test_an_answer_that_has_begun_ends_with_an_event() -> None:
    status, body, handle = ask(Answer(begins(b"data: 1\n\n"), error=lost()))
    first, error, done, rest = body.split(b"\n\n")
    assert (status, first, done, rest) == (200, b"data: 1", b"data: [DONE]", b"") and len(handle.requests) == 1
    assert "send the request again" in json.loads(error.removeprefix(b"data: "))["error"]["message"]


def test_a_refusal_after_keep_alives_is_an_event() -> None:
    refusal = b'{"error": {"message": "busy"}}'
    _, body, _ = ask(Answer(begins(KEEP_ALIVE), error=lost()), Answer(begins(refusal, 429)))
    assert json.loads(body.split(b"\n\n")[1].removeprefix(b"data: ")) == json.loads(refusal)
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("answers", "status", "message"),
    [
        ([Answer(error=lost()) for _ in range(ATTEMPTS)], 503, "is lost"),
        ([Answer(error=BackPressureError(num_queued_requests=1, max_queued_requests=1))], 429, "busy"),
        ([Answer(error=RuntimeError("a secret"))], 500, "failed to answer"),
    ],
)
def test_requests_that_no_replica_answers(answers: list[Answer], status: int, message: str) -> None:
    found, body, handle = ask(*answers)
    assert found == status and message in json.loads(body)["error"]["message"]
    assert b"secret" not in body and len(handle.requests) == len(answers)


def test_a_body_that_is_too_large() -> None:
    status, body, handle = ask(body=b"a" * 101)
    assert status == 413 and b"100 bytes" in body and not handle.requests


def test_a_client_that_leaves_ends_the_answer() -> None:
    waiting = Answer(error=TimeoutError())

    async def main() -> None:
        task = asyncio.ensure_future(Ingress(Handle([waiting]), 100, False)(request_of(b"")))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert waiting.is_cancelled


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"prompt": "ab"}', "ab"),
        (b'{"prompt": [1, 2]}', "[1, 2]"),
        (b'{"messages": [{"role": "user"}]}', '[{"role": "user"}]'),
        *((body, "/") for body in (b"", b"{", b"[]", b"1", b"{}", b'{"prompt": ""}', b"[" * 100_000, b"\xff")),
    ],
)
def test_prompts_for_routing(body: bytes, prompt: str) -> None:
    assert prompt_of(body) == prompt


# --- options ----------------------------------------------------------------------------------------------------------


def test_options() -> None:
    options = {"max_batch_size": 3, "served_model_name": ["a", "b"], "no_enable_prefix_caching": True, "revision": None}
    parsed = _parse("./llama", options)
    assert (parsed.model, parsed.max_batch_size, parsed.served_model_name) == ("./llama", 3, ["a", "b"])
    assert parsed.no_enable_prefix_caching and parsed.revision is None
    assert _parse("m", {"no_enable_prefix_caching": "true", "page_size": "8"}).page_size == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 80}, "port=80 has no effect"),
        ({"enable_rl": True}, "enable_rl=True has no effect on a replica: use `llama-te-serve` for each GPU"),
        ({"max_batch": "x"}, "--max-batch"),
        ({"max_batch_size": 0}, "0 is not possible"),
        ({"no_such_option": 1}, "--no-such-option"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        application("./llama", **options)


def test_the_command_and_python_give_the_same_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_TE_API_KEY", "key")
    words = {"model": "m", "replicas": "3", "num_gpus": "0", "prefix_routing": "true", "max_batch_size": "7"}
    text = '{"ray_actor_options": {"num_cpus": 2}, "max_ongoing_requests": 9}'
    built = app(Arguments.model_validate({**words, "deployment": text}))
    given = {"replicas": 3, "num_gpus": 0, "prefix_routing": True, "max_batch_size": 7}
    same = application("m", **given, deployment=json.loads(text))
    for each in (built, same):
        replicas = each._bound_deployment.init_args[0]._bound_deployment
        assert (replicas.num_replicas, replicas.max_ongoing_requests) == (3, 9)
        assert replicas.ray_actor_options == {"num_gpus": 0, "num_cpus": 2}
        assert replicas.init_args[0].max_batch_size == 7 and replicas.init_args[0].api_key == ["key"]
        # The router's path is private to Ray: this imports it.
        assert replicas._deployment_config.request_router_config.get_request_router_class()


# --- a replica --------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_replica(folder: Path) -> None:
    replica = Replica(_parse(str(folder), OPTIONS))

    async def main() -> None:
        body = json.dumps({**LONG, "stream": True}).encode()
        headers = [(b"content-type", b"application/json")]
        answer = replica.answer(HttpRequest("POST", "/v1/completions", b"", headers, body, ""))
        beginning = await anext(answer)
        assert isinstance(beginning, Beginning) and beginning.status == 200 and beginning.body.startswith(b"data: ")
        assert replica.engine.num_requests == 1
        await answer.aclose()
        while replica.engine.num_requests:
            await asyncio.sleep(0.001)
        parts = [part async for part in replica.answer(HttpRequest("GET", "/nothing", b"", [], b"", ""))]
        assert [part.status for part in parts if isinstance(part, Beginning)] == [404]

    asyncio.run(main())
    replica.check_health()
    replica.engine.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        replica.check_health()
    replica.__del__()
    assert not replica.engine.is_alive


# --- a cluster --------------------------------------------------------------------------------------------------------


def application_of(folder: Path, replicas: int) -> serve.Application:
    # Each replica has one request at a time, so two requests that run have two replicas.
    deployment = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1, "health_check_period_s": 1}
    options = {**OPTIONS, "deployment": deployment, "num_gpus": 0}
    return application(str(folder), replicas=replicas, prefix_routing=True, **options)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, logging_level="error", log_to_driver=False
    )
    serve.start(http_options={"port": 8765})
    serve.run(application_of(folder, 2))
    yield "http://127.0.0.1:8765/v1/completions"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def text(make_engine: Callable[..., Engine]) -> str:
    """The engine's own answer."""
    params = SamplingParams(max_tokens=LONG["max_tokens"], ignore_eos=True, temperature=0)
    return make_engine().generate([LONG["prompt"]], params)[0].outputs[0].text


class Stream:
    """A streamed answer."""

    def __init__(self, stack: ExitStack, url: str) -> None:
        response = stack.enter_context(httpx.stream("POST", url, json={**LONG, "stream": True}, timeout=120))
        assert response.status_code == 200
        self._lines = (line for line in response.iter_lines() if line.startswith("data: "))
        self.events = [next(self._lines)]

    def finish(self) -> tuple[str, dict[str, Any] | None]:
        """Return the text and the error, if there is one."""
        *events, done = self.events + list(self._lines)
        assert done == "data: [DONE]"
        contents = [json.loads(line.removeprefix("data: ")) for line in events]
        text = "".join(each["choices"][0]["text"] for each in contents if "choices" in each)
        return text, contents[-1].get("error")


def names_of_replicas() -> list[str]:
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if "#Replica#" in name]


def test_two_replicas(url: str, text: str, folder: Path) -> None:
    with ExitStack() as stack:
        # Both run at the same time.
        streams = [Stream(stack, url) for _ in range(2)]
        assert [stream.finish() for stream in streams] == [(text, None)] * 2

    assert len(httpx.get(url.replace("completions", "models")).headers.get_list("x-request-id")) == 1

    with ExitStack() as stack:
        streams = [Stream(stack, url) for _ in range(2)]
        ray.kill(ray.get_actor(names_of_replicas()[0], namespace="serve"))
        # This one waited for a replica.
        whole = httpx.post(url, json=LONG, timeout=120)
        assert whole.status_code == 200 and whole.json()["choices"][0]["text"] == text
        (ended, error), (complete, no_error) = sorted(
            (stream.finish() for stream in streams), key=lambda each: not each[1]
        )
        assert error is not None and "send the request again" in error["message"] and text.startswith(ended)
        assert (complete, no_error) == (text, None)

    until(lambda: serve.status().applications["default"].deployments["Replica"].replica_states == {"RUNNING": 2}, 300)
    # One replica alone reads this prompt, although the other one has as little to do.
    body = {**LONG, "prompt": "x" * 64, "max_tokens": 1}
    usages = [httpx.post(url, json=body, timeout=120).json()["usage"] for _ in range(7)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0 and all(cached[1:])

    with ExitStack() as stack:
        streams = [Stream(stack, url) for _ in range(2)]
        serve.run(application_of(folder, 1))
        assert [stream.finish() for stream in streams] == [(text, None)] * 2
    until(lambda: len(names_of_replicas()) == 1)
    assert httpx.post(url, json=LONG, timeout=120).json()["choices"][0]["text"] == text
