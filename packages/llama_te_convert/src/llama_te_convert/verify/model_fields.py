"""The configuration fields that describe a model, whatever the layout and age of its `config.json`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..configs.architectures import architecture_of
from ..configs.config_file import is_size
from ..configs.model_config import hf_config
from ..errors import CheckpointError
from ..sources.checkpoint import Checkpoint

# Fields that describe how a checkpoint is stored or run, and not its model.
_NOT_OF_THE_MODEL = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "gradient_checkpointing",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "quantization_config",
        "return_dict",
        "source_model_type",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    )
)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model in its configuration; `None` where the configuration has no usable value."""

    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    heads: int | None
    key_value_heads: int | None
    head_dim: int | None
    vocabulary: int | None
    rope_type: str | None
    tied: bool | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ModelSizes:
        """Read the sizes from configuration fields, which may be broken."""

        def number(name: str) -> int | None:
            value = fields.get(name)
            return value if is_size(value) else None

        rope = fields.get("rope_parameters") or fields.get("rope_scaling")
        rope_type = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        tied = fields.get("tie_word_embeddings")
        hidden_size, heads, head_dim = number("hidden_size"), number("num_attention_heads"), number("head_dim")
        if head_dim is None and hidden_size is not None and heads is not None:
            head_dim = hidden_size // heads
        return cls(
            layers=number("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size"),
            heads=heads,
            key_value_heads=number("num_key_value_heads"),
            head_dim=head_dim,
            vocabulary=number("vocab_size"),
            rope_type=rope_type if isinstance(rope_type, str) else None,
            tied=tied if isinstance(tied, bool) else None,
        )


def model_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration fields that describe the model, with transformers' defaults for missing ones.

    The fields have the names of the Hugging Face layout. Old names, such as `rope_theta` and `rope_scaling`, are
    replaced as transformers replaces them. Fields about storing or running the checkpoint are left out.

    Raises:
        CheckpointError: The configuration does not belong to an architecture that converts.
    """
    import transformers

    given = copy.deepcopy(checkpoint.config)
    given.pop("quantization_config", None)  # describes the file
    try:
        architecture = architecture_of(given)
    except CheckpointError as error:
        raise CheckpointError(f"the configuration of {checkpoint.path} cannot be used: {error}") from error
    try:
        if checkpoint.is_te:
            fields = hf_config(given).to_dict()
        else:
            # This accepts models that the layers cannot run: two Hugging Face checkpoints can still be compared.
            fields = getattr(transformers, architecture.config_class).from_dict(given).to_dict()
    # The checks of transformers raise different exceptions in different versions.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the configuration of {checkpoint.path} cannot be used: {reason} Correct its config.json."
        ) from error
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        rope.pop("type", None)  # the old name of rope_type, which transformers keeps beside it
    described = {name: value for name, value in fields.items() if name not in _NOT_OF_THE_MODEL}
    return {"model_type": architecture.model_type, **described}
