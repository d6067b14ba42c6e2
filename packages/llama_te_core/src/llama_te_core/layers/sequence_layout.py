"""The arrangement of one forward pass's tokens for the layers.

A caller passes a padded batch or packed sequences. Layers take one of two arrangements: `"bshd"`, a padded batch whose
rows begin with their tokens, or `"thd"`, all tokens of all sequences in one row. A `SequenceLayout` rearranges tokens
in both directions, and provides the layers' arguments.

A token's position is the number of tokens before it in its sequence. Padding does not count.

Shapes: B sequences, S columns of the padded batch, T packed tokens, N tokens as the layers see them, E hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """The starts and ends of packed sequences, named like transformers' flash-attention arguments.

    Args:
        cu_seq_lens_q: int32 [B + 1], running sum of the sequences' lengths, from 0.
        cu_seq_lens_k: The same for the keys; equal to `cu_seq_lens_q` in self-attention.
        max_length_q: At least the length of the longest sequence with its padding. Without it, `lay_out` reads the
            length from the tensor, and waits for the device.
        max_length_k: The same for the keys.
        cu_seq_lens_q_padded: int32 [B + 1], the start of each sequence in the buffer, if sequences have padding.
        cu_seq_lens_k_padded: The same for the keys.
        pad_between_seqs: Whether sequences have padding; follows from the tensors if not given.
    """

    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None
    cu_seq_lens_q_padded: torch.Tensor | None = None
    cu_seq_lens_k_padded: torch.Tensor | None = None
    pad_between_seqs: bool | None = None

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> PackedSequences | None:
        """Remove this class's fields from keyword arguments; return `None` without `cu_seq_lens_q`."""
        fields = {field.name: arguments.pop(field.name, None) for field in dataclasses.fields(cls)}
        return None if fields["cu_seq_lens_q"] is None else cls(**fields)


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """The arrangement of one forward pass. Make one with `lay_out`."""

    shape_BS: tuple[int, int]
    format: str
    mask_type: str
    longest: int
    cu_seqlens: torch.Tensor | None = None
    cu_seqlens_padded: torch.Tensor | None = None
    max_seqlen: int | None = None
    # For each token of the layers, its place in the flattened [B * S] input; None: the same place.
    source_N: torch.Tensor | None = None
    # For each place of the flattened input, the index of the layers' token; padding reads any token.
    target: torch.Tensor | None = None

    def arrange(self, input_BSx: torch.Tensor) -> torch.Tensor:
        """Rearrange [B, S, ...] for the layers, to [B, S, ...] or [N, ...]."""
        flat = input_BSx.flatten(0, 1)
        if self.source_N is not None:
            flat = flat[self.source_N]
        return flat if self.format == "thd" else flat.unflatten(0, self.shape_BS)

    def restore(self, output: torch.Tensor) -> torch.Tensor:
        """Rearrange the layers' output to [B, S, ...]. Values at padding are unspecified."""
        flat = output if self.format == "thd" else output.flatten(0, 1)
        if self.target is not None:
            flat = flat[self.target]
        return flat.unflatten(0, self.shape_BS)

    @property
    def tokens(self) -> int:
        """The number of tokens that the layers see, padding included."""
        return self.shape_BS[0] * self.shape_BS[1] if self.source_N is None else len(self.source_N)

    def layer_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `te.TransformerLayer.forward` for this arrangement."""
        return {
            "attention_mask": None,
            "self_attn_mask_type": self.mask_type,
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_kv": self.cu_seqlens,
            "cu_seqlens_q_padded": self.cu_seqlens_padded,
            "cu_seqlens_kv_padded": self.cu_seqlens_padded,
            "max_seqlen_q": self.max_seqlen,
            "max_seqlen_kv": self.max_seqlen,
            "pad_between_seqs": self.cu_seqlens_padded is not None if self.format == "thd" else None,
        }


def lay_out(
    input_BS: torch.Tensor,
    *,
    attn_input_format: str,
    self_attn_mask_type: str,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    packed: PackedSequences | None = None,
    cache: KVCache | None = None,
    token_multiple: int = 1,
) -> SequenceLayout:
    """Choose the arrangement of a batch for the layers.

    Args:
        input_BS: Token ids [B, S], or embeddings [B, S, E]; packed sequences have B = 1.
        attn_input_format: The arrangement that the layers take, "thd" or "bshd".
        self_attn_mask_type: "padding_causal" or "causal", for "bshd".
        attention_mask: [B, S], nonzero for tokens; with a cache also [B, columns seen + S].
        position_ids: [B, S] or [1, S]. Positions follow from the mask or the sequences. This function checks given
            positions against the mask (on the CPU, where reading costs nothing). For packed tokens without `packed`, a
            new sequence begins at each 0. With `packed`, positions are ignored.
        packed: The packed sequences.
        cache: The cache of this pass.
        token_multiple: Where this function packs, it pads the number of tokens to a multiple of this.

    Returns:
        The layout. A cache's step has begun.

    Raises:
        ValueError: The arguments do not fit together.
    """
    rows, width = input_BS.shape[:2]
    if attention_mask is not None:
        check_mask(attention_mask, rows, width, cache)
    if packed is not None:
        if attn_input_format != "thd":
            raise ValueError(
                f"cu_seq_lens_q is given, but attn_input_format={attn_input_format!r}: packed sequences need 'thd'."
            )
        if cache is not None or attention_mask is not None:
            other = "past_key_values" if cache is not None else "attention_mask"
            raise ValueError(f"cu_seq_lens_q and {other} are given: packed sequences take neither mask nor cache.")
        return _packed_by_caller(input_BS, packed)
    if cache is None and attention_mask is None and attn_input_format == "thd" and rows == 1:
        starts = _sequence_starts(position_ids)
        if starts is not None:
            assert position_ids is not None
            if position_ids.device.type == "cpu":
                _check_positions(position_ids, None, width, restarts=True)
            return _packed_by_caller(input_BS, PackedSequences(starts))

    lengths: list[int] | None = None
    if cache is not None:
        lengths = cache.begin_step(attention_mask, rows, width)
        if sum(lengths) == rows * width:
            attention_mask = None
        elif sum(lengths) == 0:
            raise ValueError(f"attention_mask leaves no token in the {width} new columns: there is nothing to compute.")
    mask_BS = None if attention_mask is None else attention_mask[:, -width:].to(input_BS.device).bool()
    if position_ids is not None and position_ids.device.type == "cpu":
        _check_positions(position_ids, mask_BS, width)
    longest = width if cache is None else cache.longest()
    if attn_input_format == "thd":
        tokens = None if lengths is None else sum(lengths)
        return _packed_here(input_BS, mask_BS, tokens, longest, token_multiple, cache)
    return _tokens_first(input_BS, mask_BS, longest, self_attn_mask_type, cache)


def check_mask(attention_mask: torch.Tensor, rows: int, width: int, cache: KVCache | None) -> None:
    """Refuse a mask that does not fit a batch of [rows, width].

    Raises:
        ValueError: The mask has another shape.
    """
    shape = list(attention_mask.shape)
    allowed = attention_mask.dim() == 2 and shape[0] == rows
    allowed = allowed and (shape[1] == width or (cache is not None and shape[1] > width))
    if not allowed:
        columns = f"{width}" if cache is None else f"{width}, or the cached columns and {width}"
        raise ValueError(
            f"attention_mask has shape {shape}: it must be [{rows}, {columns}], nonzero for tokens and 0 for padding "
            "(4D masks are not supported)."
        )


def _packed_by_caller(input_1T: torch.Tensor, packed: PackedSequences) -> SequenceLayout:
    tokens = input_1T.shape[1]
    cu_seqlens, padded = packed.cu_seq_lens_q, packed.cu_seq_lens_q_padded
    if input_1T.shape[0] != 1:
        raise ValueError(f"packed sequences come as one row [1, T], but the input is {list(input_1T.shape)}.")
    for name, tensor in (("cu_seq_lens_q", cu_seqlens), ("cu_seq_lens_q_padded", padded)):
        if tensor is not None and (tensor.dim() != 1 or tensor.dtype != torch.int32 or len(tensor) < 2):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: it must be int32 [sequences + 1], "
                "the running sum of lengths from 0."
            )
    if padded is not None and packed.pad_between_seqs is False:
        padded = None
    offsets = cu_seqlens if padded is None else padded
    # Reading costs nothing on the host. On a GPU it would wait, so a wrong sum goes unnoticed there.
    if offsets.device.type == "cpu":
        _check_offsets(cu_seqlens, padded, tokens, packed.max_length_q)
        if packed.cu_seq_lens_k is not None and not torch.equal(cu_seqlens, packed.cu_seq_lens_k):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: in self-attention both are the same sequences.")
    longest = packed.max_length_q
    if longest is None:
        longest = int(offsets.diff().max())  # not given, so wait for the device once
    device = input_1T.device
    return SequenceLayout(
        shape_BS=(1, tokens),
        format="thd",
        mask_type="padding_causal",
        longest=int(longest),
        cu_seqlens=cu_seqlens.to(device),
        cu_seqlens_padded=None if padded is None else padded.to(device),
        max_seqlen=int(longest),
    )


def _check_offsets(cu_seqlens: torch.Tensor, padded: torch.Tensor | None, tokens: int, max_length: int | None) -> None:
    name, offsets = ("cu_seq_lens_q", cu_seqlens) if padded is None else ("cu_seq_lens_q_padded", padded)
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(lengths.min()) < 0:
        raise ValueError(f"{name}={offsets.tolist()} must be the running sum of lengths from 0.")
    if padded is not None and (len(padded) != len(cu_seqlens) or bool((cu_seqlens.diff() > lengths).any())):
        raise ValueError(
            f"cu_seq_lens_q={cu_seqlens.tolist()} does not fit cu_seq_lens_q_padded={padded.tolist()}: each sequence "
            "must end before the next one's place begins."
        )
    if int(offsets[-1]) != tokens:
        raise ValueError(
            f"{name} ends at {int(offsets[-1])}, but there are {tokens} tokens: every token must belong to a sequence."
        )
    if max_length is not None and int(lengths.max()) > max_length:
        raise ValueError(
            f"max_length_q={max_length}, but the longest sequence takes {int(lengths.max())} places, padding included."
        )


def _packed_here(
    input_BS: torch.Tensor,
    mask_BS: torch.Tensor | None,
    tokens: int | None,
    longest: int,
    token_multiple: int,
    cache: KVCache | None,
) -> SequenceLayout:
    rows, width = input_BS.shape[:2]
    device = input_BS.device
    if mask_BS is None:
        source_N = target = None
        cu_seqlens = torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=device)
        tokens = rows * width
    else:
        mask_N = mask_BS.flatten()
        target = (mask_N.cumsum(0) - 1).clamp_(min=0)
        if tokens is None:
            # Every shape from here on depends on the number of tokens. Without a cache's count, packing waits for the
            # device here, and only here.
            source_N = mask_N.nonzero().flatten()
            tokens = len(source_N)
        else:
            source_N = target.new_empty(tokens + 1)  # padding goes after the tokens
            source_N.scatter_(0, target.where(mask_N, tokens), torch.arange(rows * width, device=device))
            source_N = source_N[:tokens]
        cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = mask_BS.sum(1).cumsum(0)
    # Keep at least one token, so that a batch of padding alone runs like any other.
    missing = -tokens % token_multiple if tokens else token_multiple
    if missing:
        if source_N is None:
            source_N = target = torch.arange(tokens, device=device)
        source_N = torch.cat((source_N, source_N.new_zeros(missing)))
        # The fill tokens are a sequence of their own, so their outputs stay finite and reach no other token. A cache
        # has no row for them, and ignores tokens after the last row.
        if cache is None:
            cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + missing))
    return SequenceLayout(
        shape_BS=(rows, width),
        format="thd",
        mask_type="padding_causal",
        longest=max(longest, missing) if cache is None else longest,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(width, missing) if cache is None else width,
        source_N=source_N,
        target=target,
    )


def _tokens_first(
    input_BS: torch.Tensor, mask_BS: torch.Tensor | None, longest: int, mask_type: str, cache: KVCache | None
) -> SequenceLayout:
    rows, width = input_BS.shape[:2]
    if mask_BS is None:
        if cache is None:
            return SequenceLayout((rows, width), "bshd", "causal", longest)
        cu_seqlens = torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=input_BS.device)
        return SequenceLayout((rows, width), "bshd", "padding_causal", longest, cu_seqlens, max_seqlen=width)
    row_B1 = torch.arange(rows, device=input_BS.device)[:, None] * width
    order_BS = torch.argsort(~mask_BS, dim=1, stable=True)
    place_BS = torch.argsort(order_BS, dim=1)
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=input_BS.device)
    cu_seqlens[1:] = mask_BS.sum(1).cumsum(0)
    padded = mask_type == "padding_causal" or cache is not None
    return SequenceLayout(
        shape_BS=(rows, width),
        format="bshd",
        mask_type="padding_causal" if padded else "causal",
        longest=longest,
        cu_seqlens=cu_seqlens if padded else None,
        max_seqlen=width,
        source_N=(row_B1 + order_BS).flatten(),
        target=(row_B1 + place_BS).flatten(),
    )


def _sequence_starts(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Return the cu_seqlens of packed tokens from positions [1, T] that restart at 0, or `None`."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    position_T = position_ids[0]
    # This search waits for the device. Callers that pass cu_seq_lens_q avoid it.
    start_T = position_T == 0
    start_T[0] = True
    begins = start_T.nonzero().flatten()
    if len(begins) < 2:
        return None
    end = begins.new_tensor([position_T.shape[0]])
    return torch.cat((begins, end)).to(torch.int32)


def _check_positions(
    position_ids: torch.Tensor, mask_BS: torch.Tensor | None, width: int, restarts: bool = False
) -> None:
    """Refuse positions that do not rise by one within a row. Attention does not depend on the first position."""
    if position_ids.shape[-1] != width or width < 2:
        return
    step_BS = position_ids.diff(dim=-1)
    wrong_BS = step_BS != 1
    if mask_BS is not None:
        wrong_BS = wrong_BS & mask_BS[:, 1:] & mask_BS[:, :-1]
    if restarts:
        wrong_BS = wrong_BS & (position_ids[:, 1:] != 0)
    if bool(wrong_BS.any()):
        raise ValueError(
            "position_ids do not go up by one from token to token: positions follow from attention_mask or "
            "cu_seq_lens_q here, so leave position_ids out, or pack the sequences."
        )


def token_places(offsets: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each packed token's sequence and its place there, each [tokens], from the sequences' offsets [B + 1].

    Tokens behind the last sequence count as its continuation.
    """
    token_T = torch.arange(tokens, device=offsets.device)
    row_T = torch.searchsorted(offsets[1:-1], token_T, right=True)
    return row_T, token_T - offsets[row_T]


def whole_places(place: torch.Tensor, length: torch.Tensor | int, rank: int, ranks: int) -> torch.Tensor:
    """Convert tokens' places in a context rank's part of a sequence into places in the whole sequence.

    Context ranks cut a sequence into 2 x `ranks` equal chunks, and rank i has the i-th chunk from either end. Late
    tokens attend to many keys and early tokens to few, so this gives all ranks the same work. Transformer Engine uses
    the same order.

    Args:
        place: Integers of any shape, the tokens' places in the rank's part.
        length: Length of the rank's part, even; broadcasts with `place`.
        rank: The rank, from 0.
        ranks: The number of ranks; with one, nothing changes.

    Returns:
        The places in the whole sequence, shaped as the arguments broadcast.
    """
    chunk = length // 2
    return place + chunk * torch.where(place < chunk, rank, 2 * (ranks - 1) - rank)
