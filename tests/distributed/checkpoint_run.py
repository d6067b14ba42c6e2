"""Processes that train, save and load together; started by test_train_checkpoints.py."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict

from core.full_disk import full_disk
from distributed.processes import join
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.parallel.mesh import make_mesh
from llama_te_core.parallel.parallelize import parallelize
from llama_te_core.parallel.shards import whole
from llama_te_core.parallel.sizes import ParallelSizes
from llama_te_core.train.checkpoint.checkpoints import Checkpoints, TrainingCheckpointError

CONFIG = NVLlamaConfig(
    vocab_size=31,  # not divisible by any number of processes
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_dropout=0.1,
    layer_implementation="reference",
)


def sizes(distribution: str) -> ParallelSizes:
    return {
        "fsdp": ParallelSizes(),
        "hsdp": ParallelSizes(replicate=2),
        "ddp": ParallelSizes(replicate=dist.get_world_size(), shard=1),
        "tensor": ParallelSizes(tensor=2),
    }[distribution]


class Run:
    """A training run: "plain", or distributed in one of several ways. Ranks have different batches."""

    def __init__(self, distribution: str) -> None:
        torch.manual_seed(0)
        self.model = NVLlamaForCausalLM(CONFIG).train()
        self.module: torch.nn.Module = self.model
        if distribution != "plain":
            mesh = make_mesh(sizes(distribution), torch.get_default_device().type)
            self.module = parallelize(self.model, mesh)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            ids_BS = torch.randint(3, CONFIG.vocab_size, (2, 8))
            loss = self.module(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), labels=ids_BS).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> Any:
        """Return whole tensors on the host, by the names of the parameters."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {name: whole(value).cpu().clone() for name, value in model.items()}, {
            (name, key): whole(value).cpu().clone()
            for name, state in optimizer["state"].items()
            for key, value in state.items()
        }


def placements(run: Run) -> list[Any]:
    """Return the placements of the weights and of their optimizer states."""
    tensors = [
        [parameter, *(value for value in run.optimizer.state[parameter].values() if value.dim())]
        for parameter in run.module.parameters()
    ]
    return [[getattr(tensor, "placements", None) for tensor in each] for each in tensors]


def trained_and_resumed(folder: Path, distribution: str) -> dict[str, Any]:
    """Train a run that saves after two steps and continues, and a new run that continues from the checkpoint."""
    rank = dist.get_rank()
    checkpoints = Checkpoints(folder / distribution)
    run = Run(distribution)
    torch.manual_seed(rank // 2 if distribution == "tensor" else rank)
    run.train(2)
    saved = run.state()
    checkpoints.save(2, run.module, run.optimizer, {"rank": rank})
    run.train(3)

    resumed, extra = Run(distribution), {"rank": None}
    if distribution == "ddp":
        # DDP rearranges its buckets after the first step, which changes the order of the gradients' sums.
        resumed.train(1)
    checkpoints.load(2, resumed.module, resumed.optimizer, extra)
    loaded = resumed.state()
    placed = placements(resumed) == placements(run)
    resumed.train(3)
    return {
        "saved": saved,
        "loaded": loaded,
        "placed": placed,
        "gone on": run.state(),
        "resumed": resumed.state(),
        "random": torch.get_rng_state(),
        "rank": extra["rank"],
    }


def errors(folder: Path) -> dict[str, Any]:
    """Return the errors that each process raises, for failures of all processes and of one."""
    checkpoints = Checkpoints(folder / "fsdp")
    run = Run("fsdp")
    found = {}

    def attempt(name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except (TrainingCheckpointError, ValueError) as error:
            found[name] = str(error)

    attempt("missing", checkpoints.load, 99, run.module)
    attempt("old", checkpoints.save, 2, run.module, run.optimizer)
    with full_disk() if dist.get_rank() == 1 else contextlib.nullcontext():
        checkpoints.save(3, run.module, run.optimizer)
        attempt("full", checkpoints.wait)
    checkpoints.save(3, run.module, run.optimizer)
    found["steps"] = checkpoints.steps()
    return found


def loaded(source: Path, distribution: str, target: Path) -> dict[str, Any]:
    """Load a checkpoint from another number of processes, save it again, and return its content."""
    run, extra = Run(distribution), {"rank": None}
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Checkpoints(source).load(2, run.module, run.optimizer, extra)
    checkpoints = Checkpoints(target, asynchronous=False)
    checkpoints.save(2, run.module, run.optimizer, extra)
    return {
        "loaded": run.state(),
        "warnings": [str(each.message) for each in caught if "processes" in str(each.message)],
        "random numbers go on": torch.equal(torch.get_rng_state(), before),
        "rank": extra["rank"],
    }


def damaged(folder: Path) -> dict[str, Any]:
    """Return what each process finds when the file that one process wrote to the newest checkpoint has changed."""
    run, checkpoints = Run("fsdp"), Checkpoints(folder)
    run.train(1)
    checkpoints.save(1, run.module, run.optimizer)
    before = run.state()
    run.train(1)
    checkpoints.save(2, run.module, run.optimizer)

    def flip(step: int, file: str) -> None:
        checkpoints.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            path = checkpoints.path(step) / file
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)
        dist.barrier()

    flip(2, "__3_0.distcp")
    resumed, again = Run("fsdp"), Checkpoints(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = again.latest()
    again.load(1, resumed.module, resumed.optimizer)
    found = {
        "step": step,
        "warnings": [str(each.message) for each in caught],
        "before": before,
        "loaded": resumed.state(),
    }
    flip(1, "__2_0.distcp")
    try:
        Checkpoints(folder).latest()
    except TrainingCheckpointError as error:
        found["error"] = str(error)
    return found


def killed_while_saving(rank: int, device: str, folder: Path) -> None:
    """Kill the second of two processes while it saves; the first one writes the error that it gets to `heard`."""
    join(rank, 2, device, folder / "rendezvous")
    run = Run("fsdp")
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(1, run.module, run.optimizer)
    checkpoints.wait()
    if rank == 1:
        FileSystemWriter.write_data = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(2, run.module, run.optimizer)
    try:
        checkpoints.wait()
    except TrainingCheckpointError as error:
        (folder / "heard").write_text(str(error))


def run(rank: int, world_size: int, device: str, folder: Path) -> None:
    """Run one process; it writes its findings to `found-{world_size}-{rank}.pt`."""
    # A GPU repeats the same bits only with deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    join(rank, world_size, device, folder / f"rendezvous-{world_size}")
    if world_size == 4:
        found = {name: trained_and_resumed(folder, name) for name in ("fsdp", "hsdp", "ddp", "tensor")}
        found["errors"] = errors(folder)
        found["damaged"] = damaged(folder / "damaged")
    else:
        # Only tensor ranks, without FSDP; then continue with the weights in other parts.
        found = {"tensor": trained_and_resumed(folder / "two", "tensor")}
        found |= {
            "tensor as fsdp": loaded(folder / "two" / "tensor", "fsdp", folder / "two" / "tensor, then fsdp"),
            "fsdp as tensor": loaded(folder / "two" / "tensor, then fsdp", "tensor", folder / "two" / "and tensor"),
            "fsdp of 4 as fsdp": loaded(folder / "fsdp", "fsdp", folder / "fsdp of 4, then 2"),
            "ddp of 4 as fsdp": loaded(folder / "ddp", "fsdp", folder / "ddp of 4, then fsdp of 2"),
            "hsdp of 4 as ddp": loaded(folder / "hsdp", "ddp", folder / "hsdp of 4, then ddp of 2"),
            "tensor of 4 as fsdp": loaded(folder / "tensor", "fsdp", folder / "tensor of 4, then fsdp of 2"),
            "fsdp of 4 as tensor": loaded(folder / "fsdp", "tensor", folder / "fsdp of 4, then tensor of 2"),
            "1 as fsdp": loaded(folder / "plain", "fsdp", folder / "1, then fsdp of 2"),
            "1 as tensor": loaded(folder / "plain", "tensor", folder / "1, then tensor of 2"),
        }
    torch.save(found, folder / f"found-{world_size}-{rank}.pt")
    dist.destroy_process_group()
