"""Progress bars belong on terminals: log files and pipes get none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from core.test_text_data import ByteTokenizer
from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.cli import main as convert
from llama_te_core import NVLlamaForCausalLM
from llama_te_core.train.data.text_data import TextBatches, TextData
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.engine import engine as engine_module


@pytest.fixture
def folders(
    tmp_path: Path, tiny_llama: Callable[..., PreTrainedModel], smollm2_tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, Path]:
    """Return the folders of one model in both layouts."""
    model = tiny_llama(num_hidden_layers=1, vocab_size=len(smollm2_tokenizer))
    logging.disable_progress_bar()
    try:
        model.save_pretrained(tmp_path / "hf")
        convert_llama_hf_to_te(model).save_pretrained(tmp_path / "te")
    finally:
        logging.enable_progress_bar()
    smollm2_tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", tmp_path / "te"


def bars(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was drawn to standard error, where it holds a bar."""
    error = capsys.readouterr().err
    return error if "\r" in error or "%|" in error else ""


@pytest.mark.parametrize("terminal", [False, True])
def test_loading_and_saving_a_model(
    terminal: bool, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    model = NVLlamaForCausalLM.from_pretrained(folders[1])
    assert ("Loading weights" in bars(capsys)) == terminal
    model.save_pretrained(tmp_path / "again")
    assert bool(bars(capsys)) == terminal
    assert logging.is_progress_bar_enabled(), "the library's own setting is as before"


def test_verify_with_logits(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["verify", *map(str, folders), "--logits", "The sky"]) == 0
    assert not bars(capsys)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    disabled = []

    def load_dataset(*names: Any, **options: Any) -> datasets.Dataset:
        disabled.append(datasets.are_progress_bars_disabled())
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(list(TextBatches(TextData("someone/texts", ByteTokenizer(), 8)))) == 1
    assert disabled == [True] and not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("terminal", [False, True])
def test_an_engine(
    terminal: bool, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(NVLlamaForCausalLM.from_pretrained(folders[1]))
    capsys.readouterr()
    monkeypatch.setattr(engine_module, "SECONDS_BEFORE_PROGRESS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert bool(bars(capsys)) == terminal
