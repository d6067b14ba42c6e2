"""`llama-te-serve` as a process: it says when it is ready, finishes what it has accepted, and ends with a status."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_te_infer import Engine
from llama_te_infer.serve.command import main, make_parser

COMMAND = [sys.executable, "-m", "llama_te_infer.serve"]


@pytest.fixture(scope="module")
def folder(make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    engine = make_engine()
    engine.model.generation_config.do_sample, engine.model.generation_config.temperature = True, 0.5
    engine.model.save_pretrained(path)
    engine.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    options = ["--port", "0", "--served-model-name", "tiny", "alias", "--max-batch-size", "4", "--page-size", "8"]
    running = subprocess.Popen(
        [*COMMAND, str(folder), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.fullmatch(r"Ready after [\d.]+ s: tiny at (http://127.0.0.1:\d+), Engine\(4 rows .*\)\n", line)
        assert found, line + (running.stderr.read() if running.stderr and running.poll() is not None else "")
        yield running, found[1]
    finally:
        running.kill()
        running.communicate()


def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(process: Any) -> None:
    running, url = process
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
    reached, texts = threading.Event(), []

    def read() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                texts.append(line)
                reached.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert reached.wait(30)
    running.send_signal(signal.SIGTERM)
    statuses = set()
    while running.poll() is None and reader.is_alive():
        try:
            statuses.add(httpx.get(f"{url}/ready").status_code)
            if 503 in statuses:
                refused = httpx.post(f"{url}/v1/completions", json={"prompt": "b"})
                assert refused.status_code == 503 and refused.headers["Retry-After"]
                break
        except httpx.TransportError:
            break
    reader.join(60)
    chunks = [json.loads(line.removeprefix("data: ")) for line in texts if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length" and texts[-2:] == ["data: [DONE]", ""]
    assert running.wait(30) == 0
    assert "Traceback" not in running.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "nowhere"),
        (["FOLDER", "--port", "70000"], "--port 70000 is not possible"),
        (["FOLDER", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000 cannot be used"),
        (["FOLDER", "--chat-template", "./nothing.jinja"], "nothing.jinja"),
        (["FOLDER", "--max-sequence-length", "10000"], "max_sequence_length=10000"),
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
    "arguments", [[], ["m", "--max-batch-size", "0"], ["m", "--drain-timeout", "-1"], ["m", "--x"]]
)
def test_wrong_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(arguments)
    assert "usage: llama-te-serve" in capsys.readouterr().err
