"""Generation for the models of llama_te_core: an engine, and key/value caches for `generate`.

Importing this package imports neither torch nor transformers: a name's module is imported when the name is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.async_engine import AsyncEngine
    from .engine.engine import Engine
    from .engine.logprobs import TokenLogprobs
    from .engine.outputs import Completion, RequestOutput, TokenEvent
    from .generate.inference_params import InferenceParams, inference_params_for
    from .generate.te_inference_params import HFInferenceParams
    from .kv_cache.contiguous import NonPagedKVCacheManager
    from .kv_cache.paged import PagedKVCacheManager
    from .sampling_params import SamplingParams
    from .structured_outputs import StructuredOutputs

try:
    __version__ = version("llama-te-infer")
except PackageNotFoundError:  # used from a source folder
    __version__ = "0+unknown"

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "HFInferenceParams",
    "InferenceParams",
    "NonPagedKVCacheManager",
    "PagedKVCacheManager",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenEvent",
    "TokenLogprobs",
    "inference_params_for",
]

_MODULES = {
    "AsyncEngine": "engine.async_engine",
    "Completion": "engine.outputs",
    "Engine": "engine.engine",
    "HFInferenceParams": "generate.te_inference_params",
    "InferenceParams": "generate.inference_params",
    "NonPagedKVCacheManager": "kv_cache.contiguous",
    "PagedKVCacheManager": "kv_cache.paged",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "sampling_params",
    "StructuredOutputs": "structured_outputs",
    "TokenEvent": "engine.outputs",
    "TokenLogprobs": "engine.logprobs",
    "inference_params_for": "generate.inference_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
