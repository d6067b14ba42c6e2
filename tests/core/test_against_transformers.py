"""Converted models compute what transformers' own Llama computes, in float32 on the CPU."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.layout.mapping import convert_tensors, map_names

LOGITS = {"atol": 1e-4, "rtol": 0}
LOSS = {"atol": 1e-5, "rtol": 0}
GRADIENT = 1e-4

WIDTH = 12
LENGTHS = (12, 7, 1)

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}  # key/value heads for 4 query heads
HEAD_DIMS = {"default": None, "wide": 32, "odd": 80}  # hidden_size / heads is 16
# A length limit above WIDTH keeps a rope type within its trained range. A limit below WIDTH makes it leave the range.
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic_beyond": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope_short": {"rope_type": "longrope", "original_max_position_embeddings": 16},
    "longrope_long": {"rope_type": "longrope", "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
GRID = list(itertools.product(HEADS, HEAD_DIMS, ("tied", "untied"), ROPES))


def fields_of(heads="gqa", head_dim="default", tie="untied", rope="default"):
    rope_parameters = {"rope_theta": 100.0, **ROPES[rope]}
    if rope.startswith("longrope"):
        pairs = (HEAD_DIMS[head_dim] or 16) // 2
        rope_parameters["short_factor"] = [1 + 0.1 * pair for pair in range(pairs)]
        rope_parameters["long_factor"] = [2 + 0.5 * pair for pair in range(pairs)]
    return {
        "num_hidden_layers": 2,
        "num_key_value_heads": HEADS[heads],
        "head_dim": HEAD_DIMS[head_dim],
        "tie_word_embeddings": tie == "tied",
        "rope_parameters": rope_parameters,
        "max_position_embeddings": 8 if rope == "dynamic_beyond" else 64,
    }


def padded_batch(padding, lengths=LENGTHS, width=WIDTH, seed=0):
    """Make token ids, mask and labels [B, S]. No token predicts a sequence's first token, so it has no label."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(3, 257, (len(lengths), width), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    for row, length in enumerate(lengths):
        if padding == "left":
            mask_BS[row, : width - length] = 0
        elif padding == "right":
            mask_BS[row, length:] = 0
    ids_BS[mask_BS == 0] = 0
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    labels_BS[torch.arange(len(lengths)), mask_BS.argmax(1)] = -100
    return ids_BS, mask_BS, labels_BS


def packed(sequences, gaps=None):
    """Sequences [S] as one row, with `gaps` of padding behind each, and the arguments that describe it."""
    gaps = gaps or [0] * len(sequences)
    spaced = [torch.nn.functional.pad(ids_S, (0, gap)) for ids_S, gap in zip(sequences, gaps, strict=True)]
    row_1T = torch.cat(spaced)[None]
    lengths = torch.tensor([0, *map(len, sequences)])
    offsets = lengths + torch.tensor([0, *gaps])
    cu_seq_lens = lengths.cumsum(0).to(torch.int32)
    padded = offsets.cumsum(0).to(torch.int32)
    arguments = {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": int(offsets.max()),
        "max_length_k": int(offsets.max()),
    }
    if any(gaps):
        arguments |= {"cu_seq_lens_q_padded": padded, "cu_seq_lens_k_padded": padded, "pad_between_seqs": True}
    places = [slice(int(start), int(start) + len(ids_S)) for start, ids_S in zip(padded, sequences, strict=False)]
    return row_1T, arguments, places


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 257, (length,), generator=generator) for length in lengths]


def assert_real_tokens_equal(actual_BSx, expected_BSx, mask_BS, **tolerance):
    real_BS = mask_BS.bool()
    torch.testing.assert_close(actual_BSx[real_BS], expected_BSx[real_BS], **(tolerance or LOGITS))


def gradients_in_hf_layout(model_te):
    gradients = {name: parameter.grad for name, parameter in model_te.named_parameters()}
    return convert_tensors(map_names(gradients, to_te=False), gradients, model_te.config, to_te=False)


def assert_gradients_equal(model_te, model_hf):
    actual = gradients_in_hf_layout(model_te)
    expected = {name: parameter.grad for name, parameter in model_hf.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (actual[name] - gradient).abs().max() <= GRADIENT * largest, name


@pytest.mark.parametrize(("heads", "head_dim", "tie", "rope"), GRID, ids=map("-".join, GRID))
def test_the_grid(tiny_llama, heads, head_dim, tie, rope):
    """Compare logits, losses and gradients for every combination, in both formats and with every padding."""
    model_hf = tiny_llama(**fields_of(heads, head_dim, tie, rope))
    models_te = {format: convert_llama_hf_to_te(model_hf, attn_input_format=format) for format in ("thd", "bshd")}
    for padding in ("none", "left", "right"):
        ids_BS, mask_BS, labels_BS = padded_batch(padding)
        # Without a mask, transformers and this package take other code paths than with a mask.
        inputs = {"input_ids": ids_BS, "labels": labels_BS} | ({} if padding == "none" else {"attention_mask": mask_BS})
        model_hf.zero_grad()
        expected = model_hf(**inputs)
        expected.loss.backward()
        for model_te in models_te.values():
            model_te.zero_grad()
            actual = model_te(**inputs)
            assert_real_tokens_equal(actual.logits, expected.logits, mask_BS)
            torch.testing.assert_close(actual.loss, expected.loss, **LOSS)
            actual.loss.backward()
            assert_gradients_equal(model_te, model_hf)


def test_the_grid_can_tell(tiny_llama):
    """The models of the grid are large and long enough that rope types and regimes show in their logits."""
    ids_BS, _, _ = padded_batch("none")
    logits = {}
    for rope in ROPES:
        logits[rope] = tiny_llama(**fields_of(rope=rope))(ids_BS).logits
    for one, other in itertools.combinations(ROPES, 2):
        if {one, other} != {"default", "dynamic"}:  # the same within the trained range
            assert (logits[one] - logits[other]).abs().max() > 100 * LOGITS["atol"], (one, other)


@pytest.mark.parametrize("rope", ["dynamic_beyond", "longrope_long"])
@pytest.mark.parametrize("format", ["thd", "bshd"])
def test_where_the_regime_changes(tiny_llama, rope, format):
    """Compare lengths around the trained length of 8, in any order: earlier inputs of a model have no effect."""
    fields = fields_of(rope=rope)
    model_te = convert_llama_hf_to_te(tiny_llama(**fields), attn_input_format=format)
    for width in (7, 12, 8, 9, 10, 7, 9, 300):
        ids_BS, _, _ = padded_batch("none", width=width)
        with torch.no_grad():
            expected_BSV = tiny_llama(**fields)(ids_BS).logits  # anew: transformers' model is stateful
            torch.testing.assert_close(model_te(ids_BS).logits, expected_BSV, **LOGITS)


@pytest.mark.parametrize("format", ["thd", "bshd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_near_to_float32_as_transformers_is(tiny_llama, dtype, format):
    model_hf = tiny_llama()
    ids_BS, mask_BS, _ = padded_batch("left", lengths=(12, 11, 9))
    with torch.no_grad():
        exact_BSV = model_hf(ids_BS, attention_mask=mask_BS).logits
        model_te = convert_llama_hf_to_te(model_hf.to(dtype), attn_input_format=format)
        real_BS = mask_BS.bool()
        errors = [
            (model(ids_BS, attention_mask=mask_BS).logits - exact_BSV)[real_BS].square().mean().sqrt()
            for model in (model_te, model_hf)
        ]
    assert 0 < errors[0] <= 1.2 * errors[1]


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(GRID),
    format=st.sampled_from(("thd", "bshd")),
    rows=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_mask_equals_each_sequence_alone(case, format, rows, seed):
    """Padding anywhere has no effect: each row equals transformers' result for the row's tokens alone."""
    model_hf = _model(case)
    ids_BS = torch.randint(3, 257, (len(rows), 9), generator=torch.Generator().manual_seed(seed))
    mask_BS = torch.tensor(rows)
    model_te = convert_llama_hf_to_te(model_hf, attn_input_format=format)
    with torch.no_grad():
        logits_BSV = model_te(ids_BS, attention_mask=mask_BS).logits
        for ids_S, mask_S, logits_SV in zip(ids_BS, mask_BS, logits_BSV, strict=True):
            if not mask_S.any():
                continue
            # Rope types that depend on the length use the width of the batch, as in transformers.
            if case[-1] in ("dynamic_beyond", "longrope_long") and mask_S.sum() < 9:
                continue
            torch.testing.assert_close(logits_SV[mask_S], model_hf(ids_S[mask_S][None]).logits[0], **LOGITS)


@functools.cache
def _model(case):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **fields_of(*case)})).eval()


@pytest.mark.parametrize("rope", ["default", "yarn", "longrope_short"])
def test_packed_sequences_equal_each_alone(tiny_llama, rope):
    model_hf = tiny_llama(**fields_of(rope=rope))
    model_te = convert_llama_hf_to_te(model_hf)
    sequences = random_sequences((5, 1, 12, 3))
    row_1T, arguments, places = packed(sequences)
    restarting_1T = torch.cat([torch.arange(len(ids_S)) for ids_S in sequences])[None]
    padded_row_1T, padded_arguments, padded_places = packed(sequences, gaps=[3, 7, 0, 5])
    with torch.no_grad():
        logits_TV = model_te(row_1T, **arguments).logits[0]
        logits_of_positions_TV = model_te(row_1T, position_ids=restarting_1T).logits[0]
        padded_logits_TV = model_te(padded_row_1T, **padded_arguments).logits[0]
        for ids_S, place, padded_place in zip(sequences, places, padded_places, strict=True):
            expected_SV = model_hf(ids_S[None]).logits[0]
            torch.testing.assert_close(logits_TV[place], expected_SV, **LOGITS)
            torch.testing.assert_close(logits_of_positions_TV[place], expected_SV, **LOGITS)
            torch.testing.assert_close(padded_logits_TV[padded_place], expected_SV, **LOGITS)


SHARED_ROWS = ((4, 1, 6, 2), (9,), (3, 7))


def shared_rows(shown_by):
    """Rows of several sequences as other trainers make them: the sequences, ids [B, S], places, and arguments."""
    sequences, width = random_sequences([length for row in SHARED_ROWS for length in row]), 13
    ids_BS, sample_BS = torch.zeros(len(SHARED_ROWS), width, dtype=torch.long), torch.zeros(len(SHARED_ROWS), width)
    position_BS = torch.zeros_like(ids_BS)
    places, following = [], iter(sequences)
    for row, lengths in enumerate(SHARED_ROWS):
        start = 0
        for number, length in enumerate(lengths, 1):
            place = (row, slice(start, start + length))
            ids_BS[place], sample_BS[place], position_BS[place] = next(following), number, torch.arange(length)
            places.append(place)
            start += length
        position_BS[row, start:] = torch.arange(width - start)  # axolotl's padding
    ones = torch.ones_like(ids_BS)
    return sequences, ids_BS, places, {
        "positions": {"position_ids": position_BS},
        "positions beside ones": {"position_ids": position_BS, "attention_mask": ones},
        "positions beside a mask": {"position_ids": position_BS, "attention_mask": (sample_BS > 0).long()},
        "samples": {"attention_mask": sample_BS.long()},
        "samples and positions": {"position_ids": position_BS, "attention_mask": sample_BS.long()},
        "samples and columns": {"position_ids": torch.arange(width)[None], "attention_mask": sample_BS.long()},
    }[shown_by]  # fmt: skip


SHOWN_BY = (
    "positions",
    "positions beside ones",
    "positions beside a mask",
    "samples",
    "samples and positions",
    "samples and columns",
)


@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize("shown_by", SHOWN_BY)
def test_sequences_that_share_rows_equal_each_alone(shown_by, rope):
    model_hf = _model(("gqa", "default", "untied", rope))
    model_te = convert_llama_hf_to_te(model_hf)
    sequences, ids_BS, places, arguments = shared_rows(shown_by)
    with torch.no_grad():
        logits_BSV = model_te(ids_BS, **arguments).logits
        for ids_S, place in zip(sequences, places, strict=True):
            torch.testing.assert_close(logits_BSV[place], model_hf(ids_S[None]).logits[0], **LOGITS)


def test_rows_of_numbered_samples_train_as_each_sequence_alone():
    """The loss is the mean over the labels of all sequences: no sample's last token trains on the next sample."""
    model_hf = _model(("gqa", "default", "untied", "default"))
    model_te = convert_llama_hf_to_te(model_hf)
    sequences, ids_BS, _, arguments = shared_rows("samples")
    labels_BS = ids_BS.masked_fill(arguments["attention_mask"] == 0, -100)
    trained = [ids_S for ids_S in sequences if len(ids_S) > 1]
    losses = [model_hf(ids_S[None], labels=ids_S[None]).loss * (len(ids_S) - 1) for ids_S in trained]
    expected = torch.stack(losses).sum() / sum(len(ids_S) - 1 for ids_S in trained)
    model_hf.zero_grad()
    expected.backward()
    actual = model_te(ids_BS, labels=labels_BS, **arguments).loss
    torch.testing.assert_close(actual, expected, **LOSS)
    actual.backward()
    assert_gradients_equal(model_te, model_hf)
    model_hf.zero_grad()


def test_a_mask_beside_packed_sequences_changes_nothing():
    """The BioNeMo recipe's collators leave one there, without the padding that they insert between sequences."""
    model_hf = _model(("gqa", "default", "untied", "default"))
    model_te = convert_llama_hf_to_te(model_hf)
    sequences = random_sequences((5, 2))
    for gaps, ones in (([0, 0], 7), ([3, 2], 7), ([3, 2], 12)):
        row_1T, packed_arguments, places = packed(sequences, gaps)
        labels_1T = torch.full_like(row_1T, -100)
        for place, ids_S in zip(places, sequences, strict=True):
            labels_1T[0, place] = ids_S
            labels_1T[0, place.start] = -100
        mask_1T = torch.ones(1, ones, dtype=torch.long)
        with torch.no_grad():
            output = model_te(row_1T, attention_mask=mask_1T, labels=labels_1T, **packed_arguments)
            expected = [model_hf(ids_S[None], labels=ids_S[None]) for ids_S in sequences]
        for place, each in zip(places, expected, strict=True):
            torch.testing.assert_close(output.logits[0, place], each.logits[0], **LOGITS)
        torch.testing.assert_close(output.loss, (4 * expected[0].loss + expected[1].loss) / 5, **LOSS)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=5), st.booleans())
def test_any_packing_equals_each_sequence_alone(sizes, tell_longest):
    model_hf = _model(("gqa", "wide", "tied", "llama3"))
    model_te = convert_llama_hf_to_te(model_hf)
    sequences = random_sequences([length for length, _ in sizes])
    row_1T, arguments, places = packed(sequences, [gap for _, gap in sizes])
    if not tell_longest:
        del arguments["max_length_q"], arguments["max_length_k"]
    with torch.no_grad():
        logits_TV = model_te(row_1T, **arguments).logits[0]
        for ids_S, place in zip(sequences, places, strict=True):
            torch.testing.assert_close(logits_TV[place], model_hf(ids_S[None]).logits[0], **LOGITS)


def test_packed_losses_and_gradients_equal_the_padded_batch(tiny_llama):
    """The same holds with padding between the sequences."""
    model_hf = tiny_llama()
    ids_BS, mask_BS, labels_BS = padded_batch("right")
    expected = model_hf(ids_BS, attention_mask=mask_BS, labels=labels_BS).loss
    expected.backward()
    sequences = [ids_S[mask_S.bool()] for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True)]
    for gaps in (None, [4, 1, 3]):
        model_te = convert_llama_hf_to_te(model_hf)
        row_1T, arguments, places = packed(sequences, gaps)
        labels_1T = torch.full_like(row_1T, -100)
        for place in places:
            labels_1T[:, place.start + 1 : place.stop] = row_1T[:, place.start + 1 : place.stop]
        actual = model_te(row_1T, labels=labels_1T, **arguments).loss
        torch.testing.assert_close(actual, expected, **LOSS)
        actual.backward()
        assert_gradients_equal(model_te, model_hf)


@pytest.mark.parametrize("format", ["thd", "bshd"])
def test_padding_predicts_nothing(tiny_llama, format):
    """If a caller keeps the label of the first real token, the padding before it is still not trained to predict it."""
    model_hf = tiny_llama()
    model_te = convert_llama_hf_to_te(model_hf, attn_input_format=format)
    ids_BS, mask_BS, labels_BS = padded_batch("left")
    every_label_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    loss = model_te(ids_BS, attention_mask=mask_BS, labels=every_label_BS).loss
    torch.testing.assert_close(loss, model_hf(ids_BS, attention_mask=mask_BS, labels=labels_BS).loss, **LOSS)
    assert every_label_BS[1, WIDTH - LENGTHS[1]] != -100  # the caller's labels are unchanged


@pytest.mark.parametrize("format", ["thd", "bshd"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_hidden_states(tiny_llama, format, padding):
    model_hf = tiny_llama()
    model_te = convert_llama_hf_to_te(model_hf, attn_input_format=format)
    ids_BS, mask_BS, _ = padded_batch(padding)
    with torch.no_grad():
        expected = model_hf(ids_BS, attention_mask=mask_BS, output_hidden_states=True)
        actual = model_te(ids_BS, attention_mask=mask_BS, output_hidden_states=True)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for actual_BSE, expected_BSE in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_real_tokens_equal(actual_BSE, expected_BSE, mask_BS)
    assert model_te(ids_BS).hidden_states is None
    model_te.config.output_hidden_states = True
    assert len(model_te(ids_BS).hidden_states) == 4


@pytest.mark.parametrize("columns", [1, 5, 0, torch.tensor([2, 7])])
def test_logits_to_keep(tiny_llama, columns):
    model_hf = tiny_llama()
    model_te = convert_llama_hf_to_te(model_hf)
    ids_BS, mask_BS, _ = padded_batch("left", lengths=(12, 12, 12))
    with torch.no_grad():
        expected = model_hf(ids_BS, attention_mask=mask_BS, logits_to_keep=columns).logits
        actual = model_te(ids_BS, attention_mask=mask_BS, logits_to_keep=columns).logits
    torch.testing.assert_close(actual, expected, **LOGITS)


def test_shift_labels_and_num_items_in_batch(tiny_llama):
    model_hf = tiny_llama()
    model_te = convert_llama_hf_to_te(model_hf)
    ids_BS, mask_BS, labels_BS = padded_batch("right")
    shift_labels_BS = torch.nn.functional.pad(labels_BS, (0, 1), value=-100)[:, 1:].contiguous()
    for extra in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(41)}):
        with torch.no_grad():
            expected = model_hf(ids_BS, attention_mask=mask_BS, labels=labels_BS, **extra).loss
            by_labels = model_te(ids_BS, attention_mask=mask_BS, labels=labels_BS, **extra).loss
            by_shift_labels = model_te(ids_BS, attention_mask=mask_BS, shift_labels=shift_labels_BS, **extra).loss
        torch.testing.assert_close(by_labels, expected, **LOSS)
        torch.testing.assert_close(by_shift_labels, expected, **LOSS)


@pytest.mark.parametrize("format", ["thd", "bshd"])
def test_inputs_embeds_and_tuples(tiny_llama, format):
    model_hf = tiny_llama()
    model_te = convert_llama_hf_to_te(model_hf, attn_input_format=format)
    ids_BS, mask_BS, labels_BS = padded_batch("left")
    with torch.no_grad():
        expected = model_hf(ids_BS, attention_mask=mask_BS, labels=labels_BS)
        embeds_BSE = model_te.get_input_embeddings()(ids_BS)
        loss, logits_BSV = model_te(
            inputs_embeds=embeds_BSE, attention_mask=mask_BS, labels=labels_BS, return_dict=False
        )[:2]
    assert_real_tokens_equal(logits_BSV, expected.logits, mask_BS)
    torch.testing.assert_close(loss, expected.loss, **LOSS)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model_te(ids_BS, inputs_embeds=embeds_BSE)
    with pytest.raises(ValueError, match=r"input_ids has shape \[12\]"):
        model_te(ids_BS[0])


@pytest.mark.parametrize("format", ["thd", "bshd"])
def test_float32_is_near_float64(tiny_llama, format):
    model_hf = tiny_llama()
    ids_BS, mask_BS, labels_BS = padded_batch("left")
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
    with torch.no_grad():
        single = convert_llama_hf_to_te(model_hf, attn_input_format=format)(**inputs)
        double = convert_llama_hf_to_te(model_hf.double(), attn_input_format=format)(**inputs)
        expected = model_hf(**inputs)
    assert double.logits.dtype == torch.float64
    # transformers' RMSNorm computes in float32 for every dtype of the model.
    assert_real_tokens_equal(double.logits, expected.logits, mask_BS, atol=1e-5, rtol=0)
    assert_real_tokens_equal(single.logits.double(), double.logits, mask_BS)
    torch.testing.assert_close(single.loss.double(), double.loss.double(), **LOSS)


@pytest.mark.parametrize("format", ["thd", "bshd"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
class TestHeads:
    """All five models, with each padding."""

    def models(self, tiny_llama, model_class, format, **fields):
        model_hf = tiny_llama(model_class, **fields)
        return model_hf, convert_llama_hf_to_te(model_hf, attn_input_format=format)

    def test_decoder(self, tiny_llama, format, padding):
        model_hf, model_te = self.models(tiny_llama, LlamaModel, format)
        ids_BS, mask_BS, _ = padded_batch(padding)
        with torch.no_grad():
            expected = model_hf(ids_BS, attention_mask=mask_BS).last_hidden_state
            actual = model_te(ids_BS, attention_mask=mask_BS).last_hidden_state
        assert_real_tokens_equal(actual, expected, mask_BS)

    @pytest.mark.parametrize(
        ("num_labels", "labels"),
        [
            (3, torch.tensor([0, 2, 1])),
            (1, torch.tensor([0.5, -1.0, 2.0])),
            (3, torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]])),
        ],
        ids=["classes", "regression", "multi_label"],
    )
    def test_sequence_classification(self, tiny_llama, format, padding, num_labels, labels):
        model_hf, model_te = self.models(tiny_llama, LlamaForSequenceClassification, format, num_labels=num_labels)
        ids_BS, mask_BS, _ = padded_batch(padding)
        self.assert_equal(model_te, model_hf, ("logits",), None, ids_BS, attention_mask=mask_BS, labels=labels)

    def test_token_classification(self, tiny_llama, format, padding):
        model_hf, model_te = self.models(tiny_llama, LlamaForTokenClassification, format, num_labels=3)
        ids_BS, mask_BS, _ = padded_batch(padding)
        labels_BS = (ids_BS % 3).masked_fill(mask_BS == 0, -100)
        self.assert_equal(model_te, model_hf, ("logits",), mask_BS, ids_BS, attention_mask=mask_BS, labels=labels_BS)

    def test_question_answering(self, tiny_llama, format, padding):
        model_hf, model_te = self.models(tiny_llama, LlamaForQuestionAnswering, format)
        ids_BS, mask_BS, _ = padded_batch(padding)
        fields = ("start_logits", "end_logits")
        self.assert_equal(model_te, model_hf, fields, mask_BS, ids_BS, attention_mask=mask_BS)
        if padding == "none":  # this model's loss covers all columns, padding included
            answers = {"start_positions": torch.tensor([0, 3, 99]), "end_positions": torch.tensor([2, 5, 7])}
            self.assert_equal(model_te, model_hf, fields, None, ids_BS, **answers)
            self.assert_equal(model_te, model_hf, fields, None, ids_BS, **answers, num_items_in_batch=5)

    @staticmethod
    def assert_equal(model_te, model_hf, fields, mask_BS, *args, **kwargs):
        with torch.no_grad():
            actual, expected = model_te(*args, **kwargs), model_hf(*args, **kwargs)
        for field in fields:
            if mask_BS is None:
                torch.testing.assert_close(actual[field], expected[field], **LOGITS)
            else:
                assert_real_tokens_equal(actual[field], expected[field], mask_BS)
        assert (actual.loss is None) == (expected.loss is None)
        if expected.loss is not None:
            torch.testing.assert_close(actual.loss, expected.loss, **LOSS)


@pytest.mark.parametrize("gaps", [None, [3, 7, 0]])
def test_sequence_classification_of_packed_sequences(tiny_llama, gaps):
    model_hf = tiny_llama(LlamaForSequenceClassification, num_labels=3)
    model_te = convert_llama_hf_to_te(model_hf)
    sequences, labels = random_sequences((5, 1, 9)), torch.tensor([2, 0, 1])
    row_1T, arguments, _ = packed(sequences, gaps)
    with torch.no_grad():
        actual = model_te(row_1T, labels=labels, **arguments)
        expected = [model_hf(ids_S[None], labels=label[None]) for ids_S, label in zip(sequences, labels, strict=True)]
    torch.testing.assert_close(actual.logits, torch.cat([each.logits for each in expected]), **LOGITS)
    torch.testing.assert_close(actual.loss, torch.stack([each.loss for each in expected]).mean(), **LOSS)


def test_sequence_classification_without_a_padding_token(tiny_llama):
    model_te = convert_llama_hf_to_te(tiny_llama(LlamaForSequenceClassification, pad_token_id=None))
    ids_BS, _, _ = padded_batch("none")
    with pytest.raises(ValueError, match=r"batch of 3 sequences.*pad_token_id is None"):
        model_te(ids_BS)
    assert model_te(ids_BS[:1]).logits.shape == (1, 2)
