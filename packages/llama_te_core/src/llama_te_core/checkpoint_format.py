"""Defines a checkpoint's files beside its tensors: `config.json`, and the code that finds its classes.

This module imports only the standard library, for tools that only read and write files.
"""

from __future__ import annotations

import json
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
