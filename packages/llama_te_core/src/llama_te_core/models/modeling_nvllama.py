"""Llama with Transformer Engine layers, as transformers models: all classes in one module.

A checkpoint's `config.json` names one module for all classes. A standalone checkpoint holds this module with its
imports.
"""

from __future__ import annotations

from .causal_lm import NVLlamaForCausalLM
from .configuration_nvllama import NVLlamaConfig
from .decoder import NVLlamaModel
from .heads import NVLlamaForQuestionAnswering, NVLlamaForSequenceClassification, NVLlamaForTokenClassification
from .pretrained import NVLlamaPreTrainedModel

__all__ = [
    "NVLlamaConfig",
    "NVLlamaForCausalLM",
    "NVLlamaForQuestionAnswering",
    "NVLlamaForSequenceClassification",
    "NVLlamaForTokenClassification",
    "NVLlamaModel",
    "NVLlamaPreTrainedModel",
]
