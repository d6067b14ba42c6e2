"""`llama-te-serve` as a process: it says when it is ready, finishes what it has accepted, and ends with a status."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from llama_te_infer import Engine, SamplingParams
from llama_te_infer.serve.command import main, make_parser
from serving.conftest import RunningCommand, children_of, running_command


@pytest.fixture
def process(folder: Path) -> Iterator[RunningCommand]:
    with running_command(folder) as running:
        yield running


def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(process: RunningCommand) -> None:
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    count = 12  # four run, and eight wait
    reached, texts = threading.Barrier(count + 1), []

    def read() -> None:
        with httpx.stream("POST", f"{process.url}/v1/completions", json=body, timeout=300) as answer:
            reached.wait(60)  # the engine has accepted the request
            texts.append(list(answer.iter_lines()))

    readers = [threading.Thread(target=read) for _ in range(count)]
    for reader in readers:
        reader.start()
    reached.wait(60)
    process.popen.send_signal(signal.SIGTERM)
    statuses = set()
    while process.popen.poll() is None and readers[-1].is_alive():
        try:
            statuses.add(httpx.get(f"{process.url}/ready").status_code)
            if 503 in statuses:
                refused = httpx.post(f"{process.url}/v1/completions", json={"prompt": "b"})
                assert refused.status_code == 503 and refused.headers["Retry-After"]
                break
        except httpx.TransportError:
            break
    for reader in readers:
        reader.join(300)
    assert len(texts) == count
    for lines in texts:
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length" and lines[-2:] == ["data: [DONE]", ""]
    assert process.popen.wait(30) == 0
    assert "Traceback" not in process.popen.stderr.read()
    assert not children_of(process.popen.pid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "nowhere"),
        (["FOLDER", "--port", "70000"], "--port 70000 is not possible"),
        (["FOLDER", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000 cannot be used"),
        (["FOLDER", "--chat-template", "./nothing.jinja"], "nothing.jinja"),
        (["FOLDER", "--max-sequence-length", "10000"], "max_sequence_length=10000"),
        (["FOLDER", "--kv-cache-dtype", "bfloat16"], "kv_cache_dtype='bfloat16', but the layers compute in float32"),
        (["FOLDER/config.json"], "no .gguf file"),
    ],
)
def test_wrong_arguments_give_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("FOLDER", str(folder)) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llama-te-serve: ") and message in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["m", "--max-batch-size", "0"],
        ["m", "--drain-timeout", "-1"],
        ["m", "--x"],
        ["m", "--kv-cache-dtype", "fp8_e5m2"],
    ],
)
def test_wrong_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(arguments)
    assert "usage: llama-te-serve" in capsys.readouterr().err


def test_an_fp8_cache(folder: Path, make_engine: Callable[..., Engine]) -> None:
    prompt, params = list(range(3, 40)), SamplingParams(max_tokens=20, temperature=0, logprobs=0)
    (expected,) = make_engine(kv_cache_dtype="fp8").generate([prompt], params)
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "logprobs": 0, "return_token_ids": True}
    with running_command(folder, "--kv-cache-dtype", "fp8", pages="256 pages of 8 tokens, fp8") as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)
        metrics = httpx.get(f"{running.url}/metrics").text
    (choice,), (completion,) = answer.json()["choices"], expected.outputs
    assert choice["token_ids"] == completion.token_ids
    logprobs = [step.logprob for step in completion.logprobs]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-6)
    (other,) = make_engine().generate([prompt], params)
    assert logprobs != pytest.approx([step.logprob for step in other.outputs[0].logprobs], abs=1e-3)
    labels = 'block_size="8",cache_dtype="fp8",enable_prefix_caching="True",engine="0",num_gpu_blocks="256"'
    assert f"vllm:cache_config_info{{{labels}}} 1.0" in metrics
