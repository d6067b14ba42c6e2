"""Metrics, logs and traces: what they count and say, and what they never say."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from llama_te_infer import Engine
from llama_te_infer.engine.client import RequestStream
from llama_te_infer.engine.statistics import INTER_TOKEN_SECONDS
from llama_te_infer.runner.model_runner import ModelRunner
from llama_te_infer.serve import tracing
from llama_te_infer.serve.metrics import buckets_1_2_5
from serving.conftest import RunningServer, serving

# The metrics that the queries of vLLM's examples/observability/prometheus_grafana/grafana.json name.
DASHBOARD = {
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
}
IDS = list(range(20))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def complete(server: RunningServer, prompt: Any = IDS, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


@pytest.fixture
def own(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    """A server whose counts begin at 0."""
    with serving(make_engine()) as server:
        yield server


# --- metrics ----------------------------------------------------------------------------------------------------------


def samples(server: RunningServer) -> dict[str, float]:
    """Return the value of each sample; those of several labels have them behind their names."""
    text = httpx.get(f"{server.url}/metrics").text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("engine", "model_name")}
            values[sample.name + (str(sorted(labels.items())) if labels else "")] = sample.value
            if "model_name" in sample.labels:
                assert sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0"
    return values


def test_metrics_count_what_requests_did(own: RunningServer) -> None:
    assert complete(own).status_code == 200
    assert complete(own).status_code == 200
    assert complete(own, temperature=1.0, n=2, max_tokens=3).status_code == 200
    assert complete(own, max_tokens=1000).status_code == 400
    found = samples(own)

    def of(name: str, **labels: str) -> float:
        suffix = str(sorted(labels.items())) if labels else ""
        assert found[f"vllm:{name}{suffix}"] == found[f"llama_te:{name}{suffix}"]
        return found[f"vllm:{name}{suffix}"]

    assert of("num_requests_running") == of("num_requests_waiting") == of("kv_cache_usage_perc") == 0
    assert of("prompt_tokens_total") == 3 * 20
    assert of("generation_tokens_total") == 5 + 5 + 3 + 3
    assert (of("prefix_cache_queries_total"), of("prefix_cache_hits_total")) == (3 * 20, 2 * 16)
    assert of("num_preemptions_total") == 0
    reasons = {reason: of("request_success_total", finished_reason=reason) for reason in ("stop", "length", "abort")}
    assert reasons == {"stop": 0, "length": 4, "abort": 0}
    assert (of("request_prompt_tokens_sum"), of("request_prompt_tokens_count")) == (60, 3)
    assert of("request_prompt_tokens_bucket", le="10.0") == 0 and of("request_prompt_tokens_bucket", le="20.0") == 3
    assert (of("request_generation_tokens_sum"), of("request_generation_tokens_count")) == (16, 4)
    assert of("request_max_num_generation_tokens_sum") == 5 + 5 + 3
    assert of("request_prefill_kv_computed_tokens_sum") == 60 - 32
    assert (of("request_params_n_sum"), of("request_params_max_tokens_sum")) == (4, 13)
    assert of("iteration_tokens_total_sum") == 16 + 60 - 32
    assert of("inter_token_latency_seconds_count") == 4 + 4 + 2 + 2
    bounds = [
        float(bound) for bound in re.findall(r"vllm:inter_token_latency_seconds_bucket\[\('le', '(.*?)'", str(found))
    ]
    assert bounds == [*INTER_TOKEN_SECONDS, float("inf")]
    for name in (
        *("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"),
        *("request_decode_time", "request_inference_time", "request_time_per_output_token"),
    ):
        assert of(f"{name}_seconds_count") == 3 and of(f"{name}_seconds_sum") > 0
    parts = of("request_queue_time_seconds_sum") + of("request_inference_time_seconds_sum")
    assert parts == pytest.approx(of("e2e_request_latency_seconds_sum"))
    cache = {"block_size": "8", "cache_dtype": "auto", "enable_prefix_caching": "True", "num_gpu_blocks": "256"}
    assert of("cache_config_info", **cache) == 1
    http = {"handler": "/v1/completions", "method": "POST"}
    for status, count in (("200", 3), ("400", 1)):
        assert found[f"http_requests_total{sorted({**http, 'status': status}.items())}"] == count


def test_usage_says_how_much_of_the_prompt_was_cached(own: RunningServer) -> None:
    assert complete(own).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert complete(own, [IDS, IDS, [5]]).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    arguments: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a" * 30}], "max_tokens": 4}
    whole = own.client.chat.completions.create(**arguments)
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = own.client.chat.completions.create(**arguments, stream=True, stream_options=options)
    assert last.usage.prompt_tokens_details.cached_tokens == (last.usage.prompt_tokens - 1) // 8 * 8
    assert {part.usage.prompt_tokens_details for part in parts} == {None}


def test_vllms_dashboard_finds_its_metrics(server: RunningServer) -> None:
    complete(server)
    names = {name.split("[")[0] for name in samples(server)}
    assert names.issuperset(DASHBOARD)


def test_formats_of_metrics(server: RunningServer) -> None:
    plain = httpx.get(f"{server.url}/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = httpx.get(f"{server.url}/metrics", headers=accept)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    families = list(parse_openmetrics(answer.text))
    assert {"vllm:prompt_tokens", "llama_te:prompt_tokens", "http_requests"} <= {family.name for family in families}


def test_running_cancelled_and_lost_requests(own: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": IDS, "max_tokens": 400, "stream": True, "ignore_eos": True}
    launch = own.engine.engine._runner.launch
    with monkeypatch.context() as patch:
        patch.setattr(own.engine.engine._runner, "launch", lambda *plan: (time.sleep(0.01), launch(*plan))[1])
        with httpx.stream("POST", f"{own.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running = samples(own)
    assert running["vllm:num_requests_running"] == 1 and running["vllm:kv_cache_usage_perc"] >= 3 / 256
    assert running["vllm:time_to_first_token_seconds_count"] == 1, "it is counted at once"
    until(lambda: own.engine.num_requests == 0)
    until(lambda: samples(own)["vllm:request_success_total[('finished_reason', 'abort')]"] == 1)
    with monkeypatch.context() as patch:
        patch.setattr(own.engine.engine._runner, "launch", _out_of_memory)
        assert complete(own).status_code == 500
    assert complete(own).status_code == 200
    found = samples(own)
    assert found["vllm:request_success_total[('finished_reason', 'error')]"] == 1
    assert found["vllm:e2e_request_latency_seconds_count"] == 2, "a request without tokens has no latency"


def test_metrics_need_no_key(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), api_keys=("one",)) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        handler = sorted({"handler": "none", "method": "GET", "status": "401"}.items())
        assert samples(server)[f"http_requests_total{handler}"] == 1


def test_buckets() -> None:
    assert buckets_1_2_5(100) == (1, 2, 5, 10, 20, 50, 100)
    assert buckets_1_2_5(1024) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


# --- ids --------------------------------------------------------------------------------------------------------------


def test_ids_of_requests(server: RunningServer) -> None:
    answer = complete(server, headers={"X-Request-Id": "my-id_1"})
    assert answer.headers["X-Request-Id"] == "my-id_1" and answer.json()["id"] == "cmpl-my-id_1"
    refused = complete(server, headers={"X-Request-Id": "my-id_2"}, max_tokens=-1)
    assert (refused.status_code, refused.headers["X-Request-Id"]) == (400, "my-id_2")
    for given in ("a b", "x" * 129, "é"):
        made = complete(server, headers={"X-Request-Id": given.encode()})
        assert re.fullmatch("[0-9a-f]{32}", made.headers["X-Request-Id"])
        assert made.json()["id"] == f"cmpl-{made.headers['X-Request-Id']}"
    streamed = complete(server, headers={"X-Request-Id": "stream"}, stream=True)
    assert '"id":"cmpl-stream"' in streamed.text.replace(" ", "")


# --- logs -------------------------------------------------------------------------------------------------------------

SECRETS = ("sk-secret", "Sesame", "83, 101, 115", "x-own-header", "/v1/", "stop-word", "template-secret")


def _out_of_memory(*_: Any) -> Any:
    raise MemoryError("no memory")


def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError(SECRETS[1])


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "llama_te_infer")
    caplog.set_level(logging.INFO, "uvicorn")
    return caplog


def test_no_line_has_a_part_of_a_request(
    make_engine: Callable[..., Engine], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Authorization": "Bearer sk-secret", "x-own-header": "x-own-header"}
    with serving(make_engine(), api_keys=("sk-secret",), log_interval=0.01) as server:
        url = f"{server.url}/v1/completions"

        def ask(**fields: Any) -> int:
            return complete(server, "Sesame", headers, stop=["stop-word"], **fields).status_code

        assert [ask(), ask(stream=True), ask(max_tokens=-1), ask(unknown="Sesame")] == [200, 200, 400, 400]
        assert httpx.post(url, headers={"Authorization": "Bearer sk-secret2"}).status_code == 401
        as_json = headers | {"Content-Type": "application/json"}
        assert httpx.post(url, headers=as_json, content=b'{"prompt": "Sesame').status_code == 400
        assert httpx.get(f"{server.url}/v1/Sesame", headers=headers).status_code == 404
        chat = {"messages": [{"role": "user", "content": "Sesame"}], "chat_template_kwargs": {"tokenize": 3}}
        httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json=chat)
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "launch", _out_of_memory)
            assert [ask(), ask(stream=True)] == [500, 200]
        with monkeypatch.context() as patch:
            patch.setattr("llama_te_infer.serve.server.Server.begin", _fail)
            assert ask() == 500
        with monkeypatch.context() as patch:
            patch.setattr(RequestStream, "take", _fail)
            assert '"error"' in complete(server, "Sesame", headers, stream=True).text
        assert complete(server, "Sesame", headers, max_tokens=100).status_code == 200
    lines = [log.handler.format(record) for record in log.records]
    text = "\n".join(lines)
    assert not [secret for secret in SECRETS if secret in text], text
    assert text.count("Requests have ended, since a step of the engine failed: no memory") >= 1
    assert text.count("failed with a RuntimeError") == 2 and "in _fail" in text
    assert "Avg generation throughput" in text


@pytest.mark.parametrize("content", [False, True])
def test_lines_of_requests(make_engine: Callable[..., Engine], log: pytest.LogCaptureFixture, content: bool) -> None:
    wanted = "content" if content else "parameters"
    with serving(make_engine(), log_requests=wanted) as server:
        fields: dict[str, Any] = {"n": 2, "temperature": 0.5, "stop": ["never"], "seed": 1}
        answer = complete(server, "Sesame", {"X-Request-Id": "one"}, **fields)
        complete(server, ["Sesame", "Sesame"], {"X-Request-Id": "two"})
        complete(server, [300], {"X-Request-Id": "three"})
    lines = [record.getMessage() for record in log.records if record.name == "llama_te_infer.serve.logs"]
    begin, end = (line for line in lines if line.startswith("Request one"))
    expected = "Request one: 7 prompt tokens, max_tokens=5, temperature=0.5, stop="
    assert begin.startswith(expected) and "n=2" in begin and "seed=1" in begin
    assert re.match(
        r"Request one ended: length/length, 7 prompt tokens \(0 cached\), 5/5 tokens, queue [\d.]+ s, "
        r"prefill [\d.]+ s, decode [\d.]+ s, total [\d.]+ s",
        end,
    )
    assert ("Sesame" in begin, "never" in begin) == (content, content)
    assert (repr([choice["text"] for choice in answer.json()["choices"]]) in end) == content
    assert {line.split()[1].rstrip(":") for line in lines} == {"one", "two-0", "two-1", "three"}
    assert lines[-1] == "Request three was refused: ValueError"


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_span_for_each_request(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, endpoints = InMemorySpanExporter(), []
    monkeypatch.setattr(tracing, "otlp_exporter", lambda endpoint: endpoints.append(endpoint) or exporter)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with serving(make_engine(), otlp_traces_endpoint="http://collector:4317") as server:
        before = time.time_ns()
        headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "one"}
        assert complete(server, headers=headers, n=2, temperature=0.5).status_code == 200
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        with monkeypatch.context() as patch:
            patch.setattr(server.engine.engine._runner, "launch", _out_of_memory)
            assert httpx.post(f"{server.url}/v1/chat/completions", json=chat).status_code == 500
        until(lambda: len(exporter.get_finished_spans()) == 2)
    after = time.time_ns()
    whole, lost = exporter.get_finished_spans()
    assert endpoints == ["http://collector:4317"]
    assert f"{whole.context.trace_id:032x}" == trace and f"{whole.parent.span_id:016x}" == parent
    assert whole.resource.attributes["service.name"] == "mine"
    assert before <= whole.start_time <= whole.end_time <= after
    found = dict(whole.attributes)
    times = {name: found.pop(name) for name in list(found) if name.startswith("gen_ai.latency.")}
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "llama-te",
        "gen_ai.request.id": "one",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.n": 2,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.prompt_tokens": 20,
        "gen_ai.usage.completion_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    queue, prefill, decode = (
        times[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    )
    assert queue + prefill + decode == pytest.approx(times["gen_ai.latency.e2e"])
    assert len(times) == 6 and min(times.values()) > 0
    assert lost.parent is None and lost.status.status_code == StatusCode.ERROR
    assert lost.attributes["gen_ai.operation.name"] == "chat"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf", None])
def test_exporters(protocol: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", raising=False)
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    exporter = tracing.otlp_exporter("http://127.0.0.1:9/v1/traces")
    assert ("http" if protocol == "http/protobuf" else "grpc") in type(exporter).__module__
    exporter.shutdown()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "smoke-signals")
    with pytest.raises(ValueError, match="=smoke-signals is not possible: set grpc or http/protobuf"):
        tracing.otlp_exporter("http://127.0.0.1:9")
