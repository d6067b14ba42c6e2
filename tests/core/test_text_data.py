"""Training batches lose and repeat no token of the documents, depend only on the seed, and resume exactly."""

import copy
import dataclasses
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.train.data.documents import Document, in_order
from llama_te_core.train.data.text_data import TextBatches, TextData, merge_states

# Examples have no deadline, since a busy machine would miss it.
checked = settings(deadline=None)


class ByteTokenizer:
    """A tokenizer with three special tokens, followed by one token for each byte."""

    bos_token_id = 1
    eos_token_id = 2

    def encode(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return [byte + 3 for byte in text.encode()]

    def decode(self, tokens):
        assert (tokens[0], tokens[-1]) == (1, 2)
        return bytes(token - 3 for token in tokens[1:-1]).decode()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def numbered(lengths):
    """Make documents whose tokens are all different, so that every loss or repetition shows."""
    counter = itertools.count(1)
    return [[next(counter) for _ in range(length)] for length in lengths]


def numbered_data(path, lengths, **fields):
    """Write numbered documents to files, up to three in each, and return their data."""
    documents = numbered(lengths)
    path.mkdir(exist_ok=True)
    for number in range(0, len(documents), 3):
        records = [{"input_ids": tokens} for tokens in documents[number : number + 3]]
        write_jsonl(path / f"{number:04}.jsonl", records)
    return TextData(**{"source": path, "tokenizer": None, "tokens_per_batch": 16} | fields), documents


def loader_of(batches, workers=0):
    # Fork the workers: a process started in another way would lack this module's classes and a test's patches.
    context = "fork" if workers else None
    return StatefulDataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context)


def sequences(batch):
    """Return the sequences of a packed batch as lists of tokens."""
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    return [each.tolist() for each in batch["input_ids"][0].split(lengths)]


def tokens_of(batches):
    return [token for batch in batches for token in batch["input_ids"][0].tolist()]


def in_bytes(batch):
    """Return a whole batch as bytes, to compare it bit for bit."""
    return {
        name: (value.dtype, value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def all_in_bytes(batches):
    return [in_bytes(batch) for batch in batches]


lengths = st.lists(st.integers(1, 20), min_size=3, max_size=20)
fields = st.fixed_dictionaries(
    {
        "tokens_per_batch": st.integers(20, 40),
        "sequence_length": st.sampled_from([None, 3, 7, 20]),
        "split_long": st.booleans(),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 3),
        "shuffle_buffer": st.sampled_from([0, 1, 2, 5, 100]),
    }
)

EXAMPLE_FIELDS = {"tokens_per_batch": 20, "epochs": 2, "shuffle_buffer": 0}


@checked
@given(lengths, fields, st.integers(1, 3))
def test_each_epoch_has_each_token_once(lengths, fields, ranks):
    with tempfile.TemporaryDirectory() as folder:
        data, documents = numbered_data(Path(folder), lengths, **fields)
        shares = [list(TextBatches(data, rank, ranks)) for rank in range(ranks)]
    if not data.split_long:
        documents = [document[: data.longest_sequence] for document in documents]
    of_shares = [tokens_of(share) for share in shares]
    assert Counter(itertools.chain(*of_shares)) == dict.fromkeys(itertools.chain(*documents), data.epochs)

    for share in shares:
        sizes = [batch["input_ids"].shape[1] for batch in share]
        assert all(0 < size <= data.tokens_per_batch for size in sizes)
        pieces = [sequence for batch in share for sequence in sequences(batch)]
        assert max(map(len, pieces)) <= data.longest_sequence
        if data.split_long:
            assert set(sizes[:-1]) <= {data.tokens_per_batch}, "only the last one is not full"
        else:
            assert {tuple(piece) for piece in pieces} <= {tuple(document) for document in documents}
            for batch, following in itertools.pairwise(share):
                first = len(sequences(following)[0])
                assert batch["input_ids"].shape[1] + first > data.tokens_per_batch, "greedy"
        for batch in share:
            starts = batch["cu_seq_lens_q"][:-1].tolist()
            expected = batch["input_ids"].clone()
            expected[:, starts] = -100
            assert torch.equal(batch["labels"], expected)
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["max_length_q"] == max(map(len, sequences(batch)))


@checked
@given(lengths, fields, st.integers(1, 3))
def test_documents_of_all_ranks_are_one_order(lengths, fields, ranks):
    """Each rank has every `ranks`-th document of an order that depends on seed and epoch alone."""
    with tempfile.TemporaryDirectory() as folder:
        data, documents = numbered_data(Path(folder), lengths, **fields | {"split_long": True})
        order = [
            [each.fields()["input_ids"] for each in in_order(data.open(), data.seed, epoch, data.shuffle_buffer)]
            for epoch in range(data.epochs)
        ]
        for rank in range(ranks):
            share = [document for epoch in order for document in epoch[rank::ranks]]
            assert tokens_of(TextBatches(data, rank, ranks)) == list(itertools.chain(*share))
    assert all(sorted(epoch) == documents for epoch in order)
    if data.shuffle_buffer == 0:
        assert order == [documents] * data.epochs


def test_the_order_changes_with_seed_and_epoch_alone(tmp_path):
    def order(path, **fields):
        data, _ = numbered_data(path, [1] * 30, epochs=2, **fields)
        tokens = tokens_of(TextBatches(data))
        return tokens[:30], tokens[30:]

    first, second = order(tmp_path / "one", seed=5)
    assert first != second != sorted(second)
    assert order(tmp_path / "two", seed=5) == (first, second), "not with the folder"
    assert order(tmp_path / "one", seed=6) != (first, second)
    # The order is fixed: if a release changed it, a resumed run would repeat and lose documents.
    assert first[:10] == [23, 5, 2, 17, 28, 29, 4, 9, 19, 21]
    through_a_small_buffer, _ = order(tmp_path / "one", seed=5, shuffle_buffer=8)
    assert through_a_small_buffer[:10] == [8, 4, 16, 5, 17, 18, 10, 6, 7, 9]


@checked
@given(lengths, fields, st.integers(1, 3), st.data())
def test_a_shard_resumes_at_every_step(lengths, fields, ranks, draw):
    with tempfile.TemporaryDirectory() as folder:
        data, _ = numbered_data(Path(folder), lengths, **fields)
        rank = draw.draw(st.integers(0, ranks - 1))
        expected = all_in_bytes(TextBatches(data, rank, ranks))
        interrupted = TextBatches(data, rank, ranks)
        running = iter(interrupted)
        for done in range(len(expected) + 1):
            state = json.loads(json.dumps(interrupted.state_dict()))
            resumed = TextBatches(data, rank, ranks)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert all_in_bytes(resumed) == expected[done:]
            next(running, None)
        assert all_in_bytes(resumed) == expected, "the iteration after the resumed one is whole again"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split_long", [True, False])
def test_a_loader_resumes_at_every_step(tmp_path, workers, split_long):
    lengths = [5, 31, 2, 9, 14, 1, 8, 26, 3, 12]
    data, _ = numbered_data(
        tmp_path / "data", lengths, epochs=2, split_long=split_long, sequence_length=11, shuffle_buffer=4
    )
    loader = loader_of(TextBatches(data, 1, 2), workers)
    states, batches = [loader.state_dict()], []
    for batch in loader:
        batches.append(batch)
        states.append(copy.deepcopy(loader.state_dict()))
    expected = all_in_bytes(batches)
    assert len(expected) > 4
    for done, state in enumerate(states):
        resumed = loader_of(TextBatches(data, 1, 2), workers)
        saved = io.BytesIO()
        torch.save(state, saved)
        saved.seek(0)
        resumed.load_state_dict(torch.load(saved, weights_only=False))
        assert all_in_bytes(resumed) == expected[done:], f"after {done} batches"


def test_a_copy_for_another_process_gives_the_same(tmp_path, smollm2_tokenizer):
    """Workers that are not forks of the process get the batches pickled."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text number {number}"} for number in range(30)])
    batches = TextBatches(TextData(tmp_path, smollm2_tokenizer, 16))
    batches.load_state_dict(next_state(batches))
    copied = pickle.loads(pickle.dumps(batches))
    assert all_in_bytes(copied) == all_in_bytes(batches)


def next_state(batches):
    next(iter(batches))
    return batches.state_dict()


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_a_run_goes_on_with_another_number_of_epochs(tmp_path, epochs):
    """A run in its third epoch continues to the new end. If the new end has passed, it yields nothing."""
    lengths = [5, 31, 2, 9, 14]
    data, documents = numbered_data(tmp_path / "data", lengths, epochs=4)
    batches = TextBatches(data)
    tokens = []
    for batch in batches:
        tokens += tokens_of([batch])
        if len(tokens) > 2 * sum(lengths) + 10:
            break
    rest = TextBatches(dataclasses.replace(data, epochs=epochs))
    rest.load_state_dict(batches.state_dict())
    assert len(tokens_of(rest)) == max(0, epochs * sum(lengths) - len(tokens))
    if epochs == 5:
        rest.load_state_dict(batches.state_dict())
        assert Counter(tokens + tokens_of(rest)) == dict.fromkeys(itertools.chain(*documents), 5)


@pytest.mark.parametrize("change", [{"tokens_per_batch": 7}, {"sequence_length": 5}])
def test_a_run_goes_on_with_other_batches(tmp_path, change):
    data, documents = numbered_data(tmp_path / "data", [5, 31, 2, 9, 14, 40, 8], sequence_length=6)
    before = TextBatches(data)
    tokens = tokens_of(run_for(before, 4))
    data = dataclasses.replace(data, **{"sequence_length": None} | change)
    after = TextBatches(data)
    after.load_state_dict(before.state_dict())
    batches = list(after)
    assert {batch["input_ids"].shape[1] for batch in batches[:-1]} == {data.tokens_per_batch}
    assert max(len(sequence) for batch in batches for sequence in sequences(batch)) <= data.longest_sequence
    assert Counter(tokens + tokens_of(batches)) == dict.fromkeys(itertools.chain(*documents), 1)


def test_workers_share_out_what_ranks_would(tmp_path):
    """Workers 0 and 1 of rank 1 of 2 have the documents of ranks 2 and 3 of 4."""
    data, _ = numbered_data(tmp_path / "data", [5, 31, 2, 9, 14, 1, 8, 26, 3, 12])
    by_rank = [tokens_of(TextBatches(data, rank, 4)) for rank in (2, 3)]
    assert sorted(tokens_of(loader_of(TextBatches(data, 1, 2), 2))) == sorted(by_rank[0] + by_rank[1])


def run_for(batches, steps):
    return list(itertools.islice(batches, steps))


@checked
@given(lengths, fields, st.lists(st.tuples(st.integers(1, 3), st.integers(0, 8)), min_size=1, max_size=4))
@example([30, 30, 30], EXAMPLE_FIELDS, [(1, 1), (3, 0)])  # a document begun by one run waits through another
@example([30, 30, 30], EXAMPLE_FIELDS, [(3, 1), (1, 1), (3, 1)])
@example([1, 30, 30, 1, 30, 30], EXAMPLE_FIELDS, [(3, 1)])  # one rank has finished both epochs, others none
def test_another_number_of_ranks_goes_on_without_loss_or_repetition(lengths, fields, runs):
    """Several runs with different numbers of ranks take some steps each; the last run continues to the end."""
    with tempfile.TemporaryDirectory() as folder:
        data, documents = numbered_data(Path(folder), lengths, **fields)
        tokens, merged = [], None
        for ranks, steps in [*runs, (2, None)]:
            parts = [TextBatches(data, rank, ranks) for rank in range(ranks)]
            for part in parts:
                if merged is not None:
                    part.load_state_dict(merged)
                tokens += tokens_of(run_for(part, steps))
            merged = json.loads(json.dumps(merge_states(part.state_dict() for part in parts)))
    if not data.split_long:
        documents = [document[: data.longest_sequence] for document in documents]
    assert Counter(tokens) == dict.fromkeys(itertools.chain(*documents), data.epochs)


@pytest.mark.parametrize(("workers", "others"), [(0, 2), (2, 0), (2, 3)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_loaders_go_on_with_other_ranks_and_workers(tmp_path, workers, others, steps):
    data, documents = numbered_data(tmp_path / "data", [5, 31, 2, 9, 14, 1, 8, 26, 3, 12, 7, 7, 40], epochs=2)
    loaders = [loader_of(TextBatches(data, rank, 2), workers) for rank in range(2)]
    tokens, states = [], []
    for loader in loaders:
        tokens += tokens_of(run_for(loader, steps)) if steps else []
        states.append(loader.state_dict())
    merged = merge_states([*states, states[1]])  # another process of a rank has that rank's state too
    for rank in range(3):
        batches = TextBatches(data, rank, 3)
        batches.load_state_dict(merged)
        tokens += tokens_of(loader_of(batches, others))
    assert Counter(tokens) == dict.fromkeys(itertools.chain(*documents), 2)


def test_as_many_shards_as_before_go_on_where_they_were(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [5, 31, 2, 9, 14, 1, 8, 26, 3, 12], epochs=2)
    parts = [TextBatches(data, rank, 2) for rank in range(2)]
    expected = [all_in_bytes(part) for part in parts]
    for part in parts:
        run_for(part, 3)
    merged = merge_states(part.state_dict() for part in parts)
    for rank in range(2):
        resumed = TextBatches(data, rank, 2)
        resumed.load_state_dict(merged)
        assert all_in_bytes(resumed) == expected[rank][3:]


def record_batches(data, folder, workers):
    """Append each batch to a file, then replace the saved state by the state after the batch, until the kill."""
    loader = loader_of(TextBatches(data), workers)
    log, saved = folder / "log", folder / "state"
    done = 0
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        done = state["done"]
        loader.load_state_dict(state["loader"])
    lines = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
    log.write_text("".join(lines))
    with log.open("a") as record:
        for batch in loader:
            record.write(json.dumps(sequences(batch)) + "\n")
            record.flush()
            done += 1
            torch.save({"done": done, "loader": loader.state_dict()}, folder / "new")
            os.replace(folder / "new", saved)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_with_the_very_next_batch(tmp_path, workers):
    data, _ = numbered_data(tmp_path / "data", [5, 31, 2, 9, 14, 1, 8, 26, 3, 12] * 30, epochs=2)
    expected = [json.dumps(sequences(batch)) for batch in loader_of(TextBatches(data), workers)]
    folder = tmp_path / "run"
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    kills = 0
    for batches_until_killed in (7, 60, 11):
        before = len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0
        run = fork.Process(target=record_batches, args=(data, folder, workers))
        run.start()
        while run.is_alive() and (
            not (folder / "log").exists()
            or len((folder / "log").read_text().splitlines()) < before + batches_until_killed
        ):
            run.join(0.001)
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        kills += run.exitcode == -signal.SIGKILL
    assert kills == 3, "the runs were too short to be killed"
    run = fork.Process(target=record_batches, args=(data, folder, workers))
    run.start()
    run.join()
    assert run.exitcode == 0
    assert (folder / "log").read_text().splitlines() == expected


def texts_of(data):
    """Return the texts of the documents. Each document must be one sequence."""
    return [ByteTokenizer().decode(sequence) for batch in TextBatches(data) for sequence in sequences(batch)]


def text_data(source, **fields):
    defaults = {"source": source, "tokenizer": ByteTokenizer(), "tokens_per_batch": 1000, "shuffle_buffer": 0}
    return TextData(**defaults | {"split_long": False} | fields)


def test_formats_stand_side_by_side(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "ä one", "id": 1}, {"text": "two\n\nlines"}])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n  \n{"text": "last"}')  # lines without a record, and an end without a newline
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"id": [1, 2], "text": ["row 1", "row 2"]}), tmp_path / "b" / "c.parquet")
    (tmp_path / "b" / "d.txt").write_text("\n\nfirst,\nstill first\n\n \nsecond é\n", encoding="utf-8")
    (tmp_path / "e.txt").mkdir()
    both = ["ä one", "two\n\nlines", "last", "row 1", "row 2"]
    assert texts_of(text_data(tmp_path)) == [*both, "\n\nfirst,\nstill first\n\n \nsecond é\n"]
    assert texts_of(text_data(str(tmp_path), text_document="paragraph")) == [*both, "first,\nstill first", "second é"]
    assert texts_of(text_data(tmp_path / "a.jsonl")) == both[:3], "one file"


def test_parquet_of_token_ids(tmp_path):
    table = pa.table({"input_ids": [[1, 2, 3], [4, 5]], "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    data = TextData(tmp_path, None, 8, shuffle_buffer=0, ignored_fields=["text"])
    assert tokens_of(TextBatches(data)) == [1, 2, 3, 4, 5]


def test_a_missing_field_of_a_table_names_those_there_are(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no field 'text'; .* \['body', 'id'\]"):
        list(TextBatches(text_data(tmp_path)))


def test_many_rows_of_a_table_stay_in_order(tmp_path):
    """The table has more rows than one read returns."""
    pq.write_table(pa.table({"input_ids": [[number] for number in range(2500)]}), tmp_path / "a.parquet")
    assert tokens_of(TextBatches(TextData(tmp_path, None, 64, shuffle_buffer=0))) == list(range(2500))


def test_special_tokens_are_added_as_asked(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for add_bos, add_eos, expected in [
        (True, True, [1, 100, 2]),
        (True, False, [1, 100]),
        (False, True, [100, 2]),
        (False, False, [100]),
    ]:
        assert tokens_of(TextBatches(text_data(tmp_path, add_bos=add_bos, add_eos=add_eos))) == expected


def test_a_chat_templates_text_keeps_its_one_bos_and_eos(tmp_path, smollm2_tokenizer):
    """SmolLM2's BOS token begins each turn; the template has written it, and the EOS token, into the text."""
    begin, end = smollm2_tokenizer.bos_token, smollm2_tokenizer.eos_token
    expected = smollm2_tokenizer.encode(f"{begin}user\nHello{end}", add_special_tokens=False)
    for text in (f"{begin}user\nHello{end}", f"{begin}user\nHello", f"user\nHello{end}", "user\nHello"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
        assert tokens_of(TextBatches(TextData(tmp_path, smollm2_tokenizer, 64, shuffle_buffer=0))) == expected


def test_smollm2s_tokenizer(tmp_path, smollm2_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # caplog needs this
    monkeypatch.setattr(smollm2_tokenizer, "model_max_length", 8192)
    monkeypatch.setattr(smollm2_tokenizer, "deprecation_warnings", {})
    texts = ["The sky is blue because", "Grüße, 世界 🙂", "word " * 9000]  # the last is longer than the model's context
    write_jsonl(tmp_path / "a.jsonl", [{"content": text} for text in texts])
    data = TextData(
        tmp_path, smollm2_tokenizer, 10_000, text_field="content", split_long=False, add_bos=False, shuffle_buffer=0
    )
    found = [sequence for batch in TextBatches(data) for sequence in sequences(batch)]
    assert [each[-1] for each in found] == [smollm2_tokenizer.eos_token_id] * 3
    assert [smollm2_tokenizer.decode(each[:-1]) for each in found] == texts
    assert not caplog.records, "no warning of long texts, which are cut or fit"
    loader = loader_of(TextBatches(data), 2)
    assert sorted(tokens_of(loader)) == sorted(itertools.chain(*found)), "workers tokenise too"


def test_a_model_trains_on_a_batch(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [9, 3, 4], pad_to_multiple_of=16, tokens_per_batch=32)
    config = NVLlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = NVLlamaForCausalLM(config)
    (batch,) = loader_of(TextBatches(data))
    assert batch["input_ids"].shape == (1, 16)
    loss = model(**batch).loss
    # The expected loss is the mean over each document alone, over all its tokens except the first.
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in sequences(batch)]
    targets = [len(ids) - 1 for ids in sequences(batch)]
    assert sorted(targets) == [2, 3, 8]
    expected = sum(each * count for each, count in zip(alone, targets, strict=True)) / sum(targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # sums in another order: 1e-7 apart
    loss.backward()


@pytest.mark.parametrize("split_long", [True, False])
def test_padding_is_the_collators(tmp_path, split_long):
    data, documents = numbered_data(
        tmp_path / "data",
        [5, 11, 2, 9],
        tokens_per_batch=16,
        pad_sequences_to_be_divisible_by=4,
        pad_to_multiple_of=16,
        split_long=split_long,
    )
    tokens = []
    for batch in TextBatches(data):
        assert batch["input_ids"].shape == (1, 16)
        padded = batch["cu_seq_lens_q_padded"].tolist()
        assert all(place % 4 == 0 for place in padded)
        real = batch["cu_seq_lens_q"].diff().tolist()
        rows = [batch["input_ids"][0, start : start + length] for start, length in zip(padded, real, strict=False)]
        tokens += [token for row in rows for token in row.tolist() if token]
    assert sorted(tokens) == list(itertools.chain(*documents))


def test_empty_documents_are_passed_over_on_request(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("", "one", "", "two", "")])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 has no tokens: text is empty\. Remove it, or set skip_em"):
        list(TextBatches(text_data(tmp_path)))
    assert texts_of(text_data(tmp_path, skip_empty=True)) == ["one", "two"]


@pytest.fixture
def hub(monkeypatch):
    """A fake hub with one data set. It records the requests."""
    asked = []
    table = datasets.Dataset.from_dict({"id": list(range(40)), "text": [f"text {number}" for number in range(40)]})

    def load_dataset(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        return table.to_iterable_dataset(num_shards=4) if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub(hub, streaming):
    data = text_data("someone/texts", subset="de", split="test", streaming=streaming)
    batches = TextBatches(data)
    assert hub == [], "nothing is loaded before it is needed"
    expected = [f"text {number}" for number in range(40)]
    assert [ByteTokenizer().decode(each) for batch in batches for each in sequences(batch)] == expected
    assert hub == [("someone/texts", "de", "test", streaming)]
    # Within a worker, the datasets library would shard a stream a second time.
    loader = loader_of(batches, 2)
    assert sorted(ByteTokenizer().decode(each) for batch in loader for each in sequences(batch)) == sorted(expected)


def test_a_missing_field_of_the_hubs_names_those_there_are(hub):
    with pytest.raises(ValueError, match=r"someone/texts, train, has no field 'body'.*are \['id', 'text'\]"):
        list(TextBatches(text_data("someone/texts", text_field="body")))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it\non the Hub"),
        datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist"),
        ValueError("Unknown split"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_data_set_of_the_hub_that_cannot_be_loaded(monkeypatch, error):
    def load_dataset(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = " ".join(str(error).split())
    with pytest.raises(ValueError, match=rf"source='some/texts' is no file.*split='test'\. Check.*{said}$") as refused:
        list(TextBatches(text_data("some/texts", split="test")))
    assert refused.value.__cause__ is error


def test_text_and_json_need_no_further_package(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow", "pyarrow.parquet", "torchdata"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt").write_text("a text")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "another"}])
    assert texts_of(text_data(tmp_path)) == ["a text", "another"]
    (tmp_path / "c.parquet").touch()
    with pytest.raises(ImportError, match=r"c\.parquet needs pyarrow.*pip install 'llama-te-core\[train\]'"):
        texts_of(text_data(tmp_path))
    with pytest.raises(
        ImportError, match=r"source='someone/texts' needs datasets.*pip install 'llama-te-core\[train\]'"
    ):
        texts_of(text_data("someone/texts"))


@pytest.mark.parametrize(
    ("records", "fields", "message"),
    [
        (
            [{"text": "a"}, {"body": "b", "id": 1}],
            {},
            r"line 2 has no field 'text'; .* \['body', 'id'\]\. Change text_f",
        ),
        (
            [{"text": "a"}],
            {"tokenizer": None},
            r"line 1 has no field 'input_ids'; .*`data\.tokenizer`\) if it has text",
        ),
        ([{"text": 7}], {}, r"line 1: the field 'text' is int; text_field must name a field of text"),
        ([{"text": 7}], {}, r"Set tokenizer=None \(in a configuration `data\.tokenizer: null`\) for token ids"),
        ([{"text": None}], {}, r"the field 'text' is NoneType"),
        ([{"text": ["a", 1]}], {}, r"the field 'text' is a list of int and str"),
        ([{"input_ids": "abc"}], {"tokenizer": None}, r"line 1: input_ids is str; it must be a list of token ids"),
        ([{"input_ids": [1, 2.5]}], {"tokenizer": None}, r"input_ids is a list of float and int"),
        ([{"input_ids": [[1], [2]]}], {"tokenizer": None}, r"input_ids is a list of list"),
        ([{"input_ids": []}], {"tokenizer": None}, r"line 1 has no tokens: input_ids is empty"),
        ([{"text": ""}], {}, r"or set skip_empty=True \(in a configuration `data\.skip_empty: true`\)\."),
        (["just text"], {}, r"line 1 is JSON of type str; each line .* must be one object"),
        ([], {}, r"a\.jsonl has no documents\. Remove it, or set skip_empty"),
        ([], {"skip_empty": True}, r"has no tokens for shard 0 of 1 .*fewer documents than shards"),
        ([{"text": ""}], {"skip_empty": True, "epochs": None}, r"has no tokens for shard 0 of 1"),
    ],
)
def test_documents_that_cannot_be_used(tmp_path, records, fields, message):
    write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=message):
        list(TextBatches(text_data(tmp_path, **fields)))


def test_what_is_no_json_or_no_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is no JSON \(.*\); each line"):
        list(TextBatches(text_data(path)))
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is no JSON \(.*in UTF-8"):
        list(TextBatches(text_data(path)))
    path = tmp_path / "a.txt"
    path.write_bytes(b"gr\xfc\xdfe")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        list(TextBatches(text_data(path)))


@pytest.mark.parametrize(("ids", "wrong"), [([1, 9, 10, 3], 10), ([1, -2, 3], -2), ([2**70, 1], 2**70)])
def test_ids_that_are_none_of_the_vocabulary(tmp_path, ids, wrong):
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [0, 9]}, {"input_ids": ids}])
    data = TextData(tmp_path, None, 8, shuffle_buffer=0, vocab_size=10)
    message = rf"a\.jsonl, line 2 has the token id {wrong}; ids must be from 0 to 9, for vocab_size=10\. Use the tokens"
    with pytest.raises(ValueError, match=message):
        list(TextBatches(data))
    assert dataclasses.replace(data, vocab_size=None).labelled_tokens(Document("", {"input_ids": ids})).input_ids == ids


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert tokens_of(TextBatches(text_data(tmp_path, vocab_size=101))) == [1, 100, 2]
    with pytest.raises(ValueError, match=r"a\.txt has the token id 100; ids must be from 0 to 99"):
        list(TextBatches(text_data(tmp_path, vocab_size=100)))


def test_an_error_in_a_worker_reaches_the_process(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(ValueError, match=r"line 2 has no field 'text'"):
        list(loader_of(TextBatches(text_data(tmp_path)), 2))


def test_fewer_documents_than_shards(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [3, 3])
    with pytest.raises(
        ValueError, match=r"no tokens for shard 2 of 3 \(ranks x workers\): .*Use more documents.*`data\.workers: 0`"
    ):
        list(TextBatches(data, 2, 3))


def test_fewer_documents_than_shards_are_counted_before_they_are_read(tmp_path):
    pq.write_table(pa.table({"text": ["row 1", "row 2"]}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "c.txt").write_bytes(b"\xff\n\n")  # the check does not read this file
    TextBatches(text_data(tmp_path), 0, 5).check_documents(workers=0)
    TextBatches(text_data(tmp_path), 0, 2).check_documents(workers=2)
    message = (
        r"has 5 documents, fewer than the 6 shards \(ranks x workers\)\. .*a \.txt file is one.*`data\.workers: 0`"
    )
    for ranks, workers in ((6, 0), (2, 3)):
        with pytest.raises(ValueError, match=message):
            TextBatches(text_data(tmp_path), 0, ranks).check_documents(workers)

    (tmp_path / "c.txt").write_text("one\n\ntwo")
    TextBatches(text_data(tmp_path, text_document="paragraph"), 0, 6).check_documents(workers=1)
    with pytest.raises(ValueError, match=r"c\.txt' has 1 document, fewer than the 2 shards"):
        TextBatches(text_data(tmp_path / "c.txt")).check_documents(workers=2)


def test_no_more_documents_are_read_than_are_counted(tmp_path):
    """The count stops early, since a folder or the rest of a file can be large."""
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\n" + b"words\n" * 10_000 + b"\xff")
    (tmp_path / "b.parquet").write_bytes(b"no table")
    TextBatches(text_data(tmp_path, text_document="paragraph")).check_documents(workers=2)


@pytest.mark.parametrize("source", ["texts", "./owner/name", "owner/name.jsonl", "a/b/c", "owner/"])
def test_a_source_that_is_neither_here_nor_a_hub_id(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"source='{source}' is no file or folder here, and no hub id"):
        TextBatches(text_data(source))


def test_a_source_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a text")
    assert texts_of(text_data("~/a.txt")) == ["a text"]


def test_a_source_without_text(tmp_path):
    (tmp_path / "a.pdf").touch()
    for path in (tmp_path, tmp_path / "a.pdf"):
        with pytest.raises(ValueError, match=r"has no file of documents; it must be a file \(\.csv, \.json, "):
            TextBatches(text_data(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_batch": 0}, r"tokens_per_batch is 0; it must be an integer of at least 1\."),
        ({"tokens_per_batch": True}, r"tokens_per_batch is True"),
        ({"sequence_length": 0}, r"sequence_length is 0; it must be an integer of at least 1 or None\."),
        ({"sequence_length": 1001}, r"sequence_length is 1001, more than tokens_per_batch=1000"),
        ({"vocab_size": 0}, r"vocab_size is 0; it must be an integer of at least 1 or None"),
        ({"epochs": 0}, r"epochs is 0; it must be an integer of at least 1 or None"),
        ({"seed": -1}, r"seed is -1; it must be an integer of at least 0"),
        ({"shuffle_buffer": -1}, r"shuffle_buffer is -1"),
        ({"text_field": ["text"]}, r"text_field is \['text'\]; it must be a string"),
        ({"text_document": "line"}, r"text_document is 'line'; it must be 'file' or 'paragraph'"),
        ({"pad_to_multiple_of": 0}, r"pad_to_multiple_of is 0"),
        ({"pad_sequences_to_be_divisible_by": 16}, r"tokens_per_batch is 1000; .* multiple of pad_seq\w+=16"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        text_data("anything", **fields)


@pytest.mark.parametrize("token", ["bos", "eos"])
def test_a_tokenizer_without_a_special_token(token):
    tokenizer = ByteTokenizer()
    setattr(tokenizer, f"{token}_token_id", None)
    with pytest.raises(
        ValueError,
        match=rf"add_{token} is True, but the tokenizer has no {token.upper()} token.*data\.add_{token}: false",
    ):
        text_data("anything", tokenizer=tokenizer)
    text_data("anything", tokenizer=tokenizer, **{f"add_{token}": False})


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_bad_ranks(tmp_path, rank, ranks):
    data, _ = numbered_data(tmp_path / "data", [3])
    with pytest.raises(ValueError, match=f"rank is {rank} and ranks is {ranks}; rank must be at least 0 and less"):
        TextBatches(data, rank, ranks)


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle_buffer": 7}])
def test_a_state_of_another_order_is_refused(tmp_path, change):
    data, _ = numbered_data(tmp_path / "data", [3, 4])
    changed, _ = numbered_data(tmp_path / "data", [3, 4], **change)
    ((name, value),) = change.items()
    with pytest.raises(
        ValueError, match=rf"{name} is {value} \(in .*`\), but the saved run had {getattr(data, name)}: .*Use "
    ):
        TextBatches(changed).load_state_dict(TextBatches(data).state_dict())


def test_a_state_of_other_files_is_refused(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [3, 4])
    state = TextBatches(data).state_dict()
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = TextData(tmp_path / "moved", None, 16)
    TextBatches(moved).load_state_dict(state)  # the same files elsewhere

    other_documents = TextData(tmp_path / "moved", None, 16, text_document="paragraph")
    write_jsonl(tmp_path / "moved" / "more.jsonl", [{"input_ids": [9]}])
    longer = TextBatches(moved).state_dict()
    write_jsonl(tmp_path / "moved" / "more.jsonl", [{"input_ids": [9, 9]}])
    other_state = TextBatches(other_documents).state_dict()
    for saved, data in [(state, moved), (longer, moved), (other_state, moved)]:
        with pytest.raises(
            ValueError, match=r"source='.*moved' .*other documents than .*: 2 files, .*, not . files, .*same files"
        ):
            TextBatches(data).load_state_dict(saved)


@pytest.mark.parametrize("change", [{"source": "someone/others"}, {"subset": "fr"}, {"split": "test"}])
def test_a_state_of_another_data_set_of_the_hub_is_refused(change):
    state = TextBatches(text_data("someone/texts", subset="de")).state_dict()
    other = text_data(**{"source": "someone/texts", "subset": "de"} | change)
    with pytest.raises(ValueError, match=r"source='someone/.*: someone/.*, not someone/texts, de, train\. "):
        TextBatches(other).load_state_dict(state)


def test_a_state_that_lacks_ranks_is_refused(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [3, 4, 5])
    batches = TextBatches(data, 1, 2)
    batches.load_state_dict(TextBatches(data, 0, 3).state_dict())
    with pytest.raises(RuntimeError, match=r"without shards \[1, 2\] of 3 .* this is shard 1 of 2: merge the states"):
        list(batches)


def test_a_state_of_another_rank_is_refused(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [3, 4, 5])
    batches = TextBatches(data, 1, 2)
    batches.load_state_dict(TextBatches(data, 0, 2).state_dict())
    with pytest.raises(RuntimeError, match=r"without shards \[1\] of 2 .* this is shard 1 of 2: merge the states"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaders_state_is_not_that_of_batches(tmp_path, workers):
    data, _ = numbered_data(tmp_path / "data", [3, 4])
    with pytest.raises(
        ValueError, match=r"given a dict of \['_.*\]; it must be what state_dict or merge_states returne"
    ):
        TextBatches(data).load_state_dict(loader_of(TextBatches(data), workers).state_dict())


def test_states_that_do_not_go_together(tmp_path):
    data, _ = numbered_data(tmp_path / "data", [30, 40])
    batches = TextBatches(data)
    start = batches.state_dict()
    next(iter(batches))
    with pytest.raises(ValueError, match=r"shard 0 at \[0, 0, 0\] and at \[0, 0, 16\] .*saved at one step"):
        merge_states([start, batches.state_dict()])
    with pytest.raises(ValueError, match=r"shards is 1 in one and 2 in another"):
        merge_states([start, TextBatches(data, 1, 2).state_dict()])
    other_seed = dataclasses.replace(data, seed=1)
    with pytest.raises(ValueError, match=r"order is \{.*'seed': 0,.* and \{.*'seed': 1,"):
        merge_states([TextBatches(data, 0, 2).state_dict(), TextBatches(other_seed, 1, 2).state_dict()])
    resumed = TextBatches(data, 1, 2)
    resumed.load_state_dict(start)
    with pytest.raises(ValueError, match=r"earlier is \[\] in one and \[\[\[0, 0, 0\]\]\] in another"):
        merge_states([TextBatches(data, 0, 2).state_dict(), resumed.state_dict()])
    with pytest.raises(ValueError, match=r"no state of TextBatches"):
        merge_states([{"step": 3}])
    loader = StatefulDataLoader(
        batches, batch_size=None, num_workers=1, snapshot_every_n_steps=2, multiprocessing_context="fork"
    )
    next(iter(loader))
    with pytest.raises(ValueError, match=r"1 batches old.*snapshot_every_n_steps=1"):
        merge_states([loader.state_dict()])
