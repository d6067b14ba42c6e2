"""Checkpoints with a head of its own beside `tie_word_embeddings=true`."""

from __future__ import annotations

from ..layout.rules import EMBEDDINGS, HEAD
from .checkpoint import Checkpoint
from .tensor_source import row_chunks


def has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the configuration ties the head to the embeddings, but the checkpoint stores a head with other values.

    transformers does not tie such a model, so its logits come from the stored head.

    Raises:
        CheckpointError: A file cannot be read.
    """
    tensors, source = checkpoint.source.tensors, checkpoint.source
    if checkpoint.config.get("tie_word_embeddings") is not True or not {HEAD, EMBEDDINGS} <= tensors.keys():
        return False
    info = tensors[HEAD]
    if info != tensors[EMBEDDINGS]:
        return True
    return any(
        bytes(source.read(HEAD, start, stop)) != source.read(EMBEDDINGS, start, stop)
        for start, stop in row_chunks(info, 0, info.rows)
    )
