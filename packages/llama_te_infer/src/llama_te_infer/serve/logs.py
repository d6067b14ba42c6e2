"""What the server logs: requests if the operator wants it, throughput while something runs, and failures.

Without `--log-requests` no line has a part of a request.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from ..engine.client import EngineClient
from ..sampling_params import SamplingParams
from .observation import HttpContext, ServedRequest, http_context

logger = logging.getLogger(__name__)


class RequestLog:
    """Logs a line when a request begins and when it ends.

    Args:
        text_of: Returns the text of tokens, for lines with prompts and texts; `None` for lines without them.
    """

    def __init__(self, text_of: Callable[[list[int]], str] | None) -> None:
        self._text_of = text_of

    def begin(self, request: ServedRequest) -> None:
        """Log a request that goes to the engine."""
        content = "" if self._text_of is None else f", prompt {self._text_of(request.prompt_token_ids)!r}"
        count = len(request.prompt_token_ids)
        params = parameters(request.params, with_content=self._text_of is not None)
        logger.info("Request %s: %d prompt tokens, %s%s", request.id, count, params, content)

    def refuse(self, request: ServedRequest, error: BaseException) -> None:
        """Log a request that the engine has not accepted."""
        logger.info("Request %s was refused: %s", request.id, type(error).__name__)

    def end(self, request: ServedRequest) -> None:
        """Log a request that has ended."""
        output = request.output
        if output is None or output.times is None:
            logger.info("Request %s ended: it was lost in a step that failed", request.id)
            return
        times = output.times
        parts = [
            "/".join(request.finish_reasons),
            f"{len(output.prompt_token_ids)} prompt tokens ({output.num_cached_tokens} cached)",
            f"{'/'.join(map(str, request.num_generation_tokens))} tokens",
        ]
        for name, seconds in (
            ("queue", times.queue),
            ("prefill", times.prefill),
            ("decode", times.decode),
            ("total", times.e2e),
        ):
            if seconds is not None:
                parts.append(f"{name} {seconds:.3f} s")
        content = "" if self._text_of is None else f", texts {[each.text for each in output.outputs]!r}"
        logger.info("Request %s ended: %s%s", request.id, ", ".join(parts), content)


def parameters(params: SamplingParams, with_content: bool) -> str:
    """Return the parameters that are not the defaults.

    Args:
        params: The parameters.
        with_content: Whether strings and tokens are shown; otherwise only how many there are.
    """
    parts = []
    for each in dataclasses.fields(params):
        value = getattr(params, each.name)
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if value != default:
            is_plain = value is None or isinstance(value, (bool, int, float))
            shown = (
                repr(value) if is_plain or with_content else f"<{len(value)}>" if hasattr(value, "__len__") else "..."
            )
            parts.append(f"{each.name}={shown}")
    return ", ".join(parts) or "default parameters"


class ThroughputLog:
    """Logs the load and the tokens a second from time to time while requests are in progress.

    Args:
        engine: The engine.
        interval: Seconds between two lines.
    """

    def __init__(self, engine: EngineClient, interval: float) -> None:
        self._engine, self._interval = engine, interval
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Begin to log, since a request begins."""
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._log_until_idle())

    async def _log_until_idle(self) -> None:
        before, then = self._engine.stats().counters, time.monotonic()
        has_requests = True
        while has_requests:
            await asyncio.sleep(self._interval)
            has_requests = self._engine.num_requests > 0
            stats, now = self._engine.stats(), time.monotonic()
            counters, seconds = stats.counters, now - then
            queries = counters.prefix_cache_queries
            logger.info(
                "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
                "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                (counters.prompt_tokens - before.prompt_tokens) / seconds,
                (counters.generation_tokens - before.generation_tokens) / seconds,
                stats.num_requests_running,
                stats.num_requests_waiting,
                100 * stats.kv_cache_usage,
                100 * counters.prefix_cache_hits / queries if queries else 0,
            )
            before, then = counters, now


def log_failure(error: BaseException) -> None:
    """Log an error that no one expects: its type and where it was raised. Its message may have a part of a request."""
    request_id = http_context.get(HttpContext()).request_id
    places = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("Request %s failed with a %s:\n%s", request_id, type(error).__name__, places)


def logging_config(level: str) -> dict[str, Any]:
    """Return a configuration of Python's logging: uvicorn's, with the time in each line, and with our lines.

    Args:
        level: The least level of lines, such as "info".
    """
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    for formatter in config["formatters"].values():
        formatter["fmt"] = f"%(asctime)s {formatter['fmt']}"
    config["loggers"]["llama_te_infer"] = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    return config
