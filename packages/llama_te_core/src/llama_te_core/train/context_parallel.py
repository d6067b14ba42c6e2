"""Old path of `llama_te_core.parallel.context`; import from there."""

from ..parallel.context import shard_context

__all__ = ["shard_context"]
