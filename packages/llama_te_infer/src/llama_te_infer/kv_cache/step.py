"""The current step of a key/value cache: everything that the layers ask a cache during a forward pass.

Shapes: B rows of the batch, S new columns, T new tokens, L keys per row, K key/value heads, G query heads of a
key/value head plus its key and value, D size of a head, P positions, N flattened tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llama_te_core.layers.kv_cache import UnreadColumns
from llama_te_core.layers.reference import split_qkv
from llama_te_core.layers.rope import rotate

from ..ops import library
from ..ops.append_rope import append_rope, takes_heads
from .cache_format import LayerMemory
from .storage import KVStorage


class CacheStep:
    """A cache during one forward pass: the tokens that each row has, and the tokens that it gets.

    A subclass calls `open_step` before each forward pass, and decides which memory the rows use.

    Args:
        cache_manager: The memory.
        max_batch_size: Most rows of a step.
        max_sequence_length: Most tokens of a row.
        num_heads_kv: K.
        head_dim_k: D of the keys.
        head_dim_v: D of the values.
        dtype: Of keys and values.
        device: Of keys and values.
        page_size: Tokens of a page; `None` for contiguous storage.
        total_num_pages: Pages of all rows together; `None` for contiguous storage.
        max_ctx_len: Most new tokens of a row in one step; `max_sequence_length` by default.

    Attributes:
        batch_size: B.
        cu_seqlens_q: int32 [max_batch_size + 1], running sums of the rows' new tokens.
        cu_seqlens_kv: int32 [max_batch_size + 1], running sums of the rows' tokens after the step.
        pre_step_seqlens: int32 [max_batch_size], tokens of each row before the step.
        has_fixed_dtype: See `KVCache`.
        unread: See `KVCache`.
    """

    # Here too, since transformers' `Cache` has properties of such names, which could not be set.
    batch_size: int = 0
    max_batch_size: int = 0
    has_fixed_dtype: bool = True
    unread: UnreadColumns | None = None

    def __init__(
        self,
        cache_manager: KVStorage,
        *,
        max_batch_size: int,
        max_sequence_length: int,
        num_heads_kv: int,
        head_dim_k: int,
        head_dim_v: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int | None = None,
        total_num_pages: int | None = None,
        max_ctx_len: int | None = None,
    ) -> None:
        self.cache_manager = cache_manager
        self.max_batch_size, self.max_sequence_length = max_batch_size, max_sequence_length
        self.num_heads_kv, self.head_dim_k, self.head_dim_v = num_heads_kv, head_dim_k, head_dim_v
        self.dtype, self.device = dtype, device
        # Transformer Engine's attention reads these four by their names, and `cache_manager`.
        self.is_paged = page_size is not None
        self.page_size, self.total_num_pages = page_size, total_num_pages
        self.max_ctx_len = max_sequence_length if max_ctx_len is None else max_ctx_len
        self._allocate_lengths()
        self._angles: torch.Tensor | None = None
        self._cos_sin_PD = torch.empty(0)
        self.close_step()

    @property
    def page_table(self) -> torch.Tensor | None:
        """int32 [rows, pages per row]; `None` for contiguous storage."""
        return self.cache_manager.page_table

    @property
    def caches(self) -> dict[int, LayerMemory]:
        """The memory of each allocated layer, by the layer's number."""
        return self.cache_manager.cache

    def convert(self, dtype: torch.dtype) -> None:
        """Convert all keys and values to another dtype. Their addresses change, except of FP8 numbers."""
        manager = self.cache_manager
        manager.format, self.dtype = replace(manager.format, dtype=dtype), dtype
        for layer, memory in list(self.caches.items()):
            self.caches[layer] = manager.format.converted(memory)

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    def _allocate_lengths(self) -> None:
        # One buffer, so that a step is one copy to the device.
        rows = self.max_batch_size
        self._lengths = torch.zeros(3 * rows + 2, dtype=torch.int32, device=self.device)
        self.cu_seqlens_q = self._lengths[: rows + 1]
        self.cu_seqlens_kv = self._lengths[rows + 1 : 2 * rows + 2]
        self.pre_step_seqlens = self._lengths[2 * rows + 2 :]

    # --- opening a step -----------------------------------------------------------------------------------------------

    def close_step(self) -> None:
        """Forget the current step."""
        self.batch_size = 0
        self._starts: list[int] = []
        self._new: list[int] = []
        self._forget_slots()

    def open_step(self, starts: Sequence[int], new: Sequence[int]) -> None:
        """Begin a step, for which the rows have memory.

        Args:
            starts: Tokens of each row before the step.
            new: Tokens that each row gets.
        """
        self._starts, self._new = list(starts), list(new)
        self.batch_size = len(self._new)
        self._forget_slots()
        self._send_lengths()

    def _forget_slots(self) -> None:
        self._slots: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}  # by the layers' format
        self._stored: set[int] = set()  # layers that have stored their keys and values
        self._padded: dict[int, torch.Tensor | None] = {}  # by the width of padded queries

    def _send_lengths(self) -> None:
        idle = self.max_batch_size - self.batch_size
        after = [start + new for start, new in zip(self._starts, self._new, strict=True)]
        values = []
        for lengths in (self._new, after):
            total = 0
            values.append(0)
            for length in lengths:
                total += length
                values.append(total)
            values += [total] * idle
        values += self._starts + [0] * idle
        self._lengths.copy_(torch.tensor(values, dtype=torch.int32), non_blocking=True)

    # --- the layers' interface ----------------------------------------------------------------------------------------

    def allocate_memory(self, layer_number: int) -> None:
        """Allocate the tensors of a layer ahead of its first use."""
        self.cache_manager.allocate_memory(layer_number)

    @property
    def new_lengths(self) -> list[int]:
        """The tokens that each row gets in this step."""
        return self._new

    def longest(self) -> int:
        """Return how many tokens the longest row has after this step."""
        return max((start + new for start, new in zip(self._starts, self._new, strict=True)), default=0)

    def get_seqlens_pre_step(self) -> torch.Tensor:
        """Return the tokens that each row had before this step, int32 [max_batch_size]."""
        return self.pre_step_seqlens

    def step(
        self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, qkv_format: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, str]:
        """Store a layer's new keys and values once in a step. Transformer Engine's attention calls this.

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
            keys, values = self.caches[layer_number]
            longest = self.max_sequence_length
        else:
            keys, values = self.cache_manager.rows(layer_number, self.batch_size, self._keys_of_rows())
            longest = keys.shape[1]
        ends = slice(0, self.batch_size + 1)
        return (
            keys,
            values,
            self.cu_seqlens_q[ends],
            self.cu_seqlens_kv[ends],
            longest,
            qkv_format if qkv_format == "bshd" else f"{qkv_format}_2bshd",
        )

    def _keys_of_rows(self) -> int:
        """Return how many keys of each row attention gets, where rows do not consist of pages for it."""
        return self.max_sequence_length

    def convert_paged_to_nonpaged(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of paged rows as [B, max_sequence_length, K, D], for TE's unfused attention."""
        return self.cache_manager.rows(layer_number, self.batch_size, self.max_sequence_length)

    def keys_and_values(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values of a layer as [B, L, K, D], L ≥ the longest row."""
        return self.cache_manager.rows(layer_number, self.batch_size, self.longest())

    def padded_places(self, width: int) -> torch.Tensor | None:
        """Return the position of each packed token in a padded batch of `width` columns: see `KVCache`."""
        if width not in self._padded:
            index_T = None
            if self._new != [width] * self.batch_size:
                # The host knows the sum of the lengths, so nothing waits for the device.
                row_T, number_T = self._packed(sum(self._new))
                index_T = row_T * width + number_T
            self._padded[width] = index_T
        return self._padded[width]

    @property
    def fuses_rope(self) -> bool:
        """Whether `append_rope` is one kernel on this device, so that TE's layers leave the rotation to it."""
        return self.device.type == "cuda" and self._takes_kernels() and not torch.is_grad_enabled()

    def append_rope(self, layer_number: int, qkv: torch.Tensor, angles: torch.Tensor, qkv_format: str) -> torch.Tensor:
        """Rotate a layer's new queries and keys by their positions, and store keys and values.

        The compiled operator does both in one pass. Without it, plain PyTorch does the same.

        Args:
            layer_number: The layer.
            qkv: [T, K, G, D] or [B, S, K, G, D]: for each key/value head its query heads, its key and its value.
            angles: float32 [positions, 1, 1, D].
            qkv_format: "thd" or "bshd".

        Returns:
            The rotated queries, [T, heads, D] or [B, S, heads, D].
        """
        if layer_number not in self.caches:
            self.allocate_memory(layer_number)
        if self._takes_kernels() and not qkv.requires_grad:
            query = self._append_compiled(layer_number, qkv, angles, qkv_format)
        else:
            query, key, value = split_qkv(qkv)
            query, key = rotate(query, key, angles[self._positions(qkv, qkv_format), 0, 0])
            self._store(layer_number, key, value, qkv_format)
        self._stored.add(layer_number)
        return query

    def cos_sin(self, angles: torch.Tensor) -> torch.Tensor:
        """Return cosines and sines [P, D] of angles whose halves are equal. One table of angles is computed once."""
        if self._angles is not angles:
            half_PD = angles[:, 0, 0, : angles.shape[-1] // 2]
            self._angles, self._cos_sin_PD = angles, torch.cat((half_PD.cos(), half_PD.sin()), dim=-1)
        return self._cos_sin_PD

    # --- storing ------------------------------------------------------------------------------------------------------

    def _takes_kernels(self) -> bool:
        same = self.head_dim_k == self.head_dim_v and self.cache_manager.format.has_operators
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
            self.page_table,
            width,
            query_NHD,
            *self.caches[layer_number],
        )
        return query_NHD if width == 0 else query_NHD.unflatten(0, (-1, width))

    def _store(self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, qkv_format: str) -> None:
        if qkv_format not in self._slots:
            self._slots[qkv_format] = self._slot_mapping(new_k, qkv_format)
        tokens, slots = self._slots[qkv_format]
        # FP8 products fill up the number of packed tokens; the tokens behind `slots` are this filling.
        stored = slice(len(slots)) if tokens is None else tokens
        key_NKD, value_NKD = (new.detach().flatten(0, -3)[stored] for new in (new_k, new_v))
        self.cache_manager.format.write(self.caches[layer_number], slots, key_NKD, value_NKD)

    def _slot_mapping(self, new_k: torch.Tensor, qkv_format: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return which of the flattened new tokens to store (None: the first ones), and their slots in each layer."""
        rows = range(self.batch_size)
        width = new_k.shape[1] if qkv_format == "bshd" else None
        if len(set(self._new)) == 1 and width in (None, self._new[0]):
            new = self._new[0]
            row_T = torch.arange(self.batch_size, device=self.device).repeat_interleave(new)
            position_T = torch.arange(new, device=self.device).repeat(self.batch_size)
            position_T = position_T + self.pre_step_seqlens[: self.batch_size].long().repeat_interleave(new)
            return None, self.cache_manager.slots(row_T, position_T)
        starts = self._starts
        row_T = torch.tensor([row for row in rows for _ in range(self._new[row])], dtype=torch.long)
        position_T = torch.tensor([starts[row] + i for row in rows for i in range(self._new[row])], dtype=torch.long)
        tokens = None
        if width is not None:
            tokens = torch.tensor([row * width + i for row in rows for i in range(self._new[row])], dtype=torch.long)
            tokens = tokens.to(self.device)
        return tokens, self.cache_manager.slots(row_T.to(self.device), position_T.to(self.device))

    def _positions(self, qkv: torch.Tensor, qkv_format: str) -> torch.Tensor:
        """Return the positions of the new tokens, [T] or [B, S]. Padding continues the count."""
        start_B = self.pre_step_seqlens[: self.batch_size]
        if qkv_format == "bshd":
            return start_B[:, None] + torch.arange(qkv.shape[1], device=self.device)
        row_T, number_T = self._packed(qkv.shape[0])
        return start_B[row_T] + number_T

    def _packed(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row of each packed token of this step, and its number among the row's new tokens."""
        token_T = torch.arange(tokens, device=self.device)
        row_T = torch.searchsorted(self.cu_seqlens_q[1 : self.batch_size], token_T, right=True)
        return row_T, token_T - self.cu_seqlens_q[row_T]
