"""Tests `benchmarks/loss_curves.py`: its arithmetic, and real runs of a small model."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import loss_curves


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, whose text is only a few modules of the standard library."""
    library = tmp_path / "library"
    (library / "site-packages").mkdir(parents=True)
    for name in ("argparse.py", "ast.py", "textwrap.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, library)
    (library / "site-packages" / "other.py").write_text('"""Of another library."""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(library)}[name])
    return loss_curves


def start(program: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["loss_curves.py", *map(str, words)])
    program.main()


def test_curves_of_two_precisions(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "curves.json", tmp_path / "curves.md"
    words = ["--shape", "tiny", "--precisions", "bf16", "fp32", "--steps", 24, "--json", results, "--page", page]
    start(program, monkeypatch, *words)
    record = json.loads(results.read_text())
    bf16, fp32 = record["curves"]
    assert [bf16["precision"], fp32["precision"]] == ["bf16", "fp32"]
    assert len(bf16["losses"]) == len(fp32["losses"]) == 24
    assert bf16["losses"][-1] < bf16["losses"][0] - 1
    assert (bf16["mean_difference"], bf16["greatest_difference"]) == (0, 0)
    # Both runs have the same weights and batches. Measured: 0.02 % apart; another seed differs by 2 %.
    assert 0 < fp32["mean_difference"] <= fp32["greatest_difference"] < 2e-3
    assert f"| fp32 | {fp32['last']:.4f} | {fp32['mean_difference']:.3%} |" in page.read_text()
    assert "<svg" in page.with_suffix(".svg").read_text()
    page.unlink()
    start(program, monkeypatch, "--no-runs", "--json", results, "--page", page)
    assert f"| bf16 | {bf16['last']:.4f} |  |  |" in page.read_text().splitlines()


def test_a_run_that_is_stopped_leaves_those_before_it(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "curves.json"
    lengths = iter((20, 7))
    monkeypatch.setattr(program, "losses_of", lambda config: [3.0] * next(lengths))
    words = ["--shape", "tiny", "--precisions", "bf16", "fp32", "--steps", 20, "--json", results]
    with pytest.raises(SystemExit, match=r"fp32 was stopped at step 7 of 20\."):
        start(program, monkeypatch, *words)
    assert [curve["precision"] for curve in json.loads(results.read_text())["curves"]] == ["bf16"]


def test_text_is_of_the_standard_library(program: ModuleType) -> None:
    texts = program.docstrings()
    assert any(text.startswith("Command-line parsing library") for text in texts)
    assert any(text.startswith("Help message formatter which retains any formatting") for text in texts)
    assert "" not in texts and "Of another library." not in texts
    assert len(set(texts)) == len(texts)


def test_differences_are_of_means_of_a_window(program: ModuleType) -> None:
    # Of the two windows, the second drops a 4.0 and adds the next value.
    first, second = program.compare({"bf16": [4.0] * 20 + [2.0], "fp8-block": [4.0] * 20 + [6.0]})
    assert first.last == (19 * 4 + 2) / 20
    assert (first.mean_difference, first.greatest_difference) == (0, 0)
    assert second.greatest_difference == pytest.approx(4 / (19 * 4 + 2))
    assert second.mean_difference == pytest.approx(4 / (19 * 4 + 2) / 2)


def test_precision_that_does_not_run_here_is_refused_before_any_run(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(program, "losses_of", lambda config: pytest.fail("a run began"))
    with pytest.raises(SystemExit, match="--precisions fp8-block: precision.compute='fp8' needs Transformer Engine"):
        start(program, monkeypatch, "--shape", "tiny", "--precisions", "bf16", "fp8-block")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "19"], "--steps 19: losses are means of 20 steps, so give at least as many"),
        (["--page", "x.md"], "--page x.md: the losses come from a file, so give --json FILE as well"),
        (["--no-runs"], "--no-runs only writes a page, so give --page FILE as well"),
        (["--precisions", "fp4"], "argument --precisions: invalid choice: 'fp4'"),
    ],
)
def test_bad_options_are_refused(
    program: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.arguments(words)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("shape", ["tiny", "110M", "1B"])
@pytest.mark.parametrize("precision", ["bf16", "fp8-delayed", "fp8-current", "fp8-block"])
def test_precisions_differ_in_nothing_else(program: ModuleType, tmp_path: Path, shape: str, precision: str) -> None:
    config = program.training_config(shape, precision, 500, tmp_path / "texts.jsonl")
    first = program.training_config(shape, "bf16", 500, tmp_path / "texts.jsonl")
    assert (config.data, config.model, config.seed) == (first.data, first.model, first.seed)
    assert (config.optimizer, config.schedule) == (first.optimizer, first.schedule)
    # Batches are full, so that no precision adds padding.
    assert config.data.split_long and config.data.tokens_per_batch % config.token_multiple == 0
