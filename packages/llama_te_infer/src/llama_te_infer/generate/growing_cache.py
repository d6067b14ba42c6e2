"""The cache that models and `generate` make by default. How long its rows get may be unknown when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llama_te_core.layers.kv_cache import UnreadColumns

from ..kv_cache.contiguous import NonPagedKVCacheManager
from .inference_params import InferenceParams


class GrowingCache(InferenceParams):
    """A contiguous cache whose memory grows with its rows.

    It takes the dtype in which the layers compute: autocast may surround the forward passes and not the code that makes
    the cache, since accelerate wraps `model.forward` alone.

    It allocates half as much again as the rows need, so that it grows seldom. A growth moves keys and values, so the
    kernels capture their graphs again.

    Args:
        max_batch_size: Number of rows; more rows make it grow.
        max_sequence_length: Tokens of a row; more tokens make it grow.
        **arguments: See `InferenceParams`.
    """

    cache_manager: NonPagedKVCacheManager
    has_fixed_dtype = False

    def __init__(self, max_batch_size: int, max_sequence_length: int, **arguments: Any) -> None:
        super().__init__(max_batch_size, max_sequence_length, **arguments, max_ctx_len=max_sequence_length)

    def reset(self) -> None:
        """Forget all sequences; the memory stays."""
        super().reset()
        self.unread = None

    def pre_step(self, step_dict: Mapping[int, int]) -> None:
        """Begin a step: see `InferenceParams`."""
        longest = max((self.sequences.get(key, 0) + new for key, new in step_dict.items()), default=0)
        self._make_room(len(step_dict), longest)
        super().pre_step(step_dict)

    def decode(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Compute a step of one token for each row by the kernels: see `InferenceParams`."""
        self._make_room(self.batch_size, self.longest() + 1)  # a graph reads the memory that it was captured with
        return super().decode(model, input_ids, attention_mask)

    def repeat_rows(self, copies: int) -> None:
        """Replace each row by `copies` rows that continue it."""
        if self.unread is not None:
            self._select_unread(torch.arange(self.unread.rows).repeat_interleave(copies))
            return
        self._make_room(self.batch_size * copies, self.longest())
        super().repeat_rows(copies)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows: see `InferenceParams`."""
        if self.unread is not None:
            self._select_unread(torch.arange(self.unread.rows)[indices.cpu()])
            return
        rows = int(indices.sum()) if indices.dtype == torch.bool else len(indices)
        self._make_room(rows, self.longest())
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue row `beam_idx[i]`."""
        if self.unread is not None:
            self._select_unread(beam_idx)
            return
        super().reorder_cache(beam_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns of the padded batch so far."""
        return super().get_seq_length() if self.unread is None else self.unread.width

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def max_cache_len(self) -> int:
        """-1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: see `InferenceParams`."""
        unread = self.unread
        if unread is None:
            super().crop(tokens_to_remove)
            return
        width = unread.width + tokens_to_remove
        if not 0 <= width <= unread.width:
            raise ValueError(
                f"crop({tokens_to_remove}) with {unread.width} columns in the cache: give minus the number to forget."
            )
        kept = {
            name: value[:, :width] if isinstance(value, torch.Tensor) and value.dim() > 1 else value
            for name, value in unread.arguments.items()
        }
        self.unread = replace(unread, arguments=kept, width=width) if width else None

    def _select_unread(self, rows: torch.Tensor) -> None:
        assert self.unread is not None
        self._make_room(len(rows), 0)
        selected = {
            name: value[rows.to(value.device)]
            if isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == self.unread.rows
            else value
            for name, value in self.unread.arguments.items()
        }
        self.unread = UnreadColumns(selected, len(rows), self.unread.width)

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_room(self, rows: int, tokens: int) -> None:
        if rows <= self.max_batch_size and tokens <= self.max_sequence_length:
            return
        if tokens > self.max_sequence_length:
            # Whole multiples of 64: caches of one size reuse TE's attention plans.
            self.max_sequence_length = self.max_ctx_len = -(-(tokens + max(256, tokens // 2)) // 64) * 64
        if rows > self.max_batch_size:
            self.max_batch_size = rows
            self._allocate_lengths()
        self.cache_manager.resize(self.max_batch_size, self.max_sequence_length)
        self._fused = self._inputs = None
        self._backend_is_chosen = False
