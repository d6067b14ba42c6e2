"""Generation for the models of llama_te_core: key/value caches for Transformer Engine and reference layers."""

from importlib.metadata import PackageNotFoundError, version

from .cache import InferenceParams, inference_params_for
from .cache_managers import NonPagedKVCacheManager, PagedKVCacheManager

try:
    __version__ = version("llama-te-infer")
except PackageNotFoundError:  # used from a source folder
    __version__ = "0+unknown"

__all__ = ["InferenceParams", "NonPagedKVCacheManager", "PagedKVCacheManager", "inference_params_for"]
