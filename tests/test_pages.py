"""`benchmarks/pages.py`, and the pages that are written with it: each is what the command that it names writes."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

import pages

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN_BY = re.compile("^Written by `python benchmarks/(.+?)`", re.MULTILINE)
COMMANDS = {page.name: found[1] for page in sorted(DOCS.glob("*.md")) if (found := WRITTEN_BY.search(page.read_text()))}


def test_pages_are_found() -> None:
    assert {"performance.md", "training-curves.md", "training-performance.md"} <= set(COMMANDS)


@pytest.mark.parametrize("page", COMMANDS)
def test_a_page_is_what_its_command_writes(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    written = shutil.copytree(DOCS, tmp_path / "docs") / page
    written.unlink()
    written.with_suffix(".svg").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    program, *words = COMMANDS[page].split()
    monkeypatch.setattr(sys, "argv", [program, *words, "--no-runs"])
    importlib.import_module(program.removesuffix(".py")).main()
    assert written.read_text() == (DOCS / page).read_text()
    assert "<svg" in written.with_suffix(".svg").read_text()


def test_plots_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = [pages.Bar("8B, engine", 0.75, "#2a6f97"), pages.Bar("8B, transformers", 0.5, "#d4a373")]
    files = [tmp_path / "one.svg", tmp_path / "other.svg"]
    for file in files:
        pages.plot_shares(file, bars)
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text()
    assert text.index("<!-- 8B, transformers -->") < text.index("<!-- 8B, engine -->")  # which is above it


def test_a_page_ends_with_its_notes(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    lines = ["# Speed", "", *pages.table(["what", "tokens/s"], [["1B", "60,000"], ["8B", ""]])]
    text = "# Speed\n\n| what | tokens/s |\n| --- | --- |\n| 1B | 60,000 |\n| 8B |  |\n"
    pages.write(page, lines)
    assert page.read_text() == text
    (tmp_path / "speed-notes.md").write_text("## What is missed\n\n")
    pages.write(page, lines)
    assert page.read_text() == text + "\n## What is missed\n"
