"""Limits from the model and the machine: the maximum length of a sequence, its EOS tokens, the number of pages."""

from __future__ import annotations

from typing import Any

import torch

from llama_te_core.layers.kv_cache import computing_dtype

from ..ops.library import name_of

GPU_SHARE = 0.85  # the pages' share of the free memory; a forward pass needs the rest
HOST_BYTES = 2 << 30  # memory for pages on a CPU


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
    """Return the model's EOS tokens: the generation configuration's, else the configuration's, else the tokenizer's."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(
                token for token in (ids if isinstance(ids, list | tuple) else [ids]) if token < model.config.vocab_size
            )
    return ()


def fitting_pages(model: Any, page_size: int) -> int:
    """Return the number of pages of the model's cache that fit into the free memory."""
    config = model.config
    itemsize = computing_dtype(model.get_input_embeddings().weight).itemsize
    page_bytes = 2 * config.num_hidden_layers * page_size * config.num_key_value_heads * config.head_dim * itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        # PyTorch's reserved but unused memory is free too.
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return int(free * GPU_SHARE) // page_bytes
    return HOST_BYTES // page_bytes
