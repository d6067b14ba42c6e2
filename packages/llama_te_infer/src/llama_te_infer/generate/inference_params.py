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
from typing import Any

import torch

from llama_te_core.layers.reference import split_qkv
from llama_te_core.layers.rope import rotate

from ..decode.backend import IMPLEMENTATIONS, BatchDecode, choose_decode
from ..kv_cache.managers import CacheManager, NonPagedKVCacheManager, PagedKVCacheManager, default_device
from ..ops import library
from ..ops.append_rope import append_rope, takes_heads


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
        total_num_pages: Pages of all rows together. TE demands `max_batch_size * max_sequence_length / page_size`; here
            less will do, where rows share pages or do not all get that long. A step that needs more raises an error.
        page_size: Tokens of a page; must divide `max_sequence_length`.
        max_ctx_len: Most new tokens of a row in one step; needed for "thd".
        qkv_format: "bshd" or "thd", the format that the first step comes in.
        device: Where keys and values are kept; the current GPU by default, the CPU where there is none.
        decode_implementation: What computes steps of one token, where nothing but their logits is wanted: "layers" of
            the model; "fused" kernels, the engine's, replayed from a CUDA graph; "auto", these where they can, on a
            GPU, and the layers, with one warning there, where not.

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
        decode_implementation: str = "auto",
    ) -> None:
        for name, value in (("num_heads_kv", num_heads_kv), ("head_dim_k", head_dim_k), ("dtype", dtype)):
            if value is None:
                raise ValueError(f"{name} is missing: take it from the model, or use inference_params_for(model, ...).")
        assert num_heads_kv is not None and head_dim_k is not None and dtype is not None
        if qkv_format not in ("bshd", "thd"):
            raise ValueError(f"qkv_format={qkv_format!r} is not known: use 'bshd' or 'thd'.")
        if qkv_format == "thd" and max_ctx_len is None:
            raise ValueError("max_ctx_len is missing: qkv_format='thd' needs the most new tokens of a row in one step.")
        if decode_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"decode_implementation={decode_implementation!r} is not known: use 'auto', 'fused' or 'layers'."
            )
        self.max_batch_size = max_batch_size
        self.max_sequence_length = max_sequence_length
        self.num_heads_kv = num_heads_kv
        self.head_dim_k = head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.dtype = dtype
        self.is_paged = is_paged
        self.max_ctx_len = max_sequence_length if max_ctx_len is None else max_ctx_len
        self.qkv_format = qkv_format
        self.device = torch.device(device) if device is not None else default_device()
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
        self.decode_implementation = decode_implementation
        self._decode: BatchDecode | None = None
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
        self._decode_is_chosen = False
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
        self.cache_manager.assign_rows(
            [rows.get(key) for key in step_dict], list(before.values()), list(after.values())
        )
        self._open_step(before, after)

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

    # --- the model's interface (llama_te_core.layers.kv_cache.KVCache) --------------------------------------------

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
        if width > 1:
            self._decode_is_chosen = False
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

    def decode(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Compute a step of one token for each row by the kernels that `decode_implementation` asks for.

        What computes the steps of a batch is chosen at the first one behind a prompt. So a model's weights may be
        written to at any time, and be replaced by other tensors between prompts.

        Args:
            model: An `NVLlamaForCausalLM`.
            input_ids: int64 [B, 1].
            attention_mask: As of `begin_step`.

        Returns:
            Logits [B, 1, V]; `None` where nothing was done, and the model's layers are to do it.

        Raises:
            ValueError: As of `begin_step`.
            RuntimeError: decode_implementation="fused", and the kernels cannot compute steps of this batch.
        """
        if self._columns == 0 or min(self.sequences.values()) == 0:
            return None  # a prompt; or a row may still have padding here
        if self._decode is not None and self._decode.rows != self.batch_size:
            self._decode_is_chosen = False
        if not self._decode_is_chosen:
            self._decode = choose_decode(self._decode, model, self)
            self._decode_is_chosen = True
        if self._decode is None:
            return None
        self.begin_step(attention_mask, len(input_ids), 1)
        return self._decode(input_ids)

    def longest(self) -> int:
        """Tokens of the longest row, those of this step included."""
        return max(self.sequences.values(), default=0)

    def padded_places(self, width: int) -> torch.Tensor | None:
        """Where the step's packed tokens stand in a padded batch of `width` columns: see `KVCache`."""
        if width not in self._places:
            place_T = None
            if self._new != [width] * self.batch_size:
                # The sum of the lengths is known here, so that nothing waits for the device.
                row_T, number_T = self._packed(sum(self._new))
                place_T = row_T * width + number_T
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

    def repeat_rows(self, copies: int) -> None:
        """Let `copies` rows go on as each row did, in its place: beams or returned sequences of one prompt.

        Args:
            copies: Rows for each row.

        Raises:
            ValueError: The cache has too few rows, or a paged one too few pages; nothing has changed then.
        """
        rows = self.batch_size * copies
        if rows > self.max_batch_size:
            raise ValueError(
                f"{self.batch_size} rows times {copies} do not fit the cache with max_batch_size={self.max_batch_size}."
            )
        sources = [row for row in range(self.batch_size) for _ in range(copies)]
        lengths = [length for length in self.sequences.values() for _ in range(copies)]
        self.cache_manager.assign_rows(sources, lengths, lengths)
        self.sequences = OrderedDict(enumerate(lengths))
        self.batch_size = rows
        if self._token_BC is not None:
            self._token_BC = self._token_BC.repeat_interleave(copies, 0)

    def share_prefix(self, source: int, target: int, tokens: int) -> None:
        """Begin a sequence with the first tokens of another one, which a paged cache does not copy.

        To be called before the `pre_step` that gives the new sequence the rest of its tokens.

        Args:
            source: Id of a sequence in the cache.
            target: Id of the new sequence.
            tokens: How many tokens both begin with.

        Raises:
            ValueError: The ids or the number do not fit what is in the cache, or it is full; nothing has changed then.
        """
        if self._columns > 0:
            raise ValueError("share_prefix is for sequences that pre_step names; this cache holds a padded batch.")
        if source not in self.sequences or target in self.sequences:
            raise ValueError(
                f"source={source} must be in the cache and target={target} must not; it has {list(self.sequences)}."
            )
        if not 0 < tokens <= self.sequences[source]:
            raise ValueError(f"tokens={tokens}, but sequence {source} has {self.sequences[source]} in the cache.")
        if self.batch_size == self.max_batch_size:
            raise ValueError(f"the cache is full with max_batch_size={self.max_batch_size} sequences.")
        lengths = [*self.sequences.values(), tokens]
        row = list(self.sequences).index(source)
        self.cache_manager.assign_rows([*range(self.batch_size), row], lengths, lengths)
        self.sequences[target] = tokens
        self.batch_size += 1

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
        # Beams of one prompt are equally long, but rows of different prompts may not be: look where they go.
        sources = beam_idx.tolist() if len(set(lengths)) > 1 else range(self.batch_size)
        moved = [lengths[row] for row in sources]
        if moved == lengths:
            self.cache_manager.reorder(source_rows, lengths)
        else:
            self.cache_manager.assign_rows(sources, moved, moved)
            self.sequences = OrderedDict(zip(self.sequences, moved, strict=True))
        if self._token_BC is not None:
            self._token_BC = self._token_BC[source_rows]

    # --- books ------------------------------------------------------------------------------------------------------

    def _open_step(self, before: OrderedDict[int, int], after: OrderedDict[int, int]) -> None:
        """Take note of a step that has its memory, from the rows' tokens before and after it."""
        self.sequences_pre_step, self.sequences = before, after
        self.batch_size = len(after)
        self._new = [after[key] - before[key] for key in after]
        self._slots, self._stored, self._places = {}, set(), {}
        self._write_books()

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
        return same and library.available(self.device.type) and takes_heads(self.dtype, self.head_dim_k)

    def _append_compiled(
        self, layer_number: int, qkv: torch.Tensor, angles: torch.Tensor, qkv_format: str
    ) -> torch.Tensor:
        width = qkv.shape[1] if qkv_format == "bshd" else 0
        qkv_NKGD = qkv.flatten(0, -4)
        heads = qkv.shape[-3] * (qkv.shape[-2] - 2)
        query_NHD = qkv.new_empty(qkv_NKGD.shape[0], heads, qkv.shape[-1])
        append_rope(
            qkv_NKGD,
            self.cos_sin(angles),
            self.cu_seqlens_q[: self.batch_size + 1],
            self.pre_step_seqlens,
            self.cache_manager.page_table if isinstance(self.cache_manager, PagedKVCacheManager) else None,
            width,
            query_NHD,
            *self.cache_manager.cache[layer_number],
        )
        return query_NHD if width == 0 else query_NHD.unflatten(0, (-1, width))

    def cos_sin(self, angles: torch.Tensor) -> torch.Tensor:
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
        row_T, number_T = self._packed(qkv.shape[0])
        return start_B[row_T] + number_T

    def _packed(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of each packed token of this step, and its number among the new ones there."""
        token_T = torch.arange(tokens, device=self.device)
        row_T = torch.searchsorted(self.cu_seqlens_q[1 : self.batch_size], token_T, right=True)
        return row_T, token_T - self.cu_seqlens_q[row_T]

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
    prompt_length: int | None = None,
    decode_implementation: str = "auto",
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
        prompt_length: Tokens of the longest prompt. Beams and returned sequences share the pages of their prompt:
            where it is known how long these are, fewer pages will do.
        decode_implementation: "auto", "fused" or "layers": see `InferenceParams`.

    Raises:
        ValueError: `prompt_length` is not between 0 and `max_length`.
    """
    config = model.config
    copies = max(num_beams, num_return_sequences)
    pages: dict[str, Any] = {}
    if is_paged:
        per_row = -(-max_length // page_size)
        shared, own = 0, per_row
        if prompt_length is not None:
            if not 0 <= prompt_length <= max_length:
                raise ValueError(f"prompt_length={prompt_length} must be between 0 and max_length={max_length}.")
            # What is new may begin at the end of a page, and end at the beginning of another.
            shared = prompt_length // page_size
            own = min(per_row, -(-(max_length - prompt_length) // page_size) + 1)
        total = min(batch_size * (shared + copies * own), batch_size * copies * per_row)
        pages = {"is_paged": True, "page_size": page_size, "total_num_pages": total}
        max_length = per_row * page_size
    return InferenceParams(
        max_batch_size=batch_size * copies,
        max_sequence_length=max_length,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=model.get_input_embeddings().weight.dtype,
        max_ctx_len=max_length,
        qkv_format=config.attn_input_format,
        device=model.device,
        decode_implementation=decode_implementation,
        **pages,
    )


def cache_for_generation(model: Any, *, batch_size: int, max_length: int) -> InferenceParams:
    """What `generate` takes when it is given no cache; llama_te_core finds it by its entry point."""
    # Rounded up so that requests of similar length have caches of one size, and TE's attention plans are reused.
    return inference_params_for(model, batch_size=batch_size, max_length=-(-max_length // 64) * 64)


def _check_pages(
    max_batch_size: int, max_sequence_length: int, total_num_pages: int | None, page_size: int | None
) -> tuple[int, int]:
    if page_size is None:
        raise ValueError("page_size is missing: is_paged=True needs it.")
    if page_size < 1 or max_sequence_length % page_size:
        raise ValueError(f"page_size={page_size} must divide max_sequence_length={max_sequence_length}.")
    most = max_batch_size * (max_sequence_length // page_size)
    if total_num_pages is None or not 0 < total_num_pages <= most:
        raise ValueError(
            f"total_num_pages={total_num_pages} must be between 1 and max_batch_size * max_sequence_length / page_size "
            f"= {most}, which is enough for all rows at their longest."
        )
    return total_num_pages, page_size
