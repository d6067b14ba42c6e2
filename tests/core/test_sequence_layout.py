"""Tests the arrangement of padded batches and packed sequences for the layers, and the checks of their arguments."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_te_core.layers import packed_rows
from llama_te_core.layers.sequence_layout import PackedSequences, lay_out

FORMATS = ("thd", "bshd")


@st.composite
def masks(draw):
    """Masks [B, S] of any kind: with holes, with rows that are padding alone, or all padding."""
    width = draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


def lay(input_BS, format="thd", mask_type="padding_causal", **arguments):
    return lay_out(input_BS, attn_input_format=format, self_attn_mask_type=mask_type, **arguments)


def tokens_of(mask_BS):
    """A different number for each place of a batch."""
    return torch.arange(100, 100 + mask_BS.numel()).view(mask_BS.shape)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@settings(deadline=None)
@given(masks(), st.sampled_from(FORMATS), st.integers(1, 33), st.booleans())
def test_arranging_and_restoring_changes_no_token(mask_BS, format, token_multiple, embedded):
    input_BS = tokens_of(mask_BS)
    input_BSx = torch.stack((input_BS, -input_BS), dim=-1) if embedded else input_BS
    layout = lay(input_BSx, format, attention_mask=mask_BS.long(), token_multiple=token_multiple)
    arranged = layout.arrange(input_BSx)
    restored_BSx = layout.restore(arranged)
    assert restored_BSx.shape == input_BSx.shape
    assert torch.equal(restored_BSx[mask_BS], input_BSx[mask_BS])
    assert layout.tokens == arranged.shape[: 1 if format == "thd" else 2].numel()


@settings(deadline=None)
@given(masks(), st.integers(1, 33))
def test_packing_puts_each_rows_tokens_in_a_row(mask_BS, token_multiple):
    input_BS = tokens_of(mask_BS)
    layout = lay(input_BS, attention_mask=mask_BS, token_multiple=token_multiple)
    arranged_T, offsets = layout.arrange(input_BS), layout.cu_seqlens.tolist()
    filled = [ids_S[mask_S] for ids_S, mask_S in zip(input_BS, mask_BS, strict=True) if mask_S.any()]
    for row, ids_S in enumerate(filled):
        assert torch.equal(arranged_T[offsets[row] : offsets[row + 1]], ids_S)
    assert layout.cu_seqlens.dtype == torch.int32
    # Padding to a multiple is a sequence of its own, of at most that many tokens.
    assert len(offsets) - 1 - len(filled) in (0, 1)
    assert offsets[-1] == len(arranged_T)
    assert len(arranged_T) % token_multiple == 0
    assert 0 <= len(arranged_T) - int(mask_BS.sum()) <= (token_multiple if not mask_BS.any() else token_multiple - 1)
    assert layout.max_seqlen >= layout.cu_seqlens.diff().max()
    assert layout.format == "thd"
    assert layout.mask_type == "padding_causal"


@settings(deadline=None)
@given(masks(), st.sampled_from(("padding_causal", "causal")))
def test_a_padded_batch_has_each_rows_tokens_first(mask_BS, mask_type):
    input_BS = tokens_of(mask_BS)
    layout = lay(input_BS, "bshd", mask_type, attention_mask=mask_BS)
    arranged_BS = layout.arrange(input_BS)
    for arranged_S, ids_S, mask_S in zip(arranged_BS, input_BS, mask_BS, strict=True):
        assert torch.equal(arranged_S[: int(mask_S.sum())], ids_S[mask_S])
    assert layout.mask_type == mask_type
    lengths = None if layout.cu_seqlens is None else layout.cu_seqlens.diff().tolist()
    assert lengths == (mask_BS.sum(1).tolist() if mask_type == "padding_causal" else None)
    assert layout.max_seqlen == mask_BS.shape[1]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from(FORMATS), st.integers(1, 33))
def test_a_batch_without_a_mask_is_all_tokens(rows, width, format, token_multiple):
    input_BS = tokens_of(torch.ones(rows, width))
    layout = lay(input_BS, format, token_multiple=token_multiple)
    assert torch.equal(layout.restore(layout.arrange(input_BS)), input_BS)
    if format == "thd":
        assert layout.cu_seqlens.diff().tolist()[:rows] == [width] * rows
        assert layout.tokens % token_multiple == 0
    else:
        assert layout.mask_type == "causal"
        assert torch.equal(layout.arrange(input_BS), input_BS)


@settings(deadline=None)
@given(masks(), st.sampled_from(FORMATS))
def test_positions_that_follow_from_the_mask_are_taken(mask_BS, format):
    """`lay_out` takes the positions that `generate` computes from a mask, and positions equal to the columns."""
    input_BS = tokens_of(mask_BS)
    for position_BS in ((mask_BS.cumsum(1) - 1).clamp(min=0), torch.arange(mask_BS.shape[1]).expand(mask_BS.shape)):
        layout = lay(input_BS, format, attention_mask=mask_BS, position_ids=position_BS)
        assert torch.equal(layout.restore(layout.arrange(input_BS))[mask_BS], input_BS[mask_BS])


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(0, 3))
def test_positions_that_begin_again_are_packed_sequences(lengths, first):
    """A row may also begin in the middle of a sequence, since attention depends only on distances."""
    position_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    position_1T[:, : lengths[0]] += first
    layout = lay(tokens_of(position_1T), position_ids=position_1T)
    assert layout.cu_seqlens.diff().tolist() == lengths
    assert layout.max_seqlen == layout.longest == max(lengths)


@st.composite
def rows_of_sequences(draw):
    """Rows of several sequences: their lengths, the mask that numbers samples, and the positions, each [B, S]."""
    lengths_B = draw(st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=3))
    width = max(1, max(map(sum, lengths_B)) + draw(st.integers(0, 2)))
    left = draw(st.booleans())
    sample_BS = torch.zeros(len(lengths_B), width, dtype=torch.long)
    position_BS = torch.zeros_like(sample_BS)
    for row, lengths in enumerate(lengths_B):
        place = width - sum(lengths) if left else 0
        for number, length in enumerate(lengths, 1):
            sample_BS[row, place : place + length] = number
            position_BS[row, place : place + length] = torch.arange(length)
            place += length
    return [length for lengths in lengths_B for length in lengths], sample_BS, position_BS


@settings(deadline=None)
@given(rows_of_sequences(), st.sampled_from(("samples", "samples and columns", "positions")), st.integers(1, 9))
def test_sequences_that_share_rows_are_kept_apart(case, shown_by, token_multiple):
    """The samples' numbers show them, or positions that restart; positions may also count through a row of samples."""
    lengths, sample_BS, position_BS = case
    arguments = {"attention_mask": sample_BS}
    if shown_by == "samples and columns":
        arguments["position_ids"] = torch.arange(sample_BS.shape[1])[None]
    elif shown_by == "positions":
        arguments = {"attention_mask": (sample_BS > 0).long(), "position_ids": position_BS}
    input_BS = tokens_of(sample_BS)
    layout = lay(input_BS, **arguments, token_multiple=token_multiple)
    found = layout.cu_seqlens.diff().tolist()
    assert found[: len(lengths)] == lengths
    assert len(found) - len(lengths) == (sum(lengths) % token_multiple != 0 or not lengths)
    assert torch.equal(layout.arrange(input_BS)[: sum(lengths)], input_BS[sample_BS > 0])
    assert torch.equal(layout.restore(layout.arrange(input_BS))[sample_BS > 0], input_BS[sample_BS > 0])
    assert layout.max_seqlen >= max(found)
    if len(lengths) > len({row for row, _ in sample_BS.nonzero().tolist()}):
        assert layout.longest == max(found)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=2, max_size=4))
def test_rows_without_padding_need_no_mask(lengths_B):
    rows = [torch.cat([torch.arange(length) for length in (*lengths, 13 - sum(lengths))]) for lengths in lengths_B]
    position_BS = torch.stack(rows)
    layout = lay(tokens_of(position_BS), position_ids=position_BS)
    assert layout.cu_seqlens.diff().tolist() == [each for row in lengths_B for each in (*row, 13 - sum(row))]


@pytest.mark.parametrize(
    "arguments",
    [
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])},
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 1, 0, 2, 2], [1, 1, 1, 1, 1]])},
    ],
    ids=["positions", "samples", "samples around padding"],
)
@pytest.mark.parametrize(("format", "cached"), [("bshd", False), ("bshd", True), ("thd", True)])
def test_rows_of_one_sequence_refuse_more(arguments, format, cached):
    class Cache:
        def begin_step(self, *arguments):
            raise AssertionError("the cache must stay as it was")

    with pytest.raises(
        ValueError, match="several samples in a row.*attn_input_format='thd' and without past_key_values"
    ):
        lay(torch.ones(2, 5), format, cache=Cache() if cached else None, **arguments)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=5), st.booleans())
def test_packed_sequences_are_left_where_they_are(sizes, tell_longest):
    lengths = torch.tensor([0] + [length for length, _ in sizes])
    places = lengths + torch.tensor([0] + [gap for _, gap in sizes])
    input_1T = tokens_of(torch.ones(1, int(places.sum())))
    packed = PackedSequences(
        lengths.cumsum(0).to(torch.int32),
        cu_seq_lens_q_padded=places.cumsum(0).to(torch.int32),
        max_length_q=int(places.max()) if tell_longest else None,
    )
    layout = lay(input_1T, packed=packed)
    assert torch.equal(layout.arrange(input_1T), input_1T[0])
    assert torch.equal(layout.restore(input_1T[0]), input_1T)
    assert layout.max_seqlen == int(places.max())
    assert layout.layer_arguments()["pad_between_seqs"] is True


def test_padding_between_sequences_can_be_denied():
    packed = PackedSequences(int32(0, 2, 5), cu_seq_lens_q_padded=int32(0, 2, 5), pad_between_seqs=False)
    arguments = lay(torch.ones(1, 5), packed=packed).layer_arguments()
    assert arguments["cu_seqlens_q_padded"] is None
    assert arguments["pad_between_seqs"] is False


def test_from_arguments_takes_its_names_and_leaves_the_rest():
    arguments = {"cu_seq_lens_q": int32(0, 3), "max_length_q": 3, "num_items_in_batch": 7}
    packed = PackedSequences.from_arguments(arguments)
    assert (packed.max_length_q, packed.cu_seq_lens_k) == (3, None)
    assert arguments == {"num_items_in_batch": 7}
    assert PackedSequences.from_arguments({"max_length_q": 3}) is None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 6), (2, 1, 5, 5), (5,)])
def test_a_mask_of_a_wrong_shape_is_refused(format, shape):
    with pytest.raises(ValueError, match=rf"attention_mask has shape \[{', '.join(map(str, shape))}\].*\[2, 5\].*4D"):
        lay(torch.ones(2, 5), format, attention_mask=torch.ones(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, r"cu_seq_lens_q is torch\.int64 \[2\]: it must be int32"),
        ({"cu_seq_lens_q": int32(5)}, r"cu_seq_lens_q is torch\.int32 \[1\]: it must be int32 \[sequences \+ 1\]"),
        ({"cu_seq_lens_q": int32(0, 5)[None]}, r"cu_seq_lens_q is torch\.int32 \[1, 2\]"),
        ({"cu_seq_lens_q": int32(0, 4)}, r"cu_seq_lens_q ends at 4, but there are 5 tokens"),
        ({"cu_seq_lens_q": int32(0, 6)}, r"cu_seq_lens_q ends at 6, but there are 5 tokens"),
        ({"cu_seq_lens_q": int32(1, 5)}, r"cu_seq_lens_q=\[1, 5\] must be the running sum of lengths from 0"),
        ({"cu_seq_lens_q": int32(0, 4, 2, 5)}, r"cu_seq_lens_q=\[0, 4, 2, 5\] must be the running sum"),
        (
            {"cu_seq_lens_q": int32(0, 2, 5), "max_length_q": 2},
            r"max_length_q=2, but the longest sequence takes 3 places",
        ),
        (
            {"cu_seq_lens_q": int32(0, 2), "cu_seq_lens_q_padded": torch.tensor([0, 5])},
            r"cu_seq_lens_q_padded is torch\.int64",
        ),
        ({"cu_seq_lens_q": int32(0, 2), "cu_seq_lens_q_padded": int32(0, 4)}, r"cu_seq_lens_q_padded ends at 4"),
        (
            {"cu_seq_lens_q": int32(0, 3, 4), "cu_seq_lens_q_padded": int32(0, 2, 5)},
            r"cu_seq_lens_q=\[0, 3, 4\] does not fit cu_seq_lens_q_padded=\[0, 2, 5\]",
        ),
        ({"cu_seq_lens_q": int32(0, 3), "cu_seq_lens_q_padded": int32(0, 3, 5)}, r"does not fit cu_seq_lens_q_padded"),
        (
            {"cu_seq_lens_q": int32(1, 3), "cu_seq_lens_q_padded": int32(0, 5)},
            r"cu_seq_lens_q=\[1, 3\] must be the running sum",
        ),
        (
            {
                "cu_seq_lens_q": int32(0, 2, 4),
                "cu_seq_lens_q_padded": int32(0, 2, 5),
                "cu_seq_lens_k_padded": int32(0, 3, 5),
            },
            r"cu_seq_lens_q and cu_seq_lens_k differ",
        ),
        (
            {"cu_seq_lens_q": int32(0, 5), "cu_seq_lens_k_padded": int32(0, 5)},
            r"cu_seq_lens_k_padded is given, and cu_seq_lens_q_padded differs or is missing",
        ),
        (
            {"cu_seq_lens_q": int32(0, 5), "max_length_q": 5, "max_length_k": 6},
            r"max_length_q=5 and max_length_k=6 differ",
        ),
    ],
)
def test_packed_sequences_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lay(torch.ones(1, 5), packed=PackedSequences(**arguments))


def test_packed_sequences_need_thd_and_one_row():
    packed = PackedSequences(int32(0, 5))
    with pytest.raises(ValueError, match=r"attn_input_format='bshd': packed sequences need 'thd'"):
        lay(torch.ones(1, 5), "bshd", packed=packed)
    with pytest.raises(ValueError, match=r"one row \[1, T\], but the input is \[2, 5\]"):
        lay(torch.ones(2, 5), packed=packed)


GAPS = PackedSequences(int32(0, 2, 5), cu_seq_lens_q_padded=int32(0, 3, 7))  # 2 tokens, padding; 3 tokens, padding
CLOSE = PackedSequences(int32(0, 3, 7))


@pytest.mark.parametrize(
    ("packed", "name", "values"),
    [
        (CLOSE, "attention_mask", [1, 1, 1, 1, 1, 1, 1]),
        (CLOSE, "attention_mask", [1, 1, 1, 0, 0, 0, 0]),  # the recipe's filling, a sequence of its own
        (CLOSE, "attention_mask", [1, 1, 0, 1, 1, 0, 0]),
        (CLOSE, "attention_mask", [1, 1, 1, 2, 2, 2, 2]),
        (GAPS, "attention_mask", [1, 1, 0, 1, 1, 1, 0]),
        (GAPS, "attention_mask", [1, 1, 1, 1, 1]),  # the recipe's mask of sequences that it pads
        (GAPS, "position_ids", [0, 1, 0, 1, 2]),
        (GAPS, "position_ids", [0, 1, 9, 0, 1, 2, 9]),
        (CLOSE, "position_ids", [0, 1, 2, 0, 1, 2, 3]),
        (CLOSE, "position_ids", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_fits_the_packed_sequences_changes_nothing(packed, name, values):
    alone = lay(torch.ones(1, 7), packed=packed)
    beside = lay(torch.ones(1, 7), packed=packed, **{name: torch.tensor([values])})
    assert torch.equal(alone.cu_seqlens, beside.cu_seqlens)
    assert (alone.longest, alone.pad_between_seqs) == (beside.longest, beside.pad_between_seqs)
    assert beside.source_N is None


@pytest.mark.parametrize(
    ("packed", "name", "values", "message"),
    [
        (CLOSE, "attention_mask", [0, 1, 1, 1, 1, 1, 1], "attention_mask contradicts cu_seq_lens_q"),
        (CLOSE, "attention_mask", [1, 1, 1, 1, 0, 1, 1], "attention_mask contradicts"),
        (CLOSE, "attention_mask", [1, 1, 2, 2, 2, 2, 2], "attention_mask contradicts"),
        (GAPS, "attention_mask", [1, 0, 1, 1, 1, 1, 0], "attention_mask contradicts"),
        (GAPS, "attention_mask", [1, 1, 1, 1], "attention_mask contradicts"),
        (CLOSE, "attention_mask", [1, 1, 1, 1, 1], r"attention_mask has shape \[1, 5\].*must be \[1, 7\]"),
        (CLOSE, "position_ids", [0, 1, 0, 1, 2, 3, 4], "position_ids contradicts"),
        (GAPS, "position_ids", [0, 2, 9, 0, 1, 2, 9], "position_ids contradicts"),
        (CLOSE, "position_ids", [0, 1], r"position_ids has shape \[1, 2\]"),
    ],
)
def test_what_contradicts_the_packed_sequences_is_refused(packed, name, values, message):
    with pytest.raises(ValueError, match=message):
        lay(torch.ones(1, 7), packed=packed, **{name: torch.tensor([values])})


def refused_by(check, *arguments, on_device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_rows, "_decided_on_device", lambda tensor: on_device)
        refusal = RuntimeError if on_device else ValueError  # as an assertion raises where it runs on the host
        with contextlib.suppress(refusal):
            check(*arguments)
            return False
    return True


OFFSETS = st.lists(st.integers(-1, 3), min_size=2, max_size=4).map(
    lambda steps: torch.tensor(steps).cumsum(0).to(torch.int32)
)


@settings(deadline=None)
@given(OFFSETS, st.none() | OFFSETS, st.integers(0, 9), st.none() | st.integers(1, 4), st.sampled_from((1, 2)))
def test_the_device_refuses_the_offsets_that_the_host_refuses(cu_seqlens, padded, slack, longest, multiple):
    if padded is not None:
        cu_seqlens = cu_seqlens[: len(padded)]
        padded = padded[: len(cu_seqlens)]
    # Mostly offsets that begin at 0 and end with the row.
    offsets = cu_seqlens if padded is None else padded
    offsets -= offsets[0].clone() if slack else 0
    tokens = int(offsets[-1]) + (slack == 1)
    arguments = (cu_seqlens, padded, tokens, longest, multiple)
    on_device, on_host = (refused_by(packed_rows.check_offsets, *arguments, on_device=each) for each in (True, False))
    assert on_device == on_host


@pytest.mark.parametrize("packed", [CLOSE, GAPS], ids=["close", "gaps"])
@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=7, max_size=7), st.booleans())
def test_masks_and_positions_fit_if_each_sequence_says_so(packed, name, values, narrow):
    """A plain count over each sequence gives the same answer."""
    narrow = narrow and packed is GAPS
    values = values[:5] if narrow else values
    lengths = packed.cu_seq_lens_q.diff().tolist()
    slots = lengths if narrow or packed is CLOSE else packed.cu_seq_lens_q_padded.diff().tolist()
    fits, start = True, 0
    for length, slot in zip(lengths, slots, strict=True):
        own = values[start : start + slot]
        if name == "attention_mask":
            seen = [value for value in own if value]
            fits &= own == seen + [0] * (slot - len(seen)) and len(set(seen)) <= 1
        else:
            fits &= all(after == before + 1 for before, after in itertools.pairwise(own[:length]))
        start += slot
    mask, position = (torch.tensor([values]) if name == each else None for each in ("attention_mask", "position_ids"))
    arguments = (mask, position, packed.cu_seq_lens_q, packed.cu_seq_lens_q_padded, 7)
    for on_device in (True, False):
        assert refused_by(packed_rows.check_beside_offsets, *arguments, on_device=on_device) != fits


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (2, 5, 1), (4,)])
def test_positions_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"position_ids has shape .*must be \[2, 5\] or \[1, 5\]"):
        lay(torch.ones(2, 5), position_ids=torch.ones(shape))


@pytest.mark.parametrize(
    ("format", "rows", "positions"),
    [
        ("thd", 1, [0, 1, 2, 5, 6]),
        ("thd", 1, [0, 1, 0, 5, 6]),  # restarts at 0, then jumps
        ("thd", 1, [3, 2, 1, 0, 0]),
        ("thd", 2, [0, 1, 0, 2, 3]),
        ("bshd", 1, [0, 1, 0, 1, 2]),
        ("bshd", 2, [0, 1, 2, 5, 6]),
    ],
)
def test_positions_with_jumps_are_refused(format, rows, positions):
    with pytest.raises(ValueError, match=r"position_ids do not go up by one.*leave position_ids out, or pack"):
        lay(torch.ones(rows, 5), format, position_ids=torch.tensor([positions]))


def test_positions_with_jumps_are_refused_with_a_mask_too():
    mask_BS = torch.tensor([[0, 1, 1, 1]])
    assert lay(torch.ones(1, 4), attention_mask=mask_BS, position_ids=torch.tensor([[9, 0, 1, 2]])).tokens == 3
    with pytest.raises(ValueError, match=r"position_ids do not go up by one"):
        lay(torch.ones(1, 4), attention_mask=mask_BS, position_ids=torch.tensor([[0, 1, 2, 4]]))


def test_a_step_without_tokens_is_refused():
    """Packing needs at least one token, and the cache has no row for a dummy token."""

    class Cache:
        def begin_step(self, attention_mask, batch_size, width):
            return [0] * batch_size

        def longest(self):
            return 0

    with pytest.raises(ValueError, match="leaves no token in the 3 new columns"):
        lay_out(
            torch.zeros(2, 3, dtype=torch.long),
            attn_input_format="thd",
            self_attn_mask_type="padding_causal",
            attention_mask=torch.zeros(2, 3),
            cache=Cache(),
        )


def test_keys_of_other_sequences_are_refused():
    ends, others = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        lay_out(
            torch.zeros(1, 5, dtype=torch.long),
            attn_input_format="thd",
            self_attn_mask_type="padding_causal",
            packed=PackedSequences(ends, others, 3, 3),
        )
