"""The endpoints for reinforcement learning: pauses, sleep, new weights; the engine is in a thread or a process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openapi_spec_validator import validate
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import AsyncEngine, Engine, SamplingParams
from llama_te_infer.engine.client import DrainingError
from serving.conftest import RunningCommand, running_command, serving
from serving.test_openapi import check, without_more_fields

PROMPT = "The sky is"
LENGTH = 450
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0}
POSTS = ("/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/update_weights")
GETS = ("/is_paused", "/is_sleeping")


class Client:
    """A server, and what its clients do at the same time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._threads = ThreadPoolExecutor(8)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=60, **fields)

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}").json()

    def begin(self, path: str, **fields: Any) -> Future[httpx.Response]:
        """Send a request in another thread."""
        return self._threads.submit(self.post, path, **fields)

    def complete(self, **body: Any) -> Any:
        answer = self.post("/v1/completions", json=LONG | body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def stream(self, **body: Any) -> Future[tuple[str, str]]:
        """Begin a stream; return once it has a token. The result is the text and the finish reason."""
        has_begun = threading.Event()

        def read() -> tuple[str, str]:
            text, reason = "", ""
            body_ = LONG | {"stream": True} | body
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body_, timeout=60) as answer:
                lines = list(self._noted(answer.iter_lines(), has_begun))
            assert lines[-1] == "data: [DONE]"
            for line in lines[:-1]:
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text, reason = text + choice["text"], choice["finish_reason"] or reason
            return text, reason

        result = self._threads.submit(read)
        assert has_begun.wait(30)
        return result

    @staticmethod
    def _noted(lines: Iterator[str], has_begun: threading.Event) -> Iterator[str]:
        for line in lines:
            if line.startswith("data: "):
                has_begun.set()
                yield line

    def metric(self, name: str) -> float:
        found = re.search(rf"^vllm:{name}.* (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found
        return float(found[1])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def threaded(make_engine: Callable[..., Engine]) -> Iterator[Client]:
    with serving(make_engine(), enable_rl=True) as server:
        yield Client(server.url)


@pytest.fixture(scope="module")
def own_process(folder: Path) -> Iterator[Client]:
    with running_command(folder, "--enable-rl") as running:
        yield Client(running.url)


@pytest.fixture(params=["threaded", "own_process"])
def client(request: pytest.FixtureRequest, folder: Path) -> Iterator[Client]:
    """A server that is as before after each test."""
    client: Client = request.getfixturevalue(request.param)
    yield client
    assert client.post("/wake_up").status_code == 200
    assert client.post("/update_weights", json=weights(folder)).status_code == 200
    until(lambda: client.metric("num_requests_waiting") + client.metric("num_requests_running") == 0)


def weights(checkpoint: Path | str) -> dict[str, Any]:
    return {"update_info": {"checkpoint": str(checkpoint)}}


def hf_model(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    own = {"vocab_size": 259, "initializer_range": 0.3, "num_hidden_layers": 1, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **own, "eos_token_id": 257, **fields})).eval()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other weights, in the Hugging Face layout."""
    path = tmp_path_factory.mktemp("other")
    hf_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(reference: Engine) -> str:
    return greedy(reference)


def greedy(engine: Engine, length: int = LENGTH) -> str:
    params = SamplingParams(max_tokens=length, ignore_eos=True, temperature=0)
    return engine.generate([PROMPT], params)[0].outputs[0].text


# --- pausing ----------------------------------------------------------------------------------------------------------


def test_abort_ends_requests_with_what_they_have(client: Client, text: str) -> None:
    stream = client.stream()
    whole = client.begin("/v1/completions", json=LONG)
    until(lambda: client.metric("num_requests_running") == 2)
    answer = client.post("/pause")
    assert (answer.status_code, answer.json()) == (200, {"status": "paused"})
    assert client.get("/is_paused") == {"is_paused": True}
    streamed, reason = stream.result(10)
    (choice,) = whole.result(10).json()["choices"]
    assert reason == choice["finish_reason"] == "abort"
    for part in (streamed, choice["text"]):
        assert text.startswith(part.rstrip("\ufffd")) and len(part) < len(text)
    assert client.metric("num_requests_running") == 0


def test_wait_lets_requests_finish_and_holds_new_ones(client: Client, text: str) -> None:
    stream = client.stream()
    pause = client.begin("/pause", params={"mode": "wait", "clear_cache": "false"})
    until(lambda: client.get("/is_paused")["is_paused"])
    new = client.begin("/v1/completions", json={**LONG, "max_tokens": 3})
    assert pause.result(30).json() == {"status": "paused"}
    assert stream.result(1) == (text, "length")
    until(lambda: client.metric("num_requests_waiting") == 1)
    assert not new.done()
    assert client.post("/resume").json() == {"status": "resumed"}
    assert new.result(10).json()["choices"][0]["finish_reason"] == "length"
    assert client.get("/is_paused") == {"is_paused": False}


def test_keep_freezes_requests(client: Client, text: str) -> None:
    stream = client.stream()
    assert client.post("/pause?mode=keep").status_code == 200
    new = client.begin("/v1/completions", json={**LONG, "max_tokens": 3})
    until(lambda: client.metric("num_requests_waiting") == 1)
    written = client.metric("generation_tokens_total")
    time.sleep(0.1)
    assert client.metric("generation_tokens_total") == written and not stream.done() and not new.done()
    assert httpx.get(f"{client.url}/ready").status_code == 200
    client.post("/resume")
    assert stream.result(30) == (text, "length") and new.result(30).status_code == 200


def test_a_second_pause_changes_the_mode_and_spares_what_waits(client: Client) -> None:
    assert client.post("/resume").json() == {"status": "resumed"}  # without a pause
    stream = client.stream()
    for _ in range(2):
        assert client.post("/pause?mode=keep").status_code == 200
    new = client.begin("/v1/completions", json={**LONG, "max_tokens": 3})
    until(lambda: client.metric("num_requests_waiting") == 1)
    assert client.post("/pause?mode=abort").status_code == 200
    assert stream.result(10)[1] == "abort" and not new.done()
    assert client.post("/pause?mode=wait").status_code == 200
    assert not new.done()
    client.post("/resume")
    assert new.result(10).json()["choices"][0]["finish_reason"] == "length"


def test_kept_requests_may_finish_in_a_later_pause(client: Client, text: str) -> None:
    stream = client.stream()
    client.post("/pause?mode=keep")
    assert client.post("/pause?mode=wait").status_code == 200
    assert stream.result(1) == (text, "length")


def test_a_pause_that_ends_before_the_engine_is_quiet(client: Client, text: str) -> None:
    stream = client.stream()
    pause = client.begin("/pause?mode=wait")
    until(lambda: client.get("/is_paused")["is_paused"])
    client.post("/resume")
    answer = pause.result(10)
    assert answer.status_code == 409 and "resumed before it was quiet" in answer.json()["error"]["message"]
    assert stream.result(30) == (text, "length")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_abort_of_chats_and_responses(threaded: Client, path: str) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400}
    body = {"ignore_eos": True} | (chat if "chat" in path else {"input": "a", "max_output_tokens": 400})
    calls = [threaded.begin(path, json=body), threaded.begin(path, json=body | {"stream": True})]
    until(lambda: threaded.metric("num_requests_running") == 2)
    threaded.post("/pause")
    whole, stream = (call.result(10) for call in calls)
    threaded.post("/resume")
    if "chat" in path:
        assert whole.json()["choices"][0]["finish_reason"] == "abort"
        assert '"finish_reason":"abort"' in stream.text and "error" not in stream.text
    else:
        assert whole.json()["incomplete_details"] == {"reason": "abort"}
        assert "event: response.incomplete\n" in stream.text and '"reason":"abort"' in stream.text


def test_waiting_requests_count_and_clients_may_leave(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), enable_rl=True, max_requests=2, keep_alive_interval=0.01) as server:
        client = Client(server.url)
        client.post("/pause")

        async def leave() -> None:
            async with httpx.AsyncClient() as http:
                bodies = [LONG, LONG | {"stream": True}]
                calls = [asyncio.ensure_future(http.post(f"{server.url}/v1/completions", json=each)) for each in bodies]
                while server.engine.stats().num_requests_waiting < 2:
                    await asyncio.sleep(0.001)
                refused = await http.post(f"{server.url}/v1/completions", json=LONG)
                assert refused.status_code == 429
                for call in calls:
                    call.cancel()

        asyncio.run(leave())
        until(lambda: server.engine.num_requests == 0)
        stream = client.begin("/v1/completions", json=LONG | {"stream": True, "max_tokens": 1})
        until(lambda: server.engine.num_requests == 1)
        time.sleep(0.05)
        client.post("/resume")
        assert stream.result(10).text.startswith(": keep-alive\n\n")


# --- sleep ------------------------------------------------------------------------------------------------------------


def test_sleep_with_a_request_that_is_kept(client: Client, text: str) -> None:
    stream = client.stream()
    answer = client.post("/sleep?mode=keep")
    assert (answer.status_code, answer.json()) == (200, {"status": "sleeping"})
    assert client.get("/is_sleeping") == {"is_sleeping": True} and client.get("/is_paused") == {"is_paused": True}
    assert client.metric('engine_sleep_state.*"awake"') == 0
    codes = [httpx.get(f"{client.url}{path}").status_code for path in ("/ready", "/health")]
    assert codes == [503, 200]
    new = client.begin("/v1/completions", json={**LONG, "max_tokens": 3})
    until(lambda: client.metric("num_requests_waiting") == 2)
    assert client.get("/is_sleeping") == {"is_sleeping": True}
    for path in ("/resume", "/pause?mode=wait"):
        refused = client.post(path)
        assert refused.status_code == 409 and "wake it" in refused.json()["error"]["message"]
    assert client.post("/sleep?mode=keep").status_code == 200
    assert client.post("/wake_up").json() == {"status": "awake"}
    assert stream.result(30) == (text, "length") and new.result(10).status_code == 200
    assert client.get("/is_sleeping") == {"is_sleeping": False} and client.get("/is_paused") == {"is_paused": False}
    assert client.metric('engine_sleep_state.*"awake"') == 1
    assert httpx.get(f"{client.url}/ready").status_code == 200


def test_sleep_ends_requests_or_lets_them_finish(client: Client, text: str) -> None:
    stream = client.stream()
    assert client.post("/sleep?level=1&mode=wait").status_code == 200
    assert stream.result(1) == (text, "length")
    client.post("/wake_up")
    stream = client.stream()
    client.post("/sleep?mode=keep")
    assert client.post("/pause").status_code == 200  # asleep
    assert stream.result(10)[1] == "abort" and client.get("/is_sleeping") == {"is_sleeping": True}
    client.post("/wake_up")
    assert client.complete()["text"] == text


def test_waking_without_memory(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    with serving(engine, enable_rl=True) as server:
        client = Client(server.url)
        client.post("/sleep")
        new = client.begin("/v1/completions", json={**LONG, "max_tokens": 3})
        until(lambda: server.engine.num_requests == 1)
        with monkeypatch.context() as patch:
            patch.setattr("llama_te_infer.engine.limits.free_memory", lambda device: 1000)
            refused = client.post("/wake_up")
            assert refused.status_code == 409 and "total_num_pages=" in refused.json()["error"]["message"]
            assert client.get("/is_sleeping") == {"is_sleeping": True}
        assert client.post("/wake_up").status_code == 200 and new.result(10).status_code == 200


def test_the_prefix_cache_is_forgotten(client: Client) -> None:
    def hits() -> float:
        client.complete(max_tokens=1, prompt=PROMPT * 4)
        return client.metric("prefix_cache_hits_total")

    before = hits()
    assert hits() == before + 40
    assert client.post("/reset_prefix_cache").json() == {"success": True}
    assert hits() == before + 40
    client.post("/pause?clear_cache=false")
    client.post("/resume")
    assert hits() == before + 80
    client.post("/pause")
    client.post("/resume")
    assert hits() == before + 80


# --- weights ----------------------------------------------------------------------------------------------------------


def test_new_weights_write_their_own_texts(
    client: Client, other: Path, folder: Path, text: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = greedy(Engine(convert_llama_hf_to_te(hf_model()), byte_tokenizer, max_batch_size=4, page_size=8))
    assert client.complete()["text"] == text != expected
    for pause, resume in (("/pause?mode=keep", "/resume"), ("/sleep", "/wake_up")):
        client.post(pause)
        answer = client.post("/update_weights", json=weights(other))
        assert (answer.status_code, answer.json()) == (200, {"message": "Weights updated"}), answer.text
        client.post(resume)
        assert client.complete()["text"] == expected
        assert client.post("/update_weights", json=weights(folder)).status_code == 200  # without a pause
        assert client.complete()["text"] == text


def test_weights_of_a_checkpoint_with_a_precision_of_its_own(
    threaded: Client, folder: Path, tmp_path: Path, text: str, other: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_precision": ["fp8"], "use_quantized_model_init": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert threaded.post("/update_weights", json=weights(other)).status_code == 200
    assert threaded.post("/update_weights", json=weights(tmp_path)).status_code == 200
    assert threaded.complete()["text"] == text


@pytest.mark.parametrize("pauses", [False, True])
def test_requests_in_progress_go_on_with_new_weights(client: Client, other: Path, text: str, pauses: bool) -> None:
    stream = client.stream(return_token_ids=True)
    if pauses:
        client.post("/pause?mode=keep")
    assert client.post("/update_weights", json=weights(other)).status_code == 200
    client.post("/resume")
    written, reason = stream.result(30)
    assert reason == "length" and written != text and written[:1] == text[:1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "weights has 'model.layers.1."),
        ({"hidden_size": 128}, "weights has "),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "weights has num_attention_heads=2, but the engine's"),
    ],
)
def test_a_checkpoint_of_another_size_changes_nothing(
    client: Client, tmp_path: Path, text: str, fields: dict[str, Any], message: str
) -> None:
    hf_model(**fields).save_pretrained(tmp_path)
    stream = client.stream()
    answer = client.post("/update_weights", json=weights(tmp_path))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "update_info.checkpoint" and message in error["message"]
    assert stream.result(30) == (text, "length")
    assert client.complete()["text"] == text


def test_checkpoints_that_cannot_be_read(client: Client, tmp_path: Path, folder: Path, text: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "none").mkdir()
    wrong = {
        tmp_path / "nowhere": "nowhere",
        tmp_path / "none": "none",
        folder / "config.json": "is a file, but no .gguf file",
    }
    for checkpoint, message in wrong.items():
        answer = client.post("/update_weights", json=weights(checkpoint))
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert client.post("/update_weights", json=weights(tmp_path)).status_code in (400, 500)
    assert client.complete()["text"] == text


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("/pause?mode=stop", {}, "mode='stop' is not possible: Input should be 'abort', 'wait' or 'keep'."),
        ("/pause?clear_cache=maybe", {}, "clear_cache='maybe' is not possible"),
        ("/pause?reason=x", {}, "reason is no field of this request"),
        ("/pause?wait_for_inflight_requests=true", {}, "wait_for_inflight_requests is not supported: it is the older"),
        ("/pause", {"json": {"mode": "keep"}}, "The body must be empty: parameters stand in the address. This endpoi"),
        ("/resume?mode=keep", {}, "mode is no field of this request"),
        ("/sleep?level=2", {}, "level='2' is not possible: the weights stay on the device, so give level=1"),
        ("/sleep?clear_cache=true", {}, "clear_cache is no field"),
        ("/wake_up?tags=weights", {}, "tags is not supported: the engine sleeps and wakes as a whole"),
        ("/reset_prefix_cache?reset_running_requests=true", {}, "reset_running_requests is not supported"),
        ("/update_weights", {"json": {}}, "update_info={} is not possible: Field required"),
        ("/update_weights", {"json": {"update_info": {"checkpoint": ""}}}, "update_info.checkpoint='' is not possible"),
        ("/update_weights", {"json": {"update_info": {"checkpoint": "a", "x": 1}}}, "update_info.x is no field"),
        (
            "/update_weights",
            {"json": {"update_info": {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[1]]}}},
            "update_info.names is not supported: weights do not come over NCCL",
        ),
        ("/update_weights?a=1", {"json": {"update_info": {"checkpoint": "a"}}}, "a is no field of this request"),
    ],
)
def test_what_is_refused_by_name(threaded: Client, address: str, options: dict[str, Any], message: str) -> None:
    answer = threaded.post(address, **options)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert threaded.get("/is_paused") == {"is_paused": False}


def test_other_pages_may_not_pause(make_engine: Callable[..., Engine], threaded: Client) -> None:
    page = {"Origin": "https://example.org"}
    assert threaded.post("/pause", headers=page).status_code == 403
    assert threaded.post("/resume", headers={"Origin": threaded.url}).status_code == 200
    with serving(make_engine(), enable_rl=True, allowed_origins=("https://example.org",)) as server:
        assert Client(server.url).post("/resume", headers=page).status_code == 200


def test_the_endpoints_are_absent_by_default_and_need_the_key(make_engine: Callable[..., Engine], server: Any) -> None:
    assert [httpx.post(f"{server.url}{path}").status_code for path in POSTS] == [404] * len(POSTS)
    assert [httpx.get(f"{server.url}{path}").status_code for path in GETS] == [404] * len(GETS)
    with serving(make_engine(), enable_rl=True, api_keys=("key",)) as own:
        assert [httpx.post(f"{own.url}{path}").status_code for path in POSTS] == [401] * len(POSTS)
        assert [httpx.get(f"{own.url}{path}").status_code for path in GETS] == [401] * len(GETS)
        assert httpx.post(f"{own.url}/pause", headers={"Authorization": "Bearer key"}).status_code == 200


def test_the_schema_describes_the_endpoints(threaded: Client, folder: Path) -> None:
    schema = threaded.get("/openapi.json")
    validate(schema)
    exact = without_more_fields(schema)
    for path in POSTS:
        operation = schema["paths"][path]["post"]
        assert operation["description"] and ("requestBody" in operation) == (path == "/update_weights")
        body = weights(folder) if path == "/update_weights" else None
        check(exact, path, threaded.post(path, json=body))
    for path in GETS:
        check(exact, path, httpx.get(f"{threaded.url}{path}"))
    assert [each["name"] for each in schema["paths"]["/pause"]["post"]["parameters"]] == ["mode", "clear_cache"]


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(folder: Path) -> Iterator[RunningCommand]:
    """A server that a test may end."""
    with running_command(folder, "--enable-rl") as running:
        yield running


def test_a_signal_ends_a_sleep_and_requests_finish(own: RunningCommand, text: str) -> None:
    client = Client(own.url)
    stream = client.stream()
    client.post("/sleep?mode=keep")
    new = client.begin("/v1/completions", json={**LONG, "max_tokens": 3})
    until(lambda: client.metric("num_requests_waiting") >= 1)
    own.popen.send_signal(signal.SIGTERM)
    assert stream.result(30) == (text, "length")
    assert new.result(30).json()["choices"][0]["finish_reason"] == "length"
    assert own.popen.wait(30) == 0
    assert "Traceback" not in own.popen.stderr.read()


def test_the_engines_death_in_a_pause(own: RunningCommand) -> None:
    client = Client(own.url)
    stream = client.begin("/v1/completions", json=LONG | {"n": 4, "temperature": 1, "stream": True})
    until(lambda: client.metric("num_requests_running") == 4)
    pause = client.begin("/pause?mode=wait")
    until(lambda: client.get("/is_paused")["is_paused"])
    os.kill(own.engine_pid, signal.SIGKILL)
    reason = "the engine's process has ended with signal 9 (SIGKILL)"
    answer = pause.result(10)
    assert answer.status_code == 500 and reason in answer.json()["error"]["message"]
    assert reason in stream.result(10).text
    assert own.popen.wait(30) == 1


def test_draining(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)

    async def drained(action: str, has_memory: bool, begins: bool) -> None:
        engine = make_engine()
        async with AsyncEngine(engine) as requests:
            stream = await requests.stream(PROMPT, params) if begins else None
            await (requests.sleep("keep") if action == "sleep" else requests.pause("keep"))
            if not has_memory:
                monkeypatch.setattr("llama_te_infer.engine.limits.free_memory", lambda device: 1000)
            begin = time.monotonic()
            assert await requests.drain(20) == (has_memory or not begins)
            assert time.monotonic() - begin < 10
            if stream is not None:
                output = await stream.finish()
                assert output.outputs[0].finish_reason == ("length" if has_memory else "cancelled")
            assert requests.is_asleep == (action == "sleep" and not (has_memory and begins))
            for call in (requests.pause(), requests.sleep(), requests.update_weights("a")):
                with pytest.raises(DrainingError):
                    await call

    asyncio.run(drained("pause", has_memory=True, begins=True))
    asyncio.run(drained("sleep", has_memory=True, begins=True))
    asyncio.run(drained("sleep", has_memory=True, begins=False))
    asyncio.run(drained("sleep", has_memory=False, begins=True))


def test_closing_in_a_pause(make_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        requests = AsyncEngine(make_engine())
        stream = await requests.stream(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
        pause = asyncio.ensure_future(requests.pause("wait"))
        await asyncio.sleep(0)
        await asyncio.to_thread(requests.close)
        assert (await stream.finish()).outputs[0].finish_reason == "cancelled"
        for call in (pause, requests.resume(), requests.wake(), requests.reset_prefix_cache()):
            with pytest.raises(DrainingError):
                await call

    asyncio.run(main())
