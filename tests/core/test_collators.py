"""DataCollatorWithFlattening packs losslessly, keeps losses within sequences, and pads to the given multiples."""

import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from llama_te_core.data.collators import DataCollatorWithFlattening

PAD = 1  # not 0, so that tests notice padding with a constant zero
VOCABULARY = 40


@functools.cache
def tokenizer(padding_side="right", **kwargs):
    words = {"<unk>": 0, "<pad>": PAD, "<mask>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=model, padding_side=padding_side, **special)


def causal_collator(padding_side="right", **kwargs):
    return DataCollatorForLanguageModeling(tokenizer(padding_side), mlm=False, **kwargs)


def samples_of(sequences):
    return [{"input_ids": list(ids)} for ids in sequences]


def fixed_batch(**fields):
    """Make a collator that returns the same padded batch for any features."""
    return lambda features: {name: torch.as_tensor(value) for name, value in fields.items()}


def unpack(packed, field="input_ids"):
    """Return the packed sequences without their padding, using only the offsets."""
    lengths = packed["cu_seq_lens_q"].diff().tolist()
    starts = packed.get("cu_seq_lens_q_padded", packed["cu_seq_lens_q"])[:-1].tolist()
    return [packed[field][0, start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


# Examples have no deadline, since a busy machine would miss it.
checked = settings(deadline=None, max_examples=60)

tokens = st.integers(3, VOCABULARY - 1)
sequences = st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=6)
sides = st.sampled_from(["left", "right"])
multiples = st.sampled_from([None, 1, 2, 3, 4, 6, 16])


@checked
@given(sequences, sides, multiples, multiples)
def test_every_real_token_comes_back_in_order(data, side, total_multiple, sequence_multiple):
    collator = DataCollatorWithFlattening(
        causal_collator(side),
        return_position_ids=True,
        pad_to_multiple_of=total_multiple,
        pad_sequences_to_be_divisible_by=sequence_multiple,
    )
    packed = collator(samples_of(data))

    unpacked = unpack(packed)
    assert unpacked[: len(data)] == data
    assert len(unpacked) - len(data) in (0, 1)
    assert all(set(dummy) == {PAD} for dummy in unpacked[len(data) :])

    total = packed["input_ids"].shape[1]
    assert packed["labels"].shape == packed["position_ids"].shape == (1, total)
    assert (packed["input_ids"] != PAD).sum() == sum(map(len, data))
    assert (packed["labels"][packed["input_ids"] == PAD] == -100).all()


@checked
@given(sequences, multiples, multiples)
def test_offsets_multiples_and_positions_agree(data, total_multiple, sequence_multiple):
    collator = DataCollatorWithFlattening(
        causal_collator(),
        return_position_ids=True,
        pad_to_multiple_of=total_multiple,
        pad_sequences_to_be_divisible_by=sequence_multiple,
    )
    packed = collator(samples_of(data))
    total = packed["input_ids"].shape[1]
    padded = sequence_multiple is not None
    offsets = packed["cu_seq_lens_q_padded" if padded else "cu_seq_lens_q"]
    slots = offsets.diff()

    assert ("cu_seq_lens_q_padded" in packed, "cu_seq_lens_k_padded" in packed) == (padded, padded)
    assert packed.get("pad_between_seqs") is (True if padded else None)
    for name in [name for name in packed if name.startswith("cu_seq_lens")]:
        assert packed[name].dtype == torch.int32
        assert packed[name][0] == 0
    assert torch.equal(packed["cu_seq_lens_q"], packed["cu_seq_lens_k"])
    assert offsets[-1] == total, "every position belongs to a sequence"
    assert total % (total_multiple or 1) == 0
    assert (slots % (sequence_multiple or 1) == 0).all()
    assert type(packed["max_length_q"]) is type(packed["max_length_k"]) is int
    assert packed["max_length_q"] == packed["max_length_k"] == slots.max()
    assert packed["position_ids"][0].tolist() == [i for slot in slots.tolist() for i in range(slot)]

    # The padding is never longer than the two multiples require.
    tight = [-(-len(ids) // (sequence_multiple or 1)) * (sequence_multiple or 1) for ids in data]
    assert slots[: len(data)].tolist() == tight
    step = torch.lcm(torch.tensor(total_multiple or 1), torch.tensor(sequence_multiple or 1))
    assert total - sum(tight) < (step if total_multiple else 1)


@checked
@given(sequences, sides, multiples, multiples, st.integers(0, 2**31))
def test_causal_loss_is_that_of_the_sequences_alone(data, side, total_multiple, sequence_multiple, seed):
    collator = DataCollatorWithFlattening(
        causal_collator(side), pad_to_multiple_of=total_multiple, pad_sequences_to_be_divisible_by=sequence_multiple
    )
    packed = collator(samples_of(data))
    offsets = packed.get("cu_seq_lens_q_padded", packed["cu_seq_lens_q"]).tolist()
    generator = torch.Generator().manual_seed(seed)
    shape = (1, packed["input_ids"].shape[1], VOCABULARY)
    logits = torch.randn(shape, generator=generator, dtype=torch.float32, requires_grad=True)

    alone = [
        torch.nn.functional.cross_entropy(
            logits[0, start : start + len(ids) - 1], torch.tensor(ids[1:]), reduction="sum"
        )
        for ids, start in zip(data, offsets, strict=False)
        if len(ids) > 1
    ]
    targets = sum(len(ids) - 1 for ids in data)
    loss = ForCausalLMLoss(logits, packed["labels"], VOCABULARY, num_items_in_batch=torch.tensor(max(targets, 1)))
    torch.testing.assert_close(loss, torch.stack(alone).sum() / targets if targets else torch.tensor(0.0))

    loss.backward()
    last_tokens = [start + len(ids) - 1 for ids, start in zip(data, offsets, strict=False)]
    assert (logits.grad[0, last_tokens] == 0).all(), "the loss crossed a boundary"


def test_without_the_separator_the_loss_would_cross():
    features = samples_of([[3, 4], [5, 6]])
    kept = DataCollatorWithFlattening(causal_collator(), separator_id=None)(features)
    assert kept["labels"].tolist() == [[3, 4, 5, 6]]
    default = DataCollatorWithFlattening(causal_collator())(features)
    assert default["labels"].tolist() == [[-100, 4, -100, 6]]


def test_a_separator_id_is_the_label_after_each_sequence():
    packed = DataCollatorWithFlattening(causal_collator(), separator_id=39, pad_to_multiple_of=4)(
        samples_of([[3, 4], [5, 6, 7]])
    )
    assert packed["labels"].tolist() == [[39, 4, 39, 6, 7, -100, -100, -100]]


def test_both_paddings_by_example():
    packed = DataCollatorWithFlattening(
        causal_collator(), return_position_ids=True, pad_to_multiple_of=6, pad_sequences_to_be_divisible_by=4
    )(samples_of([[3, 4, 5], [6, 7, 8, 9, 10]]))
    assert packed["input_ids"].tolist() == [[3, 4, 5] + [PAD] + [6, 7, 8, 9, 10] + [PAD] * 3]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 8]
    assert packed["cu_seq_lens_q_padded"].tolist() == [0, 4, 12]

    packed = DataCollatorWithFlattening(
        causal_collator(), return_position_ids=True, pad_to_multiple_of=6, pad_sequences_to_be_divisible_by=4
    )(samples_of([[3, 4, 5]]))
    assert packed["input_ids"].tolist() == [[3, 4, 5] + [PAD] * 9]
    assert packed["labels"].tolist() == [[-100, 4, 5] + [-100] * 9]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 11]
    assert packed["cu_seq_lens_q_padded"].tolist() == [0, 4, 12]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert packed["max_length_q"] == 8


def test_text_through_a_tokenizer_and_a_dataloader():
    encode = tokenizer("left")
    features = [dict(encode(text)) for text in ["w3 w4 w5", "w6", "w7 w8"]]
    collator = DataCollatorWithFlattening(DataCollatorForLanguageModeling(encode, mlm=False), pad_to_multiple_of=16)
    (packed,) = DataLoader(features, batch_size=3, collate_fn=collator)
    assert packed["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8] + [PAD] * 10]
    assert packed["labels"].tolist() == [[-100, 4, 5, -100, -100, 8] + [-100] * 10]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 16]
    assert packed["max_length_q"] == 10
    assert "attention_mask" not in packed


def test_padding_of_the_wrapped_collator_is_dropped():
    packed = DataCollatorWithFlattening(causal_collator(pad_to_multiple_of=8))(samples_of([[3, 4], [5]]))
    assert packed["input_ids"].tolist() == [[3, 4, 5]]
    assert packed["max_length_q"] == 2


@checked
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_mask_drops_exactly_what_it_masks(mask):
    ids = torch.arange(len(mask) * 5).reshape(-1, 5)
    collator = DataCollatorWithFlattening(fixed_batch(input_ids=ids, attention_mask=mask, extra=ids * 1.5))
    kept = [row[torch.tensor(keep)].tolist() for row, keep in zip(ids, mask, strict=True) if any(keep)]
    if not kept:
        with pytest.raises(ValueError, match=r"attention_mask keeps none of the \d+ tokens.*Remove empty samples"):
            collator(["any"])
        return
    packed = collator(["any"])
    assert unpack(packed) == kept
    assert unpack(packed, "extra") == [[1.5 * token for token in row] for row in kept]
    assert packed["extra"].dtype == torch.float32
    assert "labels" not in packed


def test_a_batch_without_mask_is_all_real():
    packed = DataCollatorWithFlattening(fixed_batch(input_ids=[[PAD, 4], [5, 6]]))(["any", "any"])
    assert packed["input_ids"].tolist() == [[PAD, 4, 5, 6]]
    assert packed["cu_seq_lens_k"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("features", [[[3, 4, 5], [6]], [torch.tensor([3, 4, 5]), torch.tensor([6])]])
def test_padding_without_a_mask_is_refused(features):
    # transformers' collator pads plain token lists without making a mask.
    with pytest.raises(ValueError, match=r"attention_mask is missing.*lengths \[1, 3\] to 3.*Give it features"):
        DataCollatorWithFlattening(causal_collator())(features)


def test_other_fields_per_token_and_per_sequence():
    batch = fixed_batch(
        input_ids=[[3, 4, 5], [6, PAD, PAD], [PAD, PAD, PAD]],
        attention_mask=[[1, 1, 1], [1, 0, 0], [0, 0, 0]],
        shift_labels=[[4, 5, -100], [7, 7, 7], [7, 7, 7]],
        token_type_ids=[[1, 1, 1], [2, 2, 2], [3, 3, 3]],
        embedding=torch.ones(3, 3, 2),
        labels=[7, 8, 9],
        weight=0.5,
    )
    collator = DataCollatorWithFlattening(
        lambda features: batch(features) | {"names": ["a", "b", "c"], "source": "web"},
        pad_to_multiple_of=6,
        pad_token_id=PAD,
    )
    packed = collator(["any"])
    assert packed["shift_labels"].tolist() == [[4, 5, -100, 7, -100, -100]]
    assert packed["token_type_ids"].tolist() == [[1, 1, 1, 2, 0, 0]]
    assert packed["embedding"].shape == (1, 6, 2)
    assert packed["labels"].tolist() == [7, 8, -100], "the empty row goes, the dummy comes"
    assert packed["names"] == ["a", "b"]
    assert (packed["source"], packed["weight"].item()) == ("web", 0.5)


def test_regression_labels_pass_unless_a_dummy_sequence_may_come():
    batch = fixed_batch(input_ids=[[3, 4], [5, 6]], labels=[[0.1, 0.2], [0.3, 0.4]])
    packed = DataCollatorWithFlattening(batch)(["any", "any"])
    torch.testing.assert_close(packed["labels"], torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    padding = DataCollatorWithFlattening(batch, pad_to_multiple_of=4, pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"labels are torch.float32.*pad_to_multiple_of is 4.*Use pad_to_multiple_of="):
        padding(["any", "any"])


def test_token_classification_keeps_first_labels_and_warns_where_it_would_not():
    wrapped = DataCollatorForTokenClassification(tokenizer())
    features = [{"input_ids": [3, 4], "labels": [1, 0]}, {"input_ids": [5], "labels": [1]}]
    packed = DataCollatorWithFlattening(wrapped, separator_id=None)(features)
    assert packed["labels"].tolist() == [[1, 0, 1]]
    with pytest.warns(UserWarning, match="separator_id is -100.*DataCollatorForTokenClassification.*separator_id=None"):
        DataCollatorWithFlattening(wrapped)
    with pytest.warns(UserWarning, match="separator_id is -100.*DataCollatorForLanguageModeling"):
        DataCollatorWithFlattening(DataCollatorForLanguageModeling(tokenizer(), mlm=True))


def test_masked_input_ids_are_those_of_the_wrapped_collator():
    wrapped = DataCollatorForLanguageModeling(
        tokenizer(), mlm=True, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    packed = DataCollatorWithFlattening(wrapped, separator_id=None)(samples_of([[3, 4], [5]]))
    assert packed["input_ids"].tolist() == [[2, 2, 2]]
    assert packed["labels"].tolist() == [[3, 4, 5]]


def test_pad_token_comes_from_the_argument_before_the_tokenizer():
    packed = DataCollatorWithFlattening(causal_collator(), pad_to_multiple_of=4, pad_token_id=9)(samples_of([[3]]))
    assert packed["input_ids"].tolist() == [[3, 9, 9, 9]]


def test_without_padding_no_pad_token_is_needed():
    packed = DataCollatorWithFlattening(fixed_batch(input_ids=[[3, 4]]))(["any"])
    assert packed["input_ids"].tolist() == [[3, 4]]


def test_it_can_be_sent_to_a_worker():
    collator = pickle.loads(pickle.dumps(DataCollatorWithFlattening(causal_collator(), pad_to_multiple_of=4)))
    assert collator(samples_of([[3, 4, 5]]), return_tensors="pt")["input_ids"].tolist() == [[3, 4, 5, PAD]]


@pytest.mark.parametrize("name", ["pad_to_multiple_of", "pad_sequences_to_be_divisible_by"])
@pytest.mark.parametrize("value", [0, -8, 2.0, True, "16"])
def test_bad_multiples_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; it must be None or an integer of at least 1\. Use "):
        DataCollatorWithFlattening(causal_collator(), **{name: value})


@pytest.mark.parametrize("name", ["pad_to_multiple_of", "pad_sequences_to_be_divisible_by"])
@pytest.mark.parametrize("wrapped", [fixed_batch(), DataCollatorWithPadding(tokenizer(pad_token=None))])
def test_padding_without_a_pad_token_is_refused(name, wrapped):
    with pytest.raises(ValueError, match=rf"pad_token_id is None and {name}=8 needs one.*Pass pad_token_id"):
        DataCollatorWithFlattening(wrapped, **{name: 8})
    with pytest.raises(ValueError, match=r"pad_token_id is -1 .*at least 0"):
        DataCollatorWithFlattening(wrapped, pad_token_id=-1, **{name: 8})


def test_a_trained_separator_with_padding_within_sequences_is_refused():
    with pytest.raises(ValueError, match=r"separator_id is 5 and pad_sequences_to_be_divisible_by is 4.*Use separator"):
        DataCollatorWithFlattening(causal_collator(), separator_id=5, pad_sequences_to_be_divisible_by=4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [1]}, r"input_ids from the wrapped collator is NoneType; it must be a torch tensor \[batch"),
        ({"input_ids": [3, 4]}, r"input_ids from the wrapped collator is \(2,\)"),
        ({"input_ids": [[3, 4]], "attention_mask": [1, 1]}, r"attention_mask .* is \(2,\).* input_ids' shape \(1, 2\)"),
        ({"input_ids": [[3, 4]], "labels": [[3, 4, 5]]}, r"labels .* has shape \(1, 3\).* \(1, 2\).*Pad both"),
        ({"input_ids": [[3, 4]], "shift_labels": [[3]]}, r"shift_labels .* has shape \(1, 1\)"),
    ],
)
def test_a_batch_that_cannot_be_packed_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithFlattening(fixed_batch(**batch))(["any"])


def test_bad_calls_are_refused():
    collator = DataCollatorWithFlattening(causal_collator())
    with pytest.raises(ValueError, match="features is empty"):
        collator([])
    with pytest.raises(ValueError, match=r"list of whole batches.*batch_size=None"):
        collator([samples_of([[3, 4]])])
    with pytest.raises(ValueError, match="return_tensors is 'np'; only None or 'pt'"):
        collator(samples_of([[3]]), return_tensors="np")
