"""What a checkpoint of the Transformer Engine layout has beside its tensors: `config.json`, and what finds its classes.

Nothing but the standard library is imported, so that a tool that knows files alone can read this module by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "nv_llama"
# What a Llama's configuration has besides its own fields, with the values that it gets unless others are set.
FIELDS: dict[str, Any] = {
    "attn_input_format": "thd",
    "self_attn_mask_type": "padding_causal",
    "layer_precision": None,
    "use_quantized_model_init": False,
    "source_model_type": "llama",
}

# Written to config.json in the place of an integer that a plain Llama no longer reads, so that loading the folder as
# one stops with this text: both have a `model_type`, but transformers only warns about that and would go on to fill
# every layer with random numbers.
_NOT_A_PLAIN_LLAMA = (
    "these weights have the Transformer Engine layout: load them with llama_te_core.NVLlamaForCausalLM, "
    "or convert them with llama_te_convert.convert_llama_te_to_hf"
)
_PRETRAINING_TP = "llama_pretraining_tp"  # where the file keeps the integer

LOADER = "llama_te"
STANDALONE = "modeling_nvllama"  # reaches all the others
IS_INSTALLED = __package__ == "llama_te_core.models"  # else a checkpoint brought this code along

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
    """The entry of `config.json` that says that a module beside it has the classes.

    One module has them all: transformers imports each that is named here, and what it imports, as modules of its own.
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
    """The text of `config.json`, with what keeps plain Llama classes off.

    Args:
        fields: The configuration as JSON types.
    """
    guarded = {**fields, "pretraining_tp": _NOT_A_PLAIN_LLAMA, _PRETRAINING_TP: fields["pretraining_tp"]}
    return json.dumps(guarded, indent=2, sort_keys=True) + "\n"


def config_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `config_text` made a file's content of; other content is left as it is."""
    fields = dict(content)
    if fields.get("pretraining_tp") == _NOT_A_PLAIN_LLAMA:
        fields["pretraining_tp"] = fields.pop(_PRETRAINING_TP, 1)
    return fields
