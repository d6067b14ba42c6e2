"""A server with a tiny model on a port of its own, and clients for it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from openai import OpenAI
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from byte_tokenizers import chat_tokenizer
from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import AsyncEngine, Engine
from llama_te_infer.serve import ServerSettings, create_app
from llama_te_infer.serve.http_server import HttpServer
from llama_te_infer.serve.loading import load_weights

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class RunningServer:
    """A server, and what tests look at from outside."""

    def __init__(self, url: str, engine: AsyncEngine) -> None:
        self.url, self.engine = url, engine
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer(TEMPLATE)


@pytest.fixture(scope="session")
def make_engine(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Engine]:
    """Makes an engine for a tiny model with random weights, which writes any bytes; EOS is `<|end|>`."""

    def make(max_position_embeddings: int = 512, **options: Any) -> Engine:
        torch.manual_seed(0)
        fields = {"vocab_size": 259, "initializer_range": 0.3, "num_hidden_layers": 1}
        fields["max_position_embeddings"] = max_position_embeddings
        config = LlamaConfig(**{**TINY, **fields, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258})
        model = convert_llama_hf_to_te(LlamaForCausalLM(config).eval())
        return Engine(model, byte_tokenizer, **{"max_batch_size": 4, "page_size": 8, **options})

    return make


@contextmanager
def serving(
    engine: Engine, *, max_requests: int | None = None, drain_timeout: float = 30, **settings: Any
) -> Iterator[RunningServer]:
    """Run a server in a thread; at the end no page is in use and no thread is left."""
    ready: list[int] = []
    began, stop = threading.Event(), threading.Event()
    running: list[Any] = []

    async def main() -> None:
        async with AsyncEngine(engine, max_requests=max_requests, load_weights=load_weights) as requests:
            # A server that several tests share writes no lines of its own into the log that one of them reads.
            quiet = {"model_names": ("tiny",), "log_interval": None}
            app = create_app(requests, ServerSettings(**{**quiet, **settings}))
            config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")

            def note(port: int) -> None:
                ready.append(port)
                running.append(requests)
                began.set()

            server = HttpServer(config, requests, drain_timeout, note)
            running.append(server)
            serving = asyncio.ensure_future(server.serve())
            while not serving.done():
                if stop.is_set():
                    server.should_exit = True
                await asyncio.sleep(0.02)
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert began.wait(30)
        yield RunningServer(f"http://127.0.0.1:{ready[0]}", running[1])
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    engine.reset_prefix_cache()
    blocks = engine.scheduler.blocks
    assert not engine.has_unfinished and blocks.available == blocks.pool.total_num_pages


@pytest.fixture(scope="session")
def server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    """One server for all tests that change nothing about it. Earlier prompts do not change its roundings."""
    with serving(make_engine(prefix_caching=False)) as running:
        yield running


@pytest.fixture(scope="session")
def reference(make_engine: Callable[..., Engine]) -> Engine:
    """A second engine for the same model: the oracle of the server's answers."""
    return make_engine(prefix_caching=False)


@pytest.fixture(scope="session")
def folder(make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model; its generation_config draws tokens."""
    path = tmp_path_factory.mktemp("tiny")
    engine = make_engine()
    engine.model.generation_config.do_sample, engine.model.generation_config.temperature = True, 0.5
    engine.model.save_pretrained(path)
    engine.tokenizer.save_pretrained(path)
    return path


@dataclass
class RunningCommand:
    """`llama-te-serve` as a process of its own."""

    popen: subprocess.Popen[str]
    url: str

    @property
    def engine_pid(self) -> int:
        """The process that runs the engine."""
        (pid,) = children_of(self.popen.pid)
        return pid


@contextmanager
def running_command(folder: Path, *options: str, pages: str = "256 pages of 8 tokens") -> Iterator[RunningCommand]:
    """Run `llama-te-serve` on a free port; it must say that it has these pages."""
    command = [sys.executable, "-m", "llama_te_infer.serve", str(folder), "--port", "0"]
    command += ["--served-model-name", "tiny", "alias", "--max-batch-size", "4", "--page-size", "8", *options]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        sizes = rf"4 sequences of up to 512 tokens on cpu; weights 0\.00 GiB, cache 0\.00 GiB \({pages}\)"
        found = re.fullmatch(rf"Ready after [\d.]+ s: tiny at (http://127.0.0.1:\d+), {sizes}\n", line)
        assert found, line + (popen.stderr.read() if popen.stderr and popen.poll() is not None else "")
        yield RunningCommand(popen, found[1])
    finally:
        popen.kill()
        popen.communicate()


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                children.append(int(status.parent.name))
    return children
