"""The command `llama-te-serve`, and `python -m llama_te_infer.serve`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.client import EngineFailedError
from ..kv_cache.names import KV_CACHE_DTYPES
from .loading import Task, check_source, make_engine, make_pooling_engine, task_of
from .tool_calls import TOOL_FORMATS, ToolFormat

if TYPE_CHECKING:
    from ..engine.async_engine import AsyncEngine
    from ..engine.pooling import PoolingEngine
    from .engine_process.client import EngineProcess
    from .settings import EngineSettings, ServerSettings

_DESCRIPTION = """Serves a Llama with OpenAI's API. MODEL is a folder with the Transformer Engine or the Hugging Face
layout, a GGUF file, or a hub id. Options with vLLM's names mean what they mean there."""
_MODULES = {  # of each extra
    "serve": ("fastapi", "msgspec", "prometheus_client", "uvicorn"),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp"),
}
SECONDS_BEFORE_PROGRESS = 2
SECONDS_BETWEEN_PROGRESS = 10
# Options that mean nothing to embeddings and scores.
_OF_GENERATION = ["fp8_recipe", "generation_config", "logprobs_mode", "max_batch_size", "page_size", "total_num_pages"]
_OF_GENERATION += ["gpu_memory_utilization", "no_enable_prefix_caching", "kv_cache_dtype", "enable_rl"]
FAILED = 1
WRONG_ARGUMENTS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until a signal ends it.

    Args:
        arguments: Those of the command line by default.

    Returns:
        The exit status: 0 after SIGTERM or Ctrl-C, 1 if the GPU failed or the server could not start, 2 for wrong
        arguments.
    """
    options = make_parser().parse_args(arguments)
    extras = ["serve"] if options.otlp_traces_endpoint is None else ["serve", "otel"]
    for extra in extras:
        if missing := [name for name in _MODULES[extra] if not _is_installed(name)]:
            print(f"llama-te-serve: needs {', '.join(missing)}: pip install 'llama-te-infer[{extra}]'", file=sys.stderr)
            return FAILED
    try:
        return asyncio.run(_serve(options))
    except (OSError, ValueError, EngineFailedError) as error:
        print(f"llama-te-serve: {error}", file=sys.stderr)
        return FAILED


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make the parser of the command.

    Args:
        parser_class: A class that treats errors in another way.
    """
    parser = parser_class(prog="llama-te-serve", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or hub id")
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", help='"0.0.0.0" for all networks (default: %(default)s)')
    group.add_argument("--port", type=int, default=8000, help="0 for a free one (default: %(default)s)")
    group.add_argument("--api-key", nargs="+", default=[], metavar="KEY", help="keys that requests need; or the "
                       "environment variable LLAMA_TE_API_KEY, with commas between them")  # fmt: skip
    group.add_argument("--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="other pages that may call")
    group = parser.add_argument_group("model")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="default: MODEL as given")
    group.add_argument("--tokenizer", help="another tokenizer's folder or hub id")
    group.add_argument("--revision", help="of a hub repository")
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the tokenizer's own")
    group.add_argument("--tool-call-parser", default="auto", choices=["auto", *TOOL_FORMATS],
                       help="the format of the model's calls of tools; auto knows all")  # fmt: skip
    group.add_argument("--enable-auto-tool-choice", action=argparse.BooleanOptionalAction, default=True,
                       help='answer requests with tool_choice "auto" (default: yes)')  # fmt: skip
    group.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
                       help="default: the checkpoint's own")  # fmt: skip
    group.add_argument("--device", help="such as cuda:0; default: a GPU if there is one")
    group.add_argument("--fp8-recipe", choices=["delayed", "current", "block"], help="compute all layers in FP8")
    group.add_argument("--generation-config", default="auto", choices=["auto", "none"],
                       help="auto: the checkpoint's temperature and the like are the defaults")  # fmt: skip
    group.add_argument("--logprobs-mode", default="raw_logprobs", choices=["raw_logprobs", "processed_logprobs"],
                       help="processed: after temperature, penalties and filters (default: %(default)s)")  # fmt: skip
    group.add_argument("--runner", default="auto", choices=["auto", "generate", "pooling"],
                       help="auto: pooling if the checkpoint is a classifier or has no head")  # fmt: skip
    group.add_argument("--convert", default="auto", choices=["auto", "none", "embed", "classify"],
                       help="embed: serve embeddings of a model that writes text")  # fmt: skip
    group = parser.add_argument_group("engine")
    group.add_argument("--max-batch-size", "--max-num-seqs", type=_positive, default=256, metavar="N",
                       help="sequences that run at the same time (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-sequence-length", "--max-model-len", type=_positive, metavar="N",
                       help="most tokens of a sequence; default: the model's limit")  # fmt: skip
    group.add_argument("--page-size", "--block-size", type=_positive, default=64, metavar="N", help="tokens of a page")
    group.add_argument("--total-num-pages", type=_positive, metavar="N", help="default: what fits into the memory")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="of the GPU's whole memory, for "
                       "weights and cache, from 0 to 1; default: 85%% of what the weights leave")  # fmt: skip
    group.add_argument("--prefill-budget", "--max-num-batched-tokens", type=_positive, default=2048, metavar="N",
                       help="most prompt tokens in a step (default: %(default)s)")  # fmt: skip
    group.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES,
                       help="how keys and values are stored; fp8: nearly twice as many pages fit (default: as the "
                       "model computes)")  # fmt: skip
    group.add_argument("--no-enable-prefix-caching", action="store_true", help="compute each prompt from its beginning")
    group = parser.add_argument_group("operation")
    group.add_argument("--max-requests", type=_positive, default=1024, metavar="N",
                       help="most requests that run and wait; more get status 429 (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-body-bytes", type=_positive, default=16 << 20, metavar="N", help="default: 16 MiB")
    group.add_argument("--request-timeout", type=_seconds, metavar="S", help="end requests after so many seconds")
    group.add_argument("--drain-timeout", type=_seconds, default=30.0, metavar="S",
                       help="after SIGTERM, wait so long for running requests (default: %(default)s)")  # fmt: skip
    group.add_argument("--enable-rl", action="store_true", help="answer /pause, /resume, /sleep, /wake_up, "
                       "/reset_prefix_cache and /update_weights, for reinforcement learning")  # fmt: skip
    group = parser.add_argument_group("observation")
    group.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    group.add_argument("--log-requests", "--enable-log-requests", nargs="?", const="parameters",
                       choices=["parameters", "content"], help="log a line when a request begins and when it ends; "
                       "content: with prompts and texts")  # fmt: skip
    group.add_argument("--log-interval", type=_interval, default=10.0, metavar="S",
                       help="log load and tokens a second so often (default: %(default)s)")  # fmt: skip
    group.add_argument("--disable-log-stats", action="store_true", help="do not log load and tokens a second")
    group.add_argument("--otlp-traces-endpoint", metavar="URL", help="send a span for each request to this "
                       "OpenTelemetry collector; needs the extra otel")  # fmt: skip
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible: give an integer of at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not possible: give a number of seconds")
    return value


def _interval(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not possible: give a number of seconds, or --disable-log-stats")
    return value


async def _serve(options: argparse.Namespace) -> int:
    # Before the model loads, so that a wrong address is told at once.
    check_source(options.model)
    with _bound(options.host, options.port) as address:
        return await _serve_at(address, options)


async def _serve_at(address: socket.socket, options: argparse.Namespace) -> int:
    from .engine_process.client import EngineProcess

    begin = time.monotonic()
    options.api_key = [*options.api_key, *keys_of_environment()]
    settings = server_settings(options)
    task = _task_of(options)
    progress = _Progress(options.model)
    starting: asyncio.Future[EngineProcess | PoolingEngine]
    if task == "generate":
        starting = asyncio.ensure_future(
            EngineProcess.start(engine_settings(options), max_requests=options.max_requests, say=progress.say)
        )
    else:
        loop = asyncio.get_running_loop()

        def say(stage: str) -> None:
            loop.call_soon_threadsafe(progress.say, stage)

        def load() -> PoolingEngine:
            return make_pooling_engine(engine_settings(options), task, options.max_requests, say)

        starting = asyncio.ensure_future(asyncio.to_thread(load))
    await asyncio.sleep(0)  # the process starts before the imports
    if task == "generate" and not options.model.endswith(".gguf"):  # transformers needs torch to read these
        from llama_te_core.compat.transformers import import_for_tokenizers

        import_for_tokenizers()
    import uvicorn

    from .app import create_app
    from .http_server import HttpServer
    from .logs import logging_config

    try:
        engine = await starting
    finally:
        progress.end()
    try:
        settings = with_defaults(settings, options, engine.sampling_defaults)
        config = uvicorn.Config(
            create_app(engine, settings),
            log_config=logging_config(options.log_level),
            log_level=options.log_level,
            access_log=options.log_level == "debug",
            lifespan="off",
        )

        def say_ready(port: int) -> None:
            seconds, url = time.monotonic() - begin, f"http://{options.host}:{port}"
            print(f"Ready after {seconds:.1f} s: {settings.model_names[0]} at {url}, {engine.description}", flush=True)

        await HttpServer(config, engine, options.drain_timeout, say_ready).serve([address])
        return 0 if engine.is_alive else FAILED
    finally:
        await asyncio.to_thread(engine.close)


class _Progress:
    """Says on stderr what takes so long.

    Args:
        model: As the operator gave it.
    """

    def __init__(self, model: str) -> None:
        self._model, self._stage = model, "starting"
        self._begin = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(SECONDS_BEFORE_PROGRESS, self._show)

    def say(self, stage: str) -> None:
        """Note what is about to happen."""
        self._stage = stage
        if time.monotonic() - self._begin > SECONDS_BEFORE_PROGRESS:
            self._timer.cancel()
            self._show()

    def end(self) -> None:
        """Say no more."""
        self._timer.cancel()

    def _show(self) -> None:
        seconds = time.monotonic() - self._begin
        print(f"llama-te-serve: {self._model}: {self._stage} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        self._timer = asyncio.get_running_loop().call_later(SECONDS_BETWEEN_PROGRESS, self._show)


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket with the address, which does not listen yet."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is not possible: give a number from 1 to 65535, or 0 for a free one.")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"--host {host} --port {port} cannot be used: {error.strerror}.") from error
    return bound


def keys_of_environment() -> list[str]:
    """Return the API keys that the environment variable LLAMA_TE_API_KEY holds."""
    return [key for key in os.environ.get("LLAMA_TE_API_KEY", "").split(",") if key]


def _task_of(options: argparse.Namespace) -> Task:
    """Return what the model is to do.

    Raises:
        ValueError: Options contradict each other or the checkpoint, or have no effect.
    """
    task = task_of(options.model, options.runner, options.convert)
    if task != "generate":
        parser = make_parser()
        for name in _OF_GENERATION:
            if getattr(options, name) != parser.get_default(name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} has no effect on a model that writes no text: leave it out.")
    return task


def load_engine(options: argparse.Namespace) -> tuple[AsyncEngine | PoolingEngine, ServerSettings]:
    """Return an engine for the model in this process, and the settings of the server.

    Args:
        options: Of the command.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: An option or the checkpoint does not fit.
    """
    settings = server_settings(options)
    task = _task_of(options)
    if task != "generate":
        return make_pooling_engine(engine_settings(options), task, None, lambda stage: None), settings
    engine, sampling_defaults = make_engine(engine_settings(options), lambda stage: None)
    from ..engine.async_engine import AsyncEngine

    return AsyncEngine(engine), with_defaults(settings, options, sampling_defaults)


def engine_settings(options: argparse.Namespace) -> EngineSettings:
    """Return what the command's options say about the engine."""
    from .settings import EngineSettings

    return EngineSettings(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        fp8_recipe=options.fp8_recipe,
        tokenizer=options.tokenizer,
        revision=options.revision,
        max_batch_size=options.max_batch_size,
        max_sequence_length=options.max_sequence_length,
        page_size=options.page_size,
        total_num_pages=options.total_num_pages,
        gpu_memory_utilization=options.gpu_memory_utilization,
        prefill_budget=options.prefill_budget,
        prefix_caching=not options.no_enable_prefix_caching,
        kv_cache_dtype=options.kv_cache_dtype,
    )


def server_settings(options: argparse.Namespace) -> ServerSettings:
    """Return what the command's options say about the server. The checkpoint's own defaults are not known yet.

    Raises:
        OSError: There is no such chat template.
    """
    from .settings import ServerSettings

    return ServerSettings(
        model_names=tuple(options.served_model_name or [options.model]),
        api_keys=tuple(options.api_key),
        chat_template=Path(options.chat_template).read_text() if options.chat_template else None,
        tool_formats=_tool_formats(options),
        max_body_bytes=options.max_body_bytes,
        request_timeout=options.request_timeout,
        enable_rl=options.enable_rl,
        allowed_origins=tuple(options.allowed_origins),
        log_requests=options.log_requests,
        log_interval=None if options.disable_log_stats else options.log_interval,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
    )


def _tool_formats(options: argparse.Namespace) -> tuple[ToolFormat, ...]:
    if not options.enable_auto_tool_choice:
        return ()
    return TOOL_FORMATS if options.tool_call_parser == "auto" else (options.tool_call_parser,)


def with_defaults(
    settings: ServerSettings, options: argparse.Namespace, sampling_defaults: Mapping[str, Any]
) -> ServerSettings:
    """Return settings with the operator's defaults for `SamplingParams`, and the checkpoint's if they are wanted."""
    mode = options.logprobs_mode.removesuffix("_logprobs")
    of_checkpoint = {} if options.generation_config == "none" else sampling_defaults
    return dataclasses.replace(settings, default_params={**of_checkpoint, "logprobs_mode": mode})
