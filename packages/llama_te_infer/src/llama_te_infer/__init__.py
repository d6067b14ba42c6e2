"""Generation for the models of llama_te_core: an engine, and key/value caches for `generate`."""

from importlib.metadata import PackageNotFoundError, version

from .cache import InferenceParams, inference_params_for
from .cache_managers import NonPagedKVCacheManager, PagedKVCacheManager
from .engine import Engine
from .request import Completion, RequestOutput, TokenEvent, TokenLogprobs
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
