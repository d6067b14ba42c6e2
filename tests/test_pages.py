"""`benchmarks/pages.py`, and the result pages: each is the output of the command that it names."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

import pages

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "results"
WRITTEN_BY = re.compile("^Written by `python benchmarks/(.+?)`", re.MULTILINE)
COMMANDS = {
    page.name: found[1] for page in sorted(PAGES.glob("*.md")) if (found := WRITTEN_BY.search(page.read_text()))
}
LARGEST_PLOT = 60_000  # bytes
PLOTS = sorted(path for path in PAGES.rglob("*") if path.suffix in {".png", ".svg"})


def test_pages_and_plots_are_found() -> None:
    assert {"decode-h100.md", "decode-h200.md", "loss-curves.md", "training.md"} <= set(COMMANDS)
    assert {page.removesuffix(".md") for page in COMMANDS} == {plot.stem for plot in PLOTS}


@pytest.mark.parametrize("page", COMMANDS)
def test_a_page_is_the_output_of_its_command(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for folder in ("docs/results", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    written = tmp_path / "docs" / "results" / page
    written.unlink()
    written.with_suffix(".svg").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    program, *words = COMMANDS[page].split()
    monkeypatch.setattr(sys, "argv", [program, *words, "--no-runs"])
    importlib.import_module(program.removesuffix(".py")).main()
    assert written.read_text() == (PAGES / page).read_text()
    assert "<svg" in written.with_suffix(".svg").read_text()


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_a_plot_is_small(plot: Path) -> None:
    assert plot.stat().st_size <= LARGEST_PLOT


def test_plots_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = [pages.Bar("8B, engine", 0.75, "#2a6f97"), pages.Bar("8B, transformers", 0.5, "#d4a373")]
    files = [tmp_path / "one.svg", tmp_path / "other.svg"]
    for file in files:
        pages.plot_shares(file, bars)
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text()
    assert text.index(">8B, transformers</text>") < text.index(">8B, engine</text>")  # the first bar is on top


def test_a_plot_has_a_path_on_a_line_and_short_coordinates() -> None:
    assert (
        pages.compact('<path d="M 1.23456 2\nL -3.999999 4.5\n" x="1.5"/>')
        == '<path d="M 1.23 2L -4.00 4.5" x="1.5"/>\n'
    )


def test_a_page_is_lines_and_tables(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    pages.write(page, ["# Speed", "", *pages.table(["what", "tokens/s"], [["1B", "60,000"], ["8B", ""]])])
    assert page.read_text() == "# Speed\n\n| what | tokens/s |\n| --- | --- |\n| 1B | 60,000 |\n| 8B |  |\n"
