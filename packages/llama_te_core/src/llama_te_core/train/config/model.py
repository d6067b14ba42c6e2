"""The section `model` of a configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...checkpoint_format import has_te_layout
from ...compat.transformers import rope_parameter_names
from ...files.input_files import read_json
from .bounds import at_least, finite


@dataclass(frozen=True)
class ShapeConfig:
    """The sizes of a model from scratch; names and defaults are those of transformers' LlamaConfig.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Width of the model.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Size of a head; null for hidden_size / num_attention_heads.
        max_position_embeddings: Tokens of the longest sequence.
        rms_norm_eps: Epsilon of the norms.
        rope_parameters: rope_type, rope_theta and the values that the type needs.
        tie_word_embeddings: Whether the head is the embedding.
        initializer_range: Standard deviation of the random weights.
    """

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def check(self) -> None:
        """Refuse sizes that no model can have; `ModelConfig` calls this.

        Raises:
            ValueError: With the size and its value.
        """
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*positive, "num_key_value_heads", "max_position_embeddings"):
            at_least(f"model.shape.{name}", getattr(self, name), 1)
        if self.head_dim is not None:
            at_least("model.shape.head_dim", self.head_dim, 1)
        finite("model.shape.rms_norm_eps", self.rms_norm_eps)
        if not 0 <= self.initializer_range <= 1:
            raise ValueError(f"model.shape.initializer_range={self.initializer_range!r}: it must be from 0 to 1.")
        for name, value in self.rope_parameters.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float):
                    finite(f"model.shape.rope_parameters.{name}", number)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.shape.hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={self.num_attention_heads}: change one of them, or set head_dim."
            )
        from ...layers.rope import check_rope_type  # here, since it imports torch

        check_rope_type(self.rope_parameters.get("rope_type", "default"))
        # transformers accepts unknown names silently, or warns and takes the defaults.
        known = rope_parameter_names()
        unknown = sorted(set(self.rope_parameters) - known)
        if unknown:
            raise ValueError(
                f"model.shape.rope_parameters has {', '.join(unknown)}: it may have {', '.join(sorted(known))}, as its "
                "rope_type needs them."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model, and the source of its weights.

    Attributes:
        checkpoint: The weights that training begins with: a folder in the Transformer Engine layout; or a Hugging Face
            checkpoint (folder, hub id or GGUF file), which is converted into the run's folder (needs llama-te-convert).
        shape: Sizes of a model from scratch, in place of a checkpoint.
        layer_implementation: auto takes Transformer Engine where it runs, and plain PyTorch elsewhere.
    """

    checkpoint: str | None = None
    shape: ShapeConfig | None = None
    layer_implementation: Literal["auto", "transformer_engine", "reference"] = "auto"

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.shape is None):
            given = "neither is" if self.shape is None else "both are"
            raise ValueError(
                f"model.checkpoint and model.shape: {given} given. Give a checkpoint to go on training with, or the "
                "shape of a model from scratch (a preset has one: --model.shape null drops it)."
            )
        if self.shape is not None:
            self.shape.check()

    @property
    def is_converted(self) -> bool:
        """Whether the checkpoint is in Hugging Face's layout, so that the run must convert it."""
        return self.checkpoint is not None and not has_te_layout(config_json(Path(self.checkpoint)))

    @property
    def vocab_size(self) -> int | None:
        """The size of the vocabulary; None for a checkpoint that must be fetched or opened first."""
        if self.checkpoint is None:
            return None if self.shape is None else self.shape.vocab_size
        return config_json(Path(self.checkpoint)).get("vocab_size")


def config_json(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`; nothing where there is none."""
    try:
        return read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
