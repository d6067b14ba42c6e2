"""Defines a checkpoint's files beside its tensors: `config.json`, and the code that finds its classes.

This module imports only the standard library, for tools that only read and write files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "nv_llama"
# Our configuration adds these fields to a plain Llama's, with these defaults.
FIELDS: dict[str, Any] = {
    "attn_input_format": "thd",
    "self_attn_mask_type": "padding_causal",
    "layer_precision": None,
    "use_quantized_model_init": False,
    "source_model_type": "llama",
}

# config.json has this text in place of the activation, which is "silu" in every checkpoint of this layout. Building a
# plain Llama from the file then fails with this text. Otherwise transformers would only warn about the other
# `model_type`, and would fill every layer with random numbers. A configuration class can still read the file: the field
# is a text in every class that derives from LlamaConfig, and models on Transformer Engine layers do not use it.
_NOT_A_PLAIN_LLAMA = (
    "these weights have the Transformer Engine layout: load them with llama_te_core.NVLlamaForCausalLM, "
    "or convert them with llama_te_convert.convert_llama_te_to_hf"
)
_ACTIVATION = "silu"

CHECKSUMS = "checksums.json"  # sizes and checksums of the other files: see llama_te_core.files.checksums
# The largest sizes of a model. They leave room above every known Llama, whose largest numbers are beside them.
_LARGEST = {
    "num_hidden_layers": 1024,  # 315, merged from other models
    "num_attention_heads": 1024,  # 128
    "num_key_value_heads": 1024,  # 128
    "head_dim": 2**16,  # 256
    "hidden_size": 2**24,  # 16,384
    "intermediate_size": 2**26,  # 53,248
    "vocab_size": 2**31 - 1,  # 262,144
    "max_position_embeddings": 2**40,  # 10,485,760
}
_OPTIONAL = ("head_dim", "num_key_value_heads")  # None follows from other sizes
_POSITIVE_OF_ROPE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LISTS_OF_ROPE = ("short_factor", "long_factor")

LOADER = "llama_te"
STANDALONE = "modeling_nvllama"  # imports every other module of the bundled code
IS_INSTALLED = __package__ == "llama_te_core"  # else this code came with a checkpoint

LOADER_SOURCE = '''"""Loads this checkpoint's classes from the installed package: pip install llama-te-core."""

from llama_te_core import (
    NVLlamaConfig,
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
)
'''


def auto_map(module: str) -> dict[str, str]:
    """Return the entry of `config.json` that names the module of each class. The module lies beside `config.json`.

    One module has all classes: transformers imports each module named here, and its imports, as separate modules.
    """
    return {
        "AutoConfig": f"{module}.NVLlamaConfig",
        "AutoModel": f"{module}.NVLlamaModel",
        "AutoModelForCausalLM": f"{module}.NVLlamaForCausalLM",
        "AutoModelForSequenceClassification": f"{module}.NVLlamaForSequenceClassification",
        "AutoModelForTokenClassification": f"{module}.NVLlamaForTokenClassification",
        "AutoModelForQuestionAnswering": f"{module}.NVLlamaForQuestionAnswering",
    }


AUTO_MAP = auto_map(LOADER if IS_INSTALLED else STANDALONE)


def config_text(fields: Mapping[str, Any]) -> str:
    """Return the text of `config.json`, with the guard against plain Llama classes.

    Args:
        fields: The configuration as JSON types.
    """
    return json.dumps({**fields, "hidden_act": _NOT_A_PLAIN_LLAMA}, indent=2, sort_keys=True) + "\n"


def has_te_layout(content: Mapping[str, Any]) -> bool:
    """Whether the content of a `config.json` says that the checkpoint has this layout.

    Other code with the same layout keeps the `model_type` of a plain Llama, and names its classes as ours are named.
    """
    if content.get("model_type") == MODEL_TYPE:
        return True
    named = content.get("architectures")
    return isinstance(named, list) and any(isinstance(each, str) and each.startswith("NVLlama") for each in named)


def config_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that `config_text` wrote. Content that it did not write stays as it is."""
    fields = dict(content)
    if fields.get("hidden_act") == _NOT_A_PLAIN_LLAMA:
        fields["hidden_act"] = _ACTIVATION
    return fields


def check_values(fields: Mapping[str, Any]) -> None:
    """Refuse numbers that no model can have: sizes that are not positive or absurd, and numbers that are not finite.

    Args:
        fields: Fields of a configuration. Those that are missing are not checked.

    Raises:
        ValueError: The message names the field, its value and what is allowed.
    """
    for name, largest in _LARGEST.items():
        value = fields.get(name)
        if name not in fields or (value is None and name in _OPTIONAL):
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 to {largest:,}.")
    if fields.get("head_dim") is not None and fields["head_dim"] % 2:
        raise ValueError(
            f"head_dim={fields['head_dim']} must be even: rotary embeddings turn the two halves of a head."
        )
    for name, largest_number in (("rms_norm_eps", math.inf), ("initializer_range", 1), ("attention_dropout", 1)):
        value = fields.get(name)
        if value is not None and not (_is_finite(value) and 0 <= value <= largest_number):
            limit = "" if largest_number == math.inf else f" up to {largest_number}"
            raise ValueError(f"{name}={value!r} must be a finite number from 0{limit}.")
    if fields.get("rope_theta") is not None:  # the name in older files
        _check_rope({"rope_theta": fields["rope_theta"]})
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(name), Mapping):
            _check_rope(fields[name])


def _check_rope(rope: Mapping[str, Any]) -> None:
    for name, value in rope.items():
        if name in _LISTS_OF_ROPE:
            is_valid = isinstance(value, list | tuple) and all(_is_finite(each) and each > 0 for each in value)
            kind = "a list of finite numbers above 0"
        elif name in _POSITIVE_OF_ROPE:
            is_valid, kind = value is None or (_is_finite(value) and value > 0), "a finite number above 0"
        else:
            is_valid, kind = not isinstance(value, float) or math.isfinite(value), "a finite number"
        if not is_valid:
            raise ValueError(f"{name}={value!r} of the rotary embeddings must be {kind}.")
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise ValueError(
            f"low_freq_factor={low!r} of the rotary embeddings must be less than high_freq_factor={high!r}."
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
