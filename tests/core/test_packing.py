"""TokenPackingDataset fills the budget, loses and repeats no token, and resumes exactly."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from llama_te_core.data.collators import DataCollatorWithFlattening
from llama_te_core.data.packing import TokenPackingDataset


def numbered(lengths):
    """Make samples whose tokens are all different, so that every loss or repetition shows."""
    counter = itertools.count(1)
    samples = []
    for index, length in enumerate(lengths):
        ids = [next(counter) for _ in range(length)]
        samples.append({"input_ids": ids, "labels": [-token for token in ids], "text": f"sample {index}"})
    return samples


def flat(samples):
    return [token for sample in samples for token in sample["input_ids"]]


def size(batch, multiple=1):
    return sum(-(-len(sample["input_ids"]) // multiple) * multiple for sample in batch)


class Stream(IterableDataset):
    """A streaming data set, optionally sharded over workers."""

    def __init__(self, samples, shard=False):
        self.samples = samples
        self.shard = shard
        self.epoch = None

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return iter(self.samples[info.id :: info.num_workers] if self.shard and info else self.samples)

    def set_epoch(self, epoch):
        self.epoch = epoch


class MapStyle(torch.utils.data.Dataset):
    """A map-style data set that never raises IndexError, so that only its length gives the end."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index % len(self.samples)]


class PlainIterable:
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


# Examples have no deadline, since a busy machine would miss it.
checked = settings(deadline=None)

KINDS = [list, Stream, MapStyle, PlainIterable]

lengths = st.lists(st.integers(0, 20), max_size=15)
multiples = st.sampled_from([None, 1, 2, 4, 5])


@checked
@given(lengths, st.integers(20, 50), multiples)
def test_whole_samples_fill_the_budget_in_order(lengths, budget, multiple):
    samples = numbered(lengths)
    batches = list(TokenPackingDataset(samples, budget, drop_last=False, pad_sequences_to_be_divisible_by=multiple))
    assert [sample for batch in batches for sample in batch] == [s for s in samples if s["input_ids"]]
    sizes = [size(batch, multiple or 1) for batch in batches]
    assert all(0 < total <= budget for total in sizes)
    # Packing is greedy: no batch has room for the first sample of the next batch.
    for total, following in itertools.pairwise(batches):
        assert size(total, multiple or 1) + size(following[:1], multiple or 1) > budget


@checked
@given(lengths, st.integers(1, 12), st.sampled_from([1, 2, 4]))
def test_split_samples_fill_each_batch_exactly(lengths, steps, multiple):
    budget = steps * multiple
    samples = numbered(lengths)
    batches = list(
        TokenPackingDataset(
            samples, budget, drop_last=False, split_samples=True, pad_sequences_to_be_divisible_by=multiple
        )
    )
    pieces = [piece for batch in batches for piece in batch]
    assert flat(pieces) == flat(samples), "tokens lost, repeated or out of order"
    assert all(piece["labels"] == [-token for token in piece["input_ids"]] for piece in pieces)
    assert all(piece["input_ids"] for piece in pieces)
    owner = {token: sample["text"] for sample in samples for token in sample["input_ids"]}
    assert all(owner[token] == piece["text"] for piece in pieces for token in piece["input_ids"])
    sizes = [size(batch, multiple) for batch in batches]
    assert all(total == budget for total in sizes[:-1])
    assert all(0 < total <= budget for total in sizes[-1:])


@checked
@given(lengths, st.integers(20, 50), st.booleans())
def test_drop_last_drops_only_an_unfilled_last_batch(lengths, budget, split):
    samples = numbered(lengths)
    all_batches = list(TokenPackingDataset(samples, budget, drop_last=False, split_samples=split))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = list(TokenPackingDataset(samples, budget, split_samples=split))
    unfilled = bool(all_batches) and size(all_batches[-1]) < budget
    assert kept == (all_batches[:-1] if unfilled else all_batches)


@checked
@given(lengths, st.integers(20, 40), st.booleans(), st.booleans(), st.sampled_from(KINDS), st.data())
def test_resuming_continues_exactly(lengths, budget, split, drop_last, kind, data):
    samples = numbered(lengths)

    def fresh():
        return TokenPackingDataset(kind(samples), budget, drop_last, split)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = list(fresh())
    done = data.draw(st.integers(0, len(expected)))
    interrupted = fresh()
    first = list(itertools.islice(interrupted, done))
    state = copy.deepcopy(interrupted.state_dict())

    resumed = fresh()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    with warnings.catch_warnings():
        warnings.simplefilter("error" if done else "ignore")
        assert first + list(resumed) == expected
        if expected:
            assert list(resumed) == expected, "the epoch after the resumed one is whole again"


def test_resuming_a_map_style_data_set_reads_no_used_sample():
    class Watched(MapStyle):
        read = ()

        def __getitem__(self, index):
            self.read += (index,)
            return super().__getitem__(index)

    packing = TokenPackingDataset(numbered([5] * 10), 10)
    list(itertools.islice(packing, 4))
    watched = Watched(numbered([5] * 10))
    resumed = TokenPackingDataset(watched, 10)
    resumed.load_state_dict(packing.state_dict())
    assert len(list(resumed)) == 1
    assert watched.read == (8, 9)


def test_splitting_by_example():
    samples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7, 8, 9, 10], "id": 7}, {"input_ids": [11]}]
    batches = list(TokenPackingDataset(samples, 4, drop_last=False, split_samples=True))
    assert batches == [
        [{"input_ids": [1, 2, 3]}, {"input_ids": [4], "id": 7}],
        [{"input_ids": [5, 6, 7, 8], "id": 7}],
        [{"input_ids": [9, 10], "id": 7}, {"input_ids": [11]}],
    ]
    assert samples[1]["input_ids"] == [4, 5, 6, 7, 8, 9, 10], "the data set's own sample is untouched"


def test_tensors_arrays_and_tuples_are_split_and_other_fields_are_repeated():
    sample = {
        "input_ids": torch.arange(6),
        "labels": np.arange(6),
        "attention_mask": (1,) * 6,
        "text": "sixsix",
        "weights": [0.5, 0.25],
        "score": torch.tensor(2.0),
    }
    ((first,), (second,)) = TokenPackingDataset([sample], 3, split_samples=True)
    assert (first["input_ids"].tolist(), second["input_ids"].tolist()) == ([0, 1, 2], [3, 4, 5])
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([0, 1, 2], [3, 4, 5])
    assert first["attention_mask"] == second["attention_mask"] == (1, 1, 1)
    for name in ("text", "weights", "score"):
        assert first[name] is second[name] is sample[name]


@pytest.mark.parametrize("kind", [list, MapStyle, PlainIterable, lambda samples: Stream(samples, shard=True)])
@pytest.mark.parametrize("split", [False, True])
def test_workers_share_the_data_out(kind, split):
    samples = numbered([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    packing = TokenPackingDataset(kind(samples), 10, drop_last=False, split_samples=split)
    loader = DataLoader(packing, batch_size=None, num_workers=2, collate_fn=list)
    batches = list(loader)
    assert sorted(flat(itertools.chain(*batches))) == flat(samples)
    assert all(size(batch) <= 10 for batch in batches)


class ResumesInWorker(TokenPackingDataset):
    """Imitates torchdata's StatefulDataLoader, which saves and loads the state in each worker."""

    states = None
    stop_after = None

    def __iter__(self):
        worker = torch.utils.data.get_worker_info().id
        if self.states:
            self.load_state_dict(self.states[worker])
        for batch in itertools.islice(super().__iter__(), self.stop_after):
            yield worker, batch, self.state_dict()


@pytest.mark.parametrize("kind", [list, PlainIterable])
def test_each_worker_resumes_its_own_share(kind):
    packing = ResumesInWorker(kind(numbered([4, 7, 9, 3] * 5)), 10, drop_last=False, split_samples=True)

    def run():
        return list(DataLoader(packing, batch_size=None, num_workers=2, collate_fn=tuple))

    expected = run()
    packing.stop_after = 2
    first = run()
    packing.stop_after = None
    packing.states = {worker: state for worker, _, state in first}
    second = run()
    for worker in (0, 1):
        batches = [batch for owner, batch, _ in first + second if owner == worker]
        assert batches == [batch for owner, batch, _ in expected if owner == worker]
    assert len(second) < len(expected)


def test_a_state_of_another_worker_is_refused():
    packing = TokenPackingDataset(numbered([5] * 8), 10)
    next(iter(packing))
    packing.load_state_dict(packing.state_dict() | {"worker": (1, 2)})
    assert packing.state_dict()["worker"] == (1, 2), "saving again before iterating keeps whose state it is"
    with pytest.raises(RuntimeError, match=r"state of worker 1 of 2, but this is worker 0 of 1.*StatefulDataLoader"):
        next(iter(packing))


def test_set_epoch_reaches_the_inner_data_set():
    stream = Stream([])
    TokenPackingDataset(stream, 4).set_epoch(3)
    assert stream.epoch == 3
    TokenPackingDataset([], 4).set_epoch(3)  # a list has no epochs: the call does nothing, without an error


def test_packed_batches_reach_the_collator():
    def pad(features):
        width = max(len(feature["input_ids"]) for feature in features)
        rows = [feature["input_ids"] + [0] * (width - len(feature["input_ids"])) for feature in features]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": ids != 0, "labels": ids.clone()}

    collator = DataCollatorWithFlattening(pad, pad_sequences_to_be_divisible_by=4, pad_token_id=0)
    packing = TokenPackingDataset(
        numbered([6, 9, 5]), 16, drop_last=False, split_samples=True, pad_sequences_to_be_divisible_by=4
    )
    first, second = DataLoader(packing, batch_size=None, collate_fn=collator)
    assert first["input_ids"].shape == (1, 16), "the budget counts the padding of the collator"
    assert first["cu_seq_lens_q"].tolist() == [0, 6, 14]
    assert first["cu_seq_lens_q_padded"].tolist() == [0, 8, 16]
    assert first["labels"][0, :8].tolist() == [-100, 2, 3, 4, 5, 6, -100, -100]
    assert second["cu_seq_lens_q"].tolist() == [0, 1, 6]


def test_a_sample_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"has 7 tokens, more than max_tokens_per_batch=6\. Pass split_samples=True"):
        list(TokenPackingDataset(numbered([2, 7]), 6))
    with pytest.raises(ValueError, match=r"has 5 tokens \(8 with padding\), more than max_tokens_per_batch=6"):
        list(TokenPackingDataset(numbered([5]), 6, pad_sequences_to_be_divisible_by=4))


@pytest.mark.parametrize(
    "sample",
    [
        {"labels": [1]},
        {"input_ids": "text"},
        {"input_ids": 5},
        {"input_ids": [[1, 2, 3]]},
        {"input_ids": torch.ones(1, 3)},
        {"input_ids": torch.tensor(3)},
        [1, 2, 3],
    ],
)
def test_samples_without_one_flat_sequence_are_refused(sample):
    with pytest.raises(ValueError, match=r"input_ids is \w+ in \w+; each sample must be a mapping.*Tokenise one text"):
        list(TokenPackingDataset([sample], 10))


def test_a_run_that_drops_everything_says_so():
    with pytest.warns(UserWarning, match="all 5 tokens.*max_tokens_per_batch=10 and drop_last=True.*Lower the budget"):
        assert list(TokenPackingDataset(numbered([2, 3]), 10)) == []


@pytest.mark.parametrize("name", ["max_tokens_per_batch", "pad_sequences_to_be_divisible_by"])
@pytest.mark.parametrize("value", [0, -1, 4.0, True])
def test_bad_counts_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be an integer of at least 1"):
        TokenPackingDataset(**{"dataset": [], "max_tokens_per_batch": 8} | {name: value})


def test_a_budget_that_padding_cannot_fill_is_refused():
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 10; .* multiple of .*divisible_by=4.*Use 12"):
        TokenPackingDataset([], 10, split_samples=True, pad_sequences_to_be_divisible_by=4)


def test_a_mapping_of_splits_is_refused():
    with pytest.raises(ValueError, match=r"dataset is a dict with the keys \['train'\].*Choose one split"):
        TokenPackingDataset({"train": []}, 10)
