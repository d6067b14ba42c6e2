"""Old path of `llama_te_core.train.checkpoint.checkpoints`; import from there."""

from .checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
