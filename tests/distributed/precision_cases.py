"""The processes of `test_training_precision`: train as the training command does, on a mesh or alone.

Each step sees the same batches on every mesh. The mesh only decides the number of batches per process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from distributed.processes import join
from llama_te_core.parallel.context import shard_context
from llama_te_core.parallel.mesh import data_rank, make_mesh
from llama_te_core.parallel.shards import whole
from llama_te_core.train.checkpoint.checkpoints import Checkpoints
from llama_te_core.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ShapeConfig,
    TrainConfig,
)
from llama_te_core.train.data.batch_stream import Batch
from llama_te_core.train.finite_updates import FiniteUpdates
from llama_te_core.train.loop import train_step
from llama_te_core.train.optimizers import make_optimizer
from llama_te_core.train.setup import build_model, random_weights

# Heads that 8 context ranks can share, and sizes that FP8 can take.
SHAPE = ShapeConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=128,
    initializer_range=0.1,
)
BATCHES = {"cpu": 4, "cuda": 8}  # in each step, one for each of the most processes there
LENGTHS = (64, 32, 32)  # multiples of 16 for 8 context ranks: each rank gets 16 tokens of a batch, as FP8 needs
WARM_UP, STEPS = 2, 20  # delayed scaling finds its scales in the first steps, which have a learning rate of 0
SAVED_AT = WARM_UP + STEPS // 2

MESHES: dict[str, dict[str, Any]] = {
    "DDP": {"replicate": -1, "shard": 1},
    "FSDP": {},
    "FSDP, activation checkpointing": {},
    "HSDP": {"replicate": 2},
    "context, p2p": {"shard": 1, "context": -1, "context_kind": "p2p"},
    "context, all_gather": {"shard": 1, "context": -1, "context_kind": "all_gather"},
    "context, a2a": {"shard": 1, "context": -1, "context_kind": "a2a"},
    "FSDP and context": {"context": 2},
    "tensor": {"shard": 1, "tensor": -1},
}
WEIGHTS_IN_BF16 = ("DDP", "tensor")  # these meshes do not use FSDP, which would cast the weights


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        layers: "reference" or "transformer_engine".
        compute: "fp32", "bf16", "fp8 delayed" or "fp8 current", the last two also with " quantized" weights.
        mesh: A name of `MESHES`.
        resumes: Continue from a checkpoint: the number of processes of the earlier run with the same name.
    """

    layers: str
    compute: str
    mesh: str
    resumes: int | None = None

    def __str__(self) -> str:
        return f"{self.layers} {self.compute}, {self.mesh}" + (f", from {self.resumes}" if self.resumes else "")

    @property
    def has_quantized_weights(self) -> bool:
        return self.compute.endswith(" quantized")

    @property
    def alone(self) -> Case:
        """The same run on one GPU, with weights and sums in bf16 if the mesh has them in bf16."""
        return Case(self.layers, self.compute, "DDP" if self.mesh in WEIGHTS_IN_BF16 else "FSDP")

    @property
    def exact(self) -> Case:
        """The same run on one GPU in FP32."""
        return Case("reference", "fp32", "FSDP")

    def config(self, world_size: int) -> TrainConfig:
        compute, *fp8 = self.compute.split()
        recompute = self.mesh.endswith("activation checkpointing")
        sizes = {name: world_size if size == -1 else size for name, size in MESHES[self.mesh].items()}
        parallel = ParallelConfig(**sizes)
        resolved = parallel.sizes.resolve(world_size)
        kept: Any = "bf16" if self.mesh in WEIGHTS_IN_BF16 else "fp32"
        quantized: dict[str, Any] = {"fp8_recipe": fp8[0]} if fp8 else {}
        return TrainConfig(
            data=DataConfig(
                source="none",
                tokens_per_batch=sum(LENGTHS),
                batches_per_step=_batches() // (resolved.replicate * resolved.shard),
            ),
            model=ModelConfig(shape=SHAPE, layer_implementation=self.layers),
            steps=WARM_UP + STEPS,
            activation_checkpointing="full" if recompute else "none",
            parallel=parallel,
            precision=PrecisionConfig(
                compute=compute, weights=kept, reduce=kept, quantized_weights=self.has_quantized_weights, **quantized
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3, max_norm=math.inf),
        )


class Batches:
    """A stand-in for `BatchStream`: repeats this process's share of the same batches."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.index, self.ranks = data_rank(mesh)

    def next(self) -> Batch:
        arguments = shard_context(new_batch(self.index % _batches()), self.mesh)
        self.index += self.ranks
        return Batch(arguments, sum(LENGTHS), 0)


def _batches() -> int:
    return BATCHES[torch.get_default_device().type]


def new_batch(index: int) -> dict[str, Any]:
    """Make packed sequences; the number of labels differs from batch to batch."""
    generator = torch.Generator("cpu").manual_seed(index)
    ids_1T = torch.randint(0, SHAPE.vocab_size, (1, sum(LENGTHS)), generator=generator, device="cpu")
    labels_1T = ids_1T.clone()
    labels_1T[0, : 5 * index] = -100
    offsets = F.pad(torch.tensor(LENGTHS, device="cpu").cumsum(0), (1, 0)).to(torch.int32)
    batch = {"input_ids": ids_1T, "labels": labels_1T, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    device = torch.get_default_device()
    return {name: value.to(device) for name, value in batch.items()} | {"max_length_q": 64, "max_length_k": 64}


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Return the losses by step, the gradients of the first step after the warm-up, and the total change of weights.

    The result also has the sizes in bytes of this process's inputs to FSDP's gathers in that step.

    Args:
        case: The run, the same for all processes.
        folder: The folder for checkpoints.
    """
    config = case.config(dist.get_world_size())
    device = torch.get_default_device()
    mesh = make_mesh(config.parallel.sizes, device.type)
    model_config = config.model_config()
    model, called = build_model(config, model_config, random_weights(0, model_config), mesh, device)
    optimizer = make_optimizer(model, config.optimizer)
    updates = FiniteUpdates(optimizer, device)
    begin = _weights(model)
    saver = f"{case.layers} {case.compute}"
    step, batches = 0, Batches(mesh)
    if case.resumes:
        step = SAVED_AT
        Checkpoints(folder / f"{case.resumes} {saver}").load(step, called, optimizer)
    losses: dict[int, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    gathered: set[int] = set()
    while step < config.steps:
        step += 1
        if step == WARM_UP + 1:
            hook = optimizer.register_step_pre_hook(lambda *_: gradients.update(_gradients(model)))
        rate = 0.0 if step <= WARM_UP else config.optimizer.learning_rate
        with _recording_gathers(gathered if step == WARM_UP + 1 else set()):
            loss, _ = train_step(config, called, updates, rate, batches, Mock())
        if step == WARM_UP + 1:
            hook.remove()
        dist.all_reduce(loss)
        losses[step] = loss.cpu() / dist.get_world_size()
        if step == SAVED_AT and case.mesh == "FSDP" and not case.resumes:
            checkpoints = Checkpoints(folder / f"{dist.get_world_size()} {saver}", asynchronous=False)
            checkpoints.save(step, called, optimizer)
    end = _weights(model)
    return {
        "losses": losses,
        "gradients": gradients,
        "change": {name: end[name] - begin[name] for name in end},
        "gathered": gathered,
    }


@contextlib.contextmanager
def _recording_gathers(sizes: set[int]) -> Iterator[None]:
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)

    def recorded(output: torch.Tensor, part: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.add(part.nbytes)
        return gather(output, part, *args, **kwargs)

    with patch.object(dist, name, recorded):
        yield


def _weights(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()  # with the optimizer's FP32 weights, if it keeps them
    return {name: whole(state[name]).cpu().float().clone() for name, _ in model.named_parameters()}


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.grad).cpu().float() for name, parameter in model.named_parameters()}


def run(rank: int, world_size: int, device: str, folder: Path, cases: list[Case]) -> None:
    """Run one process; the first one writes the result of each case, or the error that stopped it."""
    join(rank, world_size, device, folder / f"rendezvous-{world_size}-{cases[0]}")
    for case in cases:
        result: Any
        try:
            result = train(case, folder)
        except Exception:
            result = traceback.format_exc()
        if rank == 0:
            torch.save(result, folder / f"{world_size} {case}.pt")
    dist.destroy_process_group()
