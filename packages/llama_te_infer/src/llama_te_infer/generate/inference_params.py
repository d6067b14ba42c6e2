"""Key/value caches with the interface of Transformer Engine's `InferenceParams`, in plain PyTorch, on any device.

`InferenceParams` knows the row and the length of each sequence; a cache manager holds the keys and values. The same
objects serve Transformer Engine's layers, the reference layers and transformers' `generate`.

In TE 2.20's own class a running sequence advances by one token a step. Here it advances by any number of new tokens.

Shapes: B rows of the batch, S new columns, C columns seen, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache

from llama_te_core.layers.kv_cache import computing_dtype

from ..decode.backend import check_implementation, select_backend
from ..decode.fused import FusedDecode
from ..decode.inputs import StepInputs
from ..integers import checked_integer
from ..kv_cache.contiguous import NonPagedKVCacheManager
from ..kv_cache.memory import PAGE_BYTES_ON_HOST, check_fits, total_memory
from ..kv_cache.paged import PagedKVCacheManager
from ..kv_cache.step import CacheStep
from ..kv_cache.storage import CacheManager, cache_device, default_device


class InferenceParams(CacheStep, Cache):
    """Key/value cache with the constructor and methods of Transformer Engine's class.

    It is a `transformers.Cache` too, so `generate`, PEFT and accelerate treat it as one. But it stores all tokens of a
    row side by side, without padding, so it has no `layers` and no `update`.

    Args:
        max_batch_size: Number of rows; with beam search, sequences times beams.
        max_sequence_length: Tokens of a row, prompt included.
        num_heads_kv: Key/value heads of a layer.
        head_dim_k: Size of a key head.
        dtype: The dtype of keys and values.
        head_dim_v: Size of a value head; the size of a key head by default.
        is_paged: Whether rows consist of pages.
        total_num_pages: Pages of all rows together. TE demands `max_batch_size * max_sequence_length / page_size`; here
            fewer are enough if rows share pages or stay shorter. A step that needs more pages raises an error.
        page_size: Tokens of a page; must divide `max_sequence_length`.
        max_ctx_len: Most new tokens of a row in one step; required for "thd".
        qkv_format: "bshd" or "thd", the format of the first step.
        device: Holds keys and values; by default the current GPU, or the CPU on a machine without a GPU.
        decode_implementation: The backend for steps of one token whose caller wants logits alone. "layers": the model's
            layers. "fused": the engine's kernels, in a CUDA graph. "auto": on a GPU the kernels, or with one warning
            the layers if the kernels cannot compute the model.

    Raises:
        ValueError: The arguments do not fit together.
    """

    is_compileable = False
    is_croppable = True
    offloading = False
    layers: tuple[()] = ()  # transformers looks here for layers that record their past; these record nothing

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
        if dtype.itemsize == 1:
            raise ValueError(
                f"dtype={dtype} is not possible: give the dtype in which the layers compute, such as torch.bfloat16. "
                'Only an engine stores keys and values in FP8: Engine(model, kv_cache_dtype="fp8").'
            )
        if qkv_format not in ("bshd", "thd"):
            raise ValueError(f"qkv_format={qkv_format!r} is not known: use 'bshd' or 'thd'.")
        if qkv_format == "thd" and max_ctx_len is None:
            raise ValueError("max_ctx_len is missing: qkv_format='thd' needs the most new tokens of a row in one step.")
        check_implementation(decode_implementation)
        max_batch_size = checked_integer("max_batch_size", max_batch_size, 0)
        max_sequence_length = checked_integer("max_sequence_length", max_sequence_length, 0)
        num_heads_kv, head_dim_k = (
            checked_integer("num_heads_kv", num_heads_kv),
            checked_integer("head_dim_k", head_dim_k),
        )
        head_dim_v = head_dim_k if head_dim_v is None else checked_integer("head_dim_v", head_dim_v)
        if max_ctx_len is not None:
            max_ctx_len = checked_integer("max_ctx_len", max_ctx_len, 0)
        self.qkv_format = qkv_format
        self.decode_implementation = decode_implementation
        shared: dict[str, Any] = {
            "head_dim_k": head_dim_k,
            "head_dim_v": head_dim_v,
            "dtype": dtype,
            "device": torch.device(device) if device is not None else default_device(),
        }
        memory: dict[str, Any] = {
            "max_batch_size": max_batch_size,
            "max_seqlen": max_sequence_length,
            "num_heads": num_heads_kv,
        }
        manager: CacheManager
        if is_paged:
            total_num_pages, page_size = _check_pages(max_batch_size, max_sequence_length, total_num_pages, page_size)
        else:
            total_num_pages = page_size = None
        _check_memory(
            max_batch_size,
            max_sequence_length,
            page_size,
            total_num_pages,
            num_heads_kv * (head_dim_k + head_dim_v) * dtype.itemsize,
            shared["device"],
        )
        if total_num_pages is not None and page_size is not None:
            manager = PagedKVCacheManager(total_num_pages, page_size, **memory, **shared)
        else:
            manager = NonPagedKVCacheManager(**memory, **shared)
        super().__init__(
            manager,
            max_batch_size=max_batch_size,
            max_sequence_length=max_sequence_length,
            num_heads_kv=num_heads_kv,
            page_size=page_size,
            total_num_pages=total_num_pages,
            max_ctx_len=max_ctx_len,
            **shared,
        )
        self.cache_manager: CacheManager = manager
        self._fused: FusedDecode | None = None  # stays between prompts, since its graphs serve every prompt
        self._inputs: StepInputs | None = None
        self.reset()

    def __repr__(self) -> str:
        pages = f", {self.total_num_pages} pages of {self.page_size}" if self.is_paged else ""
        return (
            f"{type(self).__name__}({self.max_batch_size} rows of {self.max_sequence_length} tokens{pages}, "
            f"{self.num_heads_kv} heads of {self.head_dim_k}, {self.dtype}, {self.device}, "
            f"filled: {list(self.sequences.values())})"
        )

    # --- Transformer Engine's interface ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all sequences; the memory stays."""
        self.sequences: OrderedDict[int, int] = OrderedDict()
        self.sequences_pre_step: OrderedDict[int, int] = OrderedDict()
        # Whether each column of the caller's padded batch was a token, [B, C]; None: every column was.
        self._columns = 0
        self._token_BC: torch.Tensor | None = None
        self._backend_is_chosen = False
        self.close_step()
        self.cache_manager.reset()

    def pre_step(self, step_dict: Mapping[int, int]) -> None:
        """Begin a step.

        Args:
            step_dict: The number of new tokens of each sequence, by the sequence's id, in the order of the batch's
                rows. A sequence without an entry has ended.

        Raises:
            ValueError: There are too many sequences, or one grows too long. The cache stays as it was.
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
        self.sequences_pre_step, self.sequences = before, after
        self.open_step(list(before.values()), list(step_dict.values()))

    # --- the model's interface (llama_te_core.layers.kv_cache.KVCache) --------------------------------------------

    def begin_step(self, attention_mask: torch.Tensor | None, batch_size: int, width: int) -> list[int]:
        """Begin a step with the next `width` columns of a padded batch; return the new tokens of each row.

        `generate` writes padding after a finished sequence. If a mask over all columns excludes tokens at the end of a
        cached row, the cache forgets these tokens.

        Args:
            attention_mask: [batch_size, columns seen + width] or [batch_size, width], nonzero for tokens.
            batch_size: Rows.
            width: New columns.

        Raises:
            ValueError: The mask does not fit the cached rows, or rows grow too long. The cache stays as it was.
        """
        running = self._columns > 0
        if width > 1:
            self._backend_is_chosen = False
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
            # In a step of generation every row brings one token. Reading the mask would wait for the device.
            new = [width] * batch_size
            new_BS = None
        else:
            attention_mask = attention_mask.to(self.device) != 0
            new_BS = attention_mask[:, -width:]
            if running and whole:
                self._cut_to(attention_mask[:, : self._columns])
            new = new_BS.sum(1).tolist()  # waits for the device once per prompt, since the host keeps the lengths
        try:
            self.pre_step(OrderedDict(enumerate(new)))
        except ValueError:
            self.sequences, self._token_BC = cached, token_BC  # undo the cut
            raise
        self._add_columns(new_BS, batch_size, width)
        return new

    def decode(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Compute a step of one token for each row by the kernels, if `decode_implementation` allows it.

        The cache chooses the backend at a batch's first step after a prompt. So code may write to a model's weights at
        any time, and may attach hooks, adapters and other weights between prompts.

        Args:
            model: An `NVLlamaForCausalLM`.
            input_ids: int64 [B, 1].
            attention_mask: See `begin_step`.

        Returns:
            Logits [B, 1, V]; `None` if the model's layers have to compute the step.

        Raises:
            IndexError: On a CPU: a token is not in the vocabulary.
            ValueError: See `begin_step`.
            RuntimeError: decode_implementation="fused", and the kernels cannot compute steps of this batch.
        """
        if self._columns == 0 or min(self.sequences.values()) == 0:
            return None  # a prompt; or a row may still have padding here
        if self._inputs is None or len(self._inputs.token_R) != self.batch_size:
            self._backend_is_chosen = False
        if not self._backend_is_chosen:
            self._choose_backend(model)
        if self._fused is None or self._inputs is None:
            return None
        if not input_ids.is_cuda and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < model.config.vocab_size:
            # As PyTorch's embedding does. A GPU's host would wait for the check, and the kernel reads nothing then.
            raise IndexError(
                f"input_ids has tokens outside the vocabulary, which is 0 to {model.config.vocab_size - 1}."
            )
        self.begin_step(attention_mask, len(input_ids), 1)
        with torch.cuda.device_of(self._inputs.token_R):
            self._inputs.token_R.copy_(input_ids[:, 0])
            return self._fused(self._inputs, self.batch_size)[:, None].clone()  # the next step overwrites the logits

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _choose_backend(self, model: Any) -> None:
        rows = self.batch_size
        self._fused, _ = select_backend(model, self, rows, self.decode_implementation, self._fused)
        if self._inputs is None or len(self._inputs.token_R) != rows:
            token_R = torch.zeros(rows, dtype=torch.int64, device=self.device)
            self._inputs = StepInputs(token_R, self.pre_step_seqlens, self.page_table)
        self._backend_is_chosen = True

    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        return max(self.sequences.values(), default=0)

    def repeat_rows(self, copies: int) -> None:
        """Replace each row by `copies` rows that continue it: beams or returned sequences of one prompt.

        Args:
            copies: New rows for each row.

        Raises:
            ValueError: The cache has too few rows, or a paged cache too few pages. The cache stays as it was.
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
        """Begin a sequence with the first tokens of another sequence. A paged cache shares their pages.

        Call this before the `pre_step` that appends the new sequence's other tokens.

        Args:
            source: Id of a sequence in the cache.
            target: Id of the new sequence.
            tokens: Length of the common prefix.

        Raises:
            ValueError: The ids or the number do not fit the cached sequences, or the cache is full.
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

    # --- transformers' interface ------------------------------------------------------------------------------------

    @property
    def is_linear(self) -> list[bool]:
        """Whether layers keep a fixed-size state, a sliding window, or nothing: no."""
        return [False]

    is_sliding = is_dummy = is_linear

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns of the padded batch so far."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens that a row can hold."""
        return self.max_sequence_length

    get_max_cache_shape = get_max_length

    @property
    def max_cache_len(self) -> int:
        """The number of tokens that a row can hold; PEFT reads it."""
        return self.max_sequence_length

    @property
    def is_initialized(self) -> bool:
        """Whether layers have memory."""
        return bool(self.caches)

    def __len__(self) -> int:
        """Return the number of layers that have memory."""
        return len(self.caches)

    def __bool__(self) -> bool:
        """Return `True`: code that writes `if past_key_values` asks whether there is a cache."""
        return True

    def float(self) -> InferenceParams:
        """Return the cache itself: accelerate calls `float` on each output that has a 16-bit `dtype`."""
        return self

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the layers of llama-te store keys and values by `append_rope` and `step`.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__}.update: this cache serves the models of llama_te_core, whose layers store keys and "
            "values by append_rope or step. Pass transformers' models a transformers.DynamicCache."
        )

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of columns with `query_length` new ones, and the first column, 0."""
        return self.get_seq_length() + query_length, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by copies: see `repeat_rows`."""
        self.repeat_rows(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows.

        Args:
            indices: The rows to keep, int64 [rows], or bool [B].
        """
        if self.batch_size == 0:
            return
        known = list(self.sequences.values())
        row_B = torch.arange(self.batch_size)[indices.cpu()]
        sources = row_B.tolist()  # the host keeps the lengths, so it must know the rows
        lengths = [known[row] for row in sources]
        if len(sources) > self.max_batch_size:
            raise ValueError(f"{len(sources)} rows do not fit the cache with max_batch_size={self.max_batch_size}.")
        self.cache_manager.assign_rows(sources, lengths, lengths)
        self.sequences = OrderedDict(enumerate(lengths))
        self.batch_size = len(sources)
        if self._token_BC is not None:
            self._token_BC = self._token_BC[row_B.to(self.device)]

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceParams:
        """Return a cache with the same content in memory of its own. It captures its own graphs."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        state = {**self.__dict__, "_fused": None, "_inputs": None, "_backend_is_chosen": False}
        copied.__dict__.update(copy.deepcopy(state, memo))
        return copied

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def convert(self, dtype: torch.dtype) -> None:
        """Convert all keys and values to another dtype. The kernels capture their graphs again."""
        super().convert(dtype)
        self._fused = self._inputs = None
        self._backend_is_chosen = False

    def activate_past_recording(self) -> None:
        """Do nothing: tokens stay until new tokens overwrite them."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns.

        Args:
            tokens_to_remove: Minus the number of columns (transformers' convention); 0 changes nothing.

        Raises:
            ValueError: The number is positive, or there are fewer columns.
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
        """Let row i continue row `beam_idx[i]`. Beam search calls this between steps.

        Args:
            beam_idx: int64 [B].
        """
        if self.batch_size == 0:
            return  # beam search with use_cache=False leaves a given cache empty, but still reorders it
        source_rows = beam_idx.to(self.device).contiguous()
        lengths = list(self.sequences.values())
        # Beams of one prompt have the same length. Rows of different prompts may not: then the host reads the order.
        sources = beam_idx.tolist() if len(set(lengths)) > 1 else range(self.batch_size)
        moved = [lengths[row] for row in sources]
        if moved == lengths:
            self.cache_manager.reorder(source_rows, lengths)
        else:
            self.cache_manager.assign_rows(sources, moved, moved)
            self.sequences = OrderedDict(zip(self.sequences, moved, strict=True))
        if self._token_BC is not None:
            self._token_BC = self._token_BC[source_rows]

    # --- columns of the padded batch ----------------------------------------------------------------------------------

    def _add_columns(self, new_BS: torch.Tensor | None, batch_size: int, width: int) -> None:
        if new_BS is not None or self._token_BC is not None:
            seen_BC, new_BC = (
                torch.ones(batch_size, columns, dtype=torch.bool, device=self.device) if known is None else known
                for known, columns in ((self._token_BC, self._columns), (new_BS, width))
            )
            self._token_BC = torch.cat((seen_BC, new_BC), dim=1)
        self._columns += width

    def _cut_to(self, mask_BC: torch.Tensor) -> None:
        """Cut each row to the tokens that `mask_BC` keeps."""
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
    """Return a cache that fits a model and a request.

    Args:
        model: An `NVLlamaForCausalLM` (or `NVLlamaModel`).
        batch_size: Prompts.
        max_length: Tokens of a sequence, prompt included.
        num_beams: Beams of each prompt.
        num_return_sequences: Sequences returned for each prompt.
        is_paged: Whether rows consist of pages.
        page_size: Tokens of a page. The function rounds `max_length` up to whole pages.
        prompt_length: Tokens of the longest prompt, if known. Beams and returned sequences share the pages of their
            prompt, so the cache then needs fewer pages.
        decode_implementation: "auto", "fused" or "layers": see `InferenceParams`.

    Raises:
        ValueError: A number is no integer or out of its range, `prompt_length` is not between 0 and `max_length`, there
            is too little memory, or the model's layers compute on several devices.
    """
    config = model.config
    batch_size, max_length = checked_integer("batch_size", batch_size), checked_integer("max_length", max_length)
    num_beams = checked_integer("num_beams", num_beams)
    num_return_sequences = checked_integer("num_return_sequences", num_return_sequences)
    page_size = checked_integer("page_size", page_size)
    if prompt_length is not None:
        prompt_length = checked_integer("prompt_length", prompt_length, 0)
    copies = max(num_beams, num_return_sequences)
    pages: dict[str, Any] = {}
    if is_paged:
        per_row = -(-max_length // page_size)
        shared, own = 0, per_row
        if prompt_length is not None:
            if not 0 <= prompt_length <= max_length:
                raise ValueError(f"prompt_length={prompt_length} must be between 0 and max_length={max_length}.")
            # New tokens may begin at the end of one page, and end at the beginning of another.
            shared = prompt_length // page_size
            own = min(per_row, -(-(max_length - prompt_length) // page_size) + 1)
        total = min(batch_size * (shared + copies * own), batch_size * copies * per_row)
        pages = {"is_paged": True, "page_size": page_size, "total_num_pages": total}
        max_length = per_row * page_size
    _check_memory(
        batch_size * copies, max_length, pages.get("page_size"), pages.get("total_num_pages"), *_token_bytes(model)
    )
    return InferenceParams(
        max_batch_size=batch_size * copies,
        max_sequence_length=max_length,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=computing_dtype(model.get_input_embeddings().weight),
        max_ctx_len=max_length,
        qkv_format=config.attn_input_format,
        device=cache_device(model),
        decode_implementation=decode_implementation,
        **pages,
    )


def cache_for_generation(model: Any, *, batch_size: int, max_length: int | None) -> InferenceParams:
    """Return a cache that grows where rows need it. llama_te_core finds this function by its entry point.

    Args:
        model: An `NVLlamaForCausalLM` (or `NVLlamaModel`).
        batch_size: Rows.
        max_length: Tokens of the longest row, if known.

    Raises:
        ValueError: There is too little memory.
    """
    from .growing_cache import GrowingCache  # a subclass of this module's class

    config = model.config
    # Rounding up gives requests of similar length caches of one size, which reuse TE's attention plans.
    max_length = -(-(max_length or 0) // 64) * 64
    _check_memory(batch_size, max_length, None, None, *_token_bytes(model))
    return GrowingCache(
        batch_size,
        max_length,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=computing_dtype(model.get_input_embeddings().weight),
        qkv_format=config.attn_input_format,
        device=cache_device(model),
    )


def _check_pages(
    max_batch_size: int, max_sequence_length: int, total_num_pages: int | None, page_size: int | None
) -> tuple[int, int]:
    if page_size is None:
        raise ValueError("page_size is missing: is_paged=True needs it.")
    page_size = checked_integer("page_size", page_size)
    if total_num_pages is not None:
        total_num_pages = checked_integer("total_num_pages", total_num_pages)
    if max_sequence_length % page_size:
        raise ValueError(f"page_size={page_size} must divide max_sequence_length={max_sequence_length}.")
    most = max_batch_size * (max_sequence_length // page_size)
    if total_num_pages is None or not 0 < total_num_pages <= most:
        raise ValueError(
            f"total_num_pages={total_num_pages} must be between 1 and max_batch_size * max_sequence_length / page_size "
            f"= {most}, which is enough for all rows at their longest."
        )
    return total_num_pages, page_size


def _token_bytes(model: Any) -> tuple[int, torch.device]:
    """Return the bytes of a token's keys and values in all layers, and the cache's device."""
    config, dtype = model.config, computing_dtype(model.get_input_embeddings().weight)
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return token_bytes, cache_device(model)


def _check_memory(
    rows: int, length: int, page_size: int | None, total_num_pages: int | None, token_bytes: int, device: torch.device
) -> None:
    """Refuse a cache that is larger than the device's whole memory. Reading how much is free would cost time.

    Raises:
        ValueError: It is larger.
    """
    needed = rows * (length * token_bytes + 12)
    arguments = f"{rows} rows of {length} tokens"
    if page_size is not None and total_num_pages is not None:
        needed = total_num_pages * (page_size * token_bytes + PAGE_BYTES_ON_HOST) + rows * (
            4 * (length // page_size) + 12
        )
        arguments += f", {total_num_pages} pages of {page_size} tokens"
    check_fits(arguments, needed, total_memory(device), device)
