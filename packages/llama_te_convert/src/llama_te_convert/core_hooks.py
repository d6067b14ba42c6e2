"""The conversion that llama_te_core's training finds through an entry point (`llama_te_core.conversion`)."""

from __future__ import annotations

from .configs.model_config import te_config
from .on_disk import convert_checkpoint

__all__ = ["convert_checkpoint", "te_config"]
