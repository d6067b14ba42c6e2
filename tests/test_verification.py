"""The record of a test run, written here without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = """
import pytest

def test_close(measured):
    measured("distance", 0.12345, 0.5)

def test_far(measured):
    measured("distance", 2, 1.5)

@pytest.mark.skip
def test_not_run():
    pass
"""


def test_the_record_has_figures_counts_and_versions(tmp_path: Path) -> None:
    (tmp_path / "test_small.py").write_text(RUN)
    record = tmp_path / "docs" / "record.md"
    command = [sys.executable, "-m", "pytest", "-p", "verification", "--verification", str(record), "test_small.py"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "distance: 2 is over the bound 1.5" in finished.stdout
    lines = record.read_text(encoding="utf-8").splitlines()
    assert "| result | 1 passed, 1 failed, 1 skipped |" in lines
    assert "| command | `pytest -p verification --verification record.md test_small.py` |" in lines
    assert "| GPU | none |" in lines
    assert "| `test_small.py::test_close` | distance | 0.123 | 0.5 |" in lines
    assert "| `test_small.py::test_far` | distance | 2 | 1.5 |" in lines
    outcomes = [line for line in lines if line.startswith("- ")]
    assert outcomes == [
        "- failed: `test_small.py::test_far`",
        "- skipped: `test_small.py::test_not_run`",
    ]
