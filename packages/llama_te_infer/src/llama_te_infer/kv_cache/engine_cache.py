"""The keys and values of an engine: one memory of pages, of which each forward pass sees the rows that it is given.

Shapes: R rows, B rows that take part, P pages of a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ..generate.inference_params import InferenceParams
from ..ops import library
from ..ops.reorder import reorder_pages, takes_reorder
from .managers import PagedKVCacheManager


class EngineCache(InferenceParams):
    """A paged cache whose pages, rows and lengths are the engine's business: `open_rows` says what a pass works on.

    Who holds which page is not known here. There is one page more than the engine has: `dump_page`, which takes what
    rows that only fill up a batch write.

    Args:
        model: An `NVLlamaForCausalLM`.
        rows: Most rows of a forward pass, R.
        max_sequence_length: Tokens of a sequence; rounded up to whole pages.
        total_num_pages: Pages, without the one for dumping.
        page_size: Tokens of a page.
    """

    def __init__(
        self, model: Any, *, rows: int, max_sequence_length: int, total_num_pages: int, page_size: int
    ) -> None:
        config = model.config
        pages_of_row = -(-max_sequence_length // page_size)
        super().__init__(
            # As many as can fill all pages: there may be more of them than for the rows, to remember prompts.
            max_batch_size=max(rows, -(-(total_num_pages + 1) // pages_of_row)),
            max_sequence_length=pages_of_row * page_size,
            num_heads_kv=config.num_key_value_heads,
            head_dim_k=config.head_dim,
            dtype=model.get_input_embeddings().weight.dtype,
            is_paged=True,
            total_num_pages=total_num_pages + 1,
            page_size=page_size,
            max_ctx_len=pages_of_row * page_size,
            qkv_format=config.attn_input_format,
            device=model.device,
        )
        self.dump_page = total_num_pages
        for layer in range(config.num_hidden_layers):
            self.allocate_memory(layer + 1)
        self._ticket = torch.zeros(1, dtype=torch.int32, device=self.device)

    def make_page_table(self) -> torch.Tensor:
        """int32 [R, P] of rows without pages: all entries are the dump page."""
        return torch.full_like(self._manager.page_table, self.dump_page)

    def open_rows(self, page_table_RP: torch.Tensor, starts: Sequence[int], new: Sequence[int]) -> None:
        """Say what the next forward pass works on: row i of its batch goes on from `starts[i]` tokens in the cache.

        Args:
            page_table_RP: int32, the pages of rows 0, 1, ...; rows behind the last one are not looked at.
            starts: Tokens that rows have in the cache.
            new: Tokens that they get.
        """
        self._manager.page_table = page_table_RP
        after = OrderedDict((row, start + count) for row, (start, count) in enumerate(zip(starts, new, strict=True)))
        self._open_step(OrderedDict(enumerate(starts)), after)

    def begin_step(self, attention_mask: torch.Tensor | None, batch_size: int, width: int) -> list[int]:
        """What `open_rows` said; called by the model.

        Raises:
            ValueError: The batch is another one.
        """
        if batch_size != self.batch_size or width < max(self._new):
            raise ValueError(
                f"a batch of {batch_size} rows and {width} columns, but the engine's cache was opened for "
                f"{self.batch_size} rows of {self._new} tokens: call open_rows before each forward pass."
            )
        return list(self._new)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy what pages hold, in all layers.

        Args:
            copies: Pairs of a page and the page to write; no page is both read and written, or written twice.
        """
        from_P, to_P = send(copies, torch.int64, self.device).unbind(1)
        for tensor in self._tensors:
            tensor[to_P] = tensor[from_P]

    def reorder(self, page_table_BP: torch.Tensor, source_B: torch.Tensor, lengths: Sequence[int]) -> None:
        """Let rows go on from others, without knowing on the host from which.

        Full pages are shared: the table's entries change. What the partly filled page behind them holds is copied to
        the row's own page in that place.

        Args:
            page_table_BP: int32, changed in place.
            source_B: int64, for each row the row whose tokens it goes on from.
            lengths: Tokens of each row, which are those of its source.
        """
        length_B = send(lengths, torch.int32, self.device)
        compiled = library.available(self.device.type) and takes_reorder(self._tensors, len(lengths))
        if compiled:
            reorder_pages(self._tensors, page_table_BP, source_B, length_B, self._manager.page_size, self._ticket)
            return
        source_BP = page_table_BP[source_B]
        full_B1 = (length_B // self._manager.page_size)[:, None]
        place_B1 = full_B1.long().clamp(max=page_table_BP.shape[1] - 1)
        own_B = page_table_BP.gather(1, place_B1)[:, 0]
        is_partial_B = length_B % self._manager.page_size > 0
        read_B = torch.where(is_partial_B, source_BP.gather(1, place_B1)[:, 0], own_B)
        for tensor in self._tensors:
            tensor[own_B] = tensor[read_B]
        place_P = torch.arange(page_table_BP.shape[1], device=self.device)
        page_table_BP.copy_(torch.where(place_P < full_B1, source_BP, page_table_BP))

    @property
    def _manager(self) -> PagedKVCacheManager:
        assert isinstance(self.cache_manager, PagedKVCacheManager)
        return self.cache_manager

    @property
    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensors in self._manager.cache.values() for tensor in tensors]


def send(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on the device, without waiting: PyTorch reuses pinned memory only after it was read."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
