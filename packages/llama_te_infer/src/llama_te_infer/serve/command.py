"""The command `llama-te-serve`, and `python -m llama_te_infer.serve`."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from .settings import ServerSettings

_DESCRIPTION = """Serves a Llama with OpenAI's API. MODEL is a folder with the Transformer Engine or the Hugging Face
layout, a GGUF file, or a hub id. Options with vLLM's names mean what they mean there."""
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
    try:
        import uvicorn  # noqa: F401

        from . import app  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"llama-te-serve: {error}: pip install 'llama-te-infer[serve]'", file=sys.stderr)
        return FAILED
    try:
        return asyncio.run(_serve(options))
    except (OSError, ValueError) as error:
        print(f"llama-te-serve: {error}", file=sys.stderr)
        return FAILED


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
    group.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
                       help="default: the checkpoint's own")  # fmt: skip
    group.add_argument("--device", help="such as cuda:0; default: a GPU if there is one")
    group.add_argument("--fp8-recipe", choices=["delayed", "current", "block"], help="compute all layers in FP8")
    group.add_argument("--generation-config", default="auto", choices=["auto", "none"],
                       help="auto: the checkpoint's temperature and the like are the defaults")  # fmt: skip
    group = parser.add_argument_group("engine")
    group.add_argument("--max-batch-size", "--max-num-seqs", type=_positive, default=256, metavar="N",
                       help="sequences that run at the same time (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-sequence-length", "--max-model-len", type=_positive, metavar="N",
                       help="most tokens of a sequence; default: the model's limit")  # fmt: skip
    group.add_argument("--page-size", "--block-size", type=_positive, default=64, metavar="N", help="tokens of a page")
    group.add_argument("--total-num-pages", type=_positive, metavar="N", help="default: what fits into the memory")
    group.add_argument("--prefill-budget", "--max-num-batched-tokens", type=_positive, default=2048, metavar="N",
                       help="most prompt tokens in a step (default: %(default)s)")  # fmt: skip
    group.add_argument("--no-enable-prefix-caching", action="store_true", help="compute each prompt from its beginning")
    group = parser.add_argument_group("operation")
    group.add_argument("--max-requests", type=_positive, default=1024, metavar="N",
                       help="most requests that run and wait; more get status 429 (default: %(default)s)")  # fmt: skip
    group.add_argument("--max-body-bytes", type=_positive, default=16 << 20, metavar="N", help="default: 16 MiB")
    group.add_argument("--request-timeout", type=_seconds, metavar="S", help="end requests after so many seconds")
    group.add_argument("--drain-timeout", type=_seconds, default=30.0, metavar="S",
                       help="after SIGTERM, wait so long for running requests (default: %(default)s)")  # fmt: skip
    group.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
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


async def _serve(options: argparse.Namespace) -> int:
    # Before the model loads, so that a wrong address is told at once.
    with _bound(options.host, options.port) as address:
        return await _serve_at(address, options)


async def _serve_at(address: socket.socket, options: argparse.Namespace) -> int:
    import uvicorn

    from ..engine.async_engine import AsyncEngine
    from .app import create_app
    from .http_server import HttpServer

    begin = time.monotonic()
    options.api_key = [*options.api_key, *keys_of_environment()]
    engine, settings = load_engine(options)
    requests = AsyncEngine(engine, max_requests=options.max_requests)
    try:
        config = uvicorn.Config(
            create_app(requests, settings),
            log_level=options.log_level,
            access_log=options.log_level == "debug",
            lifespan="off",
        )

        def say_ready(port: int) -> None:
            seconds, url = time.monotonic() - begin, f"http://{options.host}:{port}"
            print(f"Ready after {seconds:.1f} s: {settings.model_names[0]} at {url}, {engine!r}", flush=True)

        await HttpServer(config, requests, options.drain_timeout, say_ready).serve([address])
    finally:
        await asyncio.to_thread(requests.close)
    return 0 if requests.failure is None else FAILED


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


def load_engine(options: argparse.Namespace) -> tuple[Engine, ServerSettings]:
    """Return an engine for the model, and the settings of the server.

    Args:
        options: Of the command.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: An option or the checkpoint does not fit.
    """
    from ..engine.engine import Engine
    from .loading import load
    from .settings import ServerSettings

    loaded = load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        fp8_recipe=options.fp8_recipe,
        tokenizer=options.tokenizer,
        revision=options.revision,
    )
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch_size=options.max_batch_size,
        max_sequence_length=options.max_sequence_length,
        page_size=options.page_size,
        total_num_pages=options.total_num_pages,
        prefill_budget=options.prefill_budget,
        prefix_caching=not options.no_enable_prefix_caching,
    )
    settings = ServerSettings(
        model_names=tuple(options.served_model_name or [options.model]),
        api_keys=tuple(options.api_key),
        default_params={} if options.generation_config == "none" else loaded.sampling_defaults,
        chat_template=Path(options.chat_template).read_text() if options.chat_template else None,
        max_body_bytes=options.max_body_bytes,
        request_timeout=options.request_timeout,
        allowed_origins=tuple(options.allowed_origins),
    )
    return engine, settings
