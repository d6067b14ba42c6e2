"""A checkpoint of either layout as Hugging Face tensors, without converting it."""

from __future__ import annotations

import dataclasses

from ..configs.architectures import architecture_of
from ..errors import CheckpointError
from ..layout.mapping import map_known_names
from ..layout.row_order import HeadSizes
from ..layout.row_ranges import ConvertedTensor, RowRange, converted_tensors
from ..layout.rules import HEAD, is_computed
from ..sources.checkpoint import Checkpoint
from ..sources.own_head import has_own_head
from .model_fields import model_fields


class HFView:
    """A checkpoint's tensors by their Hugging Face names, each as row ranges of the stored tensors.

    Args:
        checkpoint: An open checkpoint, of either layout.

    Raises:
        CheckpointError: The configuration or a shape is not valid, or the checkpoint has one tensor twice.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.source = checkpoint.source
        self.fields = model_fields(checkpoint)
        infos = {name: info for name, info in self.source.tensors.items() if not is_computed(name)}
        rules = architecture_of(checkpoint.config).rules
        known = map_known_names(infos, rules=rules, is_te=True) if checkpoint.is_te else {}
        sizes = HeadSizes(*(self.fields[field.name] for field in dataclasses.fields(HeadSizes)))
        try:
            split = converted_tensors({name: infos[name] for name in known}, sizes, to_te=False, rules=rules)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        self.tensors = {tensor.name: tensor for tensor in split}
        for name, info in infos.items():
            if name in known:
                continue
            if name in self.tensors:
                raise CheckpointError(
                    f"{checkpoint.path} has {name} twice: under that name, and within another tensor. Remove one."
                )
            self.tensors[name] = ConvertedTensor(name, info, (RowRange(name, 0, info.rows),))
        self._is_tied = self.fields["tie_word_embeddings"] is True
        if has_own_head(checkpoint):
            self.fields["tie_word_embeddings"] = False  # as transformers loads it, and as a conversion writes it

    @property
    def _embeddings(self) -> ConvertedTensor | None:
        """The embeddings, if the configuration ties the head to them."""
        if not self._is_tied:
            return None
        return next((each for name, each in self.tensors.items() if name.endswith("embed_tokens.weight")), None)

    def add_tied_head(self, other: HFView) -> None:
        """Add a head that is tied to the embeddings and not stored, if the other checkpoint has a head."""
        embeddings = self._embeddings
        if embeddings is not None and HEAD not in self.tensors and HEAD in other.tensors:
            self.tensors[HEAD] = dataclasses.replace(embeddings, name=HEAD)

    def note(self) -> str | None:
        """A warning if the configuration ties the head to the embeddings, but the stored head differs from them."""
        embeddings = self._embeddings
        if embeddings is None or self.fields["tie_word_embeddings"] is True:
            return None
        return (
            f"{self.checkpoint.path} has tied embeddings by its configuration, but its {HEAD} is not "
            f"{embeddings.name}: set tie_word_embeddings to false there, or remove {HEAD}."
        )
