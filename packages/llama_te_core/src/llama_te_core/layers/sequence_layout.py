"""The arrangement of one forward pass's tokens for the layers.

A caller passes a padded batch or packed sequences. Layers take one of two arrangements: `"bshd"`, a padded batch whose
rows begin with their tokens, or `"thd"`, all tokens of all sequences in one row. A `SequenceLayout` rearranges tokens
in both directions, and provides the layers' arguments.

A token's position is the number of tokens before it in its sequence. Padding does not count.

With context parallelism a process has its part of each sequence, and `cu_seq_lens_q` and `max_length_q` describe the
whole sequences, as in Transformer Engine.

Shapes: B sequences, S columns of the padded batch, T packed tokens, N tokens as the layers see them, E hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .backend import CACHE_OF_SPLIT_MODEL
from .kv_cache import KVCache
from .packed_rows import (
    SHARED_ROW,
    RowSequences,
    check_beside_offsets,
    check_offsets,
    find_sequences,
    is_one_sequence_a_row,
    refuse_unless,
)


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """The starts and ends of packed sequences, named like transformers' flash-attention arguments.

    Args:
        cu_seq_lens_q: int32 [B + 1], running sum of the sequences' lengths, from 0.
        cu_seq_lens_k: The same for the keys; equal to `cu_seq_lens_q` in self-attention.
        max_length_q: At least the length of the longest sequence with its padding. Without it, `lay_out` reads the
            length from the tensor, and waits for the device.
        max_length_k: Equal to `max_length_q`.
        cu_seq_lens_q_padded: int32 [B + 1], the start of each sequence in the buffer, if sequences have padding.
        cu_seq_lens_k_padded: Equal to `cu_seq_lens_q_padded`.
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
        fields = {name: arguments.pop(name, None) for name in PACKED_ARGUMENTS}
        return None if fields["cu_seq_lens_q"] is None else cls(**fields)


PACKED_ARGUMENTS = tuple(field.name for field in dataclasses.fields(PackedSequences))


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
    pad_between_seqs: bool = False
    # For each token of the layers, its place in the flattened [B * S] input; None: the same place.
    source_N: torch.Tensor | None = None
    # For each place of the flattened input, the index of the layers' token; padding reads any token.
    target: torch.Tensor | None = None

    def arrange(self, input_BSx: torch.Tensor) -> torch.Tensor:
        """Rearrange [B, S, ...] for the layers, to [B, S, ...] or [N, ...]."""
        if self.format == "bshd" and self.source_N is None:
            return input_BSx
        flat = input_BSx.flatten(0, 1)
        if self.source_N is not None:
            flat = flat[self.source_N]
        return flat if self.format == "thd" else flat.unflatten(0, self.shape_BS)

    def restore(self, output: torch.Tensor) -> torch.Tensor:
        """Rearrange the layers' output to [B, S, ...]. Values at padding are unspecified."""
        if self.format == "bshd" and self.target is None:
            return output
        flat = output if self.format == "thd" else output.flatten(0, 1)
        if self.target is not None:
            flat = flat[self.target]
        return flat.unflatten(0, self.shape_BS)

    @property
    def tokens(self) -> int:
        """The number of tokens that the layers see, padding included."""
        return self.shape_BS[0] * self.shape_BS[1] if self.source_N is None else self.source_N.shape[0]

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
            "pad_between_seqs": self.pad_between_seqs if self.format == "thd" else None,
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
    context_ranks: int = 1,
) -> SequenceLayout:
    """Choose the arrangement of a batch for the layers.

    Args:
        input_BS: Token ids [B, S], or embeddings [B, S, E]; with `packed`, B = 1.
        attn_input_format: The arrangement that the layers take, "thd" or "bshd".
        self_attn_mask_type: "padding_causal" or "causal", for "bshd".
        attention_mask: [B, S], nonzero for tokens; with a cache also [B, columns seen + S]. Values may number the
            samples of a packed row: 1 for the tokens of the first, 2 for the second, and so on. With `packed` it must
            fit the sequences (see `check_beside_offsets`) and has no other effect. With context ranks and `packed` this
            function ignores it: the collators of the BioNeMo recipe leave the mask of the whole batch there, and the
            sequences are known.
        position_ids: [B, S] or [1, S]. Positions follow from the mask or the sequences, and must fit them. A row holds
            several sequences if its positions restart at 0. With context ranks and `packed` this function ignores them,
            as it does a mask.
        packed: The packed sequences.
        cache: The cache of this pass.
        token_multiple: Where this function packs, it pads the number of tokens to a multiple of this.
        context_ranks: The number of processes that share the tokens of each sequence.

    Returns:
        The layout. A cache's step has begun.

    Raises:
        ValueError: The arguments do not fit together. Where only values on a GPU tell, and nothing reads them anyway,
            an assertion on the GPU fails instead (see `check_offsets`).
    """
    rows, width = input_BS.shape[:2]
    if cache is not None and context_ranks > 1:
        raise ValueError(CACHE_OF_SPLIT_MODEL)
    if packed is not None:
        if attn_input_format != "thd":
            raise ValueError(
                f"cu_seq_lens_q is given, but attn_input_format={attn_input_format!r}: packed sequences need 'thd'."
            )
        if cache is not None:
            raise ValueError("cu_seq_lens_q and past_key_values are given: packed sequences take no cache.")
        if context_ranks > 1:
            attention_mask = position_ids = None
        return _packed_by_caller(input_BS, packed, attention_mask, position_ids, context_ranks)
    if attention_mask is not None:
        check_mask(attention_mask, rows, width, cache)
        attention_mask = attention_mask.to(input_BS.device)
    position_ids = _check_shape(position_ids, rows, width)
    if context_ranks > 1:
        _check_part(attention_mask, position_ids, context_ranks)
        attention_mask = None
    tracing = torch.compiler.is_compiling()
    if cache is None and attn_input_format == "thd" and not tracing:
        found = None
        if attention_mask is not None or position_ids is not None:
            found = find_sequences(attention_mask, position_ids, rows, width, input_BS.device)
        return _packed_here(input_BS, found, token_multiple, context_ranks)

    # Each row is one sequence from here on.
    if width > 1 or tracing:  # a step of generation has nothing to compare, and must not wait for the device
        alone = is_one_sequence_a_row(attention_mask, position_ids)
        if alone is not None and cache is not None and not tracing:
            # A prompt: the cache reads its mask on the host too, so waiting costs little.
            alone = alone.cpu()
        if alone is not None:
            refuse_unless(alone, SHARED_ROW)
    lengths: list[int] | None = None
    if cache is not None:
        lengths = cache.begin_step(attention_mask, rows, width)
        if sum(lengths) == rows * width:
            attention_mask = None
        elif sum(lengths) == 0:
            raise ValueError(f"attention_mask leaves no token in the {width} new columns: there is nothing to compute.")
    mask_BS = None if attention_mask is None else attention_mask[:, -width:].bool()
    longest = width * context_ranks if cache is None else cache.longest()
    if attn_input_format == "thd":
        tokens = None if lengths is None else sum(lengths)
        return _packed_rows(input_BS, mask_BS, tokens, longest, token_multiple, cache, context_ranks)
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


def _check_shape(position_ids: torch.Tensor | None, rows: int, width: int) -> torch.Tensor | None:
    """Return positions as [B, S] or [1, S]."""
    if position_ids is None:
        return None
    position_BS = position_ids[None] if position_ids.dim() == 1 else position_ids
    if position_BS.dim() != 2 or position_BS.shape[0] not in (1, rows) or position_BS.shape[1] != width:
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}: it must be [{rows}, {width}] or [1, {width}], or be "
            "left out."
        )
    return position_BS


def _check_part(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, context_ranks: int) -> None:
    """Refuse arguments that describe sequences of which this process has a part alone."""
    if position_ids is not None:
        raise ValueError(
            f"position_ids are given on {context_ranks} context ranks, each of which has two pieces of every sequence: "
            "positions follow from the pieces. Leave them out, or pass cu_seq_lens_q for packed sequences."
        )
    if attention_mask is not None:
        refuse_unless(
            (attention_mask != 0).all(),
            f"attention_mask has padding on {context_ranks} context ranks, each of which has two pieces of every row: "
            "split the batch by llama_te_core.parallel.context.shard_context, which puts padding behind the tokens.",
        )


def _packed_by_caller(
    input_1T: torch.Tensor,
    packed: PackedSequences,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    context_ranks: int,
) -> SequenceLayout:
    tokens, device = input_1T.shape[1], input_1T.device
    if input_1T.shape[0] != 1:
        raise ValueError(f"packed sequences come as one row [1, T], but the input is {list(input_1T.shape)}.")
    cu_seqlens, padded, longest = _host_checks(packed)
    if cu_seqlens.device.type != "cpu" and longest is None:
        # Attention needs the longest length on the host. Not given, so wait for the device once, and read the rest too.
        cu_seqlens = cu_seqlens.cpu()
        padded = None if padded is None else padded.cpu()
    check_offsets(cu_seqlens, padded, tokens * context_ranks, longest, 2 * context_ranks if context_ranks > 1 else 1)
    for each, keys in ((packed.cu_seq_lens_q, packed.cu_seq_lens_k), (padded, packed.cu_seq_lens_k_padded)):
        if each is not None and keys is not None and keys is not each:
            same = (keys == each.to(keys.device)).all()
            refuse_unless(
                same, "cu_seq_lens_q and cu_seq_lens_k differ: in self-attention both are the same sequences."
            )
    if position_ids is not None and position_ids.dim() == 1:
        position_ids = position_ids[None]
    check_beside_offsets(attention_mask, position_ids, cu_seqlens, padded, tokens)
    offsets = cu_seqlens if padded is None else padded
    longest = int(offsets.diff().max()) if longest is None else longest
    cu_seqlens, offsets = cu_seqlens.to(device), offsets.to(device)
    if context_ranks > 1:
        # Padding counts as the end of its sequence, where causality hides it: this fits every exchange of TE.
        cu_seqlens, padded = offsets, None
    return SequenceLayout(
        shape_BS=(1, tokens),
        format="thd",
        mask_type="padding_causal",
        longest=longest,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=offsets if padded is not None or context_ranks > 1 else None,
        max_seqlen=longest,
        pad_between_seqs=padded is not None,
    )


def _host_checks(packed: PackedSequences) -> tuple[torch.Tensor, torch.Tensor | None, int | None]:
    """Check without reading tensors; return `cu_seq_lens_q`, the padded offsets if any, and the longest length."""
    cu_seqlens, padded = packed.cu_seq_lens_q, packed.cu_seq_lens_q_padded
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens_q_padded", "cu_seq_lens_k_padded"):
        tensor = getattr(packed, name)
        if tensor is not None and (tensor.dim() != 1 or tensor.dtype != torch.int32 or len(tensor) < 2):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: it must be int32 [sequences + 1], "
                "the running sum of lengths from 0."
            )
    if packed.cu_seq_lens_k is not None and len(packed.cu_seq_lens_k) != len(cu_seqlens):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: in self-attention both are the same sequences.")
    if packed.cu_seq_lens_k_padded is not None and (padded is None or len(packed.cu_seq_lens_k_padded) != len(padded)):
        raise ValueError(
            "cu_seq_lens_k_padded is given, and cu_seq_lens_q_padded differs or is missing: in self-attention both are "
            "the same sequences."
        )
    if packed.pad_between_seqs is False:
        padded = None
    longest = packed.max_length_k if packed.max_length_q is None else packed.max_length_q
    if longest is not None and packed.max_length_k is not None and int(packed.max_length_k) != int(longest):
        raise ValueError(
            f"max_length_q={packed.max_length_q} and max_length_k={packed.max_length_k} differ: in self-attention both "
            "are the same sequences."
        )
    return cu_seqlens, padded, None if longest is None else int(longest)


def _packed_here(
    input_BS: torch.Tensor, found: RowSequences | None, token_multiple: int, context_ranks: int
) -> SequenceLayout:
    """Pack a batch without a cache. Without `found`, every place is a token and each row one sequence."""
    rows, width = input_BS.shape[:2]
    if found is None:
        return _packed_rows(input_BS, None, rows * width, width * context_ranks, token_multiple, None, context_ranks)
    # Frequencies of some rope types depend on the longest sequence. Where each row has one, this is the row's width,
    # as in transformers.
    longest = found.longest if found.share_rows else width
    return _fill_up(
        SequenceLayout(
            shape_BS=(rows, width),
            format="thd",
            mask_type="padding_causal",
            longest=longest,
            cu_seqlens=found.cu_seqlens,
            max_seqlen=longest,
            source_N=found.source_N,
            target=found.target_M,
        ),
        token_multiple,
        separate=True,
    )


def _packed_rows(
    input_BS: torch.Tensor,
    mask_BS: torch.Tensor | None,
    tokens: int | None,
    longest: int,
    token_multiple: int,
    cache: KVCache | None,
    context_ranks: int = 1,
) -> SequenceLayout:
    """Pack a batch in which each row is one sequence, a row without tokens too."""
    rows, width = input_BS.shape[:2]
    device = input_BS.device
    whole = width * context_ranks
    source_N = target = None
    if mask_BS is None:
        cu_seqlens = torch.arange(0, (rows + 1) * whole, whole, dtype=torch.int32, device=device)
    else:
        mask_N = mask_BS.flatten()
        target = (mask_N.cumsum(0) - 1).clamp_(min=0)
        if tokens is None:
            source_N = mask_N.nonzero().flatten()
        else:
            source_N = target.new_empty(tokens + 1)  # padding goes after the tokens
            source_N.scatter_(0, target.where(mask_N, tokens), torch.arange(rows * width, device=device))
            source_N = source_N[:tokens]
        cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = mask_BS.sum(1).cumsum(0)
    layout = SequenceLayout(
        shape_BS=(rows, width),
        format="thd",
        mask_type="padding_causal",
        longest=longest,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=cu_seqlens if context_ranks > 1 else None,
        max_seqlen=whole,
        source_N=source_N,
        target=target,
    )
    # A cache has no row for the fill tokens, and ignores tokens after the last row.
    return _fill_up(layout, token_multiple, separate=cache is None, context_ranks=context_ranks)


def _fill_up(layout: SequenceLayout, token_multiple: int, *, separate: bool, context_ranks: int = 1) -> SequenceLayout:
    """Pad packed tokens to a multiple, and to at least one, so that a batch of padding alone runs like any other.

    Args:
        layout: Of packed tokens.
        token_multiple: The multiple.
        separate: Make the fill tokens a sequence of their own, so that their outputs stay finite and reach no other
            token.
        context_ranks: The number of processes that share each sequence.
    """
    missing = -layout.tokens % token_multiple if layout.tokens else token_multiple
    cu_seqlens, max_seqlen = layout.cu_seqlens, layout.max_seqlen
    if not missing:
        return layout
    assert cu_seqlens is not None and max_seqlen is not None
    source_N, target = layout.source_N, layout.target
    if source_N is None:
        source_N = torch.arange(layout.tokens, device=cu_seqlens.device)
        target = source_N
    longest = layout.longest
    if separate:
        whole = missing * context_ranks
        cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + whole))
        longest, max_seqlen = max(longest, whole), max(max_seqlen, whole)
    return dataclasses.replace(
        layout,
        source_N=torch.cat((source_N, source_N.new_zeros(missing))),
        target=target,
        longest=longest,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=None if layout.cu_seqlens_padded is None else cu_seqlens,
        max_seqlen=max_seqlen,
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
