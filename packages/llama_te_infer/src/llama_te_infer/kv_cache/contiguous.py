"""Contiguous storage: each row of the batch has memory for its longest sequence.

Shapes: R rows, B rows of the batch, T new tokens, L keys per row, K key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import library
from ..ops.reorder import reorder_rows, takes_reorder
from .cache_format import CacheFormat, LayerMemory
from .storage import default_device, tensors_of


class NonPagedKVCacheManager:
    """One row of `max_seqlen` tokens per sequence."""

    page_table = None

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
        self.format = CacheFormat(dtype)
        self.device = device if device is not None else default_device()
        self.cache: dict[int, LayerMemory] = {}

    def allocate_memory(self, layer_number: int) -> None:
        """Allocate the tensors [max_batch_size, max_seqlen, K, D] of a layer."""
        shape = (self.max_batch_size, self.max_seqlen, self.num_heads, self.head_dim_k)
        self.cache[layer_number] = self.format.allocate(shape, self.head_dim_v, self.device)

    def resize(self, max_batch_size: int, max_seqlen: int) -> None:
        """Move all layers to larger memory. The content stays, and its addresses change.

        Args:
            max_batch_size: Rows, at least as many as before.
            max_seqlen: Tokens of a row, at least as many as before.
        """
        self.max_batch_size, self.max_seqlen = max_batch_size, max_seqlen
        for layer_number, old in list(self.cache.items()):
            self.allocate_memory(layer_number)
            for new_RLKD, old_RLKD in zip(self.cache[layer_number], old, strict=True):
                new_RLKD[: old_RLKD.shape[0], : old_RLKD.shape[1]] = old_RLKD

    def reset(self) -> None:
        """Forget all sequences: the next ones overwrite their rows from the start."""

    def assign_rows(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy each row that continues another row."""
        moved = [
            (row, source, start)
            for row, (source, start) in enumerate(zip(sources, starts, strict=True))
            if source not in (None, row) and start > 0
        ]
        if moved:
            to, source, kept = zip(*moved, strict=True)
            to_R, source_R = torch.tensor(to, device=self.device), torch.tensor(source, device=self.device)
            for tensor in tensors_of(self.cache):
                tensor[to_R, : max(kept)] = tensor[source_R, : max(kept)]

    def slots(self, row_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        """Return the slot of each token: row times row size plus position."""
        return row_T * self.max_seqlen + position_T

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a view of the first `keys` tokens of each row."""
        key_BLKD, value_BLKD = self.cache[layer_number]
        return key_BLKD[:batch_size, :keys], value_BLKD[:batch_size, :keys]

    def reorder(self, source_rows: torch.Tensor, lengths: Sequence[int]) -> None:
        """Copy the filled part of each source row. The compiled operator needs no second copy of the memory."""
        rows, keys = len(lengths), max(lengths)
        caches = tensors_of(self.cache)
        if caches and library.available(self.device.type) and takes_reorder(caches, rows):
            reorder_rows(caches, source_rows, torch.tensor(lengths, dtype=torch.int32).to(self.device))
            return
        for tensor in caches:
            tensor[:rows, :keys] = tensor[:rows, :keys].index_select(0, source_rows)
