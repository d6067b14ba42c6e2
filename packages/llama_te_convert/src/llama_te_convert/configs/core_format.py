"""The module `llama_te_core.checkpoint_format`, which imports neither torch nor transformers."""

from __future__ import annotations

from llama_te_core import checkpoint_format

__all__ = ["checkpoint_format"]
