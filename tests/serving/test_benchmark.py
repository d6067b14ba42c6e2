"""`benchmarks/serve.py` reports what a server does."""

from __future__ import annotations

import math
from typing import Any

import pytest

import serve as benchmark
from serving.conftest import RunningServer


@pytest.mark.parametrize("rate", [math.inf, 50.0])
def test_a_load(server: RunningServer, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "PROCESSES", 2)
    sampling: dict[str, Any] = {"temperature": 0}
    figure = benchmark.load(server.url, "tiny", [[1, 2, 3]] * 12, 8, rate, sampling)
    assert (figure.requests, figure.failed, figure.rate) == (12, 0, rate)
    assert figure.tokens_per_second > 0 and 0 < figure.ttft_ms[0] <= figure.ttft_ms[1]
    assert "12 requests, 0 left, 0 failed" in str(figure)


def test_clients_that_leave(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "PROCESSES", 1)
    figure = benchmark.load(server.url, "tiny", [[1, 2, 3]] * 40, 8, math.inf, {"temperature": 0}, leave=0.5)
    assert (figure.requests, figure.failed) == (40, 0) and 8 < figure.left < 32
    assert benchmark.leavings(server.url, None) == {"running": 0, "waiting": 0, "cache": 0}


def test_failures_are_counted(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "PROCESSES", 1)
    figure = benchmark.load(server.url, "tiny", [[1, 2, 3], [999]], 8, math.inf, {"temperature": 0})
    assert (figure.requests, figure.failed) == (2, 1)
    with pytest.raises(SystemExit, match="no request succeeded"):
        benchmark.load(server.url, "tiny", [[999]], 8, math.inf, {"temperature": 0})
