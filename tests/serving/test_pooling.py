"""Embeddings and scores equal transformers', whatever else is in the same pass."""

from __future__ import annotations

import asyncio
import base64
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from conftest import TINY
from llama_te_infer import Engine
from llama_te_infer.engine.client import DrainingError, EngineFailedError, QueueFullError
from llama_te_infer.engine.pooling import PoolingEngine
from llama_te_infer.serve import ServerSettings, create_app
from llama_te_infer.serve.command import load_engine, main, make_parser
from llama_te_infer.serve.loading import task_of
from serving.conftest import RunningServer
from serving.test_openapi import check, without_more_fields

Result = TypeVar("Result")
TEXTS = ["one", "a longer text", "é", "x" * 40]


def config(**more: Any) -> LlamaConfig:
    fields = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return LlamaConfig(**{**TINY, **fields, **more})


@pytest.fixture(scope="module")
def folders(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of transformers: a language model, a classifier with one class, and one with three."""
    torch.manual_seed(0)
    models = {
        "text": LlamaForCausalLM(config(matryoshka_dimensions=[16])),
        "one": LlamaForSequenceClassification(config(num_labels=1)),
        "three": LlamaForSequenceClassification(config(num_labels=3)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        byte_tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> Iterator[dict[str, PoolingEngine]]:
    loaded = {}
    for name, folder in folders.items():
        options = make_parser().parse_args([str(folder), "--runner", "pooling", "--prefill-budget", "32"])
        engine, _ = load_engine(options)
        assert isinstance(engine, PoolingEngine)
        loaded[name] = engine
    yield loaded
    for engine in loaded.values():
        engine.close()


def ask(engine: Any, call: Callable[[httpx.AsyncClient], Awaitable[Result]], **settings: Any) -> Result:
    """Call an application without a network."""

    async def run() -> Result:
        app = create_app(engine, ServerSettings(model_names=("tiny",), **settings))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return await call(client)

    return asyncio.run(run())


def post(engine: Any, path: str, **body: Any) -> httpx.Response:
    return ask(engine, lambda client: client.post(path, json=body))


def embeddings_of(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Return the embeddings of transformers, one prompt at a time."""
    model = LlamaForCausalLM.from_pretrained(folder).model.eval()
    with torch.no_grad():
        last = [model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    return torch.nn.functional.normalize(torch.stack(last), dim=-1)


@pytest.fixture(scope="module")
def rows(byte_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return byte_tokenizer(TEXTS)["input_ids"]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], rows: list[list[int]]) -> torch.Tensor:
    return embeddings_of(folders["text"], rows)


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_embeddings_through_the_openai_client(
    engines: dict[str, PoolingEngine], expected: torch.Tensor, rows: list[list[int]], encoding: Any
) -> None:
    async def call(client: httpx.AsyncClient) -> Any:
        openai = AsyncOpenAI(base_url="http://tiny/v1", api_key="none", http_client=client, max_retries=0)
        # The client asks for base64 by itself.
        options = {} if encoding == "base64" else {"encoding_format": encoding}
        return await openai.embeddings.create(model="tiny", input=TEXTS, **options)

    answer = ask(engines["text"], call)
    assert [each.index for each in answer.data] == [0, 1, 2, 3] and answer.model == "tiny"
    torch.testing.assert_close(torch.tensor([each.embedding for each in answer.data]), expected, rtol=0, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, rows))


def test_forms_of_inputs(engines: dict[str, PoolingEngine], expected: torch.Tensor, rows: list[list[int]]) -> None:
    def vectors(**body: Any) -> torch.Tensor:
        answer = post(engines["text"], "/v1/embeddings", **body)
        assert answer.status_code == 200, answer.text
        return torch.tensor([each["embedding"] for each in answer.json()["data"]])

    def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

    close(vectors(input=TEXTS[1]), expected[1:2])
    close(vectors(input=rows[2]), expected[2:3])
    close(vectors(input=rows), expected)
    without_bos = vectors(input=TEXTS[1], add_special_tokens=False)
    close(without_bos, vectors(input=rows[1][1:]))
    assert (without_bos - expected[1:2]).abs().max() > 0.01
    cut = vectors(input=TEXTS, dimensions=16)
    close(cut, torch.nn.functional.normalize(expected[:, :16], dim=-1))
    raw = vectors(input=TEXTS, use_activation=False)
    assert (raw.norm(dim=-1) - 1).abs().min() > 0.01
    close(torch.nn.functional.normalize(raw, dim=-1), expected)


def test_base64_is_little_endian(engines: dict[str, PoolingEngine], expected: torch.Tensor) -> None:
    answer = post(engines["text"], "/v1/embeddings", input=TEXTS[0], encoding_format="base64")
    content = base64.b64decode(answer.json()["data"][0]["embedding"])
    assert struct.unpack(f"<{len(content) // 4}f", content) == pytest.approx(expected[0].tolist(), abs=1e-6)


def test_scores_of_a_classifier(
    engines: dict[str, PoolingEngine], folders: dict[str, Path], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = LlamaForSequenceClassification.from_pretrained(folders["one"]).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([byte_tokenizer("query", text)["input_ids"]])).logits[0, 0] for text in TEXTS]

    def scores(path: str = "/score", **body: Any) -> list[float]:
        answer = post(engines["one"], path, **body)
        assert answer.status_code == 200, answer.text
        assert [each["index"] for each in answer.json()["data"]] == list(range(len(TEXTS)))
        return [each["score"] for each in answer.json()["data"]]

    wanted = torch.stack(logits)
    assert scores(text_1="query", text_2=TEXTS) == pytest.approx(wanted.sigmoid().tolist(), abs=1e-6)
    assert scores("/v1/score", queries=["query"] * 4, documents=TEXTS) == pytest.approx(
        wanted.sigmoid().tolist(), abs=1e-6
    )
    assert scores(text_1="query", text_2=TEXTS, use_activation=False) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_answers_fit_the_schema(engines: dict[str, PoolingEngine]) -> None:
    schema = without_more_fields(ask(engines["text"], lambda client: client.get("/openapi.json")).json())
    for encoding in ("float", "base64"):
        answer = post(engines["text"], "/v1/embeddings", input=["a", "b"], encoding_format=encoding)
        check(schema, "/v1/embeddings", answer)
    for path in ("/score", "/v1/score"):
        check(schema, path, post(engines["text"], path, text_1="a", text_2="b"))


def test_metrics_count_tokens(engines: dict[str, PoolingEngine], rows: list[list[int]]) -> None:
    def tokens() -> float:
        text = ask(engines["text"], lambda client: client.get("/metrics")).text
        return float(re.findall(r"^vllm:prompt_tokens_total{.*} (.*)$", text, re.MULTILINE)[0])

    before = tokens()
    post(engines["text"], "/v1/embeddings", input=rows)
    assert tokens() - before == sum(map(len, rows))


def test_scores_of_embeddings_are_cosines(engines: dict[str, PoolingEngine], expected: torch.Tensor) -> None:
    answer = post(engines["text"], "/score", text_1=TEXTS[0], text_2=TEXTS).json()
    assert [each["score"] for each in answer["data"]] == pytest.approx((expected @ expected[0]).tolist(), abs=1e-6)
    assert answer["object"] == "list" and answer["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("name", "path", "body", "status", "message"),
    [
        ("text", "/v1/embeddings", {"input": []}, 400, "input=[] is not possible"),
        ("text", "/v1/embeddings", {"input": [[]]}, 400, "0 tokens"),
        ("text", "/v1/embeddings", {"input": [[1], [259]]}, 400, "input[1] has the token 259"),
        ("text", "/v1/embeddings", {"input": "a" * 100}, 400, "max_sequence_length=64"),
        ("text", "/v1/embeddings", {"input": "a", "dimensions": 32}, 400, "trained for 16, 64"),
        ("text", "/v1/embeddings", {"input": "a", "temperature": 1}, 400, "temperature is no field"),
        ("text", "/v1/embeddings", {"input": "a", "model": "other"}, 404, "not served here"),
        ("text", "/score", {"text_1": "a"}, 400, "text_1 and text_2 are needed"),
        ("text", "/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400, "2 texts and text_2 has 1"),
        ("text", "/score", {"text_1": "a", "text_2": "b", "use_activation": False}, 400, "no effect on a cosine"),
        ("text", "/v1/completions", {"prompt": "a"}, 400, "writes no text"),
        ("one", "/v1/embeddings", {"input": "a"}, 404, "ask /score"),
        ("three", "/score", {"text_1": "a", "text_2": "b"}, 404, "3 classes"),
    ],
)
def test_wrong_requests(
    engines: dict[str, PoolingEngine], name: str, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    answer = post(engines[name], path, **body)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    assert engines[name].num_requests == 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/score"])
def test_a_model_that_writes_text_says_how_to_get_them(server: RunningServer, path: str) -> None:
    answer = httpx.post(f"{server.url}{path}", json={"input": "a"})
    assert answer.status_code == 404 and "--convert embed" in answer.json()["error"]["message"]


def test_prompts_share_passes(engines: dict[str, PoolingEngine], rows: list[list[int]]) -> None:
    engine = engines["text"]
    passes: list[int] = []
    handle = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    asyncio.run(engine.pool(rows))
    handle.remove()
    # At most 32 tokens together; the last prompt has more.
    assert passes == [sum(map(len, rows[:3])), len(rows[3])]


def test_limits_and_failures(folders: dict[str, Path]) -> None:
    engine, _ = load_engine(make_parser().parse_args([str(folders["text"]), "--convert", "embed"]))
    assert isinstance(engine, PoolingEngine)
    engine.max_requests = 1
    fails = False

    def hook(*_: Any) -> None:
        if fails:
            raise RuntimeError("out of memory")

    engine.model.register_forward_pre_hook(hook)

    async def run() -> None:
        nonlocal fails
        waiting = asyncio.ensure_future(engine.pool([[1]] * 50))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await engine.pool([[1]])
        waiting.cancel()
        await asyncio.wait([waiting])
        assert engine.num_requests == 0
        fails = True
        with pytest.raises(EngineFailedError, match="out of memory"):
            await engine.pool([[1], [2]])
        assert engine.failure is not None
        fails = False
        await engine.pool([[1]])
        assert engine.failure is None
        assert await engine.drain(10)
        with pytest.raises(DrainingError):
            await engine.pool([[1]])

    asyncio.run(run())
    engine.close()
    assert not engine.is_alive


@pytest.mark.parametrize(
    ("name", "runner", "convert", "task"),
    [
        ("text", "auto", "auto", "generate"),
        ("text", "generate", "none", "generate"),
        ("text", "pooling", "auto", "embed"),
        ("text", "auto", "embed", "embed"),
        ("one", "auto", "auto", "classify"),
        ("one", "pooling", "none", "classify"),
        ("one", "auto", "embed", "embed"),
        ("nowhere", "auto", "auto", "generate"),
    ],
)
def test_what_a_model_does(folders: dict[str, Path], name: str, runner: str, convert: str, task: str) -> None:
    assert task_of(str(folders.get(name, name)), runner, convert) == task


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("text", ["--convert", "classify"], "needs a checkpoint for sequence classification"),
        ("text", ["--convert", "embed", "--runner", "generate"], "contradicts --runner generate"),
        ("text", ["--runner", "pooling", "--convert", "none"], "is no classifier"),
        ("one", ["--runner", "generate"], "writes no text"),
        ("one", ["--page-size", "8"], "--page-size has no effect"),
        ("one", ["--max-model-len", "1000"], "max_sequence_length=1000"),
    ],
)
def test_wrong_options(
    folders: dict[str, Path], name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folders[name]), "--port", "0", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_command_serves_embeddings(folders: dict[str, Path], expected: torch.Tensor) -> None:
    command = [sys.executable, "-m", "llama_te_infer.serve", str(folders["text"]), "--convert", "embed", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stderr is not None
            line = running.stdout.readline()
            found = re.search(r"at (http://[\d.:]+), PoolingEngine\(64 numbers a prompt, 64 tokens\)", line)
            assert found, line + running.stderr.read()
            client = OpenAI(base_url=f"{found[1]}/v1", api_key="none")
            answer = client.embeddings.create(model=str(folders["text"]), input=TEXTS[0])
            assert answer.data[0].embedding == pytest.approx(expected[0].tolist(), abs=1e-6)
            assert httpx.get(f"{found[1]}/health").status_code == 200
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
        finally:
            running.kill()


def test_a_limit_above_the_models(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match="max_sequence_length=1000"):
        PoolingEngine(make_engine().model, None, max_sequence_length=1000)
