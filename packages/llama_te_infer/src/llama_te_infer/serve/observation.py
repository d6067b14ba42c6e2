"""What is known of a request while it runs and when it has ended, for metrics, logs and traces."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from ..engine.client import DrainingError
from ..engine.outputs import RequestOutput
from ..runner.stopping import FinishReason
from ..sampling_params import SamplingParams
from .protocol.answers import VllmReason

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class HttpContext:
    """What an HTTP request says about itself.

    Attributes:
        path: Of its address.
        request_id: The client's `X-Request-Id` if it has at most 128 letters, digits and characters of "_.:-"; else a
            new one.
        trace_headers: The headers `traceparent` and `tracestate` of W3C's Trace Context, as far as they are there.
    """

    path: str = ""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    trace_headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, headers: Mapping[str, str]) -> HttpContext:
        """Return the context of a request.

        Args:
            path: Of its address.
            headers: With names in lower case.
        """
        traces = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        given = headers.get("x-request-id", "")
        return cls(path, given, traces) if _ID.fullmatch(given) else cls(path, trace_headers=traces)


# Of the HTTP request that the current task answers.
http_context: ContextVar[HttpContext] = ContextVar("http_context")


def vllm_reason(finish_reason: FinishReason) -> VllmReason:
    """Return vLLM's name of the reason why a completion has ended."""
    return "abort" if finish_reason == "cancelled" else finish_reason


@dataclass
class ServedRequest:
    """A request of the engine, on behalf of an HTTP request.

    Attributes:
        id: The HTTP request's id, with a number behind it if the HTTP request has several prompts.
        model_name: The served name.
        prompt_token_ids: The prompt.
        params: How to continue it.
        context: The HTTP request's.
        arrival: When it arrived, in seconds of `time.monotonic()`.
        output: Once it has ended.
        error: Instead of an output, if the step failed that computed it.
    """

    id: str
    model_name: str
    prompt_token_ids: list[int]
    params: SamplingParams
    context: HttpContext
    arrival: float = field(default_factory=time.monotonic)
    output: RequestOutput | None = None
    error: Exception | None = None

    @property
    def finish_reasons(self) -> list[str]:
        """Why each completion ended: "stop", "length", "abort" or "error", as vLLM names them."""
        if self.output is None:
            return ["abort" if isinstance(self.error, DrainingError) else "error"] * self.params.n
        return [vllm_reason(each.finish_reason) for each in self.output.outputs]

    @property
    def num_generation_tokens(self) -> list[int]:
        """Tokens of each completion."""
        return [] if self.output is None else [len(each.token_ids) for each in self.output.outputs]
