"""Rows of tokens with labels train on these labels; fields without effect are refused.

Rows have different tokens everywhere, so a token tells its row and its place.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from core.test_text_data import ByteTokenizer, all_in_bytes
from core.training_runs import docstrings, options, train
from llama_te_convert import convert_llama_te_to_hf
from llama_te_core.train.command import main, read_config
from llama_te_core.train.data.text_data import TextBatches, TextData, merge_states
from llama_te_core.train.setup import build_model, random_weights

IGNORED = -100


def rows_of(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Make rows of tokens 1, 2, 3, ..., each token trained or not at random."""
    coin, counter = random.Random(seed), itertools.count(1)
    rows = []
    for length in lengths:
        tokens = [next(counter) for _ in range(length)]
        labels = [token if coin.random() < 0.5 else IGNORED for token in tokens]
        rows.append({"input_ids": tokens, "labels": [*labels[:-1], tokens[-1]]})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def expected_labels(batch: dict[str, Any], rows: list[dict[str, list[int]]]) -> list[int]:
    """Return the labels of a packed batch by the rows: no token predicts the first token of a sequence."""
    label_of = {token: label for row in rows for token, label in zip(row["input_ids"], row["labels"], strict=True)}
    starts = set(batch["cu_seq_lens_q"].tolist())
    return [
        IGNORED if place in starts else label_of[token] for place, token in enumerate(batch["input_ids"][0].tolist())
    ]


def test_a_run_on_labelled_rows_has_the_losses_of_a_plain_loop_with_transformers(tmp_path: Path) -> None:
    rows = []
    for text, length, prompt in zip(docstrings(90), (40, 60, 70, 86), (20, 5, 1, 80), strict=False):
        tokens = [3 + byte for byte in text.encode()[:length]]
        rows.append({"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]})
    source = write_rows(tmp_path / "rows.jsonl", rows)
    settings: dict[str, Any] = {
        "data__tokenizer": None, "data__tokens_per_batch": 256, "data__sequence_length": 256, "data__shuffle_buffer": 0,
        "model__shape__num_hidden_layers": 2, "optimizer__epsilon": 1e-5, "steps": 5, "checkpoint__interval": None,
        "schedule__kind": "constant",
    }  # fmt: skip
    curve = train(tmp_path / "run", source, **settings)

    config = read_config(options(tmp_path, source, **settings))
    model_config = config.model_config()
    weights = random_weights(config.seed, model_config)
    model = convert_llama_te_to_hf(build_model(config, model_config, weights, None, torch.device("cpu"))[0])
    groups = [
        {"params": [each for each in model.parameters() if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in model.parameters() if each.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.learning_rate, betas=(0.9, 0.95), eps=1e-5)
    trained = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    for loss in curve:
        total = 0.0
        for row in rows:  # each row alone; transformers divides the sum by num_items_in_batch
            batch = {name: torch.tensor([values]) for name, values in row.items()}
            each = model(**batch, num_items_in_batch=torch.tensor(trained)).loss
            each.backward()
            total += each.item()
        assert total == pytest.approx(loss, abs=2e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(curve) == 5


@pytest.mark.parametrize("split_long", [True, False])
def test_labels_stay_beside_their_tokens_when_batches_cut_rows_and_runs_resume(
    tmp_path: Path, split_long: bool
) -> None:
    rows = rows_of([5, 31, 2, 9, 14, 3, 8, 26, 3, 12])
    write_rows(tmp_path / "rows.jsonl", rows)
    data = TextData(
        tmp_path, None, 16 if split_long else 32, sequence_length=11 if split_long else None, split_long=split_long,
        epochs=2, shuffle_buffer=4, pad_sequences_to_be_divisible_by=None,
    )  # fmt: skip
    whole = list(TextBatches(data))
    assert all(batch["labels"][0].tolist() == expected_labels(batch, rows) for batch in whole)
    assert any(IGNORED in batch["labels"][0, 1:] for batch in whole)
    running = TextBatches(data)
    steps = iter(running)
    for done in range(len(whole)):
        resumed = TextBatches(data)
        resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert all_in_bytes(resumed) == all_in_bytes(whole[done:])
        next(steps)
    half = TextBatches(data)
    list(itertools.islice(half, 3))
    for rank in range(3):  # another number of ranks goes on in the middle of a row
        part = TextBatches(data, rank, 3)
        part.load_state_dict(merge_states([half.state_dict()]))
        assert all(batch["labels"][0].tolist() == expected_labels(batch, rows) for batch in part)


def test_labels_of_padded_and_divided_sequences(tmp_path: Path) -> None:
    rows = rows_of([5, 11, 2, 9])
    write_rows(tmp_path / "rows.jsonl", rows)
    data = TextData(tmp_path, None, 48, pad_sequences_to_be_divisible_by=4, pad_to_multiple_of=16, shuffle_buffer=0)
    (batch,) = TextBatches(data)
    places = batch["cu_seq_lens_q_padded"].tolist()
    expected = torch.full_like(batch["labels"], IGNORED)
    for place, row in zip(places, rows, strict=False):
        expected[0, place + 1 : place + len(row["labels"])] = torch.tensor(row["labels"][1:])
    assert torch.equal(batch["labels"], expected)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_tokenized_data_sets_with_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rows as a Hugging Face tokenizer pads them, on either side, with labels and an attention mask."""
    padded = {
        "input_ids": [[7, 8, 9, 0], [0, 0, 4, 5]],
        "attention_mask": [[1, 1, 1, 0], [0, 0, 1, 1]],
        "labels": [[IGNORED, 8, IGNORED, IGNORED], [IGNORED, IGNORED, 4, 5]],
        "id": [1, 2],
    }
    source: Any = tmp_path
    if kind == "parquet":
        pq.write_table(pa.table(padded), tmp_path / "rows.parquet")
    elif kind == "jsonl":
        write_rows(tmp_path / "rows.jsonl", [{name: values[row] for name, values in padded.items()} for row in (0, 1)])
    else:
        source, table = "someone/rows", datasets.Dataset.from_dict(padded)
        monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: table)
    (batch,) = TextBatches(TextData(source, None, 8, shuffle_buffer=0))
    assert batch["input_ids"].tolist() == [[7, 8, 9, 4, 5]]
    assert batch["labels"].tolist() == [[IGNORED, 8, IGNORED, IGNORED, 5]]


TEXT, TOKENS = {"tokenizer": ByteTokenizer()}, {"tokenizer": None}


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        ({"text": "a", "labels": [1]}, TEXT, r"line 1 has the field 'labels' without effect: training reads text\."),
        ({"text": "a", "input_ids": [1]}, TEXT, r"'input_ids' without effect.*`data\.tokenizer: null`"),
        ({"text": "a", "messages": []}, TEXT, r"'messages' without effect.*does not render conversations.*label -100"),
        ({"messages": [{"role": "user"}]}, TEXT, r"has no field 'text'.*does not render conversations"),
        ({"prompt": "a", "completion": "b"}, TOKENS, r"has no field 'input_ids'.*label -100 for the tokens"),
        ({"text": "a", "w": 1, "x": 2}, TEXT, r"the fields 'w', 'x' without.*`data\.ignored_fields: \[\"w\", \"x\"\]`"),
        ({"text": "a", "w": 1, "x": 2}, TEXT | {"ignored_fields": ("w",)}, r"field 'x' .*_fields=\[\"w\", \"x\"\]"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, TOKENS, r"'loss_mask' without effect: training reads input_ids"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, TOKENS, r"'position_ids' without effect"),
        ({"input_ids": [1, 2], "labels": [1]}, TOKENS, r"labels is a list of int of 1; .* 2 integers, as many"),
        ({"input_ids": [1, 2], "labels": None}, TOKENS, r"labels is NoneType; it must be a list of 2 integers"),
        ({"input_ids": [1, 2], "labels": [1.5, 2]}, TOKENS, r"labels is a list of float and int"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, TOKENS, r"line 1 has the label -1; labels must be -100,.* from 0\."),
        ({"input_ids": [1, 2], "labels": [1, 9]}, TOKENS | {"vocab_size": 9}, r"the label 9; .* token ids from 0 to 8"),
        ({"input_ids": [1, 2], "labels": [1, IGNORED]}, TOKENS, r"line 1 has no labels to train on: .*skip_empty"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, TOKENS, r"attention_mask has \[1, 2\]; it may have 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_without_effect_and_wrong_labels_are_refused(
    tmp_path: Path, row: dict[str, Any], data: dict[str, Any], message: str, kind: str
) -> None:
    if kind == "jsonl":
        write_rows(tmp_path / "rows.jsonl", [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
        message = message.replace("line 1 ", "").replace("a list of float and int", "a list of float")
    with pytest.raises(ValueError, match=message):
        list(TextBatches(TextData(tmp_path, tokens_per_batch=8, **data)))


def test_ignored_fields_and_null_fields_are_accepted(tmp_path: Path) -> None:
    rows = [{"text": "a", "url": "x", "score_of_mine": 1, "messages": None}]
    data = TextData(write_rows(tmp_path / "a.jsonl", rows), ByteTokenizer(), 8, ignored_fields=["score_of_mine"])
    assert [batch["input_ids"].tolist() for batch in TextBatches(data)] == [[[1, 100, 2]]]
    data = TextData(
        write_rows(tmp_path / "b.jsonl", [{"input_ids": [1, 2], "labels": [IGNORED] * 2}, *rows_of([2])]),
        None,
        8,
        skip_empty=True,
    )
    assert [batch["input_ids"].tolist() for batch in TextBatches(data)] == [[[1, 2]]]


def test_the_command_names_field_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "messages": []}])
    assert main(options(tmp_path / "run", file, steps=1)) == 1
    message = capsys.readouterr().err
    assert f"{file}, line 1 has the field 'messages' without effect" in message and "Traceback" not in message
