"""Sequences that share a row: where they begin, and whether what a caller says about them fits together.

Two arguments show several sequences in a row of a batch: `position_ids` that restart at 0, and an `attention_mask`
whose values number the samples 1, 2, 3, ..., as axolotl makes it. `cu_seq_lens_q` describes the sequences of one row.

Shapes: B rows, S columns, M = B * S places of a batch, T tokens of a packed row.
"""

from __future__ import annotations

import dataclasses

import torch

from ..compat.torch import assert_on_device


@dataclasses.dataclass(frozen=True)
class RowSequences:
    """The sequences in the rows of a batch.

    Attributes:
        tokens: The number of tokens, without padding.
        longest: The length of the longest sequence.
        share_rows: Whether a row has several sequences.
        source_N: int64 [tokens], each token's place in the flattened batch; `None`: all places are tokens.
        target_M: int64 [M], each place's token; padding has any.
        cu_seqlens: int32 [sequences + 1], the running sum of lengths.
    """

    tokens: int
    longest: int
    share_rows: bool
    source_N: torch.Tensor | None
    target_M: torch.Tensor | None
    cu_seqlens: torch.Tensor


def find_sequences(
    mask_BS: torch.Tensor | None, position_BS: torch.Tensor | None, rows: int, width: int, device: torch.device
) -> RowSequences:
    """Find the sequences in the rows of a batch. This waits for the device once.

    The number of tokens and of sequences are shapes of tensors, and attention needs the longest length on the host.

    Args:
        mask_BS: Nonzero for tokens. A token with another value than the token before it begins a sequence.
        position_BS: [B, S] or [1, S]. A token at position 0 begins a sequence.
        rows: B.
        width: S.
        device: The device of the result.

    Raises:
        ValueError: Positions within a sequence do not go up by one.
    """
    places = rows * width
    place_M = torch.arange(places, device=device)
    target_M: torch.Tensor | None = None
    if mask_BS is None:
        source_M, tokens = place_M, torch.full((), places, device=device)
    else:
        token_M = (mask_BS != 0).flatten()
        tokens = token_M.sum()
        target_M = (token_M.cumsum(0) - 1).clamp_(min=0)
        # Tokens come first, in order. The additional entry takes all padding.
        source_M = place_M.new_zeros(places + 1).scatter_(0, target_M.where(token_M, places), place_M)[:places]
    is_token_M = place_M < tokens

    row_M = source_M.div(width, rounding_mode="floor")
    begins_row_M = _differs_from_previous(row_M) & is_token_M
    begins_M = begins_row_M
    if mask_BS is not None and mask_BS.dtype != torch.bool:
        begins_M = begins_M | (_differs_from_previous(mask_BS.flatten()[source_M]) & is_token_M)
    jumps = begins_M.new_zeros(())
    if position_BS is not None:
        position_M = position_BS.expand(rows, width).flatten()[source_M]
        begins_M = begins_M | ((position_M == 0) & is_token_M)
        # Across padding inside a sequence, positions may count the padding or not.
        adjacent_M = (source_M[1:] - source_M[:-1] == 1) & is_token_M[1:] & ~begins_M[1:]
        jumps = ((position_M.diff() != 1) & adjacent_M).any()

    sequence_M = begins_M.cumsum(0) - 1
    # The start of each sequence, then the end of the last; the last entry takes the tokens that begin nothing.
    offsets_M = tokens.expand(places + 2).scatter(0, sequence_M.where(begins_M, places + 1), place_M)[: places + 1]
    numbers = (tokens, begins_M.sum(), begins_row_M.sum(), offsets_M.diff().max(), jumps)
    count, sequences, filled_rows, longest, wrong = torch.stack(numbers).tolist()
    if wrong:
        raise ValueError(NOT_CONSECUTIVE)
    return RowSequences(
        tokens=count,
        longest=longest,
        share_rows=sequences > filled_rows,
        source_N=None if mask_BS is None else source_M[:count],
        target_M=target_M,
        cu_seqlens=offsets_M[: sequences + 1].to(torch.int32),
    )


NOT_CONSECUTIVE = (
    "position_ids do not go up by one from token to token, and do not restart at 0 either: positions follow from "
    "attention_mask or cu_seq_lens_q here, so leave position_ids out, or pack the sequences."
)
SHARED_ROW = (
    "position_ids do not go up by one from token to token, or attention_mask numbers several samples in a row, where a "
    "row holds one sequence: leave position_ids out, or pack the sequences, with attn_input_format='thd' and without "
    "past_key_values."
)


def is_one_sequence_a_row(mask_BC: torch.Tensor | None, position_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Return on the device, bool [], whether each row has one sequence; `None` if nothing can say otherwise.

    Args:
        mask_BC: [B, C] with C ≥ S, nonzero for tokens.
        position_BS: [B, S] or [1, S]. Positions count where both neighbours are tokens.
    """
    found: torch.Tensor | None = None
    if mask_BC is not None and mask_BC.dtype != torch.bool and mask_BC.shape[1] > 1:
        found = ((mask_BC == 0) | (mask_BC == mask_BC.amax(1, keepdim=True))).all()
    if position_BS is not None and position_BS.shape[1] > 1:
        rising_BS = position_BS.diff(dim=1) == 1
        if mask_BC is not None:
            token_BS = mask_BC[:, -position_BS.shape[1] :] != 0
            rising_BS = rising_BS | ~(token_BS[:, 1:] & token_BS[:, :-1])
        found = rising_BS.all() if found is None else found & rising_BS.all()
    return found


def check_offsets(
    cu_seqlens: torch.Tensor,
    padded: torch.Tensor | None,
    tokens: int,
    longest: int | None,
    multiple: int = 1,
) -> None:
    """Refuse offsets of packed sequences that do not describe a row of tokens.

    On the host this raises. On a GPU a raised error would need a wait for the device, so an assertion runs there: it
    ends the program with its message, before attention reads outside its tensors.

    Args:
        cu_seqlens: int32 [sequences + 1].
        padded: The start of each sequence in the row, with its padding.
        tokens: The length of the row, over all context ranks.
        longest: The caller's limit of a sequence's length, padding included.
        multiple: Each sequence takes a multiple of this number of places.

    Raises:
        ValueError: The offsets are on the host, and wrong.
    """
    if padded is not None and len(padded) != len(cu_seqlens):
        raise ValueError(
            f"cu_seq_lens_q has {len(cu_seqlens)} entries and does not fit cu_seq_lens_q_padded with {len(padded)}: "
            "both need one for each sequence, and one more."
        )
    name, offsets = ("cu_seq_lens_q", cu_seqlens) if padded is None else ("cu_seq_lens_q_padded", padded)
    lengths = offsets.diff()
    if _decided_on_device(offsets):
        right = (offsets[0] == 0) & (lengths >= 0).all() & (offsets[-1] == tokens)
        if longest is not None:
            right = right & (lengths <= longest).all()
        if padded is not None:
            own = cu_seqlens.diff()
            right = right & (cu_seqlens[0] == 0) & (own >= 0).all() & (own <= lengths).all()
        if multiple > 1:
            right = right & (lengths % multiple == 0).all()
        assert_on_device(
            right,
            f"{name} must rise from 0 to {tokens}, the number of tokens, in steps of at most max_length_q={longest} "
            f"and multiples of {multiple}, and cu_seq_lens_q must fit cu_seq_lens_q_padded.",
        )
        return
    for which, each in (("cu_seq_lens_q", cu_seqlens), (name, offsets)):
        if int(each[0]) != 0 or int(each.diff().min()) < 0:
            raise ValueError(f"{which}={each.tolist()} must be the running sum of lengths from 0.")
    if padded is not None and bool((cu_seqlens.diff() > lengths).any()):
        raise ValueError(
            f"cu_seq_lens_q={cu_seqlens.tolist()} does not fit cu_seq_lens_q_padded={padded.tolist()}: each sequence "
            "must end before the next one's place begins."
        )
    if int(offsets[-1]) != tokens:
        raise ValueError(
            f"{name} ends at {int(offsets[-1])}, but there are {tokens} tokens: every token must belong to a sequence."
        )
    if longest is not None and int(lengths.max()) > longest:
        raise ValueError(
            f"max_length_q={longest}, but the longest sequence takes {int(lengths.max())} places, padding included."
        )
    if bool((lengths % multiple).any()):
        raise ValueError(
            f"sequences of {lengths.tolist()} tokens cannot be shared out over context={multiple // 2} ranks: make "
            f"each a multiple of {multiple} (DataCollatorWithFlattening(pad_sequences_to_be_divisible_by={multiple}))."
        )


def check_beside_offsets(
    mask_1T: torch.Tensor | None,
    position_1T: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    padded: torch.Tensor | None,
    tokens: int,
) -> None:
    """Refuse a mask or positions beside `cu_seq_lens_q` that say something else about the sequences.

    A mask fits if each sequence is tokens of one value, then padding: causal attention hides padding behind the tokens,
    and collators mark their filling so. Positions fit if they go up by one within each sequence. Both may leave out the
    padding between sequences, as the collators of the BioNeMo recipe do.

    Args:
        mask_1T: [1, T], or [1, tokens without padding].
        position_1T: The same.
        cu_seqlens: int32 [sequences + 1].
        padded: The start of each sequence in the row, with its padding.
        tokens: T.

    Raises:
        ValueError: A shape does not fit; or the values do not, and are on the host. On a GPU an assertion fails.
    """
    for name, value_1T in (("attention_mask", mask_1T), ("position_ids", position_1T)):
        if value_1T is None:
            continue
        columns = value_1T.shape[-1]
        whole = columns == tokens
        if value_1T.dim() != 2 or value_1T.shape[0] != 1 or not (whole or padded is not None):
            raise ValueError(
                f"{name} has shape {list(value_1T.shape)} beside cu_seq_lens_q: it must be [1, {tokens}], or be left "
                "out."
            )
        if columns < 2:
            continue
        device = value_1T.device
        offsets = (cu_seqlens if padded is None or not whole else padded).to(device).long()
        begins_T = torch.zeros(columns + 1, dtype=torch.bool, device=device)
        begins_T.scatter_(0, offsets.clamp(0, columns), True)
        value_T = value_1T[0]
        if name == "attention_mask":
            wrong_T = (value_T[1:] != value_T[:-1]) & (value_T[1:] != 0)
        else:
            wrong_T = value_T.diff() != 1
            if padded is not None and whole:
                place_T = torch.arange(columns, device=device)
                row_T = torch.searchsorted(offsets[1:-1].contiguous(), place_T, right=True)
                wrong_T = wrong_T & (place_T - offsets[row_T] < cu_seqlens.to(device).diff()[row_T])[1:]
        right = ~(wrong_T & ~begins_T[1:columns]).any()
        if not whole:
            right = right & (offsets[-1] == columns)
        refuse_unless(
            right,
            f"{name} contradicts cu_seq_lens_q: within a sequence a mask must be tokens and then padding, and "
            "positions must go up by one. Leave it out, since cu_seq_lens_q says all.",
        )


def refuse_unless(right: torch.Tensor, message: str) -> None:
    """Raise a `ValueError` if a bool [] on the host is false; on a GPU an assertion with this message fails.

    The assertion ends the program, and nothing waits for the device. While torch traces the model it becomes a part of
    the graph.
    """
    if _decided_on_device(right):
        assert_on_device(right, message)
    elif not bool(right):
        raise ValueError(message)


def _decided_on_device(tensor: torch.Tensor) -> bool:
    # Other devices, such as Apple's, have no assertions: the host reads their values.
    return tensor.device.type in ("cuda", "meta") or torch.compiler.is_compiling()


def _differs_from_previous(value_M: torch.Tensor) -> torch.Tensor:
    """Return where a value differs from the one before it; the first counts as different."""
    return torch.nn.functional.pad(value_M[1:] != value_M[:-1], (1, 0), value=True)
