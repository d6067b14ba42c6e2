"""Key/value caches with the interface of Transformer Engine's `InferenceParams`, in plain PyTorch, on any device.

`InferenceParams` keeps the books (which sequence has how many tokens, and in which row), a cache manager keeps the
keys and values. The same objects serve Transformer Engine's layers, the reference layers and transformers' `generate`.

Unlike TE 2.20's own class, a running sequence advances by the tokens it is given, not by one.

Shapes: B rows of the batch, S new columns, T new tokens, L keys per row, K key/value heads, D size of a head, P pages
per row, N tokens of a page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from llama_te_core.reference_layer import split_qkv
from llama_te_core.rope import rotate

from . import operators


class CacheManager(Protocol):
    """Where keys and values live."""

    cache: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors of a layer."""
        ...

    def reset(self) -> None:
        """Forget all sequences."""
        ...

    def assign_rows(self, source_rows: list[int | None], lengths: list[int]) -> None:
        """Give the rows of the next step room for `lengths` tokens each; row i goes on as `source_rows[i]` did."""
        ...

    def slots(self, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Where tokens go in the flattened memory of a layer, from their rows and places there."""
        ...

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [B, L, K, D] with L ≥ `keys`."""
        ...

    def reorder(self, source_rows: torch.Tensor, lengths: list[int]) -> None:
        """Row i becomes what row `source_rows[i]` was, for all layers; both have `lengths[i]` tokens."""
        ...


def _allocate(
    shape: tuple[int, ...], head_dim_v: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Zeros, not empty: attention multiplies what stands behind a row's tokens by 0, which keeps a NaN one.
    return (
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros((*shape[:-1], head_dim_v), dtype=dtype, device=device),
    )


class NonPagedKVCacheManager:
    """One row of `max_seqlen` tokens per sequence."""

    def __init__(
        self,
        max_batch_size: int,
        max_seqlen: int,
        num_heads: int,
        head_dim_k: int,
        dtype: torch.dtype,
        head_dim_v: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.max_batch_size, self.max_seqlen = max_batch_size, max_seqlen
        self.num_heads, self.head_dim_k = num_heads, head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.dtype = dtype
        self.device = device if device is not None else _default_device()
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors [max_batch_size, max_seqlen, K, D] of a layer."""
        shape = (self.max_batch_size, self.max_seqlen, self.num_heads, self.head_dim_k)
        self.cache[layer_number] = _allocate(shape, self.head_dim_v, self.dtype, self.device)

    def reset(self) -> None:
        """Forget all sequences: a row is overwritten from its start."""

    def assign_rows(self, source_rows: list[int | None], lengths: list[int]) -> None:
        """Move the rows that go on to their new place."""
        kept = [(row, source) for row, source in enumerate(source_rows) if source is not None]
        if any(row != source for row, source in kept):
            to, source = (torch.tensor(rows, device=self.device) for rows in zip(*kept, strict=True))
            for tensors in self.cache.values():
                for tensor in tensors:
                    tensor[to] = tensor[source]

    def slots(self, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Row times its size plus place."""
        return row_T * self.max_seqlen + place_T

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A view of the first `keys` tokens of each row."""
        key_BLKD, value_BLKD = self.cache[layer_number]
        return key_BLKD[:batch_size, :keys], value_BLKD[:batch_size, :keys]

    def reorder(self, source_rows: torch.Tensor, lengths: list[int]) -> None:
        """Copy rows, as far as they are filled; with the compiled operator in place, without a second copy."""
        rows, keys = len(lengths), max(lengths)
        caches = [tensor for tensors in self.cache.values() for tensor in tensors]
        if caches and operators.available(self.device.type) and operators.takes_reorder(caches, rows):
            operators.reorder_rows(caches, source_rows, torch.tensor(lengths, dtype=torch.int32).to(self.device))
            return
        for tensor in caches:
            tensor[:rows, :keys] = tensor[:rows, :keys].index_select(0, source_rows)


class PagedKVCacheManager:
    """Rows are lists of pages of `page_size` tokens each, taken from a common pool when they are needed."""

    def __init__(
        self,
        total_num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim_k: int,
        dtype: torch.dtype,
        max_batch_size: int,
        max_seqlen: int,
        head_dim_v: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.total_num_pages, self.page_size = total_num_pages, page_size
        self.num_heads, self.head_dim_k = num_heads, head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.dtype = dtype
        self.max_batch_size, self.max_seqlen = max_batch_size, max_seqlen
        self.max_pages_per_seq = max_seqlen // page_size
        self.device = device if device is not None else _default_device()
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Pages of each row by id, and the same as a tensor for the kernels; unused entries name page 0.
        self.pages: list[list[int]] = []
        self.page_table = torch.zeros(max_batch_size, self.max_pages_per_seq, dtype=torch.int32, device=self.device)
        self.free_pages = list(range(total_num_pages))

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors [total_num_pages, page_size, K, D] of a layer."""
        shape = (self.total_num_pages, self.page_size, self.num_heads, self.head_dim_k)
        self.cache[layer_number] = _allocate(shape, self.head_dim_v, self.dtype, self.device)

    def reset(self) -> None:
        """Return all pages to the pool."""
        self.pages = []
        self.free_pages = list(range(self.total_num_pages))
        self.page_table.zero_()

    def assign_rows(self, source_rows: list[int | None], lengths: list[int]) -> None:
        """Free the pages of rows that end or were cut, and take what the others need.

        Raises:
            ValueError: The pool has too few pages left; nothing has changed then.
        """
        wanted = [-(-length // self.page_size) for length in lengths]
        pages = [
            [] if source is None else self.pages[source][:count]  # less than before for a row that was cut
            for source, count in zip(source_rows, wanted, strict=True)
        ]
        kept = {page for row in pages for page in row}
        free = self.free_pages + [page for row in self.pages for page in row if page not in kept]
        missing = sum(wanted) - len(kept)
        if missing > len(free):
            raise ValueError(
                f"the cache's {self.total_num_pages} pages of {self.page_size} tokens are not enough: {missing} more "
                f"are needed for rows of {lengths} tokens, and {len(free)} are free."
            )
        changed = False
        taken = 0
        for row, count in enumerate(wanted):
            more = count - len(pages[row])
            pages[row] += free[taken : taken + more]
            taken += more
            changed = changed or row >= len(self.pages) or pages[row] != self.pages[row]
        self.free_pages = free[taken:]
        if changed or len(pages) != len(self.pages):
            table = [row + [0] * (self.max_pages_per_seq - len(row)) for row in pages]
            self.page_table[: len(pages)].copy_(torch.tensor(table, dtype=torch.int32))
        self.pages = pages

    def slots(self, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Page times its size plus place in the page."""
        page_T = self.page_table[row_T, place_T // self.page_size].long()
        return page_T * self.page_size + place_T % self.page_size

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the pages of each row, one behind the other."""
        table_BP = self.page_table[:batch_size, : -(-keys // self.page_size)].long()
        key_BLKD, value_BLKD = (tensor[table_BP].flatten(1, 2) for tensor in self.cache[layer_number])
        return key_BLKD, value_BLKD

    def reorder(self, source_rows: torch.Tensor, lengths: list[int]) -> None:
        """Copy the pages of rows."""
        counts = [-(-length // self.page_size) for length in lengths]
        most = max(counts)
        to_BP = self.page_table[: len(lengths), :most].long()
        if min(counts) < most:
            # Behind the pages of a short row the table names page 0, which is somebody's: leave these entries out.
            used_BP = torch.arange(most, device=self.device) < torch.tensor(counts, device=self.device)[:, None]
            to_P, source_P = to_BP[used_BP], to_BP[source_rows][used_BP]
        else:
            to_P, source_P = to_BP.flatten(), to_BP[source_rows].flatten()
        for tensors in self.cache.values():
            for tensor in tensors:
                tensor[to_P] = tensor[source_P]


class InferenceParams:
    """Key/value cache with the constructor and methods of Transformer Engine's class.

    Args:
        max_batch_size: Rows; with beam search, sequences times beams.
        max_sequence_length: Tokens of a row, prompt included.
        num_heads_kv: Key/value heads of a layer.
        head_dim_k: Size of a key head.
        dtype: Of the keys and values.
        head_dim_v: Size of a value head; that of a key head by default.
        is_paged: Whether rows are made of pages.
        total_num_pages: Pages of all rows: `max_batch_size * max_sequence_length / page_size`, as TE demands.
        page_size: Tokens of a page; must divide `max_sequence_length`.
        max_ctx_len: Most new tokens of a row in one step; needed for "thd".
        qkv_format: "bshd" or "thd", the format that the first step comes in.
        device: Where keys and values are kept; the current GPU by default, the CPU where there is none.

    Raises:
        ValueError: The arguments do not fit together.
    """

    is_compileable = False
    is_croppable = True
    layers: tuple[()] = ()  # transformers looks here for layers that record their past; there is nothing to record

    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        num_heads_kv: int | None = None,
        head_dim_k: int | None = None,
        dtype: torch.dtype | None = None,
        head_dim_v: int | None = None,
        is_paged: bool = False,
        total_num_pages: int | None = None,
        page_size: int | None = None,
        max_ctx_len: int | None = None,
        qkv_format: str = "bshd",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("num_heads_kv", num_heads_kv), ("head_dim_k", head_dim_k), ("dtype", dtype)):
            if value is None:
                raise ValueError(f"{name} is missing: take it from the model, or use inference_params_for(model, ...).")
        assert num_heads_kv is not None and head_dim_k is not None and dtype is not None
        if qkv_format not in ("bshd", "thd"):
            raise ValueError(f"qkv_format={qkv_format!r} is not known: use 'bshd' or 'thd'.")
        if qkv_format == "thd" and max_ctx_len is None:
            raise ValueError("max_ctx_len is missing: qkv_format='thd' needs the most new tokens of a row in one step.")
        self.max_batch_size = max_batch_size
        self.max_sequence_length = max_sequence_length
        self.num_heads_kv = num_heads_kv
        self.head_dim_k = head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.dtype = dtype
        self.is_paged = is_paged
        self.max_ctx_len = max_sequence_length if max_ctx_len is None else max_ctx_len
        self.qkv_format = qkv_format
        self.device = torch.device(device) if device is not None else _default_device()
        shared: dict[str, Any] = {
            "max_batch_size": max_batch_size,
            "max_seqlen": max_sequence_length,
            "num_heads": num_heads_kv,
            "head_dim_k": head_dim_k,
            "head_dim_v": self.head_dim_v,
            "dtype": dtype,
            "device": self.device,
        }
        if is_paged:
            self.total_num_pages, self.page_size = _check_pages(
                max_batch_size, max_sequence_length, total_num_pages, page_size
            )
            shared |= {"total_num_pages": self.total_num_pages, "page_size": self.page_size}
        self.cache_manager: CacheManager = (PagedKVCacheManager if is_paged else NonPagedKVCacheManager)(**shared)

        # One buffer, so that a step is one copy to the device: running sums of new and of all tokens, then the tokens
        # that each row had before.
        self._books = torch.zeros(3 * max_batch_size + 2, dtype=torch.int32, device=self.device)
        self.cu_seqlens_q = self._books[: max_batch_size + 1]
        self.cu_seqlens_kv = self._books[max_batch_size + 1 : 2 * max_batch_size + 2]
        self.pre_step_seqlens = self._books[2 * max_batch_size + 2 :]
        self._angles: torch.Tensor | None = None
        self._cos_sin_PD = torch.empty(0)
        self.reset()

    def __repr__(self) -> str:
        pages = f", {self.total_num_pages} pages of {self.page_size}" if self.is_paged else ""
        return (
            f"InferenceParams({self.max_batch_size} rows of {self.max_sequence_length} tokens{pages}, "
            f"{self.num_heads_kv} heads of {self.head_dim_k}, {self.dtype}, {self.device}, "
            f"filled: {list(self.sequences.values())})"
        )

    # --- Transformer Engine's interface ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all sequences; the memory stays."""
        self.sequences: OrderedDict[int, int] = OrderedDict()
        self.sequences_pre_step: OrderedDict[int, int] = OrderedDict()
        self.batch_size = 0
        self._new: list[int] = []
        # Of the current step: where its tokens go, for each format that layers come with, and the layers done.
        self._slots: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._stored: set[int] = set()
        self._places: dict[int, torch.Tensor | None] = {}  # for each width of padded queries
        # Which columns of the caller's padded batch were tokens, [B, columns]; None: all of them.
        self._columns = 0
        self._token_BC: torch.Tensor | None = None
        self.cache_manager.reset()

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors of a layer ahead of its first use."""
        self.cache_manager.allocate_memory(layer_number)

    def pre_step(self, step_dict: Mapping[int, int]) -> None:
        """Begin a step.

        Args:
            step_dict: New tokens of each sequence that takes part, by the sequence's id, in the order of the batch's
                rows. Sequences that are left out have ended.

        Raises:
            ValueError: Too many sequences, or one that grows too long; nothing has changed then.
        """
        if len(step_dict) > self.max_batch_size:
            raise ValueError(
                f"{len(step_dict)} sequences do not fit the cache with max_batch_size={self.max_batch_size}."
            )
        before = OrderedDict((key, self.sequences.get(key, 0)) for key in step_dict)
        after = OrderedDict((key, before[key] + new) for key, new in step_dict.items())
        for key, length in after.items():
            if length > self.max_sequence_length:
                raise ValueError(
                    f"sequence {key} has {before[key]} tokens in the cache and gets {step_dict[key]} more, but "
                    f"max_sequence_length={self.max_sequence_length}: make the cache longer."
                )
        rows = {key: row for row, key in enumerate(self.sequences)}
        self.cache_manager.assign_rows([rows.get(key) for key in step_dict], list(after.values()))
        self.sequences_pre_step, self.sequences = before, after
        self.batch_size = len(step_dict)
        self._new = list(step_dict.values())
        self._slots, self._stored, self._places = {}, set(), {}
        self._write_books()

    def get_seqlens_pre_step(self) -> torch.Tensor:
        """int32 [max_batch_size]: tokens that each row had before this step."""
        return self.pre_step_seqlens

    def step(
        self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, qkv_format: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, str]:
        """Store a layer's new keys and values, unless this step has; called by Transformer Engine's attention.

        Args:
            layer_number: The layer.
            new_k: [B, S, K, D] or [T, K, D].
            new_v: Likewise.
            qkv_format: "bshd" or "thd".

        Returns:
            Keys and values of all tokens (rows, or the pages of all rows), running sums of the new and of all tokens
            [B + 1], the greatest length of a row, and the format of queries and keys.
        """
        if layer_number not in self._stored:
            self._store(layer_number, new_k, new_v, qkv_format)
            self._stored.add(layer_number)
        if self.is_paged:
            keys, values = self.cache_manager.cache[layer_number]
        else:
            keys, values = self.cache_manager.rows(layer_number, self.batch_size, self.max_sequence_length)
        ends = slice(0, self.batch_size + 1)
        return (
            keys,
            values,
            self.cu_seqlens_q[ends],
            self.cu_seqlens_kv[ends],
            self.max_sequence_length,
            qkv_format if qkv_format == "bshd" else f"{qkv_format}_2bshd",
        )

    def convert_paged_to_nonpaged(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of paged rows as [B, max_sequence_length, K, D]; for TE's unfused attention."""
        return self.cache_manager.rows(layer_number, self.batch_size, self.max_sequence_length)

    # --- the model's interface (llama_te_core.kv_cache.KVCache) ----------------------------------------------------

    def begin_step(self, attention_mask: torch.Tensor | None, batch_size: int, width: int) -> list[int]:
        """Begin a step with the next `width` columns of a padded batch; returns the new tokens of each row.

        Where a mask over all columns leaves out tokens at the end of what a row has cached (the padding that
        `generate` writes behind a finished sequence), the row is cut to what is left.

        Args:
            attention_mask: [batch_size, columns seen + width] or [batch_size, width], nonzero for tokens.
            batch_size: Rows.
            width: New columns.

        Raises:
            ValueError: The mask does not fit what is cached, or rows grow too long; nothing has changed then.
        """
        running = self._columns > 0
        if running and batch_size != self.batch_size:
            raise ValueError(
                f"the cache holds a batch of {self.batch_size} rows, but {batch_size} rows come: "
                "call reset() before another batch."
            )
        whole = attention_mask is not None and attention_mask.shape[1] == self._columns + width
        if attention_mask is not None and not whole and attention_mask.shape[1] != width:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cache has seen {self._columns} and "
                f"{width} are new: give a mask over all of them, or over the new ones."
            )
        cached, token_BC = self.sequences, self._token_BC
        if attention_mask is None or (running and width == 1 and min(cached.values()) > 0):
            # A step of generation: every row brings one token, and looking at the mask would wait for the device.
            new = [width] * batch_size
            new_BS = None
        else:
            attention_mask = attention_mask.to(self.device) != 0
            new_BS = attention_mask[:, -width:]
            if running and whole:
                self._cut_to(attention_mask[:, : self._columns])
            new = new_BS.sum(1).tolist()  # rows' lengths are kept on the host: once per prompt
        try:
            self.pre_step(OrderedDict(enumerate(new)))
        except ValueError:
            self.sequences, self._token_BC = cached, token_BC  # as before the cut
            raise
        self._add_columns(new_BS, batch_size, width)
        return new

    def longest(self) -> int:
        """Tokens of the longest row, those of this step included."""
        return max(self.sequences.values(), default=0)

    def padded_places(self, width: int) -> torch.Tensor | None:
        """Where the step's packed tokens stand in a padded batch of `width` columns: see `KVCache`."""
        if width not in self._places:
            place_T = None
            if self._new != [width] * self.batch_size:
                # The sum of the lengths is known here, so that nothing waits for the device.
                token_T = torch.arange(sum(self._new), device=self.device)
                row_T = torch.searchsorted(self.cu_seqlens_q[1 : self.batch_size], token_T, right=True)
                place_T = row_T * width + token_T - self.cu_seqlens_q[row_T]
            self._places[width] = place_T
        return self._places[width]

    @property
    def fuses_rope(self) -> bool:
        """Whether `append_rope` is one kernel on this device, so that TE's layers leave the rotation to it."""
        return self.device.type == "cuda" and self._takes_kernels() and not torch.is_grad_enabled()

    def append_rope(self, layer_number: int, qkv: torch.Tensor, angles: torch.Tensor, qkv_format: str) -> torch.Tensor:
        """Rotate a layer's new queries and keys by their positions, and store keys and values.

        The compiled operator does both in one pass; where it does not apply, plain PyTorch does the same.

        Args:
            layer_number: The layer.
            qkv: [T, K, G, D] or [B, S, K, G, D]: for each key/value head its query heads, its key and its value.
            angles: float32 [positions, 1, 1, D].
            qkv_format: "thd" or "bshd".

        Returns:
            The rotated queries, [T, heads, D] or [B, S, heads, D].
        """
        if layer_number not in self.cache_manager.cache:
            self.allocate_memory(layer_number)
        if self._takes_kernels() and not qkv.requires_grad:
            query = self._append_compiled(layer_number, qkv, angles, qkv_format)
        else:
            query, key, value = split_qkv(qkv)
            query, key = rotate(query, key, angles[self._positions(qkv, qkv_format), 0, 0])
            self._store(layer_number, key, value, qkv_format)
        self._stored.add(layer_number)
        return query

    def keys_and_values(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer as [B, L, K, D], L ≥ the longest row."""
        return self.cache_manager.rows(layer_number, self.batch_size, self.longest())

    # --- transformers' interface ------------------------------------------------------------------------------------

    @property
    def is_linear(self) -> list[bool]:
        """Whether the layers keep a fixed-size state: no."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that were seen."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row can hold."""
        return self.max_sequence_length

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """Nothing to do: tokens stay until they are overwritten."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns.

        Args:
            tokens_to_remove: How many, as a negative number (transformers' convention); 0 changes nothing.

        Raises:
            ValueError: The number is positive, or greater than what was seen.
        """
        if not -self._columns <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}) with {self._columns} columns in the cache: give minus the number to forget."
            )
        if tokens_to_remove == 0:
            return
        columns = self._columns + tokens_to_remove
        removed = [-tokens_to_remove] * self.batch_size
        if self._token_BC is not None:
            removed = self._token_BC[:, columns:].sum(1).tolist()
            self._token_BC = self._token_BC[:, :columns]
        self._columns = columns
        for key, count in zip(self.sequences, removed, strict=True):
            self.sequences[key] -= count

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on as row `beam_idx[i]` did: what beam search calls between steps.

        Args:
            beam_idx: int64 [B].
        """
        if self.batch_size == 0:
            return  # beam search with use_cache=False leaves a given cache empty, and reorders it all the same
        source_rows = beam_idx.to(self.device).contiguous()
        lengths = list(self.sequences.values())
        if len(set(lengths)) > 1:
            # Beams of one prompt are equally long, but rows of different prompts may not be: look where they go.
            lengths = [lengths[row] for row in beam_idx.tolist()]
            if lengths != list(self.sequences.values()):
                self.cache_manager.assign_rows(list(range(self.batch_size)), [max(lengths)] * self.batch_size)
            for key, length in zip(self.sequences, lengths, strict=True):
                self.sequences[key] = length
        self.cache_manager.reorder(source_rows, lengths)
        if self._token_BC is not None:
            self._token_BC = self._token_BC[source_rows]

    # --- books ------------------------------------------------------------------------------------------------------

    def _write_books(self) -> None:
        idle = self.max_batch_size - self.batch_size
        books = []
        for lengths in (self._new, list(self.sequences.values())):
            total = 0
            books.append(0)
            for length in lengths:
                total += length
                books.append(total)
            books += [total] * idle
        books += list(self.sequences_pre_step.values()) + [0] * idle
        self._books.copy_(torch.tensor(books, dtype=torch.int32), non_blocking=True)

    def _store(self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, qkv_format: str) -> None:
        if qkv_format not in self._slots:
            self._slots[qkv_format] = self._find_slots(new_k, qkv_format)
        tokens, slots = self._slots[qkv_format]
        for memory, new in zip(self.cache_manager.cache[layer_number], (new_k, new_v), strict=True):
            new_Tx = new.detach().flatten(0, -3)
            # Behind packed tokens may stand what fills their number up for FP8.
            new_Tx = new_Tx[: len(slots)] if tokens is None else new_Tx[tokens]
            memory.flatten(0, 1).index_copy_(0, slots, new_Tx)

    def _takes_kernels(self) -> bool:
        same = self.head_dim_k == self.head_dim_v
        return same and operators.takes_heads(self.dtype, self.head_dim_k) and operators.available(self.device.type)

    def _append_compiled(
        self, layer_number: int, qkv: torch.Tensor, angles: torch.Tensor, qkv_format: str
    ) -> torch.Tensor:
        width = qkv.shape[1] if qkv_format == "bshd" else 0
        qkv_NKGD = qkv.flatten(0, -4)
        heads = qkv.shape[-3] * (qkv.shape[-2] - 2)
        query_NHD = qkv.new_empty(qkv_NKGD.shape[0], heads, qkv.shape[-1])
        operators.append_rope(
            qkv_NKGD,
            self._cos_sin(angles),
            self.cu_seqlens_q[: self.batch_size + 1],
            self.pre_step_seqlens,
            self.cache_manager.page_table if isinstance(self.cache_manager, PagedKVCacheManager) else None,
            width,
            query_NHD,
            *self.cache_manager.cache[layer_number],
        )
        return query_NHD if width == 0 else query_NHD.unflatten(0, (-1, width))

    def _cos_sin(self, angles: torch.Tensor) -> torch.Tensor:
        """Cosines and sines [P, D] of angles whose halves are equal, computed once for each table of angles."""
        if self._angles is not angles:
            half_PD = angles[:, 0, 0, : angles.shape[-1] // 2]
            self._angles, self._cos_sin_PD = angles, torch.cat((half_PD.cos(), half_PD.sin()), dim=-1)
        return self._cos_sin_PD

    def _positions(self, qkv: torch.Tensor, qkv_format: str) -> torch.Tensor:
        """The positions of the new tokens, [T] or [B, S]; padding goes on counting."""
        start_B = self.pre_step_seqlens[: self.batch_size]
        if qkv_format == "bshd":
            return start_B[:, None] + torch.arange(qkv.shape[1], device=self.device)
        token_T = torch.arange(qkv.shape[0], device=self.device)
        row_T = torch.searchsorted(self.cu_seqlens_q[1 : self.batch_size], token_T, right=True)
        return start_B[row_T] + token_T - self.cu_seqlens_q[row_T]

    def _find_slots(self, new_k: torch.Tensor, qkv_format: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Which of the flattened new tokens to store (None: the first), and where; for all layers of a step."""
        rows = range(self.batch_size)
        width = new_k.shape[1] if qkv_format == "bshd" else None
        if len(set(self._new)) == 1 and width in (None, self._new[0]):
            new = self._new[0]
            row_T = torch.arange(self.batch_size, device=self.device).repeat_interleave(new)
            place_T = torch.arange(new, device=self.device).repeat(self.batch_size)
            place_T = place_T + self.pre_step_seqlens[: self.batch_size].long().repeat_interleave(new)
            return None, self.cache_manager.slots(row_T, place_T)
        before = list(self.sequences_pre_step.values())
        row_T = torch.tensor([row for row in rows for _ in range(self._new[row])], dtype=torch.long)
        place_T = torch.tensor([before[row] + i for row in rows for i in range(self._new[row])], dtype=torch.long)
        tokens = None
        if width is not None:
            tokens = torch.tensor([row * width + i for row in rows for i in range(self._new[row])], dtype=torch.long)
            tokens = tokens.to(self.device)
        return tokens, self.cache_manager.slots(row_T.to(self.device), place_T.to(self.device))

    def _add_columns(self, new_BS: torch.Tensor | None, batch_size: int, width: int) -> None:
        if new_BS is not None or self._token_BC is not None:
            seen_BC, new_BC = (
                torch.ones(batch_size, columns, dtype=torch.bool, device=self.device) if known is None else known
                for known, columns in ((self._token_BC, self._columns), (new_BS, width))
            )
            self._token_BC = torch.cat((seen_BC, new_BC), dim=1)
        self._columns += width

    def _cut_to(self, mask_BC: torch.Tensor) -> None:
        """Cut rows to the tokens that `mask_BC` leaves of the columns seen."""
        cached_BC = torch.ones_like(mask_BC) if self._token_BC is None else self._token_BC
        kept_BC, dropped_BC = cached_BC & mask_BC, cached_BC & ~mask_BC
        # A dropped token before a kept one would leave a gap in the row.
        gap = (kept_BC & (dropped_BC.cumsum(1) > 0)).any(1)
        unknown = (mask_BC & ~cached_BC).any(1)
        lengths, gaps, unknowns = torch.stack((kept_BC.sum(1), gap.long(), unknown.long())).tolist()
        if any(gaps) or any(unknowns):
            row = (gaps if any(gaps) else unknowns).index(1)
            what = "leaves out a cached token before others" if any(gaps) else "has tokens where padding was cached"
            raise ValueError(f"attention_mask {what} in row {row}: only the end of a cached row can be left out.")
        self.sequences = OrderedDict(zip(self.sequences, lengths, strict=True))
        self._token_BC = kept_BC


def inference_params_for(
    model: Any,
    *,
    batch_size: int,
    max_length: int,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    is_paged: bool = False,
    page_size: int = 64,
) -> InferenceParams:
    """A cache that fits a model and a request.

    Args:
        model: An `NVLlamaForCausalLM` (or `NVLlamaModel`).
        batch_size: Prompts.
        max_length: Tokens of a sequence, prompt included.
        num_beams: Beams of each prompt.
        num_return_sequences: Sequences returned for each prompt.
        is_paged: Whether rows are made of pages.
        page_size: Tokens of a page; `max_length` is rounded up to whole ones.
    """
    config = model.config
    rows = batch_size * max(num_beams, num_return_sequences)
    pages: dict[str, Any] = {}
    if is_paged:
        per_row = -(-max_length // page_size)
        max_length = per_row * page_size
        pages = {"is_paged": True, "page_size": page_size, "total_num_pages": rows * per_row}
    return InferenceParams(
        max_batch_size=rows,
        max_sequence_length=max_length,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=model.get_input_embeddings().weight.dtype,
        max_ctx_len=max_length,
        qkv_format=config.attn_input_format,
        device=model.device,
        **pages,
    )


def cache_for_generation(model: Any, *, batch_size: int, max_length: int) -> InferenceParams:
    """What `generate` takes when it is given no cache; llama_te_core finds it by its entry point."""
    # Rounded up so that requests of similar length have caches of one size, and TE's attention plans are reused.
    return inference_params_for(model, batch_size=batch_size, max_length=-(-max_length // 64) * 64)


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _check_pages(
    max_batch_size: int, max_sequence_length: int, total_num_pages: int | None, page_size: int | None
) -> tuple[int, int]:
    if page_size is None:
        raise ValueError("page_size is missing: is_paged=True needs it.")
    if page_size < 1 or max_sequence_length % page_size:
        raise ValueError(f"page_size={page_size} must divide max_sequence_length={max_sequence_length}.")
    wanted = max_batch_size * (max_sequence_length // page_size)
    if total_num_pages != wanted:
        raise ValueError(
            f"total_num_pages={total_num_pages} must be max_batch_size * max_sequence_length / page_size = {wanted}."
        )
    return wanted, page_size
