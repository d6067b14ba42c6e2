"""Limits from the model and the machine: the maximum length of a sequence, its EOS tokens, the number of pages."""

from __future__ import annotations

import bisect
import functools
import warnings
from dataclasses import dataclass
from typing import Any

from llama_te_core.layers.kv_cache import computing_dtype

from ..integers import as_integer
from ..kv_cache.cache_format import CacheFormat, cache_format
from ..kv_cache.engine_cache import scratch_pages
from ..kv_cache.memory import PAGE_BYTES_ON_HOST, check_fits, free_memory, total_memory
from ..ops import library
from ..ops.decode_attention import takes_decode_attention
from ..ops.library import name_of

GPU_SHARE = 0.85  # the pages' share of the free memory; a forward pass needs the rest
HOST_BYTES = 2 << 30  # memory for pages on a CPU
ROW_BYTES = 1024  # of a row's parameters and lengths, on the device and the host
PAGE_TABLES = 3  # of the cache, the running batch and the prefill


def check_model(model: Any) -> None:
    """Refuse a model that an engine cannot run.

    Raises:
        ValueError: The model has another class, or has its weights elsewhere.
    """
    from llama_te_core import NVLlamaForCausalLM  # a late import: it loads transformers' models

    if not isinstance(model, NVLlamaForCausalLM):
        raise ValueError(
            f"model is a {type(model).__name__}: give a llama_te_core.NVLlamaForCausalLM. A Hugging Face Llama is "
            "converted with llama_te_convert.convert_llama_hf_to_te first."
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            "weights of the model are not in memory, since accelerate keeps them on the CPU or on disk: load the model "
            'on one device, such as device_map={"": 0}. model.generate works with such weights.'
        )


def model_kind(model: Any) -> str:
    """Return in words what an engine's memory depends on: dtype, device and size of the vocabulary."""
    weight = model.get_input_embeddings().weight
    return f"{name_of(weight.dtype)} on {weight.device} with {model.lm_head.out_features} tokens"


def max_sequence_length_of(config: Any, wanted: int | None) -> int:
    """Return the maximum number of tokens of a sequence.

    Args:
        config: The model's configuration.
        wanted: The user's choice; `None` for the model's limit.

    Raises:
        ValueError: `wanted` is more than the model's limit; or the model's rotary angles depend on the length of the
            longest sequence, and would change below `wanted`. Sequences of different lengths run together, and cached
            keys keep their rotation.
    """
    longest = int(config.max_position_embeddings)
    rope_type = config.rope_parameters["rope_type"]
    changes = rope_type in ("dynamic", "longrope")
    if rope_type == "longrope":
        longest = int(config.rope_parameters["original_max_position_embeddings"])
    if wanted is None:
        return longest
    if changes and wanted > longest:
        raise ValueError(
            f"max_sequence_length={wanted}, but with rope_type={rope_type!r} angles change beyond {longest} tokens, "
            f"for all texts of a batch: give at most {longest}, or use model.generate for longer ones."
        )
    if wanted > longest:
        raise ValueError(
            f"max_sequence_length={wanted}, but the model's max_position_embeddings is {longest}: give at most "
            f"{longest}. For longer sequences give the model's configuration rope_parameters that scale its rotary "
            "angles, and the new max_position_embeddings."
        )
    return wanted


def eos_token_ids_of(model: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """Return the model's EOS tokens: the generation configuration's, else the configuration's, else the tokenizer's.

    Tokens outside the vocabulary are left out, with one warning: checkpoints have them, and no text can end with one.

    Raises:
        ValueError: One is no integer.
    """
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is None:
            continue
        name, known = type(source).__name__, []
        for value in ids if isinstance(ids, list | tuple) else [ids]:
            token = as_integer(value)
            if token is None:
                raise ValueError(f"{name} has eos_token_id={ids!r}: give a token id, a list of them, or None.")
            if 0 <= token < model.config.vocab_size:
                known.append(token)
            else:
                _warn_of_unknown_eos(name, token, model.config.vocab_size)
        return tuple(known)
    return ()


@functools.cache
def _warn_of_unknown_eos(name: str, token: int, vocab_size: int) -> None:
    warnings.warn(
        f"{name} has the EOS token {token}, and the model knows 0 to {vocab_size - 1}: the engine leaves it out.",
        stacklevel=2,
    )


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of an engine's cache, whatever its number of pages.

    Args:
        model: The model, on its device.
        format: Of the pages.
        rows: Most rows of a forward pass.
        rows_multiple: See `EngineCache`.
        max_sequence_length: Most tokens of a row.
        page_size: Tokens of a page.
        prefill_budget: See `EngineCache`.
    """

    model: Any
    format: CacheFormat
    rows: int
    rows_multiple: int
    max_sequence_length: int
    page_size: int
    prefill_budget: int = 0

    @property
    def pages_per_row(self) -> int:
        """Most pages of a row."""
        return -(-self.max_sequence_length // self.page_size)

    @property
    def page_bytes(self) -> int:
        """The memory of a page, in all layers."""
        return int(self.model.config.num_hidden_layers) * self._page_bytes_of_layer(self.format)

    def cache_bytes(self, total_num_pages: int) -> int:
        """Return the memory of so many pages, and of the scratch pages that FP8 needs beside them."""
        return total_num_pages * self.page_bytes + self._scratch_pages(total_num_pages) * self._scratch_page_bytes

    def fitting_pages(self, memory: float) -> int:
        """Return the number of pages that fit into so many bytes; it may be less than 1."""
        most = int(memory // self.page_bytes)  # as many as fit without scratch pages, whose number grows with theirs
        return bisect.bisect_right(range(most + 1), memory, key=self.cache_bytes) - 1

    def _scratch_pages(self, total_num_pages: int) -> int:
        if not self.format.is_fp8:
            return 0
        budget_pages = -(-self.prefill_budget // self.page_size)
        return scratch_pages(self.rows, self.pages_per_row, total_num_pages, self.rows_multiple, budget_pages)

    @property
    def _scratch_page_bytes(self) -> int:
        return self._page_bytes_of_layer(CacheFormat(self.format.dtype))

    def _page_bytes_of_layer(self, its_format: CacheFormat) -> int:
        config = self.model.config
        return int(self.page_size * its_format.token_bytes(config.num_key_value_heads, config.head_dim))


def checked_cache_format(model: Any, kv_cache_dtype: str, page_size: int) -> CacheFormat:
    """Return the format of an engine's cache.

    Args:
        model: The model, on its device.
        kv_cache_dtype: See `Engine`.
        page_size: Tokens of a page.

    Raises:
        ValueError: There is no such format, the model computes otherwise, or on a GPU there are no kernels for it.
    """
    its_format = cache_format(kv_cache_dtype, computing_dtype(model.get_input_embeddings().weight))
    if not its_format.is_fp8 or model.device.type != "cuda":
        return its_format
    argument = f"{kv_cache_dtype=}"
    if not library.available("cuda"):
        raise ValueError(
            f"{argument}, but the compiled operators do not run on this GPU: python -m llama_te_infer.info says why. "
            "Use 'auto' without them."
        )
    config, most = model.config, library.limits()
    group = config.num_attention_heads // config.num_key_value_heads
    if not takes_decode_attention(its_format.dtype, group, config.head_dim, page_size):
        raise ValueError(
            f"{argument} with layers in {name_of(its_format.dtype)}, heads of {config.head_dim}, {group} query heads "
            f"for each key and {page_size=}: the kernels take bfloat16, heads of "
            f"{' or '.join(map(str, most.decode_head_dims))}, up to {most.max_decode_group} query heads and a "
            f"page_size that is a multiple of {most.decode_tile_keys}. Change what differs, or use 'auto'."
        )
    return its_format


def fitting_pages(sizes: CacheSizes, gpu_memory_utilization: float | None) -> int:
    """Return the number of pages of the model's cache that fit into the memory.

    Args:
        sizes: Of the cache.
        gpu_memory_utilization: See `Engine`.

    Raises:
        ValueError: `gpu_memory_utilization` is no share, or too small for the weights and one page.
    """
    device = sizes.model.device
    if gpu_memory_utilization is not None:
        return _pages_of_share(sizes, gpu_memory_utilization)
    free = free_memory(device) if device.type == "cuda" else None
    return sizes.fitting_pages(HOST_BYTES if free is None else free * GPU_SHARE)


def _pages_of_share(sizes: CacheSizes, share: float) -> int:
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization={share!r} is not possible: give a number above 0, up to 1 for all.")
    device, weights = sizes.model.device, weight_bytes(sizes.model)
    total = total_memory(device)
    if total is None:
        raise ValueError(f"gpu_memory_utilization={share!r}: nobody says how much memory {device} has.")
    pages = sizes.fitting_pages(share * total - weights)
    if pages < 1:
        least = sizes.cache_bytes(1)
        raise ValueError(
            f"gpu_memory_utilization={share!r} is {share * total / 2**30:,.1f} of the {total / 2**30:,.1f} GiB of "
            f"{device}, but the weights take {weights / 2**30:,.1f} GiB, and a cache of one page "
            f"{least / 2**30:,.3f} GiB: give more than {(weights + least) / total:.3f}."
        )
    return pages


def weight_bytes(model: Any) -> int:
    """Return the memory of a model's weights on its device; on a GPU of all that this process has allocated there."""
    if model.device.type == "cuda":
        import torch

        # Parameters in FP8 do not say their true size.
        return int(torch.cuda.memory_allocated(model.device))
    return int(model.get_memory_footprint())


def check_memory(sizes: CacheSizes, total_num_pages: int, max_batch_size: int) -> None:
    """Refuse sizes of an engine that need more memory than there is: for pages, tables, logits and rotary angles.

    Raises:
        ValueError: There is less memory.
    """
    model, page_size, max_sequence_length = sizes.model, sizes.page_size, sizes.max_sequence_length
    needed = sizes.cache_bytes(total_num_pages) + sizes.page_bytes + (total_num_pages + 1) * PAGE_BYTES_ON_HOST
    row_bytes = ROW_BYTES + PAGE_TABLES * 4 * sizes.pages_per_row
    needed += max_batch_size * (row_bytes + model.lm_head.out_features * sizes.format.dtype.itemsize)
    needed += max_sequence_length * model.config.head_dim * 4
    arguments = f"{max_batch_size=}, {max_sequence_length=}, {page_size=}, {total_num_pages=}"
    check_fits(arguments, needed, free_memory(model.device), model.device)
