"""The conversion that llama_te_core finds through an entry point (`llama_te_core.conversion`)."""

from __future__ import annotations

from .configs.model_config import te_config
from .loading import load_converted
from .on_disk import convert_checkpoint

__all__ = ["convert_checkpoint", "load_converted", "te_config"]
