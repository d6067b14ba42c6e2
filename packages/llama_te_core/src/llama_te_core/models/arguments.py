"""Arguments of transformers' Llama that the models here do not have, and the selection of hidden states."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..compat.transformers import cache_field

CACHE_FIELD = cache_field()  # a constant, since torch.compile cannot trace the function

# transformers and its trainers pass these around. They change nothing in transformers' Llama either.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_router_logits",
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "tokenizer",
    }
)


def check_arguments(config: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the layers cannot follow. Warn once about each name that nothing knows.

    Args:
        config: Of the model.
        arguments: The arguments of a forward pass that nothing has used.

    Raises:
        ValueError: `output_attentions=True` (here or in the configuration), or `is_causal=False`.
    """
    attentions = arguments.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        raise ValueError(
            "output_attentions=True: the layers compute attention in fused kernels, which return no weights. Leave it "
            "out, or convert the model to transformers' Llama (llama_te_convert.convert_llama_te_to_hf)."
        )
    if arguments.get("is_causal") is False or getattr(config, "is_causal", None) is False:
        raise ValueError("is_causal=False: the layers compute causal attention only. Leave it out.")
    for name, value in arguments.items():
        if value is not None and name not in _WITHOUT_EFFECT and name not in ("output_attentions", "is_causal"):
            _warn_once(name)


def given_cache(past_key_values: Any | None, cache: Any | None) -> Any | None:
    """Return the cache, which has two names.

    Raises:
        ValueError: Both names have a value.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and both are given: give one.")
    return past_key_values if cache is None else cache


def select_hidden_states(
    hidden_states: tuple[torch.Tensor, ...], output_hidden_states: Any
) -> tuple[torch.Tensor | None, ...] | None:
    """Return the hidden states that are asked for, with `None` in the place of the others.

    Args:
        hidden_states: All of them.
        output_hidden_states: A flag, an index or several indices, as in transformers: negative indices count from the
            end, and the number 0 is the flag `False`.
    """
    if not output_hidden_states:
        return None
    if output_hidden_states is True:
        return hidden_states
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else list(output_hidden_states)
    count = len(hidden_states)
    wanted = {index % count for index in indices if -count <= index < count}
    return tuple(hidden if index in wanted else None for index, hidden in enumerate(hidden_states))


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(f"{name} is not an argument of the model's forward pass, and has no effect.", stacklevel=2)
