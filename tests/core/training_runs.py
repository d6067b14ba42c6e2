"""Runs of the training command on real text, the docstrings of Python's standard library."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from llama_te_core.train.command import main

MODULES = (argparse, json, textwrap, ast)


def docstrings(length: int) -> list[str]:
    """Return the ASCII docstrings of modules and their members that have `length` characters, cut to this length."""
    found = []
    for module in MODULES:
        for each in [module, *vars(module).values()]:
            text = getattr(each, "__doc__", None) or ""
            if getattr(each, "__module__", module.__name__) == module.__name__ and text.isascii():
                found.append(text)
    return list(dict.fromkeys(text[:length] for text in found if len(text) >= length))


def write(folder: Path, texts: list[str]) -> Path:
    """Write texts to a file of documents, and return the file."""
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def options(folder: Path, source: Path, **changes: Any) -> list[str]:
    """Return the command's arguments for the preset `tiny` with changes, such as `optimizer__max_norm=1`."""
    values: dict[str, Any] = {
        "data.source": source,
        "folder": folder,
        "log.interval": 1,
        "export.te": False,
        "schedule.warmup_steps": 0,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    words = ["--config", "tiny"]
    for name, value in values.items():
        words += [
            f"--{name}",
            "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value),
        ]
    return words


def train(folder: Path, source: Path, **changes: Any) -> list[float]:
    """Run the command in this process, and return the losses."""
    assert main(options(folder, source, **changes)) == 0
    return losses(folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder: Path) -> list[float]:
    """Return the loss of each step, from the first to the last."""
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


class Command:
    """The command in a separate process. Leaving the context always kills it."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama_te_core.train", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for_step(self, step: int) -> None:
        while len(metrics(self.folder)) < step:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)
