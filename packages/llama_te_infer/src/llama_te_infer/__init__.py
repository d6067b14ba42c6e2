"""Generation for the models of llama_te_core: an engine, and key/value caches for `generate`."""

from importlib.metadata import PackageNotFoundError, version

from .engine.engine import Engine
from .engine.sequence import Completion, RequestOutput, TokenEvent, TokenLogprobs
from .generate.inference_params import InferenceParams, inference_params_for
from .kv_cache.managers import NonPagedKVCacheManager, PagedKVCacheManager
from .sampling_params import SamplingParams

try:
    __version__ = version("llama-te-infer")
except PackageNotFoundError:  # used from a source folder
    __version__ = "0+unknown"

__all__ = [
    "Completion",
    "Engine",
    "InferenceParams",
    "NonPagedKVCacheManager",
    "PagedKVCacheManager",
    "RequestOutput",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprobs",
    "inference_params_for",
]
