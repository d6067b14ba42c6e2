"""OpenTelemetry spans: one for each request, with the attributes of its conventions for generative AI.

Needs the extra `otel`. Spans have vLLM's names of attributes where OpenTelemetry has none.
"""

from __future__ import annotations

import os
import time
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from .observation import ServedRequest

SERVICE_NAME = "llama-te"


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Return an exporter to a collector.

    It speaks gRPC unless the environment variable OTEL_EXPORTER_OTLP_TRACES_PROTOCOL or OTEL_EXPORTER_OTLP_PROTOCOL is
    "http/protobuf". OpenTelemetry's further variables hold, too.

    Args:
        endpoint: The collector's address.

    Raises:
        ValueError: The variable has another value.
    """
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next(filter(None, map(os.environ.get, variables)), "grpc")
    match protocol:
        case "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            return GrpcExporter(endpoint=endpoint)
        case "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

            return HttpExporter(endpoint=endpoint)
    raise ValueError(f"{' or '.join(variables)}={protocol} is not possible: set grpc or http/protobuf.")


class Tracing:
    """Records a span when a request ends.

    Args:
        exporter: Where the spans go, in batches and from a thread of its own; the last ones when the process ends.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence.
        resource = Resource({"service.name": SERVICE_NAME, "service.version": __version__}).merge(Resource.create())
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("llama_te_infer", __version__)

    def end(self, request: ServedRequest) -> None:
        """Record a request that has ended."""
        parent = TraceContextTextMapPropagator().extract(dict(request.context.trace_headers))
        offset = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            "llm_request",
            parent,
            SpanKind.SERVER,
            _attributes(request),
            start_time=offset + int(request.arrival * 1e9),
        )
        if "error" in request.finish_reasons:
            span.set_status(StatusCode.ERROR)
        span.end()


def _attributes(request: ServedRequest) -> dict[str, Any]:
    params, output = request.params, request.output
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion" if request.context.path == "/v1/completions" else "chat",
        "gen_ai.provider.name": SERVICE_NAME,
        "gen_ai.request.id": request.id,
        "gen_ai.request.model": request.model_name,
        "gen_ai.response.model": request.model_name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.n": params.n,
        "gen_ai.response.finish_reasons": request.finish_reasons,
        "gen_ai.usage.num_sequences": params.n,
    }
    if output is not None and output.times is not None:
        times, prompt, written = output.times, len(output.prompt_token_ids), sum(request.num_generation_tokens)
        attributes |= {
            "gen_ai.usage.input_tokens": prompt,
            "gen_ai.usage.output_tokens": written,
            "gen_ai.usage.prompt_tokens": prompt,
            "gen_ai.usage.completion_tokens": written,
            "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
            "gen_ai.latency.time_in_queue": times.queue,
            "gen_ai.latency.time_to_first_token": times.time_to_first_token,
            "gen_ai.latency.time_in_model_prefill": times.prefill,
            "gen_ai.latency.time_in_model_decode": times.decode,
            "gen_ai.latency.time_in_model_inference": times.inference,
            "gen_ai.latency.e2e": times.e2e,
        }
    return {name: value for name, value in attributes.items() if value is not None}
