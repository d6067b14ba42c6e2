"""GPU tests: which attention TE chose, and the record of what was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu.small_llama import MODEL

_FIGURES = pytest.StashKey[list[tuple[str, str, str, str]]]()
_OUTCOMES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verification", type=Path, help="write what ran and what was measured to this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []
    config.stash[_OUTCOMES] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """`measured(what, value, bound)`: note a figure and assert that it is within its bound."""

    def note(what: str, value: float, bound: float) -> None:
        name = request.node.nodeid.rpartition("/")[2]
        request.config.stash[_FIGURES].append((name, what, f"{value:.3g}", f"{bound:.3g}"))
        assert value <= bound, f"{what}: {value:.4g} is over the bound {bound:.4g}"

    return note


@pytest.fixture
def fused_attention() -> Iterator[None]:
    """Fails unless TE ran its fused (cuDNN) attention: a fallback would make the test prove something else."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = dot_product_attention._attention_backends
    chosen["attention_params"] = None  # TE chooses afresh
    chosen["use_fused_attention"] = None
    yield
    assert chosen["use_fused_attention"], f"TE chose {chosen}"
    assert not chosen["use_flash_attention"], f"TE chose {chosen}"


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a transformers Llama in float32 on the GPU."""

    def make(**fields: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**{**MODEL, **fields}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model.eval()

    return make


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[_OUTCOMES][item.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--verification")
    if path is None or not session.config.stash[_OUTCOMES]:
        return
    outcomes = session.config.stash[_OUTCOMES]
    counts = {name: list(outcomes.values()).count(name) for name in ("passed", "failed", "skipped")}
    lines = [
        "# Verification on a GPU",
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
        "Relative errors are ‖x - y‖ / ‖y‖ over all real tokens; each was asserted to be within its bound.",
        "",
        "| test | what | measured | bound |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{' | '.join((name + '`', what, value, bound))} |"
            for name, what, value, bound in session.config.stash[_FIGURES]
        ),
        "",
        "## Tests",
        "",
        *(f"- {outcome}: `{name}`" for name, outcome in sorted(outcomes.items())),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def _machine() -> dict[str, str]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    names = ("llama-te-core", "llama-te-convert", "llama-te-infer", "torch", "transformers", "transformer-engine")
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    cuda = f"{driver[0] if driver else '?'}, {torch.version.cuda}, {torch.backends.cudnn.version()}"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"`pytest {' '.join(argument.rpartition(os.sep)[2] for argument in sys.argv[1:])}`",
        "GPU": f"{torch.cuda.get_device_name()} (compute capability {capability})",
        "driver, CUDA, cuDNN": cuda,
        "Python": platform.python_version(),
        **{name: installed(name) for name in names},
    }
