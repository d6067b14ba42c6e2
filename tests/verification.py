"""The record of a GPU test run: the fixture `measured` and the option `--verification`.

The record has the hardware, the versions, the counts, the measured figures, and each test that did not pass.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

_FIGURES = pytest.StashKey[list[tuple[str, str, str, str]]]()
_OUTCOMES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--verification",
        type=Path,
        help="write the record of this run to this Markdown file, such as benchmarks/results/DATE_GPU_verification.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []
    config.stash[_OUTCOMES] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """`measured(what, value, bound)`: record a figure and assert that it is within its bound."""

    def note(what: str, value: float, bound: float) -> None:
        name = request.node.nodeid.rpartition("/")[2]
        request.config.stash[_FIGURES].append((name, what, f"{value:.3g}", f"{bound:.3g}"))
        assert value <= bound, f"{what}: {value:.4g} is over the bound {bound:.4g}"

    return note


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[_OUTCOMES][item.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--verification")
    outcomes = session.config.stash[_OUTCOMES]
    if path is None or not outcomes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_record(session.config.stash[_FIGURES], outcomes), encoding="utf-8")


def _record(figures: list[tuple[str, str, str, str]], outcomes: dict[str, str]) -> str:
    counts = {name: list(outcomes.values()).count(name) for name in ("passed", "failed", "skipped")}
    lines = [
        "# Verification on a GPU" if torch.cuda.device_count() < 2 else "# Verification on several GPUs",
        "",
        "Written by the test command; do not edit.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _machine().items()),
        f"| result | {', '.join(f'{count} {name}' for name, count in counts.items())} |",
        "",
        "## Figures",
        "",
        "A relative error is ‖x - y‖ / ‖y‖ over all real tokens. A test asserts that each figure is within its bound.",
        "",
        "| test | what | measured | bound |",
        "| --- | --- | --- | --- |",
        *(f"| `{' | '.join((name + '`', what, value, bound))} |" for name, what, value, bound in figures),
    ]
    others = [f"- {outcome}: `{name}`" for name, outcome in sorted(outcomes.items()) if outcome != "passed"]
    if others:
        lines += ["", "## Tests that did not pass", "", *others]
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, str]:
    names = ("llama-te-core", "llama-te-convert", "llama-te-infer", "torch", "transformers", "transformer-engine")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"`pytest {' '.join(map(_without_folders, sys.argv[1:]))}`",
        **_gpus(),
        "Python": platform.python_version(),
        **{name: _installed(name) for name in names},
    }


def _without_folders(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return option + equals + value.rpartition(os.sep)[2]


def _gpus() -> dict[str, str]:
    """Describe the GPUs, the driver, and NCCL where there are several GPUs."""
    if not torch.cuda.is_available():
        return {"GPU": "none"}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    count = torch.cuda.device_count()
    versions = f"{driver[0] if driver else '?'}, {torch.version.cuda}, {torch.backends.cudnn.version()}"
    described = {
        "GPU": f"{f'{count} × ' * (count > 1)}{torch.cuda.get_device_name()} (compute capability {capability})",
        "driver, CUDA, cuDNN": versions,
    }
    if count > 1:
        described["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return described


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
