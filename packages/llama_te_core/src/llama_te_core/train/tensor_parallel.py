"""Old path of `llama_te_core.parallel.shards`; import from there."""

from ..parallel.shards import gather_halves

__all__ = ["gather_halves"]
