"""Limits from the model and the machine: the maximum length of a sequence, its EOS tokens, the number of pages."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from llama_te_core.layers.kv_cache import computing_dtype

from ..integers import as_integer
from ..kv_cache.memory import PAGE_BYTES_ON_HOST, check_fits, free_memory, total_memory
from ..ops.library import name_of

GPU_SHARE = 0.85  # the pages' share of the free memory; a forward pass needs the rest
HOST_BYTES = 2 << 30  # memory for pages on a CPU
ROW_BYTES = 1024  # of a row's parameters and lengths, on the device and the host
PAGE_TABLES = 3  # of the cache, the running batch and the prefill


def check_model(model: Any) -> None:
    """Refuse a model that an engine cannot run.

    Raises:
        ValueError: The model has another class, is in training mode, or has its weights elsewhere.
    """
    from llama_te_core import NVLlamaForCausalLM  # a late import: it loads transformers' models

    if not isinstance(model, NVLlamaForCausalLM):
        raise ValueError(
            f"model is a {type(model).__name__}: give a llama_te_core.NVLlamaForCausalLM. A Hugging Face Llama is "
            "converted with llama_te_convert.convert_llama_hf_to_te first."
        )
    if model.training:
        raise ValueError("model is in training mode: call model.eval() first.")
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


def fitting_pages(model: Any, page_size: int, gpu_memory_utilization: float | None) -> int:
    """Return the number of pages of the model's cache that fit into the memory.

    Args:
        model: The model, on its device.
        page_size: Tokens of a page.
        gpu_memory_utilization: See `Engine`.

    Raises:
        ValueError: `gpu_memory_utilization` is no share, or too small for the weights and one page.
    """
    page_bytes = _page_bytes(model, page_size)
    if gpu_memory_utilization is not None:
        return _pages_of_share(model, page_bytes, gpu_memory_utilization)
    free = free_memory(model.device) if model.device.type == "cuda" else None
    return HOST_BYTES // page_bytes if free is None else int(free * GPU_SHARE) // page_bytes


def _pages_of_share(model: Any, page_bytes: int, share: float) -> int:
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization={share!r} is not possible: give a number above 0, up to 1 for all.")
    total, weights = total_memory(model.device), weight_bytes(model)
    if total is None:
        raise ValueError(f"gpu_memory_utilization={share!r}: nobody says how much memory {model.device} has.")
    pages = int(share * total - weights) // page_bytes
    if pages < 1:
        raise ValueError(
            f"gpu_memory_utilization={share!r} is {share * total / 2**30:,.1f} of the {total / 2**30:,.1f} GiB of "
            f"{model.device}, but the weights take {weights / 2**30:,.1f} GiB, and a page of the cache "
            f"{page_bytes / 2**30:,.3f} GiB: give more than {(weights + page_bytes) / total:.3f}."
        )
    return pages


def weight_bytes(model: Any) -> int:
    """Return the memory of a model's weights on its device; on a GPU of all that this process has allocated there."""
    if model.device.type == "cuda":
        import torch

        # Parameters in FP8 do not say their true size.
        return int(torch.cuda.memory_allocated(model.device))
    return int(model.get_memory_footprint())


def cache_bytes(model: Any, page_size: int, total_num_pages: int) -> int:
    """Return the memory of the keys and values in so many pages."""
    return total_num_pages * _page_bytes(model, page_size)


def check_memory(
    model: Any, *, max_batch_size: int, max_sequence_length: int, page_size: int, total_num_pages: int
) -> None:
    """Refuse sizes of an engine that need more memory than there is: for pages, tables, logits and rotary angles.

    Raises:
        ValueError: There is less memory.
    """
    config, itemsize = model.config, computing_dtype(model.get_input_embeddings().weight).itemsize
    table_bytes = PAGE_TABLES * 4 * -(-max_sequence_length // page_size)
    needed = (total_num_pages + 1) * (_page_bytes(model, page_size) + PAGE_BYTES_ON_HOST)
    needed += max_batch_size * (ROW_BYTES + table_bytes + model.lm_head.out_features * itemsize)
    needed += max_sequence_length * config.head_dim * 4
    arguments = f"{max_batch_size=}, {max_sequence_length=}, {page_size=}, {total_num_pages=}"
    check_fits(arguments, needed, free_memory(model.device), model.device)


def _page_bytes(model: Any, page_size: int) -> int:
    config = model.config
    itemsize = computing_dtype(model.get_input_embeddings().weight).itemsize
    return int(2 * config.num_hidden_layers * page_size * config.num_key_value_heads * config.head_dim * itemsize)
