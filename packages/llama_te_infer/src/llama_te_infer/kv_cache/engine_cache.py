"""The keys and values of an engine: one memory of pages, and the rows that the current forward pass sees.

Shapes: R rows, B rows that take part, P pages of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llama_te_core.layers.kv_cache import computing_dtype

from ..transfers import to_device
from .paged import PagedStorage
from .step import CacheStep
from .storage import tensors_of


class EngineCache(CacheStep):
    """A paged cache whose pages, rows and lengths the engine decides. `open_rows` names the rows of a forward pass.

    The cache does not know which row holds which page. It has one page more than the engine gives out:
    `padding_page`, which receives the tokens of rows that only fill up a batch.

    Args:
        model: An `NVLlamaForCausalLM`.
        rows: Most rows of a forward pass, R.
        max_sequence_length: Tokens of a sequence; rounded up to whole pages.
        total_num_pages: Pages, without the padding page.
        page_size: Tokens of a page.
    """

    def __init__(
        self, model: Any, *, rows: int, max_sequence_length: int, total_num_pages: int, page_size: int
    ) -> None:
        config, device = model.config, model.device
        pages_per_row = -(-max_sequence_length // page_size)
        dtype = computing_dtype(model.get_input_embeddings().weight)
        self.storage = PagedStorage(
            total_num_pages + 1,
            page_size,
            config.num_key_value_heads,
            config.head_dim,
            dtype,
            rows,
            pages_per_row * page_size,
            device=device,
        )
        super().__init__(
            self.storage,
            max_batch_size=rows,
            max_sequence_length=pages_per_row * page_size,
            num_heads_kv=config.num_key_value_heads,
            head_dim_k=config.head_dim,
            head_dim_v=config.head_dim,
            dtype=dtype,
            device=device,
            page_size=page_size,
            total_num_pages=total_num_pages + 1,
        )
        self.padding_page = total_num_pages
        for layer in range(config.num_hidden_layers):
            self.allocate_memory(layer + 1)

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def make_page_table(self, rows: int | None = None) -> torch.Tensor:
        """Return the table of rows without pages, int32 [rows, P]: all entries are the padding page.

        Args:
            rows: R by default.
        """
        table_RP = self.storage.page_table
        return table_RP.new_full((len(table_RP) if rows is None else rows, table_RP.shape[1]), self.padding_page)

    def open_rows(self, page_table_RP: torch.Tensor, starts: Sequence[int], new: Sequence[int]) -> None:
        """Set the rows of the next forward pass: row i of its batch continues `starts[i]` tokens in the cache.

        Args:
            page_table_RP: int32, the pages of rows 0, 1, ...; it may have more rows than the batch.
            starts: Tokens that rows have in the cache.
            new: Tokens that they get.
        """
        self.storage.page_table = page_table_RP
        self.open_step(starts, new)

    def begin_step(self, attention_mask: torch.Tensor | None, batch_size: int, width: int) -> list[int]:
        """Return the new tokens of each row, as `open_rows` set them. The model calls this.

        Raises:
            ValueError: The batch is another one.
        """
        if batch_size != self.batch_size or width < max(self._new):
            raise ValueError(
                f"a batch of {batch_size} rows and {width} columns, but the engine's cache was opened for "
                f"{self.batch_size} rows of {self._new} tokens: call open_rows before each forward pass."
            )
        return list(self._new)

    def decode(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Leave the step to the layers: the engine itself calls the kernels."""

    def repeat_rows(self, copies: int) -> None:
        """Refuse: the engine decides which rows continue a prompt.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("an engine's cache does not repeat rows: pass a llama_te_infer.InferenceParams to generate.")

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the content of pages, in all layers.

        Args:
            copies: Pairs of a page and the page to write; no page is both read and written, or written twice.
        """
        from_P, to_P = to_device(copies, torch.int64, self.device).unbind(1)
        self.storage.copy_pages(from_P, to_P)

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Write zeros to pages, in all layers."""
        page_P = to_device(pages, torch.int64, self.device)
        for tensor in tensors_of(self.caches):
            tensor.index_fill_(0, page_P, 0)

    def reorder(self, page_table_BP: torch.Tensor, source_B: torch.Tensor, lengths: Sequence[int]) -> None:
        """Let rows continue other rows; the host does not know which.

        Rows share the full pages of their sources: the table's entries change. The content of the source's partly
        filled page is copied to the row's own page at that place.

        Args:
            page_table_BP: int32, changed in place.
            source_B: int64, the row that each row continues.
            lengths: Tokens of each row, and of its source.
        """
        length_B = to_device(lengths, torch.int32, self.device)
        if self.storage.takes_reorder(len(lengths)):
            self.storage.reorder_pages(page_table_BP, source_B, length_B)
            return
        source_BP = page_table_BP[source_B]
        full_B1 = (length_B // self.storage.page_size)[:, None]
        last_B1 = full_B1.long().clamp(max=page_table_BP.shape[1] - 1)
        own_B = page_table_BP.gather(1, last_B1)[:, 0]
        is_partial_B = length_B % self.storage.page_size > 0
        read_B = torch.where(is_partial_B, source_BP.gather(1, last_B1)[:, 0], own_B)
        for tensor in tensors_of(self.caches):
            tensor[own_B] = tensor[read_B]
        entry_P = torch.arange(page_table_BP.shape[1], device=self.device)
        page_table_BP.copy_(torch.where(entry_P < full_B1, source_BP, page_table_BP))
