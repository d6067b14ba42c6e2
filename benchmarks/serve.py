"""Measure a server with OpenAI's API under load: time to the first token, time between tokens, throughput.

    python benchmarks/serve.py --size 8B --rates 1 4 16 32 --json benchmarks/results/DATE_GPU_serve.json
    python benchmarks/serve.py --url http://127.0.0.1:8000 --model llama --rates 16   # any other server

With `--size` the program builds a model of that shape with random weights, serves it in this process, and first times
the engine alone with the same requests. Clients run in processes of their own and speak plain HTTP/1.1 over sockets.
Requests are random tokens and arrive as a Poisson process; the rate `inf` sends all at once. Times between tokens are
those between the chunks of a stream: a chunk may have more than one token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROCESSES = 4  # of clients, so that reading thousands of chunks a second is not the limit
VOCABULARY = {"tiny": 1024}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Request:
    """What a client saw of one request; times in seconds from the start of the load.

    Attributes:
        due: When the request is sent.
        first: When its first chunk with text or tokens came.
        chunks: When each of these chunks came.
        tokens: The tokens that the usage reports.
        error: What went wrong.
    """

    due: float
    first: float | None = None
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


@dataclass
class Figure:
    """The result of one load.

    Attributes:
        rate: Requests a second; infinite if all came at once.
        requests: Their number.
        failed: Those without a whole answer.
        tokens_per_second: Written tokens over the time from the first request to the last token.
        ttft_ms: The median and the 99th percentile of the time to the first chunk.
        inter_token_ms: The same of the time between chunks.
    """

    rate: float
    requests: int
    failed: int
    tokens_per_second: float
    ttft_ms: tuple[float, float]
    inter_token_ms: tuple[float, float]

    def __str__(self) -> str:
        (ttft, ttft_99), (between, between_99) = self.ttft_ms, self.inter_token_ms
        return (
            f"rate {self.rate:g}/s, {self.requests} requests, {self.failed} failed: "
            f"{self.tokens_per_second:,.0f} tok/s; first token p50 {ttft:.1f} p99 {ttft_99:.1f} ms; "
            f"between tokens p50 {between:.2f} p99 {between_99:.2f} ms"
        )


# --- clients ----------------------------------------------------------------------------------------------------------


async def _send(request: Request, host: str, port: int, path: str, body: bytes, begin: float) -> None:
    await asyncio.sleep(max(0.0, begin + request.due - time.time()))
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        status = (await reader.readline()).split()[1]
        while True:
            line = await reader.readline()
            if not line or line == b"data: [DONE]\n":
                break
            if not line.startswith(b"data: "):
                continue  # a header, a chunk's length, or an empty line
            if b'"choices":[]' in line:
                request.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            else:
                request.chunks.append(time.time() - begin)
        writer.close()
        request.first = request.chunks[0] if request.chunks else None
        if status != b"200" or not request.tokens:
            request.error = f"status {status.decode()}, {request.tokens} tokens"
    except (OSError, IndexError, ValueError) as error:
        request.error = repr(error)


def _client(url: str, bodies: Sequence[bytes], dues: Sequence[float], begin: float, results: Any) -> None:
    parts = urllib.parse.urlsplit(url)
    requests = [Request(due) for due in dues]

    async def main() -> None:
        await asyncio.gather(
            *(
                _send(request, str(parts.hostname), parts.port or 80, "/v1/completions", body, begin)
                for request, body in zip(requests, bodies, strict=True)
            )
        )

    asyncio.run(main())
    results.put(requests)


def load(url: str, model: str, prompts: Sequence[list[int]], new_tokens: int, rate: float, sampling: Any) -> Figure:
    """Send requests at a rate, and return what the clients saw."""
    source = random.Random(0)
    body = {"model": model, "max_tokens": new_tokens, "ignore_eos": True, "stream": True, **sampling}
    body["stream_options"] = {"include_usage": True}
    bodies = [json.dumps({**body, "prompt": prompt}).encode() for prompt in prompts]
    due, dues = 0.0, []
    for _ in prompts:
        dues.append(due)
        due += 0 if rate == float("inf") else source.expovariate(rate)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    begin = time.time() + 3  # the processes start meanwhile
    each = [
        context.Process(target=_client, args=(url, bodies[n::PROCESSES], dues[n::PROCESSES], begin, results))
        for n in range(PROCESSES)
    ]
    for process in each:
        process.start()
    requests = [request for _ in each for request in results.get()]
    for process in each:
        process.join()
    return figure_of(requests, rate)


def figure_of(requests: Sequence[Request], rate: float) -> Figure:
    """Return the figure of a load."""
    good = [request for request in requests if request.error is None and request.first is not None]
    for error in sorted({request.error for request in requests if request.error is not None}):
        print(f"  failed: {error}", file=sys.stderr)
    if not good:
        raise SystemExit("no request succeeded")
    firsts = [request.first - request.due for request in good if request.first is not None]
    between = [
        later - earlier for request in good for earlier, later in zip(request.chunks, request.chunks[1:], strict=False)
    ]
    seconds = max(request.chunks[-1] for request in good) - min(request.due for request in good)
    return Figure(
        rate,
        len(requests),
        len(requests) - len(good),
        sum(request.tokens for request in good) / seconds,
        _percentiles(firsts),
        _percentiles(between),
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return (float("nan"), float("nan"))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return (round(1000 * cuts[49], 3), round(1000 * cuts[98], 3))


# --- our server -------------------------------------------------------------------------------------------------------


def make_tokenizer(size: int) -> Any:
    """Make a tokenizer of byte-level BPE whose every token decodes to a few characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = (f"Ġ{a}{b}{c}{d}" for a in letters for b in letters for c in letters for d in letters)
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    while len(vocabulary) < size:
        vocabulary[next(words)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(size: str) -> Any:
    """Build a model with random weights: on the GPU, or a tiny one on the CPU."""
    if size != "tiny":
        import decode

        return decode.make_model(size)
    import torch

    from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM

    torch.manual_seed(0)
    return NVLlamaForCausalLM(NVLlamaConfig(vocab_size=VOCABULARY["tiny"], max_position_embeddings=2048, **TINY)).eval()


def offline(engine: Any, prompts: Sequence[list[int]], new_tokens: int, sampling: dict[str, Any]) -> float:
    """Return the tokens a second of `Engine.generate` with the same requests."""
    from llama_te_infer import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, **sampling)
    engine.generate(prompts[:8], params)
    engine.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = engine.generate(list(prompts), params)
    seconds = time.perf_counter() - begin
    engine.reset_prefix_cache()
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


async def serve_and_measure(engine: Any, measure: Any) -> Any:
    """Serve an engine in this process while `measure(url)` runs in another thread."""
    import uvicorn

    from llama_te_infer import AsyncEngine
    from llama_te_infer.serve import ServerSettings, create_app
    from llama_te_infer.serve.http_server import HttpServer

    async with AsyncEngine(engine) as requests:
        app = create_app(requests, ServerSettings(("model",)))
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
        server = HttpServer(config, requests, 10, port.set_result)
        serving = asyncio.ensure_future(server.serve())
        try:
            return await asyncio.to_thread(measure, f"http://127.0.0.1:{await port}")
        finally:
            server.should_exit = True
            await serving


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "1B", "8B"], help="serve a model of this shape")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--model", default="model", help="its model's name (default: %(default)s)")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[float("inf")], help="requests a second; inf: at once"
    )
    parser.add_argument("--requests", type=int, default=256, help="for each rate (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--greedy", action="store_true", help="instead of temperature 0.8 and top_p 0.95")
    parser.add_argument("--vocabulary", type=int, default=128256, help="of the random tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if (options.size is None) == (options.url is None):
        parser.error("give either --size or --url")
    source = random.Random(1)
    vocabulary = VOCABULARY.get(options.size, options.vocabulary)
    prompts = [
        [source.randrange(300, vocabulary) for _ in range(options.prompt_tokens)] for _ in range(options.requests)
    ]
    sampling = {"temperature": 0} if options.greedy else {"temperature": 0.8, "top_p": 0.95}

    def measure(url: str) -> list[Figure]:
        figures = []
        for rate in options.rates:
            figures.append(load(url, options.model, prompts, options.new_tokens, rate, sampling))
            print(figures[-1], flush=True)
        return figures

    record: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(options).items()}, **versions()}
    if options.url is not None:
        record["figures"] = [asdict(figure) for figure in measure(options.url)]
    else:
        from llama_te_infer import Engine

        model = make_model(options.size)
        length = -(-(options.prompt_tokens + options.new_tokens) // 64) * 64
        engine = Engine(
            model, make_tokenizer(vocabulary), max_batch_size=options.max_batch_size, max_sequence_length=length
        )
        record["offline_tokens_per_second"] = offline(engine, prompts, options.new_tokens, sampling)
        print(f"engine alone: {record['offline_tokens_per_second']:,.0f} tok/s", flush=True)
        record["figures"] = [asdict(figure) for figure in asyncio.run(serve_and_measure(engine, measure))]
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the software and the GPU."""
    import torch

    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return found


if __name__ == "__main__":
    main()
