"""Which tests of several processes run on which machine."""

from __future__ import annotations

import os
import types
from typing import Any

import pytest
import torch

from distributed.conftest import pytest_collection_modifyitems
from distributed.processes import local_rank

TESTS = {
    "plain": None,
    "2": pytest.mark.processes(2),
    "4": pytest.mark.processes(4),
    "8": pytest.mark.processes(8),
    "2 GPUs": pytest.mark.processes(2, device="cuda"),
    "2 own GPUs": pytest.mark.processes(2, own_gpus=True),
    "2 CPUs": pytest.mark.processes(2, device="cpu"),
}


@pytest.mark.parametrize(
    ("chosen", "gpus", "each", "run"),
    [
        ("cpu", 0, 1, ["plain", "2", "4", "2 own GPUs", "2 CPUs"]),
        ("cpu", 8, 2, ["plain", "2", "4", "2 own GPUs", "2 CPUs"]),
        ("cuda", 0, 2, ["plain"]),
        ("cuda", 1, 1, ["plain"]),
        ("cuda", 1, 2, ["plain", "2", "2 GPUs"]),
        ("cuda", 2, 1, ["plain", "2", "2 GPUs", "2 own GPUs"]),
        ("cuda", 8, 1, ["plain", "2", "4", "8", "2 GPUs", "2 own GPUs"]),
    ],
)
def test_each_process_has_a_gpu_or_the_test_is_left_out(
    chosen: str, gpus: int, each: int, run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    left_out: list[Any] = []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    options = {"--device": chosen, "--processes-per-gpu": each}
    config: Any = types.SimpleNamespace(getoption=lambda name, default: options[name], hook=hook)
    items: list[Any] = [
        types.SimpleNamespace(name=name, get_closest_marker=lambda _, mark=mark: mark and mark.mark)
        for name, mark in TESTS.items()
    ]
    pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == run
    assert {item.name for item in left_out} == TESTS.keys() - set(run)


@pytest.mark.parametrize(
    ("gpus", "numbers"), [(0, [0, 0, 0, 0]), (1, [0, 0, 0, 0]), (2, [0, 1, 0, 1]), (4, [0, 1, 2, 3])]
)
def test_processes_share_gpus_as_hosts_of_their_own(
    gpus: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    hosts = set()
    for rank, number in enumerate(numbers):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {})
            assert local_rank(rank, len(numbers)) == number
            hosts.add(os.environ.get("NCCL_HOSTID"))
    assert len(hosts) == (4 if 0 < gpus < 4 else 1)
