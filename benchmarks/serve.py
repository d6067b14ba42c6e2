r"""Measure servers with OpenAI's API under load: time to the first token, time between tokens, throughput.

    python benchmarks/serve.py --size 8B --rates 1 4 16 32 inf --output results
    python benchmarks/serve.py --size 8B --rates 1 4 16 32 inf --output results \
        --server vllm "vllm serve {config} --load-format dummy --served-model-name model --port {port}"
    python benchmarks/serve.py --url other http://127.0.0.1:8000 --rates 16

With `--size` the program writes a checkpoint of that shape with random weights. If `inf` is one of the rates, it times
`Engine.generate` with the same requests in a process of its own. Then it starts `llama-te-serve` and each further
`--server`, one after the other. In their commands `{checkpoint}` is the folder with the weights in Transformer Engine's
layout, `{config}` a folder with Hugging Face's configuration and the tokenizer alone, and `{port}` a free port.

Clients run in processes of their own and speak plain HTTP/1.1 over sockets. Requests are random tokens and arrive as a
Poisson process; the rate `inf` sends all at once. All servers get the same requests, no two of which begin alike. Times
between tokens are those between the chunks of a stream: a chunk may have more than one token. `--output` is a folder;
each result is a line of JSON in its file serve.jsonl.

With `--leave 0.3` three of ten clients close their connection in the middle of an answer. Afterwards the program says
what is left of their requests: running and waiting ones, pages of the cache, and the growth of memory and descriptors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import queue
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shapes import LLAMA_3, VOCABULARY

PROCESSES = 4  # of clients, so that reading thousands of chunks a second is not the limit
POSITIONS = 8192  # of the models, so that a kept checkpoint serves other lengths too
LEAST_REQUESTS = 24  # for percentiles
JSON_TYPE = {"Content-Type": "application/json"}
TINY_VOCABULARY = 1024
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
        patience: The client leaves after so many chunks.
    """

    due: float
    patience: float = float("inf")
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
        failed: Those without a whole answer, although the client stayed.
        left: Those whose client left.
        tokens_per_second: Written tokens over the time from the first request to the last token.
        ttft_ms: The median and the 99th percentile of the time to the first chunk.
        inter_token_ms: The same of the time between chunks.
    """

    rate: float
    requests: int
    failed: int
    left: int
    tokens_per_second: float
    ttft_ms: tuple[float, float]
    inter_token_ms: tuple[float, float]

    def __str__(self) -> str:
        (ttft, ttft_99), (between, between_99) = self.ttft_ms, self.inter_token_ms
        return (
            f"rate {self.rate:g}/s, {self.requests} requests, {self.left} left, {self.failed} failed: "
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
                if len(request.chunks) >= request.patience:
                    break
        writer.close()
        request.first = request.chunks[0] if request.chunks else None
        if len(request.chunks) >= request.patience:
            return
        if status != b"200" or not request.tokens:
            request.error = f"status {status.decode()}, {request.tokens} tokens"
    except (OSError, IndexError, ValueError) as error:
        request.error = repr(error)


def _client(url: str, bodies: Sequence[bytes], requests: Sequence[Request], begin: float, results: Any) -> None:
    parts = urllib.parse.urlsplit(url)

    async def main() -> None:
        await asyncio.gather(
            *(
                _send(request, str(parts.hostname), parts.port or 80, "/v1/completions", body, begin)
                for request, body in zip(requests, bodies, strict=True)
            )
        )

    asyncio.run(main())
    results.put(requests)


def load(
    url: str,
    model: str,
    prompts: Sequence[list[int]],
    new_tokens: int,
    rate: float,
    sampling: dict[str, Any],
    leave: float = 0.0,
) -> Figure:
    """Send requests at a rate, and return what the clients saw. A share of `leave` of them leave in the middle."""
    source = random.Random(0)
    body = {"model": model, "max_tokens": new_tokens, "ignore_eos": True, "stream": True, **sampling}
    body["stream_options"] = {"include_usage": True}
    bodies = [json.dumps({**body, "prompt": prompt}).encode() for prompt in prompts]
    due, sent = 0.0, []
    for _ in prompts:
        patience = source.randrange(1, new_tokens) if source.random() < leave else float("inf")
        sent.append(Request(due, patience))
        due += 0 if rate == float("inf") else source.expovariate(rate)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    begin = time.time() + 3  # the processes start meanwhile
    each = [
        context.Process(target=_client, args=(url, bodies[n::PROCESSES], sent[n::PROCESSES], begin, results))
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
    stayed = [request for request in requests if len(request.chunks) < request.patience]
    good = [request for request in stayed if request.error is None and request.first is not None]
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
        len(stayed) - len(good),
        len(requests) - len(stayed),
        sum(request.tokens for request in good) / seconds,
        _percentiles(firsts),
        _percentiles(between),
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return (float("nan"), float("nan"))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return (round(1000 * cuts[49], 3), round(1000 * cuts[98], 3))


# --- servers ----------------------------------------------------------------------------------------------------------


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


def write_checkpoint(size: str, vocabulary: int, positions: int, checkpoint: Path, config: Path) -> None:
    """Write a checkpoint with random weights, and a folder with Hugging Face's configuration. Runs in its own process.

    Args:
        size: "1B", "8B", or "tiny" for a CPU.
        vocabulary: Its tokens.
        positions: Most tokens of a sequence.
        checkpoint: The folder with the weights.
        config: The folder without.
    """
    import torch
    from transformers import LlamaConfig

    from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM

    fields = (TINY if size == "tiny" else LLAMA_3[size]) | {
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if size == "tiny" else torch.bfloat16)
    with torch.device("cpu" if size == "tiny" else "cuda"):
        model = NVLlamaForCausalLM(NVLlamaConfig(**fields)).eval()
    model.save_pretrained(checkpoint)
    llama = LlamaConfig(**fields, architectures=["LlamaForCausalLM"], dtype=torch.get_default_dtype())
    llama.save_pretrained(config)
    tokenizer = make_tokenizer(vocabulary)
    for folder in (checkpoint, config):
        tokenizer.save_pretrained(folder)


def offline(
    checkpoint: Path, length: int, rows: int, prompts: Sequence[list[int]], new_tokens: int, sampling: dict[str, Any]
) -> float:
    """Return the tokens a second of `Engine.generate` for a checkpoint."""
    from llama_te_infer import SamplingParams
    from llama_te_infer.serve.loading import make_engine
    from llama_te_infer.serve.settings import EngineSettings

    settings = EngineSettings(str(checkpoint), max_batch_size=rows, max_sequence_length=length)
    engine, _ = make_engine(settings, lambda stage: None)
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, **sampling)
    rates = []
    for _ in range(3):  # the first time captures CUDA graphs and warms caches
        engine.reset_prefix_cache()
        begin = time.perf_counter()
        outputs = engine.generate(list(prompts), params)
        seconds = time.perf_counter() - begin
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
    return max(rates)


def _call(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    results.put(function(*arguments))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its memory on the GPU is free afterwards."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_call, args=(results, function, arguments))
    process.start()
    while True:
        with suppress(queue.Empty):
            result = results.get(timeout=1)
            break
        if not process.is_alive() and results.empty():
            raise SystemExit(f"{function.__name__} has failed")
    process.join()
    return result


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def started(
    command: Sequence[str], url: str, prompt: list[int], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, float]]]:
    """Run a server; yield its process, and the seconds until it is healthy and until its first token."""
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not _is_healthy(url):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} has ended with status {process.returncode}: see {log}")
            time.sleep(0.05)
        seconds = {"seconds_to_ready": time.perf_counter() - begin}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps({"prompt": prompt, "max_tokens": 1}).encode(), JSON_TYPE
        )
        with urllib.request.urlopen(request) as answer:
            answer.read()
        yield process, seconds | {"seconds_to_first_token": time.perf_counter() - begin}
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def leavings(url: str, process: subprocess.Popen[bytes] | None) -> dict[str, float]:
    """Return what a server holds when all clients are gone. Waits until it has nothing to do, but at most 30 s.

    Args:
        url: Of a server with vLLM's metrics.
        process: The server, if its memory and its descriptors count too.
    """
    names = {"running": "num_requests_running", "waiting": "num_requests_waiting", "cache": "kv_cache_usage_perc"}
    held: dict[str, float] = {}
    for _ in range(300):
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        held = {
            key: sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}"))
            for key, name in names.items()
        }
        if not any(held.values()):
            break
        time.sleep(0.1)
    if process is not None:
        pids = [process.pid, *_children(process.pid)]
        held["descriptors"] = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        statuses = [Path(f"/proc/{pid}/status").read_text().splitlines() for pid in pids]
        held["megabytes"] = sum(int(line.split()[1]) for lines in statuses for line in lines if "VmRSS" in line) / 1024
    return held


def _children(pid: int) -> list[int]:
    found = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "1B", "8B"], help="measure llama-te with a model of this shape")
    parser.add_argument("--server", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"),
                        help="start this server too; needs --size")  # fmt: skip
    parser.add_argument("--url", nargs=2, action="append", default=[], metavar=("NAME", "URL"),
                        help="measure a server that runs already")  # fmt: skip
    parser.add_argument("--model", default="model", help="the served model's name (default: %(default)s)")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[float("inf")], help="requests a second; inf: at once"
    )
    parser.add_argument("--requests", type=int, default=256, help="most for each rate (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="most seconds in which requests arrive (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument(
        "--leave", type=float, default=0.0, help="the share of clients that leave (default: %(default)s)"
    )
    parser.add_argument("--greedy", action="store_true", help="instead of temperature 0.8 and top_p 0.95")
    parser.add_argument("--vocabulary", type=int, help="of the random tokens (default: the model's)")
    parser.add_argument("--output", type=Path, help="a folder; add lines to its serve.jsonl")
    parser.add_argument(
        "--checkpoint", type=Path, help="keep the checkpoint in this folder, and read it if it is there"
    )
    options = parser.parse_args()
    if options.size is None and (options.server or not options.url):
        parser.error("give --size, or --url alone")
    vocabulary = options.vocabulary or (TINY_VOCABULARY if options.size == "tiny" else VOCABULARY)
    sampling = {"temperature": 0} if options.greedy else {"temperature": 0.8, "top_p": 0.95}
    record = _recorder(options, vocabulary)

    def prompts(rate: float) -> list[list[int]]:
        source = random.Random(str(rate))  # a number and its negative would be the same seed
        return [
            [source.randrange(300, vocabulary) for _ in range(options.prompt_tokens)] for _ in range(options.requests)
        ]

    def measure(name: str, url: str, process: subprocess.Popen[bytes] | None = None, **more: Any) -> None:
        load(url, options.model, prompts(-1)[: options.max_batch_size], 16, float("inf"), sampling)  # warms up
        for rate in options.rates:
            sent = prompts(rate)
            if rate < float("inf"):
                sent = sent[: max(int(options.seconds * rate), LEAST_REQUESTS)]
            before = leavings(url, process) if options.leave else {}
            figure = load(url, options.model, sent, options.new_tokens, rate, sampling, options.leave)
            print(f"{name}: {figure}", flush=True)
            if options.leave:
                after = leavings(url, process)
                more["leavings"] = {key: round(value - before[key], 3) for key, value in after.items()}
                print(f"{name}: left behind: {more['leavings']}", flush=True)
            record(server=name, **more, **asdict(figure))

    with tempfile.TemporaryDirectory() as temporary:
        if options.size is not None:
            folder = options.checkpoint or Path(temporary)
            places = {"checkpoint": folder / "checkpoint", "config": folder / "config"}
            length = -(-(options.prompt_tokens + options.new_tokens) // 64) * 64
            if not places["config"].exists():
                in_own_process(write_checkpoint, options.size, vocabulary, max(length, POSITIONS), *places.values())
            if float("inf") in options.rates:
                arguments = (options.max_batch_size, prompts(float("inf")), options.new_tokens, sampling)
                alone = in_own_process(offline, places["checkpoint"], length, *arguments)
                print(f"engine alone: {alone:,.0f} tok/s", flush=True)
                record(server="engine alone", tokens_per_second=alone)
            ours = [sys.executable, "-m", "llama_te_infer.serve", "{checkpoint}", "--served-model-name", "model"]
            ours += ["--port", "{port}", "--max-batch-size", str(options.max_batch_size)]
            ours += ["--max-sequence-length", str(length)]
            servers = [("llama-te", ours), *((name, shlex.split(command)) for name, command in options.server)]
            for name, command in servers:
                port = free_port()
                command = [part.format(port=port, **places) for part in command]
                url, log = f"http://127.0.0.1:{port}", (options.output or Path(temporary)) / f"{name}.log"
                with started(command, url, prompts(0)[0], log) as (process, seconds):
                    print(f"{name}: " + ", ".join(f"{value:.1f} {key}" for key, value in seconds.items()), flush=True)
                    measure(name, url, process, **seconds)
    for name, url in options.url:
        measure(name, url)


def _recorder(options: argparse.Namespace, vocabulary: int) -> Callable[..., None]:
    """Return a function that adds a line to the results."""
    import torch

    about = {
        "size": options.size,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "greedy": options.greedy,
        "vocabulary": vocabulary,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)

    def record(**values: Any) -> None:
        if options.output is not None:
            with (options.output / "serve.jsonl").open("a") as file:
                file.write(json.dumps(about | values) + "\n")

    return record


if __name__ == "__main__":
    main()
