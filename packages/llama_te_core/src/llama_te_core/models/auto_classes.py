"""The models' registration with transformers' Auto classes."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..compat.transformers import add_causal_model
from .causal_lm import NVLlamaForCausalLM
from .configuration_nvllama import NVLlamaConfig
from .decoder import NVLlamaModel
from .heads import NVLlamaForQuestionAnswering, NVLlamaForSequenceClassification, NVLlamaForTokenClassification


def register() -> None:
    """Let transformers' Auto classes know the configuration and the models."""
    AutoConfig.register(NVLlamaConfig.model_type, NVLlamaConfig, exist_ok=True)
    AutoModel.register(NVLlamaConfig, NVLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(NVLlamaConfig, NVLlamaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(NVLlamaConfig, NVLlamaForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(NVLlamaConfig, NVLlamaForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(NVLlamaConfig, NVLlamaForQuestionAnswering, exist_ok=True)
    add_causal_model(NVLlamaConfig.model_type, NVLlamaForCausalLM.__name__)
