"""Llama 3 on NVIDIA Transformer Engine, as transformers models: `NVLlamaForCausalLM` and its kin.

Importing this package makes transformers' Auto classes know the models. It imports neither torch nor transformers
itself: each name here is imported when it is first used. Transformer Engine is imported when a model is built on a
machine with a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .compat.transformers import when_imported

if TYPE_CHECKING:
    from .data.collators import DataCollatorWithFlattening
    from .data.labels import next_token_labels
    from .data.packing import TokenPackingDataset
    from .loss.linear_cross_entropy import linear_cross_entropy
    from .models.causal_lm import NVLlamaForCausalLM
    from .models.configuration_nvllama import NVLlamaConfig
    from .models.decoder import NVLlamaModel
    from .models.heads import (
        NVLlamaForQuestionAnswering,
        NVLlamaForSequenceClassification,
        NVLlamaForTokenClassification,
    )
    from .models.pretrained import NVLlamaPreTrainedModel
    from .parallel.context_batches import ContextParallelDataLoaderWrapper, DataCollatorForContextParallel
    from .precision.scaling_state import calibrate

    __version__: str

__all__ = [
    "ContextParallelDataLoaderWrapper",
    "DataCollatorForContextParallel",
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

_MODULES = {
    "ContextParallelDataLoaderWrapper": ".parallel.context_batches",
    "DataCollatorForContextParallel": ".parallel.context_batches",
    "DataCollatorWithFlattening": ".data.collators",
    "NVLlamaConfig": ".models.configuration_nvllama",
    "NVLlamaForCausalLM": ".models.causal_lm",
    "NVLlamaForQuestionAnswering": ".models.heads",
    "NVLlamaForSequenceClassification": ".models.heads",
    "NVLlamaForTokenClassification": ".models.heads",
    "NVLlamaModel": ".models.decoder",
    "NVLlamaPreTrainedModel": ".models.pretrained",
    "TokenPackingDataset": ".data.packing",
    "calibrate": ".precision.scaling_state",
    "linear_cross_entropy": ".loss.linear_cross_entropy",
    "next_token_labels": ".data.labels",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-te-core")
    except PackageNotFoundError:  # used from a source folder
        return "0+unknown"


def _register() -> None:
    if importlib.util.find_spec("torch") is None:
        return  # see `import_for_tokenizers`
    from .models.auto_classes import register

    register()


def _register_adapters() -> None:
    from .compat.peft_injection import around_injection

    around_injection(_with_projections)


def _with_projections(model: Any, config: Any) -> Any:
    from .lora import with_projections  # not before it is needed: that module imports PEFT itself

    return with_projections(model, config)


when_imported("transformers", _register)
when_imported("peft", _register_adapters)
