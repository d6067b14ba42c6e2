"""The keys and values of an engine: one memory of pages, and the rows that the current forward pass sees.

Shapes: R rows, B rows that take part, P pages of a row, W pages of a row that are widened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llama_te_core.layers.kv_cache import computing_dtype

from ..transfers import to_device
from .cache_format import as_bytes
from .paged import PagedStorage
from .step import CacheStep
from .storage import tensors_of

SCRATCH_SHARE = 8
SCRATCH_BUDGETS = 2


class _Widening(NamedTuple):
    """How the pages of a step's rows are widened.

    Attributes:
        page_table_BW: int32, the pages.
        length_B: int32, tokens of each row after the step.
        scratch_table_RP: int32, the page table of the widened pages.
    """

    page_table_BW: torch.Tensor
    length_B: torch.Tensor
    scratch_table_RP: torch.Tensor


class EngineCache(CacheStep):
    """A paged cache whose pages, rows and lengths the engine decides. `open_rows` names the rows of a forward pass.

    The cache does not know which row holds which page. It has one page more than the engine gives out:
    `padding_page`, which receives the tokens of rows that only fill up a batch.

    Decoding kernels read FP8 pages as they are. For the attention of prompts, and of the model's own layers, the pages
    of the rows are widened to the computing dtype: layer after layer, in one memory of `scratch_pages`. So FP8 rows
    that do not fit it together take part in several forward passes, one for each of `parts`.

    Args:
        model: An `NVLlamaForCausalLM`.
        rows: Most rows of a forward pass, R.
        max_sequence_length: Tokens of a sequence; rounded up to whole pages.
        total_num_pages: Pages, without the padding page.
        page_size: Tokens of a page.
        is_fp8: Whether the pages hold FP8 numbers.
        rows_multiple: The number of rows of a forward pass is a multiple of this.
        prefill_budget: Most tokens of prompts that a step reads; see `scratch_pages`.
    """

    _widening: _Widening | None = None  # of the current step, where something has needed it

    def __init__(
        self,
        model: Any,
        *,
        rows: int,
        max_sequence_length: int,
        total_num_pages: int,
        page_size: int,
        is_fp8: bool = False,
        rows_multiple: int = 1,
        prefill_budget: int = 0,
    ) -> None:
        config, device = model.config, model.device
        pages_per_row = -(-max_sequence_length // page_size)
        dtype = computing_dtype(model.get_input_embeddings().weight)
        self.scratch_pages = 0
        if is_fp8:
            budget_pages = -(-prefill_budget // page_size)
            self.scratch_pages = scratch_pages(rows, pages_per_row, total_num_pages, rows_multiple, budget_pages)
        self.rows_multiple, self._longest_row = rows_multiple, min(pages_per_row, total_num_pages)
        self.storage = PagedStorage(
            total_num_pages + 1,
            page_size,
            config.num_key_value_heads,
            config.head_dim,
            dtype,
            rows,
            pages_per_row * page_size,
            device=device,
            scratch_pages=self.scratch_pages,
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
        self.is_paged = not is_fp8  # Transformer Engine's attention gets FP8 rows widened, one behind the other
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
        self._widening = None
        self.open_step(starts, new)

    def parts(self, lengths: Sequence[int]) -> list[slice]:
        """Split the rows of a step into those that can take part in a forward pass together.

        Args:
            lengths: Tokens of each row after the step.

        Returns:
            Consecutive rows, in multiples of `rows_multiple`. One part has all of them, unless FP8 pages have too
            little room to be widened.
        """
        if self.storage.scratch is None:
            return [slice(0, len(lengths))]
        parts, first, most = [], 0, 0
        for row in range(0, len(lengths), self.rows_multiple):
            end = row + self.rows_multiple
            pages = self._widened_pages(max(lengths[row:end]))
            if row > first and (end - first) * max(most, pages) > self.scratch_pages:
                parts.append(slice(first, row))
                first, most = row, 0
            most = max(most, pages)
        return [*parts, slice(first, len(lengths))]

    def _widened_pages(self, length: int) -> int:
        """Return how many pages of each row are widened for a row of a length."""
        # Powers of two keep the plans of Transformer Engine's attention few.
        pages = max(1, -(-length // self.storage.page_size))
        return min(1 << (pages - 1).bit_length(), self._longest_row)

    def _keys_of_rows(self) -> int:
        return self._widened_pages(self.longest()) * self.storage.page_size

    @property
    def attended_memory(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer as attention of prompts reads them, with any content."""
        keys, values, *_ = self.storage.scratch or self.caches[1]
        return keys, values

    def attended_pages(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what attention of prompts reads: keys and values [pages, page_size, K, D], and the page table.

        The next layer overwrites widened pages.
        """
        storage = self.storage
        if storage.scratch is None:
            keys, values = self.caches[layer_number]
            return keys, values, storage.page_table
        if self._widening is None:
            self._widening = self._plan_widening()
        storage.widen(layer_number, self._widening.page_table_BW, self._widening.length_B)
        keys, values = storage.scratch
        return keys, values, self._widening.scratch_table_RP

    def _plan_widening(self) -> _Widening:
        storage, rows = self.storage, self.batch_size
        widened = self._widened_pages(self.longest())
        length_B = self.cu_seqlens_kv[: rows + 1].diff()
        entry_P = torch.arange(storage.page_table.shape[1], dtype=torch.int32, device=self.device)
        row_B1 = torch.arange(rows, dtype=torch.int32, device=self.device)[:, None]
        # Behind a row's pages is the page of zeros: others may have NaN of earlier rows, and 0 times NaN is NaN.
        table_RP = torch.full_like(storage.page_table, self.scratch_pages)
        is_own_BP = entry_P * storage.page_size < length_B[:, None]
        table_RP[:rows] = torch.where(is_own_BP, row_B1 * widened + entry_P, self.scratch_pages)
        return _Widening(storage.page_table[:rows, :widened].contiguous(), length_B, table_RP)

    def convert(self, dtype: torch.dtype) -> None:
        """Convert all keys and values to another dtype: see `CacheStep`."""
        super().convert(dtype)
        if self.storage.scratch is not None:
            self.storage.scratch = tuple(tensor.to(dtype) for tensor in self.storage.scratch)

    @property
    def memory_bytes(self) -> int:
        """The bytes of all pages, in all layers, and of the memory in which FP8 pages are widened."""
        return sum(tensor.nbytes for tensor in [*tensors_of(self.caches), *(self.storage.scratch or ())])

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
        for tensor in map(as_bytes, tensors_of(self.caches)):
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
        for tensor in map(as_bytes, tensors_of(self.caches)):
            tensor[own_B] = tensor[read_B]
        entry_P = torch.arange(page_table_BP.shape[1], device=self.device)
        page_table_BP.copy_(torch.where(entry_P < full_B1, source_BP, page_table_BP))


def scratch_pages(
    rows: int, pages_per_row: int, total_num_pages: int, rows_multiple: int = 1, budget_pages: int = 0
) -> int:
    """Return how many FP8 pages can be widened together.

    A step may read a chunk for each row, behind a cached prefix of any length. So only as many pages as the longest
    row has, for each row, would always be enough, which may be far more than all pages. Here the longest rows that a
    forward pass cannot do without fit, and beside them the larger of an eighth of all pages and of twice the pages of
    the prompts that a step reads, but no more than all pages.

    `EngineCache.parts` counts each row with the pages of the longest one, rounded up to a power of two. That is less
    than twice as many, so new prompts of one length, of half a page or more, take one pass. A widened page is of one
    layer, so with 32 layers an eighth of all pages takes less than a hundredth of the cache.

    Args:
        rows: Most rows of a step.
        pages_per_row: Most pages of a row.
        total_num_pages: All pages.
        rows_multiple: See `EngineCache`.
        budget_pages: Pages of the tokens that a step reads.
    """
    longest = min(pages_per_row, total_num_pages)
    beside = min(total_num_pages, max(total_num_pages // SCRATCH_SHARE, SCRATCH_BUDGETS * budget_pages))
    return min(rows * longest, rows_multiple * longest + beside)
