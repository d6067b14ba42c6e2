"""What an engine takes from its model and the machine: how long texts may be, where they end, how many pages fit."""

from __future__ import annotations

from typing import Any

import torch

GPU_SHARE = 0.85  # of the free memory, for pages; the rest is for what a forward pass needs
HOST_BYTES = 2 << 30  # for pages on a CPU


def check_model(model: Any) -> None:
    """Refuse a model that an engine cannot run.

    Raises:
        ValueError: It is of another class, or in training mode.
    """
    from llama_te_core import NVLlamaForCausalLM  # here, since it takes transformers' models with it

    if not isinstance(model, NVLlamaForCausalLM):
        raise ValueError(
            f"model is a {type(model).__name__}: give a llama_te_core.NVLlamaForCausalLM. A Hugging Face Llama is "
            "converted with llama_te_convert.convert_llama_hf_to_te first."
        )
    if model.training:
        raise ValueError("model is in training mode: call model.eval() first.")


def max_sequence_length_of(config: Any, wanted: int | None) -> int:
    """Tokens that a sequence may have.

    Args:
        config: The model's.
        wanted: What the user asks for; `None` for all that the model allows.

    Raises:
        ValueError: The model's rotation of positions depends on how long the longest text is, and would change there:
            texts that run together are not equally long, and what is in the cache stays as it was rotated.
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
    return wanted


def eos_token_ids_of(model: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """The tokens that end a text: the generation configuration's, else the configuration's, else the tokenizer's."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(
                token for token in (ids if isinstance(ids, list | tuple) else [ids]) if token < model.config.vocab_size
            )
    return ()


def fitting_pages(model: Any, page_size: int) -> int:
    """Pages of the model's cache that fit the memory that is free now."""
    config = model.config
    itemsize = model.get_input_embeddings().weight.dtype.itemsize
    page_bytes = 2 * config.num_hidden_layers * page_size * config.num_key_value_heads * config.head_dim * itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        # What PyTorch holds and does not use is free too.
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return int(free * GPU_SHARE) // page_bytes
    return HOST_BYTES // page_bytes
