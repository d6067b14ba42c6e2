"""The whole configuration of a run, and the checks of its sections against each other."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .bounds import at_least
from .checkpoint import CheckpointConfig
from .data import DataConfig
from .export import ExportConfig
from .log import LogConfig
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .precision import PrecisionConfig
from .profile import ProfileConfig
from .schedule import ScheduleConfig

if TYPE_CHECKING:
    from ...models.configuration_nvllama import NVLlamaConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: The training data.
        model: The model, and the source of its weights.
        steps: The last step; epochs repeat until then.
        folder: The run's folder: checkpoints, metrics, exports. All processes must see it.
        seed: Decides random weights and the order of documents.
        activation_checkpointing: Compute activations again in the backward pass instead of keeping them: of no layer,
            of every second one (selective), of all (full).
        activation_offload_layers: The number of first layers that keep their activations in the host's memory until
            the backward pass; not all layers.
        parallel: The share of each process in the work.
        precision: Number formats.
        optimizer: AdamW and the loss.
        schedule: The learning rate.
        checkpoint: Saving, and going on after an interruption.
        export: The folders of the trained model.
        log: Metrics and statistics.
        profile: Traces and memory recordings.
    """

    data: DataConfig
    model: ModelConfig
    steps: int = 1000
    folder: str = "run"
    seed: int = 0
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    activation_offload_layers: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("seed", self.seed, 0, 2**32 - 1)
        at_least("activation_offload_layers", self.activation_offload_layers, 0)
        if self.activation_offload_layers and self.activation_checkpointing != "none":
            raise ValueError(
                f"activation_offload_layers={self.activation_offload_layers} and "
                f"activation_checkpointing={self.activation_checkpointing!r}: layers that compute their "
                "activations again have none to offload. Use activation_offload_layers=0, or "
                "activation_checkpointing='none'."
            )
        if self.log.inspect is not None:
            self._check_inspection()
        for name in ("trace_at", "memory_at"):
            first = getattr(self.profile, name)
            if first is not None and first > self.steps:
                raise ValueError(
                    f"profile.{name}={first} is after the last step, steps={self.steps}: nothing would be recorded. "
                    f"Give --profile.{name} {self.steps} or less, or --steps {first} or more."
                )
        if self.precision.quantized_weights:
            self._check_quantized_weights()
        pieces = 2 * self.parallel.context
        if self.parallel.context > 1 and self.data.tokens_per_batch % pieces:
            raise ValueError(
                f"data.tokens_per_batch={self.data.tokens_per_batch} is no multiple of 2 x parallel.context={pieces}, "
                "which each sequence is divided by: change one of them."
            )
        if self.model.shape is not None:
            self.check_model(self.model_config())
        # Checks the data's settings against each other; the run checks the tokenizer when it has loaded it.
        self.data.text_data(None, self.seed, self.token_multiple, self.parallel.context)

    @property
    def token_multiple(self) -> int:
        """The divisor of the number of tokens of a context rank, whose tensor ranks share them."""
        return self.precision.token_multiple * self.parallel.tensor

    def model_config(self, folder: str | Path | None = None) -> "NVLlamaConfig":
        """Return the configuration of the model, in this run's precision.

        Args:
            folder: A checkpoint in the Transformer Engine layout; without one, `model.shape` gives the sizes.

        Raises:
            ValueError: `NVLlamaForCausalLM` does not take this configuration.
        """
        from ...models.configuration_nvllama import NVLlamaConfig  # here, since it imports transformers

        if folder is None:
            assert self.model.shape is not None
            config = NVLlamaConfig(**asdict(self.model.shape))
        else:
            config = NVLlamaConfig.from_pretrained(folder)
        config.layer_implementation = self.model.layer_implementation
        config.layer_precision = self.precision.layer_precision(config.num_hidden_layers)
        config.use_quantized_model_init = self.precision.quantized_weights
        config.dtype = self.precision.weights_dtype
        config.use_cache = False
        config.check()
        return config

    def check_model(self, config: "NVLlamaConfig") -> None:
        """Refuse sequences that are too long for the model, and more offloaded layers than it allows.

        Args:
            config: The model's.

        Raises:
            ValueError: With both lengths, or both numbers of layers.
        """
        length, name = self.data.sequence_length, "sequence_length"
        if length is None:
            length, name = self.data.tokens_per_batch, "tokens_per_batch (sequence_length is null)"
        if length > config.max_position_embeddings:
            raise ValueError(
                f"data.{name} is {length}, but the model has max_position_embeddings={config.max_position_embeddings}: "
                "set data.sequence_length to that or less."
            )
        if self.activation_offload_layers >= config.num_hidden_layers:
            raise ValueError(
                f"activation_offload_layers={self.activation_offload_layers}, but the model has "
                f"{config.num_hidden_layers} layers, the last of which needs its activations at once: use at most "
                f"{config.num_hidden_layers - 1}."
            )

    def _check_quantized_weights(self) -> None:
        given = "precision.quantized_weights=True"
        if self.parallel.tensor > 1:
            raise ValueError(
                f"{given} and parallel.tensor={self.parallel.tensor}: tensor ranks cannot share weights that layers "
                "hold in FP8 only. Use shard, or quantized_weights=False."
            )
        if self.activation_checkpointing != "none":
            raise ValueError(
                f"{given} and activation_checkpointing={self.activation_checkpointing!r}: Transformer Engine "
                "transposes such weights for the backward pass, and cannot compute activations again with them "
                "correctly. Use activation_checkpointing='none', or quantized_weights=False."
            )
        if self.activation_offload_layers:
            raise ValueError(
                f"{given} and activation_offload_layers={self.activation_offload_layers}: tensors kept for the "
                "backward pass would include such weights. Use 0, or quantized_weights=False."
            )

    def _check_inspection(self) -> None:
        given, precision = f"log.inspect={self.log.inspect!r}", self.precision
        if not precision.is_quantized:
            raise ValueError(
                f"{given} is about the tensors of FP8 and FP4 layers, but precision.compute={precision.compute!r} has "
                "none. Use compute 'fp8', 'mxfp8' or 'nvfp4', or log.inspect null."
            )
        if precision.quantized_weights:
            raise ValueError(
                f"{given} and precision.quantized_weights=True: the loss of quantizing weights is unknown where "
                "they exist in the lossy format only. Use quantized_weights=False, or log.inspect null."
            )
        if self.activation_offload_layers:
            raise ValueError(
                f"{given} and activation_offload_layers={self.activation_offload_layers}: Transformer Engine does not "
                "offload activations during inspection. Use activation_offload_layers=0, or log.inspect null."
            )
