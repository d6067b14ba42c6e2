"""What a training run is told: typed, and checked before anything is loaded.

`TrainConfig` is the whole of it, one dataclass for each section of the YAML file. Each checks itself when it is made;
`check_machine` checks what only the machine can answer.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.modeling_rope_utils import RopeParameters

from ..layers.backend import transformer_engine_problem
from ..layers.collectives import ContextKind
from ..layers.rope import check_rope_type
from ..models.checkpoint_format import MODEL_TYPE
from ..models.configuration_nvllama import NVLlamaConfig
from ..parallel.mesh import ParallelSizes
from ..precision.plan import recipe_token_multiple
from .data.documents import TextDocument
from .data.text_data import TextData, Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        rope_parameters: rope_type, rope_theta and what the type needs.
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
        """Refuse sizes that no model has; `ModelConfig` calls this.

        Raises:
            ValueError: With the size and its value.
        """
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*positive, "num_key_value_heads", "max_position_embeddings"):
            _at_least(f"model.shape.{name}", getattr(self, name), 1)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.shape.hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={self.num_attention_heads}: change one of them, or set head_dim."
            )
        check_rope_type(self.rope_parameters.get("rope_type", "default"))
        # transformers says nothing, or warns and takes the defaults.
        unknown = sorted(set(self.rope_parameters) - set(RopeParameters.__annotations__))
        if unknown:
            raise ValueError(
                f"model.shape.rope_parameters has {', '.join(unknown)}: it may have "
                f"{', '.join(sorted(RopeParameters.__annotations__))}, as its rope_type needs them."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model, and where its weights come from.

    Attributes:
        checkpoint: What training begins with: a folder in the Transformer Engine layout; or a Hugging Face checkpoint
            (folder, hub id or GGUF file), which is converted into the run's folder (needs llama-te-convert).
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
        """Whether the checkpoint is in Hugging Face's layout and has to be converted."""
        return self.checkpoint is not None and _content(Path(self.checkpoint)).get("model_type") != MODEL_TYPE

    @property
    def vocab_size(self) -> int | None:
        """What token ids must be below; None where that is not known before a checkpoint is fetched or opened."""
        if self.checkpoint is None:
            return None if self.shape is None else self.shape.vocab_size
        return _content(Path(self.checkpoint)).get("vocab_size")


@dataclass(frozen=True)
class DataConfig:
    """What to train on; all but the first, the last two and the tokenizer is as in `TextData`.

    Attributes:
        source: A .txt, .jsonl or .parquet file, a folder with such files, or a hub id.
        tokenizer: A folder or hub id of a tokenizer; "bytes", which needs no files: each byte is a token (258 with BOS
            and EOS); or null, where documents have their tokens in a field input_ids.
        tokens_per_batch: Tokens of one packed batch of one data-parallel process.
        sequence_length: Tokens of the longest sequence; null for tokens_per_batch.
        split_long: Cut documents where a sequence or a batch is full; else what is behind sequence_length is dropped.
        text_field: The field of a document that is its text.
        text_document: What a document of a .txt file is: the whole file, or each paragraph.
        add_bos: Begin each text with the BOS token.
        add_eos: End each text with the EOS token.
        skip_empty: Pass over documents without tokens, which are an error otherwise.
        shuffle_buffer: Documents in memory of which the next is drawn; 0 leaves them in order.
        subset: The name of a data set's configuration on the hub.
        split: Split of a data set of the hub.
        streaming: Read a data set of the hub over the network.
        workers: Processes of each process that read and tokenise; 0 does it in the process itself.
        batches_per_step: Batches of one data-parallel process whose gradients make one step (gradient accumulation).
    """

    source: str
    tokenizer: str | None = None
    tokens_per_batch: int = 8192
    sequence_length: int | None = None
    split_long: bool = True
    text_field: str = "text"
    text_document: TextDocument = "file"
    add_bos: bool = True
    add_eos: bool = True
    skip_empty: bool = False
    shuffle_buffer: int = 10_000
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    workers: int = 2
    batches_per_step: int = 1

    def __post_init__(self) -> None:
        _at_least("data.workers", self.workers, 0)
        _at_least("data.batches_per_step", self.batches_per_step, 1)

    def text_data(
        self,
        tokenizer: Tokenizer | None,
        seed: int,
        token_multiple: int,
        context: int,
        vocab_size: int | None = None,
    ) -> TextData:
        """These settings for the data, which goes round for ever.

        Args:
            tokenizer: The tokenizer, or `None` for documents of tokens.
            seed: Decides the order of documents.
            token_multiple: What the tokens of a context rank must be a multiple of.
            context: Processes that share each sequence.
            vocab_size: The model's, which token ids must be below; None where it is not known.

        Raises:
            ValueError: A setting is out of its range, or does not go with another.
        """
        own = ("tokenizer", "workers", "batches_per_step")
        settings = {name: value for name, value in asdict(self).items() if name not in own}
        return TextData(
            **settings,
            tokenizer=tokenizer,
            epochs=None,
            seed=seed,
            pad_to_multiple_of=token_multiple * context if token_multiple > 1 else None,
            pad_sequences_to_be_divisible_by=2 * context if context > 1 else None,
            vocab_size=vocab_size,
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the work; see `ParallelSizes`.

    Attributes:
        replicate: Copies of the model.
        shard: Processes that share the weights (FSDP); -1 for all that the others leave.
        context: Processes that share the tokens of each sequence.
        tensor: Processes that share heads, features and vocabulary.
        reshard_after_forward: Free a layer's gathered weights after its forward pass: less memory, more traffic.
        context_kind: How context ranks of Transformer Engine layers come by each other's keys and values: in a ring
            (p2p), all at once (all_gather), or by exchanging heads for tokens (a2a).
    """

    replicate: int = 1
    shard: int = -1
    context: int = 1
    tensor: int = 1
    reshard_after_forward: bool = True
    context_kind: ContextKind = "p2p"

    def __post_init__(self) -> None:
        _ = self.sizes

    @property
    def sizes(self) -> ParallelSizes:
        """The mesh's sizes."""
        return ParallelSizes(self.replicate, self.shard, self.context, self.tensor)


@dataclass(frozen=True)
class PrecisionConfig:
    """What is computed and kept in which number format.

    Attributes:
        compute: What layers compute in. fp8, mxfp8 and nvfp4 are for the layers' matrix products, and need Transformer
            Engine; what is outside of the layers computes in bf16 then.
        fp8_recipe: How fp8 tensors are scaled: by earlier steps' maxima (delayed), their own (current), or in blocks
            (block).
        weights: Dtype of the weights, and of AdamW's two states for each. fp32 weights are cast for computing.
        reduce: Dtype in which gradients are summed over processes.
        bf16_first_layers: So many first layers compute in bf16, whatever compute is.
        bf16_last_layers: So many last layers compute in bf16.
        quantized_weights: Keep the weights of fp8 layers in FP8, in which FSDP gathers them, and in the optimizer in
            fp32. With current or delayed scaling.
    """

    compute: Literal["bf16", "fp32", "fp8", "mxfp8", "nvfp4"] = "bf16"
    fp8_recipe: Literal["delayed", "current", "block"] = "current"
    weights: Literal["bf16", "fp32"] = "fp32"
    reduce: Literal["bf16", "fp32"] = "fp32"
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    quantized_weights: bool = False

    def __post_init__(self) -> None:
        _at_least("precision.bf16_first_layers", self.bf16_first_layers, 0)
        _at_least("precision.bf16_last_layers", self.bf16_last_layers, 0)
        if self.compute == "fp32" and self.weights == "bf16":
            raise ValueError(
                "precision.compute='fp32', but precision.weights='bf16': weights of fewer bits than what is computed "
                "with them gain nothing. Use weights='fp32', or compute='bf16'."
            )
        if self.quantized_weights and (self.compute != "fp8" or self.fp8_recipe == "block" or self.weights != "fp32"):
            raise ValueError(
                f"precision.quantized_weights=True, but compute={self.compute!r}, fp8_recipe={self.fp8_recipe!r} and "
                f"weights={self.weights!r}: it needs compute='fp8' with one scale for each weight (fp8_recipe "
                "'current' or 'delayed'), and weights='fp32' for what the optimizer keeps. Change them, or use "
                "quantized_weights=False."
            )

    @property
    def is_quantized(self) -> bool:
        """Whether layers compute in FP8 or FP4."""
        return self.compute in ("fp8", "mxfp8", "nvfp4")

    @property
    def token_multiple(self) -> int:
        """What the tokens of a forward pass must be a multiple of."""
        return 1 if self.recipe is None else recipe_token_multiple(self.recipe)

    @property
    def recipe(self) -> str | None:
        """What Transformer Engine calls the recipe; `None` without quantized layers."""
        if self.compute == "fp8":
            names = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
            return names[self.fp8_recipe]
        return {"mxfp8": "MXFP8BlockScaling", "nvfp4": "NVFP4BlockScaling"}.get(self.compute)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of weights and optimizer."""
        return DTYPES[self.weights]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of what is not quantized."""
        return torch.float32 if self.compute == "fp32" else torch.bfloat16

    def layer_precision(self, num_layers: int) -> list[str | None] | None:
        """`NVLlamaConfig.layer_precision` for so many layers.

        Raises:
            ValueError: There are not so many layers as shall be in BF16.
        """
        if not self.is_quantized:
            return None
        quantized = num_layers - self.bf16_first_layers - self.bf16_last_layers
        if quantized < 1:
            raise ValueError(
                f"precision.bf16_first_layers={self.bf16_first_layers} and bf16_last_layers={self.bf16_last_layers} "
                f"leave none of {num_layers} layers for {self.compute}: lower them, or use compute='bf16'."
            )
        name = "fp4" if self.compute == "nvfp4" else "fp8"
        return [None] * self.bf16_first_layers + [name] * quantized + [None] * self.bf16_last_layers

    def recipes(self) -> dict[str, Any]:
        """The models' arguments `fp8_recipe` or `fp4_recipe`; none without quantized layers. Imports TE."""
        if self.recipe is None:
            return {}
        recipes = importlib.import_module("transformer_engine.common.recipe")
        argument = "fp4_recipe" if self.compute == "nvfp4" else "fp8_recipe"
        return {argument: getattr(recipes, self.recipe)()}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; its states have the dtype of the weights.

    Attributes:
        learning_rate: The largest one, see `schedule`.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        epsilon: Added to the root of the latter.
        weight_decay: For matrices; the norms' weights do not decay.
        max_norm: Gradients with a larger norm are scaled down to it.
        z_loss: Adds this times the mean of logsumexp² of the logits to the loss, which keeps them from drifting.
        loss_chunk_tokens: Logits are made for so many tokens at a time.
    """

    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = 1.0
    z_loss: float = 0.0
    loss_chunk_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "weight_decay", "z_loss"):
            _finite(f"optimizer.{name}", getattr(self, name))
        if not self.max_norm > 0:
            raise ValueError(f"optimizer.max_norm={self.max_norm!r}: it must be above 0; .inf scales nothing down.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)!r}: it must be at least 0 and below 1.")
        _at_least("optimizer.loss_chunk_tokens", self.loss_chunk_tokens, 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's way through the run.

    Attributes:
        kind: constant; or from the largest rate down to final_fraction of it at the last step, linearly or by a cosine.
        warmup_steps: It rises linearly over so many first steps.
        final_fraction: Of the largest rate, at the end.
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        _at_least("schedule.warmup_steps", self.warmup_steps, 0)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction={self.final_fraction!r}: it must be from 0 to 1.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in `FOLDER/checkpoints`, from the last of which a run goes on by itself.

    Attributes:
        interval: Save after every so many steps, after the last one, and at SIGTERM; null never saves.
        keep: How many stay.
        asynchronous: Write in the background.
    """

    interval: int | None = 500
    keep: int = 3
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.interval is not None:
            _at_least("checkpoint.interval", self.interval, 1)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True)
class ExportConfig:
    """What is made of the weights after the last step.

    Attributes:
        te: Write `FOLDER/te`, which `NVLlamaForCausalLM.from_pretrained` loads.
        hf: Write `FOLDER/hf`, which transformers loads (needs llama-te-convert); made of `FOLDER/te`.
    """

    te: bool = True
    hf: bool = False

    def __post_init__(self) -> None:
        if self.hf and not self.te:
            raise ValueError("export.hf=True, but export.te=False: the one is made of the other, so leave te True.")


@dataclass(frozen=True)
class LogConfig:
    """What is told of the run, where. TensorBoard files are written wherever it is installed.

    Attributes:
        interval: Steps between two looks at the losses. Each look waits for the GPU.
        wandb_project: The Weights & Biases project to log to; null for none (needs wandb).
        inspect: A YAML file of features of nvdlfw-inspect, which say what is told of the tensors of quantized layers;
            it is written to `FOLDER/inspect`. Null for none.
    """

    interval: int = 10
    wandb_project: str | None = None
    inspect: str | None = None

    def __post_init__(self) -> None:
        _at_least("log.interval", self.interval, 1)


@dataclass(frozen=True)
class ProfileConfig:
    """Steps of which more is recorded, in `FOLDER/profile`.

    Attributes:
        trace_at: First step of a trace of torch.profiler, for chrome://tracing or Perfetto; null for none.
        trace_steps: How many steps it has.
        memory_at: First step of a recording of the GPU's memory, for pytorch.org/memory_viz; null for none.
        memory_steps: How many steps it has.
    """

    trace_at: int | None = None
    trace_steps: int = 3
    memory_at: int | None = None
    memory_steps: int = 2

    def __post_init__(self) -> None:
        for name in ("trace_at", "trace_steps", "memory_at", "memory_steps"):
            if getattr(self, name) is not None:
                _at_least(f"profile.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: What to train on.
        model: The model, and where its weights come from.
        steps: The last step; data is gone through as often as it takes.
        folder: The run's: checkpoints, metrics, what is exported. All processes must see it.
        seed: Of random weights and of the documents' order.
        activation_checkpointing: Compute activations anew in the backward pass instead of keeping them: of no layer, of
            every second one (selective), of all (full).
        activation_offload_layers: So many first layers keep their activations in the host's memory until the backward
            pass; fewer than there are.
        parallel: How processes share the work.
        precision: Number formats.
        optimizer: AdamW and the loss.
        schedule: The learning rate.
        checkpoint: Saving and going on.
        export: What is made of the trained model.
        log: Metrics.
        profile: Traces.
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
        _at_least("steps", self.steps, 1)
        _at_least("seed", self.seed, 0)
        _at_least("activation_offload_layers", self.activation_offload_layers, 0)
        if self.activation_offload_layers and self.activation_checkpointing != "none":
            raise ValueError(
                f"activation_offload_layers={self.activation_offload_layers} and "
                f"activation_checkpointing={self.activation_checkpointing!r}: layers that compute their "
                "activations anew have none to offload. Use activation_offload_layers=0, or "
                "activation_checkpointing='none'."
            )
        if self.log.inspect is not None:
            self._check_inspection()
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than steps={self.steps}: the learning "
                f"rate would never be reached. Give --schedule.warmup_steps {self.steps} or less, or --steps "
                f"{self.schedule.warmup_steps} or more."
            )
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
        # The settings of the data among each other; what the tokenizer has is seen when there is one.
        self.data.text_data(None, self.seed, self.token_multiple, self.parallel.context)

    @property
    def token_multiple(self) -> int:
        """What the tokens of a context rank must be a multiple of: its tensor ranks share them out."""
        return self.precision.token_multiple * self.parallel.tensor

    def model_config(self, folder: str | Path | None = None) -> NVLlamaConfig:
        """The configuration of the model, in this run's precision.

        Args:
            folder: Of the checkpoint in the Transformer Engine layout; without one, the model is one of `model.shape`.

        Raises:
            ValueError: The model cannot be one of `NVLlamaForCausalLM`.
        """
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

    def check_model(self, config: NVLlamaConfig) -> None:
        """Refuse sequences that are longer than the model knows, and to offload more layers than can be.

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
                "have in FP8 only. Use shard, or quantized_weights=False."
            )
        if self.activation_checkpointing != "none":
            raise ValueError(
                f"{given} and activation_checkpointing={self.activation_checkpointing!r}: for the backward pass, "
                "Transformer Engine has such weights transposed, and cannot rightly compute activations anew with "
                "them. Use activation_checkpointing='none', or quantized_weights=False."
            )
        if self.activation_offload_layers:
            raise ValueError(
                f"{given} and activation_offload_layers={self.activation_offload_layers}: what is kept for the "
                "backward pass would have such weights in it. Use 0, or quantized_weights=False."
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
                f"{given} and precision.quantized_weights=True: what weights lose cannot be told where they exist in "
                "the lossy format only. Use quantized_weights=False, or log.inspect null."
            )
        if self.activation_offload_layers:
            raise ValueError(
                f"{given} and activation_offload_layers={self.activation_offload_layers}: Transformer Engine does not "
                "offload activations while it is inspected. Use activation_offload_layers=0, or log.inspect null."
            )


def check_machine(config: TrainConfig, world_size: int) -> None:
    """Refuse what this machine cannot do, or has not.

    Args:
        config: The run.
        world_size: How many processes there are.

    Raises:
        FileNotFoundError: `model.checkpoint` or `log.inspect` is a path that does not exist.
        RuntimeError: A package or a GPU is missing.
        ValueError: The mesh, the data or the checkpoint do not fit.
    """
    config.parallel.sizes.resolve(world_size)
    problem = transformer_engine_problem()
    if config.precision.is_quantized and (problem or config.model.layer_implementation == "reference"):
        problem = problem or "model.layer_implementation is 'reference'"
        raise RuntimeError(
            f"precision.compute={config.precision.compute!r} needs Transformer Engine layers on an NVIDIA GPU, but "
            f"{problem}. Use precision.compute='bf16' here."
        )
    if config.profile.memory_at is not None and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile.memory_at={config.profile.memory_at} records a GPU's memory, and torch finds no GPU: use null."
        )
    if config.log.wandb_project is not None:
        _needs("wandb", f"log.wandb_project={config.log.wandb_project!r}", "wandb")
    if config.log.inspect is not None:
        _needs("nvdlfw_inspect", f"log.inspect={config.log.inspect!r}", "nvdlfw-inspect")
        if not Path(config.log.inspect).is_file():
            raise FileNotFoundError(
                f"log.inspect={config.log.inspect!r} is no file: give a YAML file of features, such as "
                "examples/inspect.yaml."
            )
    if config.export.hf:
        _needs("llama_te_convert", "export.hf=True", "llama-te-convert")
    checkpoint = config.model.checkpoint
    if checkpoint is None:
        return
    path = Path(checkpoint)
    if not path.exists() and (path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1):
        raise FileNotFoundError(f"model.checkpoint={checkpoint!r} is no path that exists, and no hub id (owner/name).")
    if config.model.is_converted:
        _needs("llama_te_convert", f"model.checkpoint={checkpoint!r} is not in the Transformer Engine layout, and this",
               "llama-te-convert")  # fmt: skip
        if content := _content(path):
            from llama_te_convert.configs.model_config import te_config

            config.check_model(te_config(content))  # before the conversion, which takes its time
    elif (path / ".metadata").is_file():
        raise ValueError(
            f"model.checkpoint={checkpoint!r} is a checkpoint that a run goes on from in its own folder. To begin "
            f"another run with its weights, convert it (llama-te-convert to-hf {checkpoint} ./start) and give ./start, "
            "or give the `te` folder that a finished run exports."
        )
    elif path.is_dir():
        config.check_model(config.model_config(path))


def _content(folder: Path) -> dict[str, Any]:
    """What the `config.json` of a folder says; nothing where there is none."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _needs(module: str, why: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RuntimeError(f"{why} needs the package {package}: pip install {package}")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: it must be an integer of at least {least}.")


def _finite(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: it must be a finite number of at least 0.")
