"""Which tests of several processes run on which machine."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from distributed.conftest import pytest_collection_modifyitems

TESTS = {
    "plain": None,
    "2": pytest.mark.processes(2),
    "4": pytest.mark.processes(4),
    "8": pytest.mark.processes(8),
    "2 GPUs": pytest.mark.processes(2, device="cuda"),
    "2 CPUs": pytest.mark.processes(2, device="cpu"),
}


@pytest.mark.parametrize(
    ("chosen", "gpus", "run"),
    [
        ("cpu", 0, ["plain", "2", "4", "2 CPUs"]),
        ("cpu", 8, ["plain", "2", "4", "2 CPUs"]),
        ("cuda", 0, ["plain"]),
        ("cuda", 2, ["plain", "2", "2 GPUs"]),
        ("cuda", 8, ["plain", "2", "4", "8", "2 GPUs"]),
    ],
)
def test_each_process_has_a_gpu_or_the_test_is_left_out(
    chosen: str, gpus: int, run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    left_out: list[Any] = []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = types.SimpleNamespace(getoption=lambda name, default: chosen, hook=hook)
    items: list[Any] = [
        types.SimpleNamespace(name=name, get_closest_marker=lambda _, mark=mark: mark and mark.mark)
        for name, mark in TESTS.items()
    ]
    pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == run
    assert {item.name for item in left_out} == TESTS.keys() - set(run)
