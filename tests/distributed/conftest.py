"""Several processes: on CPUs with gloo, or with `--device=cuda` on GPUs with NCCL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

MOST_ON_CPU = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="what processes compute on")
    parser.addoption(
        "--processes-per-gpu", type=int, default=1, help="with more than 1, tests of many processes need fewer GPUs"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = _device(config)
    # The options are known where the command names this folder.
    gpus, shared = torch.cuda.device_count(), config.getoption("--processes-per-gpu", 1)
    for_here, left_out = [], []
    for item in items:
        mark = item.get_closest_marker("processes")
        fits = mark is None or mark.kwargs.get("device") in (None, device)
        if mark is not None and fits:
            most = gpus * (1 if mark.kwargs.get("own_gpus") else shared) if device == "cuda" else MOST_ON_CPU
            fits = mark.args[0] <= most
        (for_here if fits else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = for_here


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device of the processes: "cpu" or "cuda"."""
    return _device(pytestconfig)


@pytest.fixture(scope="module", autouse=True)
def _no_gpu_unless_asked_for(device: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def _device(config: pytest.Config) -> str:
    return str(config.getoption("--device", "cpu"))
