"""Conversion between Hugging Face Llama checkpoints and the Transformer Engine layout of llama_te_core."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import convert_adapter
    from .in_memory import convert_llama_hf_to_te, convert_llama_te_to_hf
    from .on_disk import Report, convert_checkpoint
    from .sources.tensor_source import CheckpointError
    from .targets.standalone import export_te_checkpoint

try:
    __version__ = version("llama-te-convert")
except PackageNotFoundError:  # used from a source folder
    __version__ = "0+unknown"

# Imported when they are asked for: transformers' models take seconds, and the command does without them.
_MODULES = {
    "CheckpointError": "sources.tensor_source",
    "Report": "on_disk",
    "convert_adapter": "adapter",
    "convert_checkpoint": "on_disk",
    "convert_llama_hf_to_te": "in_memory",
    "convert_llama_te_to_hf": "in_memory",
    "export_te_checkpoint": "targets.standalone",
}
__all__ = [
    "CheckpointError",
    "Report",
    "convert_adapter",
    "convert_checkpoint",
    "convert_llama_hf_to_te",
    "convert_llama_te_to_hf",
    "export_te_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
