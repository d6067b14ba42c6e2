"""The examples run as they are written, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_te_core import NVLlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_with_trainer(tmp_path: Path) -> None:
    options = ("--model", "random", "--steps", 8, "--learning-rate", 3e-3, "--output", "out")
    out = run("train_with_trainer.py", *options, folder=tmp_path)
    before, after = (float(out.split("held-out text: ")[1].split()[place]) for place in (0, 2))
    assert after < before - 0.5
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")("Two and two", return_tensors="pt").input_ids
    ours, theirs = (
        NVLlamaForCausalLM.from_pretrained(tmp_path / "out" / "te"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf"),
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    again = run("train_with_trainer.py", *options, folder=tmp_path)  # goes on, with nothing left to do
    assert again.split("before")[1] == out.split("before")[1]


@pytest.mark.slow
def test_lora(tmp_path: Path) -> None:
    out = run("lora.py", "--model", "random", "--steps", 4, "--output", "out", folder=tmp_path)
    assert "Adapter of 14 Hugging Face weights" in out
    assert out.count("(allowed: 1e-04)") == 2


@pytest.mark.slow
@pytest.mark.parametrize("rollouts", ["engine", "generate"])
def test_grpo(rollouts: str, tmp_path: Path) -> None:
    options = ("--model", "random", "--steps", 2, "--batch", 16, "--rollouts", rollouts, "--output", "out")
    assert "Mean reward of the first step 0.0" in run("grpo.py", *options, folder=tmp_path)
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert log["rollouts"] == rollouts and len(log["steps"]) == 2
    for step in log["steps"]:
        assert 0 <= step["reward"] < 0.1
        assert step["seconds"] > step["rollout_seconds"] and (step["rollout_seconds"] > 0) == (rollouts == "engine")
        assert step["rollout_tokens"] <= 16 * 16
    assert (tmp_path / "out" / "reward.png").stat().st_size > 1000
