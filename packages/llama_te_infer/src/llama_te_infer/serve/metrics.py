"""Metrics for Prometheus, under the names of vLLM's server and once more under `llama_te:`.

The engine's own counts are read when Prometheus asks. The other metrics are counted when a request ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..engine import statistics
from ..engine.client import EngineClient
from .observation import ServedRequest

PREFIXES = ("vllm:", "llama_te:")
LABELS = ("model_name", "engine")
ENGINE = "0"  # vLLM numbers the engines behind a server
FINISH_REASONS = ("stop", "length", "abort", "error")

# Upper bounds as of vLLM's histograms.
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_COMPLETIONS = (1, 2, 5, 10, 20)

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return all metrics in the format that Prometheus asks for."""
    own: Metrics = request.app.state.server.metrics
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(own.registry), headers={"Content-Type": content_type})


class Metrics:
    """The metrics of one server.

    Args:
        engine: The engine behind the server.
        model_name: The value of the label `model_name`.

    Attributes:
        registry: What Prometheus reads.
    """

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name
        self._own = own = CollectorRegistry()
        lengths = buckets_1_2_5(engine.max_sequence_length)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, meaning, LABELS, registry=own, buckets=buckets).labels(model_name, ENGINE)

        def seconds(name: str, meaning: str) -> Histogram:
            return histogram(name, meaning, _REQUEST_SECONDS)

        self._e2e = seconds("e2e_request_latency_seconds", "Seconds from a request's arrival to its last token.")
        self._queue = seconds("request_queue_time_seconds", "Seconds in the queue.")
        self._prefill = seconds("request_prefill_time_seconds", "Seconds from the queue to the first token.")
        self._decode = seconds("request_decode_time_seconds", "Seconds from the first token to the last one.")
        self._inference = seconds("request_inference_time_seconds", "Seconds from the queue to the last token.")
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "A request's mean seconds from token to token.",
            statistics.INTER_TOKEN_SECONDS,
        )
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", lengths)
        self._generation_tokens = histogram("request_generation_tokens", "Tokens of a completion.", lengths)
        self._computed_tokens = histogram(
            "request_prefill_kv_computed_tokens", "Tokens of a prompt that were not in the prefix cache.", lengths
        )
        self._longest = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion.", lengths
        )
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", lengths)
        self._n = histogram("request_params_n", "n of a request.", _COMPLETIONS)
        self._success = Counter(
            "request_success", "Completions that have ended.", (*LABELS, "finished_reason"), registry=own
        )
        for reason in FINISH_REASONS:  # so that each begins with 0
            self._success.labels(model_name, ENGINE, reason)
        self.registry = CollectorRegistry()
        self._http = Counter("http_requests", "HTTP requests.", ("handler", "method", "status"), registry=self.registry)
        self.registry.register(_UnderBothNames(self))

    def count_http(self, handler: str, method: str, status: int) -> None:
        """Count an answer.

        Args:
            handler: The endpoint's path; "none" without one.
            method: The HTTP method.
            status: The answer's status.
        """
        self._http.labels(handler, method, str(status)).inc()

    def end(self, request: ServedRequest) -> None:
        """Count a request that has ended."""
        for reason in request.finish_reasons:
            self._success.labels(self._model_name, ENGINE, reason).inc()
        self._n.observe(request.params.n)
        if request.params.max_tokens is not None:
            self._max_tokens.observe(request.params.max_tokens)
        output = request.output
        if output is None or output.times is None or output.times.first_token is None:
            return  # it has got no token
        prompt, counts, times = len(output.prompt_token_ids), request.num_generation_tokens, output.times
        self._prompt_tokens.observe(prompt)
        self._computed_tokens.observe(prompt - output.num_cached_tokens)
        for count in counts:
            self._generation_tokens.observe(count)
        self._longest.observe(max(counts))
        for histogram, seconds in (
            (self._e2e, times.e2e),
            (self._queue, times.queue),
            (self._prefill, times.prefill),
            (self._decode, times.decode),
            (self._inference, times.inference),
            (self._per_token, None if max(counts) < 2 or times.decode is None else times.decode / (max(counts) - 1)),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, without a prefix in their names."""
        yield from self._own.collect()
        stats = self._engine.stats()
        counters = stats.counters
        yield self._gauge("num_requests_running", "Sequences that run.", stats.num_requests_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", stats.num_requests_waiting)
        yield self._gauge("kv_cache_usage_perc", "The used share of the cache, from 0 to 1.", stats.kv_cache_usage)
        yield self._counter("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens written.", counters.generation_tokens)
        yield self._counter("num_preemptions", "Preemptions of running sequences.", counters.num_preemptions)
        yield self._counter(
            "prefix_cache_queries", "Tokens that were looked up in the prefix cache.", counters.prefix_cache_queries
        )
        yield self._counter("prefix_cache_hits", "Tokens that the prefix cache had.", counters.prefix_cache_hits)
        yield self._histogram("iteration_tokens_total", "Tokens of an engine's step.", counters.step_tokens)
        yield self._histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            counters.time_to_first_token_seconds,
        )
        yield self._histogram(
            "inter_token_latency_seconds", "Seconds from token to token.", counters.inter_token_seconds
        )
        sleep = GaugeMetricFamily(
            "engine_sleep_state", "awake = 0: the engine is asleep.", labels=(*LABELS, "sleep_state")
        )
        # The weights stay on the device: vLLM's other two states do not occur.
        for state, value in (("awake", not self._engine.is_asleep), ("weights_offloaded", 0), ("discard_all", 0)):
            sleep.add_metric((self._model_name, ENGINE, state), value)
        yield sleep
        cache = GaugeMetricFamily(
            "cache_config_info",
            "The cache.",
            labels=("block_size", "cache_dtype", "enable_prefix_caching", "engine", "num_gpu_blocks"),
        )
        values = (stats.page_size, stats.kv_cache_dtype, stats.prefix_caching, ENGINE, stats.total_num_pages)
        cache.add_metric([str(value) for value in values], 1)
        yield cache

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=LABELS)
        family.add_metric((self._model_name, ENGINE), value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=LABELS)
        family.add_metric((self._model_name, ENGINE), value)
        return family

    def _histogram(self, name: str, meaning: str, histogram: statistics.Histogram) -> Metric:
        family = HistogramMetricFamily(name, meaning, labels=LABELS)
        bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric((self._model_name, ENGINE), buckets, histogram.total)
        return family


class _UnderBothNames(Collector):
    """Gives each metric once under vLLM's name and once under our own."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for family in self._metrics.collect():
            for prefix in PREFIXES:
                named = Metric(prefix + family.name, family.documentation, family.type, family.unit)
                # The time at which a metric was made says nothing here.
                samples = (sample for sample in family.samples if not sample.name.endswith("_created"))
                named.samples = [sample._replace(name=prefix + sample.name) for sample in samples]
                yield named


def buckets_1_2_5(largest: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, ... up to a number, as vLLM does."""
    values = [mantissa * 10**exponent for exponent in range(len(str(largest))) for mantissa in (1, 2, 5)]
    return tuple(value for value in values if value <= largest)
