"""Checkpoints of a training run: model, optimizer and all that makes the next step what it would have been.

    checkpoints = Checkpoints("run/checkpoints")
    extra = {"scheduler": scheduler, "data": loader}
    step = checkpoints.latest() or 0
    if step:
        checkpoints.load(step, model, optimizer, extra)
    ...
    checkpoints.save(step, model, optimizer, extra)  # goes on in the background
    ...
    checkpoints.wait()

`run/checkpoints/step-00001200/` is a checkpoint of torch.distributed.checkpoint with the model's `config.json` beside
it, which `llama-te-convert` reads. Its state dict holds

- `model` and `optimizer.state`: tensors by the names of the parameters, in parts, so that any number of processes can
  load them; of weights that layers have in FP8 only, `model` has what the optimizer keeps of them in FP32;
- `optimizer.groups`: the options of the parameter groups, of which `load` leaves `betas`, `eps` and `weight_decay` to
  the optimizer that it is given;
- `ranks`: for each process its random numbers, its `extra` and the scaling state of its FP8 layers.

The last two are bytes, which torch.load makes objects of: load what you trust.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from ...compat.torch import FSDP_CLASS_PREFIX, file_of_item, uncompiled
from ...compat.transformer_engine import MASTER_WEIGHT
from ...layers.collectives import local_part
from ...parallel.shards import gather_halves, scatter_halves
from ...precision.scaling_state import scaling_state, set_scaling_state

_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"
# What an optimizer is made with and keeps. The rate is not: a scheduler may compute it from the last one. Others are
# state, such as the number of steps that Transformer Engine's optimizer counts in its groups.
_OPTIONS = ("betas", "eps", "weight_decay")

T = TypeVar("T")


class TrainingCheckpointError(RuntimeError):
    """A checkpoint cannot be saved or loaded."""


class Checkpoints:
    """The checkpoints of one training run, in a folder that all its processes see.

    A checkpoint is written under another name (`step-00001200.partial`) and gets its own when it is whole and on the
    disk: whenever the processes end, the folder has whole checkpoints only. What was left unfinished is removed by the
    next `save`.

    All processes make the object, call its methods, and do so in the same order, as they communicate. One run writes to
    a folder at a time.

    Args:
        folder: Made by the first `save`.
        keep: How many checkpoints stay. Older ones are removed once a new one is whole.
        asynchronous: Whether `save` returns when the state is copied to the host's memory, and a thread writes it. The
            methods wait for that thread, and raise its errors.

    Raises:
        ValueError: `keep` is not an integer of at least 1.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3, asynchronous: bool = True) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: it must be an integer of at least 1, for how many checkpoints stay.")
        self.folder = Path(folder)
        self.keep = keep
        distributed = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if distributed else 0
        self._ranks = dist.get_world_size() if distributed else 1
        # A group of its own: in one that training uses, the order of the thread's messages and training's would differ
        # from process to process. Gloo, since what is sent is on the host.
        self._group = dist.new_group(backend="gloo") if distributed else None
        if self._group is None:
            # That there is one process is no news to who started it. For good, since catch_warnings in the thread would
            # meddle with those of training.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if asynchronous else None
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a checkpoint; the one before is waited for.

        Random numbers (of Python, NumPy, torch and this process's GPU) and the scaling state of FP8 layers go along by
        themselves.

        Args:
            step: Its number, larger than those that there are.
            model: A model of transformers or of this package: plain, compiled, or distributed by `fully_shard`,
                `DistributedDataParallel` or `parallelize`.
            optimizer: Of its parameters.
            extra: What else belongs to this process, by name: objects with `state_dict` and `load_state_dict`
                (scheduler, data loader), or values that torch.save can write. Each process keeps its own, whole: these
                should be small.

        Raises:
            TrainingCheckpointError: This save, or the one before, has failed, for example on a full disk; checkpoints
                that exist stay.
            TypeError: The model is of another kind.
            ValueError: `step` is not larger than those that there are, or weights exist in a quantized format only.
                `optimizers.make_optimizer` keeps them in FP32 too.
        """
        self.wait()
        inner = _unwrapped(model)
        weights = _weights(inner)
        self._on_rank_0(lambda: self._begin(step, inner))
        state = gather_halves(
            {
                "model": weights,
                "optimizer": _optimizer_state(inner, optimizer),
                "ranks": {str(self._rank): _to_bytes(_own_state(inner, extra or {}))},
            }
        )
        if self._thread is None:
            self._write(step, state)
        else:
            self._writing = self._thread.submit(self._write, step, _on_host(state))

    def wait(self) -> None:
        """Wait until the last save is on the disk. Call it before the process group is destroyed.

        Raises:
            TrainingCheckpointError: It has failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are, in order.

        Raises:
            TrainingCheckpointError: The last save has failed.
        """
        self.wait()
        return self._on_rank_0(self._found)

    def latest(self) -> int | None:
        """The step of the newest checkpoint; `None` where there is none.

        Raises:
            TrainingCheckpointError: The last save has failed.
        """
        return max(self.steps(), default=None)

    def load(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra: MutableMapping[str, Any] | None = None,
    ) -> None:
        """Load a checkpoint into a model and what belongs to it.

        Any number of processes, in any arrangement, loads what any other has saved: weights and the optimizer's state
        are the same, bit for bit. Where the number of processes is the same, so are the random numbers and `extra` of
        each; otherwise, with a warning, random numbers go on as they are, and every process gets rank 0's `extra` and
        scaling state.

        Of the options of the optimizer's groups, `betas`, `eps` and `weight_decay` stay as they are, so that a run can
        go on with others. All else comes from the checkpoint: the learning rate, what schedulers keep in the groups,
        and `betas` too where a scheduler moves them (`OneCycleLR`, `CyclicLR`).

        Args:
            step: Which one.
            model: As for `save`.
            optimizer: Of its parameters, in the same groups. Its gradients are dropped. `None` leaves its state out.
            extra: As for `save`; it can have fewer names. Objects load their state, other values are replaced, with
                tensors in the host's memory.

        Raises:
            TrainingCheckpointError: There is no such checkpoint, it is damaged, or it does not fit. The model may be
                loaded in part then.
            TypeError: The model is of another kind.
            ValueError: Weights exist in a quantized format only; see `save`.
        """
        steps = self.steps()
        if step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise TrainingCheckpointError(f"{self.folder} has no checkpoint of step {step}: {there}.")
        model = _unwrapped(model)
        weights = _weights(model)
        reader = _Reader(self.path(step))
        try:
            paths = set(reader.read_metadata().planner_data.values())
        except Exception as error:
            raise self._not_loaded(step, steps, error) from error
        ranks = {path[1] for path in paths if path[0] == "ranks"}
        same_ranks = len(ranks) == self._ranks
        own = str(self._rank if same_ranks else 0)

        state: dict[str, Any] = {"model": weights, "ranks": {own: b""}}
        if optimizer is not None:
            saved = {path[2:] for path in paths if path[:2] == ("optimizer", "state")}
            empty = _empty_optimizer_state(model, optimizer, {path[0] for path in saved})
            kept, kept_there = {key for each in empty.values() for key in each}, {path[1] for path in saved}
            if kept < kept_there:  # torch names what the checkpoint lacks, but passes over what it has beyond
                raise TrainingCheckpointError(
                    f"optimizer keeps {sorted(kept)} of a parameter, but that of the checkpoint kept "
                    f"{sorted(kept_there)}: go on with one of the same kind (in a training run, with the same "
                    "precision.quantized_weights)."
                )
            state["optimizer"] = {"state": empty, "groups": b""}
        whole = gather_halves(state)
        try:
            state_dict_loader.load(whole, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            raise self._not_loaded(step, steps, error) from error
        state = scatter_halves(whole, state)

        # First, since with delayed scaling it has the scales that weights are quantized with.
        _set_own_state(_from_bytes(state["ranks"][own]), model, {} if extra is None else extra, same_ranks)
        set_model_state_dict(model, state["model"])
        if optimizer is not None:
            groups = _from_bytes(state["optimizer"]["groups"])
            _set_optimizer_state(model, optimizer, state["optimizer"]["state"], groups)
        if not same_ranks:
            warnings.warn(
                f"step {step} was saved by {len(ranks)} processes and is loaded by {self._ranks}: weights and the "
                "optimizer's state are the same, random numbers go on as they are, and extra is what rank 0 saved (in "
                "a run of llama-te-train the place in the data, which is that of all ranks: none is lost or repeated).",
                stacklevel=2,
            )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, there or not."""
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}{_PARTIAL}"

    def _found(self) -> list[int]:
        if not self.folder.exists():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _STEP.fullmatch(path.name)))

    def _begin(self, step: int, model: PreTrainedModel) -> None:
        newest = max(self._found(), default=-1)
        if isinstance(step, bool) or not isinstance(step, int) or step <= newest:
            raise ValueError(
                f"step={step!r}: it must be an integer larger than {newest}"
                + (f", since {self.path(newest)} exists. Remove it to go back behind it." if newest >= 0 else ".")
            )
        try:
            for leftover in self.folder.glob(f"step-*{_PARTIAL}"):
                shutil.rmtree(leftover)
            self._partial(step).mkdir(parents=True)
            _config(model).save_pretrained(self._partial(step))
        except OSError as error:
            raise self._failed(step, error) from error

    def _write(self, step: int, state: dict[str, Any]) -> None:
        """Write what `_begin` has begun; runs in the thread."""
        # Nothing may be copied ahead here: the thread would do so on GPU 0, whichever this process has.
        writer = _Writer(self._partial(step), per_thread_copy_ahead=0)
        try:
            state_dict_saver.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            self._on_rank_0(lambda: self._finish(step))
        except (Exception, CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            raise self._failed(step, error) from error
        self._on_rank_0(self._rotate)

    def _finish(self, step: int) -> None:
        partial = self._partial(step)
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(self.path(step))
        _sync(self.folder)

    def _rotate(self) -> None:
        for step in self._found()[: -self.keep]:
            try:
                # Half removed, it must not look whole.
                self.path(step).rename(self._partial(step))
                shutil.rmtree(self._partial(step))
            except OSError as error:
                raise TrainingCheckpointError(f"{self.path(step)} cannot be removed: {_reason(error)}.") from error

    def _failed(self, step: int, error: BaseException) -> TrainingCheckpointError:
        newest = max(self._found(), default=None)
        stays = "There is no checkpoint yet." if newest is None else f"The last checkpoint is that of step {newest}."
        return TrainingCheckpointError(f"step {step} cannot be saved to {self.folder}: {_reason(error)}. {stays}")

    def _not_loaded(self, step: int, steps: list[int], error: BaseException) -> TrainingCheckpointError:
        message = f"{self.path(step)} cannot be loaded: {_reason(error)}."
        if isinstance(_first(error)[0], _DamagedFileError):
            newest = max((other for other in steps if other != step), default=None)
            message += f" Remove {self.path(step)} to " + (
                "begin anew." if newest is None else f"go on from step {newest}."
            )
        return TrainingCheckpointError(message)

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        """What an action of rank 0 returns or raises, in all processes."""
        outcome: list[Any] = [None]
        if self._rank == 0:
            try:
                outcome = [action()]
            except Exception as error:  # all processes have to hear of it, whatever it is
                outcome = [error]
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


class _Writer(FileSystemWriter):
    """Writes what torch's does, and says why it could not.

    Where the disk refuses, torch.save raises an error of its own about positions. The disk's is behind that one, and is
    lost when the processes tell each other.
    """

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


class _DamagedFileError(RuntimeError):
    """A file of a checkpoint is not what was saved."""


class _Reader(FileSystemReader):
    """Reads what torch's does, and says which file is damaged."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with _reading(".metadata"):
            return super().read_metadata(*args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(file_of_item(self, item), []).append(item)
        for name, items in files.items():
            with _reading(name):
                super().read_data(replace(plan, items=items), planner)
        return super().read_data(replace(plan, items=[]), planner)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _DamagedFileError(f"{name} is missing") from error
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise  # the machine's fault, which the file may outlive
    except Exception as error:  # damaged bytes can raise anything
        raise _DamagedFileError(f"{name} is damaged ({_reason(error)})") from error


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    inner: Any = uncompiled(model)
    while isinstance(inner, DistributedDataParallel):
        inner = uncompiled(inner.module)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model is a {type(inner).__name__}: it must be a model of transformers or of this package.")
    return inner


def _config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration as the model's own `save_pretrained` writes it."""
    config = copy.deepcopy(model.config)
    config.architectures = [
        type(model).__name__.removeprefix(FSDP_CLASS_PREFIX)
    ]  # fully_shard makes a class of that name
    config.dtype = model.dtype
    return config


@torch.no_grad()
def _weights(model: PreTrainedModel) -> dict[str, Any]:
    """The model's state dict, which shares its memory, or that of the optimizer where that has the weights in FP32."""
    state: dict[str, Any] = get_model_state_dict(model)
    for name, value in state.items():
        part = local_part(value)
        if type(part) not in (nn.Parameter, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(part).__name__}, which a checkpoint of a training run does not hold: train with "
                "llama_te_core.train.optimizers.make_optimizer, which keeps weights in FP32 too, or with "
                "use_quantized_model_init=False."
            )
    return state


def _optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    untouched = not optimizer.state
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if untouched:
        # torch has made a state by a step without gradients, which would count.
        optimizer.state.clear()
        state["state"] = {}
    return {"state": _without_masters(state["state"]), "groups": _to_bytes(state["param_groups"])}


def _without_masters(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """An optimizer's state without weights, which are saved as the model's."""
    return {name: {key: value for key, value in each.items() if key != MASTER_WEIGHT} for name, each in state.items()}


def _empty_optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, saved: Set[str]) -> dict[str, Any]:
    """Tensors to load the state of the parameters that have one into."""
    optimizer.zero_grad()
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if state["state"].keys() != saved:
        # torch makes them by a step with gradients of zero, but only where there are neither state nor gradients. Not
        # of every optimizer, since in some versions Adagrad has its state from the beginning, and no step makes it.
        optimizer.state.clear()
        state = get_optimizer_state_dict(model, optimizer)
    return _without_masters({name: value for name, value in state["state"].items() if name in saved})


def _set_optimizer_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    target: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    saved = [sorted(group["params"]) for group in groups]
    there = [sorted(group["params"]) for group in target["param_groups"]]
    if saved != there:
        raise TrainingCheckpointError(
            f"optimizer has groups of {list(map(len, there))} parameters, but the checkpoint has groups of "
            f"{list(map(len, saved))}, or of others: give each group the parameters that it had."
        )
    groups = [
        group | {name: own[name] for name in _OPTIONS if name in own and not (name == "betas" and _moves_betas(group))}
        for group, own in zip(groups, target["param_groups"], strict=True)
    ]
    for name, each in state.items():
        if MASTER_WEIGHT in target["state"].get(name, {}):
            each[MASTER_WEIGHT] = target["state"][name][
                MASTER_WEIGHT
            ]  # loaded with the model's weights, whose memory it is
    # Not strict: what had no state when it was saved, such as a parameter that no step has changed yet, has none now.
    set_optimizer_state_dict(
        model, optimizer, {"state": state, "param_groups": groups}, options=StateDictOptions(strict=False)
    )


def _moves_betas(group: dict[str, Any]) -> bool:
    """Whether a scheduler of torch does, which then has their range in the group."""
    return "base_momentum" in group


def _own_state(model: nn.Module, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "random": _random_state(),
        "scaling": scaling_state(model),
        "extra": {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in extra.items()},
    }


def _set_own_state(state: dict[str, Any], model: nn.Module, extra: MutableMapping[str, Any], same_ranks: bool) -> None:
    for name, value in extra.items():
        if name not in state["extra"]:
            names = ", ".join(map(repr, state["extra"])) or "nothing"
            raise TrainingCheckpointError(f"extra has {name!r}, but the checkpoint has {names} as extra.")
        if isinstance(value, Stateful):
            value.load_state_dict(state["extra"][name])
        else:
            extra[name] = state["extra"][name]
    set_scaling_state(model, state["scaling"])
    if same_ranks:
        _set_random_state(state["random"])


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


def _on_host(state: Any) -> Any:
    """A copy that training does not change, with its tensors in the host's memory."""

    def copied(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: copied(each) for key, each in value.items()}
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", non_blocking=True, copy=True)  # from a GPU, into pinned memory
        return copy.deepcopy(value)

    result = copied(state)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # the next step must not change a tensor before it is copied
    return result


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _first(error: BaseException) -> tuple[BaseException, str]:
    """An error, or that of the first of several processes; and which process, in words."""
    if not isinstance(error, CheckpointException):
        return error, ""
    number, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    return error, f" (rank {number})"


def _reason(error: BaseException) -> str:
    """Why, in one line; for an error of several processes, that of the first."""
    error, rank = _first(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{rank}: make room, or keep fewer checkpoints"
    if isinstance(error, _DamagedFileError):
        return f"{error}{rank}"
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0].rstrip('.')}" if lines else "") + rank
