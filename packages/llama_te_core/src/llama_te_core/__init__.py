"""Llama 3 on NVIDIA Transformer Engine, as transformers models: `NVLlamaForCausalLM` and its kin.

Importing this package makes transformers' Auto classes know the models. Transformer Engine itself is imported when a
model is built on a machine with a GPU.
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .data.collators import DataCollatorWithFlattening
from .data.labels import next_token_labels
from .data.packing import TokenPackingDataset
from .loss.linear_cross_entropy import linear_cross_entropy
from .models.configuration_nvllama import NVLlamaConfig
from .models.modeling_nvllama import (
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
    NVLlamaPreTrainedModel,
)
from .precision.plan import calibrate

try:
    __version__ = version("llama-te-core")
except PackageNotFoundError:  # used from a source folder
    __version__ = "0+unknown"

__all__ = [
    "DataCollatorWithFlattening",
    "NVLlamaConfig",
    "NVLlamaForCausalLM",
    "NVLlamaForQuestionAnswering",
    "NVLlamaForSequenceClassification",
    "NVLlamaForTokenClassification",
    "NVLlamaModel",
    "NVLlamaPreTrainedModel",
    "TokenPackingDataset",
    "calibrate",
    "linear_cross_entropy",
    "next_token_labels",
]

AutoConfig.register(NVLlamaConfig.model_type, NVLlamaConfig, exist_ok=True)
AutoModel.register(NVLlamaConfig, NVLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(NVLlamaConfig, NVLlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NVLlamaConfig, NVLlamaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(NVLlamaConfig, NVLlamaForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(NVLlamaConfig, NVLlamaForQuestionAnswering, exist_ok=True)
# By this list of names Trainer knows whose labels to shift when it computes the loss itself, as label smoothing does.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NVLlamaConfig.model_type] = NVLlamaForCausalLM.__name__
