"""The training loop."""

from __future__ import annotations

import contextlib
import dis
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..data import tokenizer_files
from ..files.disk import replace_text, writing_to
from ..files.folder_lock import FolderLock
from ..models.causal_lm import NVLlamaForCausalLM
from ..parallel.mesh import make_mesh, on_rank_0, process_rank
from ..parallel.parallelize import clip_gradients
from .checkpoint.checkpoints import Checkpoints
from .checkpoint.run_folder import check_folder, check_same_model, check_same_run
from .config import TrainConfig
from .config.machine import check_machine
from .data.batch_stream import BatchStream
from .data.byte_tokenizer import byte_tokenizer
from .export import converted, export_hf, export_te, refuse_changed
from .finite_updates import FiniteUpdates
from .interruption import Interruption
from .metrics import Metrics, NonFiniteLossError
from .optimizers import make_optimizer
from .profiling import Profiler
from .schedule import learning_rate
from .setup import build_model, checkpoint_weights, random_weights
from .tensor_statistics import TensorStatistics


class RefusedRunError(RuntimeError):
    """The configuration, the data, the checkpoint or the machine does not let a run begin or export its result."""


def train(config: TrainConfig) -> int:
    """Train from a configuration, in all processes that torchrun started, or in this process alone.

    A run whose folder has checkpoints continues from the last one. At SIGTERM or Ctrl-C the run saves a checkpoint and
    ends.

    Args:
        config: The configuration of the run.

    Returns:
        The last step.

    Raises:
        RefusedRunError: The run cannot begin, or its result cannot be exported. Most checks come before the model is
            built.
        TrainingCheckpointError: A checkpoint could not be saved.
        DiskError: The metrics or the configuration could not be written.
        NonFiniteLossError: The loss is infinite or NaN.
        UnusableDocumentError: A document cannot be used.
        KeyboardInterrupt: At a second Ctrl-C, or at one before the first step.
    """
    folder, settings = Path(config.folder), asdict(config)
    with _refusals():
        check_machine(config, int(os.environ.get("WORLD_SIZE", "1")))
    with _processes(config) as (mesh, device), contextlib.ExitStack() as until_the_end:
        with _refusals():
            until_the_end.enter_context(_locked(folder))
            checkpoints = Checkpoints(
                folder / "checkpoints", keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
            )
            step = checkpoints.latest() or 0
            if not step:
                check_same_run(folder, settings)
            elif step > config.steps:
                raise ValueError(f"folder={config.folder!r} is at step {step}: steps={config.steps} is less.")
            tokenizer = load_tokenizer(config.data.tokenizer)
            # With a tokenizer, a check of its size below replaces the check of each token.
            vocab_size = config.model.vocab_size if tokenizer is None else None
            multiple, context = config.token_multiple, config.parallel.context
            data = config.data.text_data(tokenizer, config.seed, multiple, context, vocab_size)
            stream = BatchStream(data, mesh, device, config.data.workers)
            until_the_end.callback(stream.close)

            checkpoint = config.model.checkpoint
            if checkpoint is None:
                model_config = config.model_config()
                weights = random_weights(config.seed, model_config)
            else:
                start = Path(checkpoint)
                if config.model.is_converted:
                    start = converted(checkpoint, folder / "start")
                elif not step:  # later, the weights come from the run's own checkpoint
                    refuse_changed(start)
                model_config = config.model_config(start)
                weights = checkpoint_weights(start, tied=model_config.tie_word_embeddings)
            config.check_model(model_config)
            if step:
                check_same_model(checkpoints.path(step), model_config)
            if tokenizer is not None:
                _check_vocabulary(len(tokenizer), model_config.vocab_size)
                model_config.bos_token_id, model_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            statistics = None
            if config.log.inspect is not None:
                statistics = until_the_end.enter_context(TensorStatistics(config.log.inspect, folder))
            rank = process_rank()
            if rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(config.seed)
            model, called = build_model(config, model_config, weights, mesh, device)
        optimizer = make_optimizer(model, config.optimizer)
        updates = FiniteUpdates(optimizer, device)
        if step:
            with _refusals():
                checkpoints.load(step, called, optimizer, {"data": stream})
                checkpoints.remove_old()
        if rank == 0:
            with writing_to(folder / "config.yaml"):
                replace_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            _announce(config, model, mesh, device, step)
        if statistics is not None:
            statistics.begin(model, step)
        profiler = Profiler(config.profile, folder / "profile", rank)
        metrics = Metrics(
            config.log, folder, model_config, compute=config.precision.compute, device=device, ranks=stream.ranks,
            step=step, steps=config.steps, settings=settings,
        )  # fmt: skip
        with contextlib.closing(metrics), Interruption() as interruption:
            stopped: str | None = None
            while step < config.steps and stopped is None:
                step += 1
                profiler.before(step)
                rate = learning_rate(step, config.steps, config.optimizer.learning_rate, config.schedule)
                loss, norm = train_step(config, called, updates, rate, stream, metrics)
                metrics.add(step, loss, norm, rate)
                if statistics is not None:
                    statistics.end_step()
                stopped = interruption.agreed()
                last = stopped is not None or step == config.steps
                profiler.after(step, last)
                interval = config.checkpoint.interval
                save = interval is not None and (last or step % interval == 0)
                if save or last or step % config.log.interval == 0:
                    try:
                        metrics.report()  # before a checkpoint: a run that is not finite ends here
                    except NonFiniteLossError:
                        checkpoints.wait()  # the last checkpoint, which is good, may still be on its way to the disk
                        raise
                if save:
                    checkpoints.save(step, called, optimizer, {"data": stream})
            checkpoints.wait()
        if stopped is not None and rank == 0:
            print(f"stopped by {stopped}: {_how_to_go_on(config, step)}", file=sys.stderr, flush=True)
        with _refusals():
            if step == config.steps and config.export.te:
                export_te(model, tokenizer, folder / "te")
            if step == config.steps and config.export.hf:
                export_hf(folder / "te", folder / "hf")
    return step


def train_step(
    config: TrainConfig,
    model: nn.Module,
    updates: FiniteUpdates,
    rate: float,
    stream: BatchStream,
    metrics: Metrics,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one training step: sum the gradients of the step's batches, clip them, and update the weights.

    A step whose loss or gradients are infinite or NaN updates nothing, see `FiniteUpdates`.

    Returns:
        This process's loss, and the norm of all gradients before clipping; each float [] on the device.
    """
    batches = [stream.next() for _ in range(config.data.batches_per_step)]
    # Batches have different numbers of labels: the loss is the mean over all labels of the step.
    labels = torch.stack([batch.arguments["num_items_in_batch"] for batch in batches]).sum()
    labels = labels.where(labels > 0, 1)  # a step of prompts alone has no labels: its loss is 0
    losses = []
    for number, batch in enumerate(batches):
        metrics.count(batch.tokens, batch.squared_lengths)
        with _synchronized(model, number == len(batches) - 1):
            batch_loss = model(**batch.arguments | {"num_items_in_batch": labels})
            batch_loss.backward()
        losses.append(batch_loss.detach())
    norm = clip_gradients(model, config.optimizer.max_norm)
    loss = torch.stack(losses).sum()
    for group in updates.optimizer.param_groups:
        group["lr"] = rate
    updates.step(loss, norm)
    updates.optimizer.zero_grad()
    return loss, norm


def load_tokenizer(name: str | None) -> Any:
    """Load the tokenizer that `DataConfig.tokenizer` names; return None where it is None."""
    if name is None:
        return None
    if name == "bytes":
        return byte_tokenizer()
    try:
        return tokenizer_files.load_tokenizer(name)
    except ValueError as error:
        raise ValueError(
            f"data.tokenizer={name!r} cannot be loaded: give a tokenizer's folder or hub id, or 'bytes'. {error}"
        ) from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn errors of the input into `RefusedRunError`, whose message is all that a user needs.

    Other errors, such as an out-of-memory error or a bug, stay as they are.
    """
    try:
        yield
    except OSError as error:
        raise RefusedRunError(str(error)) from error
    except (ImportError, RuntimeError, ValueError) as error:
        if not _is_refusal(error):
            raise
        raise RefusedRunError(str(error)) from error


def _is_refusal(error: BaseException) -> bool:
    """Tell whether a `raise` statement of these packages made the error.

    They raise errors of these types for wrong input, with a message that says what to do. The same types come from
    torch or Python where something else has failed.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    is_ours = trace.tb_frame.f_globals.get("__name__", "").startswith("llama_te_")
    return is_ours and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder. Rank 0 has the lock.

    Raises:
        FolderInUseError: Another run has it.
        OSError: The folder cannot be written.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            check_folder(folder)
            held.enter_context(FolderLock(folder))

        on_rank_0(take)
        yield


@contextlib.contextmanager
def _processes(config: TrainConfig) -> Iterator[tuple[DeviceMesh | None, torch.device]]:
    """Yield the mesh of the processes and this process's device. Without torchrun there is mostly no mesh."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    elif config.precision.compute_dtype != config.precision.weights_dtype:
        # FSDP casts the weights. It needs a process group, even for this process alone.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        yield None, device
        return
    try:
        yield make_mesh(config.parallel.sizes, device.type), device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _synchronized(model: nn.Module, last: bool) -> Iterator[None]:
    """Sum gradients over the processes once, in the backward pass of a step's last batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def _how_to_go_on(config: TrainConfig, step: int) -> str:
    if config.checkpoint.interval is None:
        return f"step {step} is not saved (checkpoint.interval is null)"
    command = "torchrun ... -m llama_te_core.train" if "WORLD_SIZE" in os.environ else "llama-te-train"
    return (
        f"step {step} is saved. To go on, give the same command again, or: {command} --config "
        f"{shlex.quote(str(Path(config.folder) / 'config.yaml'))}"
    )


def _check_vocabulary(tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise ValueError(
            f"data.tokenizer has {tokens} tokens, but the model has vocab_size={vocab_size}: use the model's own "
            "tokenizer, or a larger model.shape.vocab_size."
        )


def _announce(
    config: TrainConfig, model: NVLlamaForCausalLM, mesh: DeviceMesh | None, device: torch.device, step: int
) -> None:
    if config.schedule.warmup_steps > config.steps:
        print(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is more than steps={config.steps}: the warm-up "
            f"takes {config.steps} steps",
            file=sys.stderr,
            flush=True,
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ranks = 1 if mesh is None else mesh.size()
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    begin = f"going on from step {step}" if step else "from the beginning"
    print(
        f"{parameters:,} parameters, {config.precision.compute} on {processes} ({device.type}), {begin}; "
        f"folder {config.folder}",
        file=sys.stderr,
        flush=True,
    )
