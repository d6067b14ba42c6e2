"""Conversion between Hugging Face Llama checkpoints and the Transformer Engine layout of llama_te_core."""

from importlib.metadata import PackageNotFoundError, version

from .models import convert_llama_hf_to_te, convert_llama_te_to_hf

try:
    __version__ = version("llama-te-convert")
except PackageNotFoundError:  # used from a source folder
    __version__ = "0+unknown"

__all__ = ["convert_llama_hf_to_te", "convert_llama_te_to_hf"]
