"""Documents, folders and earlier runs that end a started training command with a message."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from core.training_runs import docstrings, losses, options, train, write
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core.train.command import main

SHORT: dict[str, Any] = {"steps": 2, "data__workers": 0, "checkpoint__interval": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text"), docstrings(150)[:4])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Return the folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, source, **SHORT | {"checkpoint__interval": 100})
    return folder


def refused(folder: Path, source: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """Return the message of a command that refuses."""
    assert main(options(folder, source, **SHORT | changes)) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_document_ends_the_process_and_its_workers(workers: int, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    rows = [{"text": text} for text in docstrings(150)[:8]]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"other": "words"}]))
    words = options(tmp_path / "run", file, **SHORT | {"steps": 100, "data__workers": workers})
    # The timeout kills a process that waits for its workers for ever.
    command = [sys.executable, "-m", "llama_te_core.train", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    (message,) = [line for line in ended.stderr.splitlines() if line.startswith("llama-te-train: ")]
    assert "line 9 has no field 'text'" in message and "Traceback" not in ended.stderr


def test_another_error_ends_the_process_and_its_workers(tmp_path: Path, source: Path) -> None:
    program = (
        "import sys, llama_te_core.train.loop as loop\n"
        "def fails(*arguments):\n"
        "    arguments[4].next()\n"
        "    raise MemoryError('no more')\n"
        "loop.train_step = fails\n"
        "from llama_te_core.train.command import main\n"
        "main(sys.argv[1:])\n"
    )
    words = options(tmp_path / "run", source, **SHORT | {"data__workers": 2})
    command = [sys.executable, "-c", program, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and "MemoryError: no more" in ended.stderr


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {
                "model__shape__num_attention_heads": 8,
                "model__shape__num_key_value_heads": 4,
                "model__shape__head_dim": 12,
            },
            "num_attention_heads=4 (here 8)",
        ),
        ({"model__shape__rope_parameters__rope_theta": 5e5}, "rope_parameters="),
        ({"model__shape__rms_norm_eps": 1e-3}, "rms_norm_eps="),
        ({"model__shape__num_hidden_layers": 3}, "num_hidden_layers=4 (here 3)"),
    ],
)
def test_a_run_does_not_go_on_with_another_model(
    changes: dict[str, Any], difference: str, saved: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(saved, source, capsys, steps=4, checkpoint__interval=100, **changes)
    assert f"step-00000002 is of another model, with {difference}" in message
    assert len(losses(saved)) == 2


def test_fewer_steps_than_there_were_are_refused(saved: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (saved / "config.yaml").read_text()
    assert "is at step 2: steps=1 is less" in refused(saved, source, capsys, steps=1)
    assert (saved / "config.yaml").read_text() == before


def test_a_run_without_checkpoints_is_not_overwritten_by_another(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tmp_path, source, **SHORT)
    message = refused(tmp_path, source, capsys, optimizer__learning_rate=1e-2, steps=3)
    assert "has a run with another optimizer and steps, and no checkpoint of it" in message
    assert losses(tmp_path) == first
    assert train(tmp_path, source, **SHORT) == first  # a run with the same settings begins anew


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file: give a folder" in refused(tmp_path / "file", source, capsys)


def test_a_tokenizer_that_is_not_there_is_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(tmp_path / "run", source, capsys, data__tokenizer="./nowhere")
    assert "data.tokenizer='./nowhere' cannot be loaded: give a tokenizer's folder or hub id, or 'bytes'" in message


def test_a_head_that_a_tied_model_would_lose_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Callable[..., PreTrainedModel]
) -> None:
    hf = tiny_llama(vocab_size=258, max_position_embeddings=512)
    convert_llama_hf_to_te(hf).save_pretrained(tmp_path / "te")
    config = tmp_path / "te" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    checkpoint = {"model__checkpoint": tmp_path / "te", "model__shape": None}
    message = refused(tmp_path / "run", source, capsys, **checkpoint)
    assert "lm_head.weight and model.embed_tokens.weight with different values" in message


def test_sequences_too_long_for_a_checkpoint_are_refused_before_it_is_converted(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Callable[..., PreTrainedModel]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "hf")
    changes = {"model__shape": None, "model__checkpoint": tmp_path / "hf", "data__sequence_length": 65}
    message = refused(tmp_path / "run", source, capsys, **changes)
    assert "data.sequence_length is 65, but the model has max_position_embeddings=64" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("token", [260, -1])
def test_tokens_that_the_model_has_not_are_refused(
    token: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.jsonl"
    file.write_text(json.dumps({"input_ids": [5, token, 7]}) + "\n")
    message = refused(tmp_path / "run", file, capsys, data__tokenizer=None)
    assert f"line 1 has the token id {token}; ids must be from 0 to 259" in message


def test_fewer_documents_than_readers_are_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has 4 documents, fewer than the 5 shards" in refused(tmp_path / "run", source, capsys, data__workers=5)
    assert not (tmp_path / "run").exists()


def test_angles_without_what_their_type_needs_are_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = '{"rope_type": "linear", "rope_theta": 10000.0}'
    message = refused(tmp_path / "run", source, capsys, model__shape__rope_parameters=rope)
    assert "has no 'factor', which rope_type='linear' needs" in message
