"""Checkpoints of a training run: the complete state that the next step depends on.

    checkpoints = Checkpoints("run/checkpoints")
    extra = {"scheduler": scheduler, "data": loader}
    step = checkpoints.latest() or 0  # the newest one whose files are as they were written
    if step:
        checkpoints.load(step, model, optimizer, extra)
    ...
    checkpoints.save(step, model, optimizer, extra)  # writes in the background
    ...
    checkpoints.wait()

`run/checkpoints/step-00001200/` holds a checkpoint of torch.distributed.checkpoint, the model's `config.json`, and
`checksums.json` with the size and the checksum of each file. `llama-te-convert` reads them. The checkpoint's state dict
has these entries:

- `model` and `optimizer.state`: tensors by the names of the parameters, in parts, so that any number of processes can
  load them. For weights that layers hold in FP8 only, `model` has the optimizer's FP32 weights.
- `optimizer.groups`: the options of the parameter groups. `load` keeps `betas`, `eps` and `weight_decay` of the given
  optimizer.
- `ranks`: each process's random numbers, its `extra` and the scaling state of its FP8 layers.

Loading runs no code in these files, whoever made them: see `files.pickles`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from transformers import PreTrainedModel

from ...checkpoint_format import CHECKSUMS
from ...files.checksums import Checksum, DamagedChecksumsError, file_problem, read_checksums, record_checksums
from ...files.disk import free_gigabytes, is_full, sync
from ...files.folder_lock import FolderInUseError, FolderLock, reading, removing
from ...files.pickles import PickleFileError
from ...parallel.mesh import on_rank_0
from ...parallel.shards import gather_halves, scatter_halves
from .state import (
    TrainingCheckpointError,
    empty_optimizer_state,
    from_bytes,
    on_host,
    optimizer_state,
    own_state,
    saved_config,
    set_optimizer_state,
    set_own_state,
    to_bytes,
    unwrapped,
    weights_of,
)
from .storage import DamagedFileError, Planner, Reader, Writer, first_error, reason

__all__ = ["Checkpoints", "TrainingCheckpointError"]

_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"
_DAMAGED = ".damaged"
T = TypeVar("T")

# The locks of this process, by folder: several objects of one process may save to a folder in turns.
_LOCKS: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()


class Checkpoints:
    """The checkpoints of one training run, in a folder that all its processes see.

    `save` writes a checkpoint under a temporary name (`step-00001200.partial`), and renames it when it is complete and
    on the disk. So every other folder is a complete checkpoint, whenever the processes end. The next `save` removes
    unfinished checkpoints.

    All processes make the object and call its methods in the same order, since they communicate. From the first `save`
    on, the folder is locked for this run as long as the object exists: another run that saves there gets an error that
    names this one.

    Args:
        folder: The folder of the checkpoints. The first `save` makes it.
        keep: The number of checkpoints to keep. `save` removes older ones when the new one is complete. One that
            `llama-te-convert` is reading stays until a later save.
        asynchronous: `save` returns when the state is copied to the host's memory, and a thread writes it. The other
            methods wait for this thread, and raise its errors.

    Raises:
        ValueError: `keep` is not an integer of at least 1.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3, asynchronous: bool = True) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: it must be an integer of at least 1: the checkpoints that stay.")
        self.folder = Path(folder)
        self.keep = keep
        distributed = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if distributed else 0
        self._ranks = dist.get_world_size() if distributed else 1
        # The thread needs its own process group: in training's group, the order of the thread's and training's messages
        # would differ between processes. The backend is Gloo, since all messages are on the host.
        self._group = dist.new_group(backend="gloo") if distributed else None
        if self._group is None:
            # Users who start one process need no warning about it. The filter stays, since catch_warnings in the thread
            # would change training's filters.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if asynchronous else None
        self._writing: Future[None] | None = None
        self._accepted: set[int] = set()  # steps whose files need no further comparison with their checksums
        self._lock: FolderLock | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Wait for the previous checkpoint, then save a new one.

        It includes random numbers (of Python, NumPy, torch and this process's GPU) and the scaling state of FP8 layers.

        Args:
            step: The checkpoint's step, larger than every step in the folder.
            model: A model of transformers or of this package: plain, compiled, or distributed by `fully_shard`,
                `DistributedDataParallel` or `parallelize`.
            optimizer: The optimizer of its parameters.
            extra: Other state of this process, by name: objects with `state_dict` and `load_state_dict` (scheduler,
                data loader), or values: numbers, texts, bytes, tensors, arrays of NumPy, and lists, tuples, sets and
                dicts of them. The states of objects consist of such values too. Each process saves its complete
                `extra`, so it should be small.

        Raises:
            TrainingCheckpointError: This save or the previous one has failed, for example on a full disk, or another
                run saves to the folder, or `extra` has other values. Existing checkpoints stay.
            TypeError: The model is of another kind.
            ValueError: `step` is not larger than every step in the folder, or weights exist in a quantized format only.
                `optimizers.make_optimizer` keeps them in FP32 too.
        """
        self.wait()
        inner = unwrapped(model)
        weights = weights_of(inner)
        self._on_rank_0(lambda: self._begin(step, inner))
        state = gather_halves(
            {
                "model": weights,
                "optimizer": optimizer_state(inner, optimizer),
                "ranks": {str(self._rank): to_bytes(own_state(inner, extra or {}))},
            }
        )
        if self._thread is None:
            self._write(step, state)
        else:
            self._writing = self._thread.submit(self._write, step, on_host(state))

    def wait(self) -> None:
        """Wait until the last save is on the disk. Call this before you destroy the process group.

        Raises:
            TrainingCheckpointError: The last save has failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def remove_old(self) -> None:
        """Remove all but the newest `keep` checkpoints. `save` does so too, unless its process is killed before.

        Raises:
            TrainingCheckpointError: The last save has failed, or a checkpoint cannot be removed.
        """
        self.wait()
        self._on_rank_0(self._remove_old)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints in the folder, in order.

        Raises:
            TrainingCheckpointError: The last save has failed.
        """
        self.wait()
        return self._on_rank_0(self._found)

    def latest(self) -> int | None:
        """Return the step of the newest undamaged checkpoint, or `None` without a checkpoint.

        The processes share the files of the checkpoint and compare them with their sizes and checksums. If a file has
        changed or is missing, the folder of this checkpoint gets the name `step-00001200.damaged`, and a warning names
        the file and the older checkpoint that takes its place.

        Raises:
            TrainingCheckpointError: The last save has failed, or all checkpoints are damaged, which then keep their
                names.
        """
        damaged: dict[int, list[str]] = {}
        for step in reversed(self.steps()):
            problems = self._problems(step)
            if not problems:
                if damaged:
                    self._on_rank_0(lambda: self._set_aside(damaged, step))  # noqa: B023  (called at once)
                return step
            damaged[step] = problems
        if not damaged:
            return None
        raise TrainingCheckpointError(
            f"{self.folder} has no undamaged checkpoint: {_damages(damaged)}. Bring one back from a copy, or remove "
            "them to begin again."
        )

    def load(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra: MutableMapping[str, Any] | None = None,
    ) -> None:
        """Load a checkpoint into a model, its optimizer and other state.

        Any mesh can load the checkpoint of any other mesh: weights and the optimizer's state are the same, bit for bit.
        With the same number of processes, each process also gets its random numbers and its `extra` back. With another
        number, `load` warns: random numbers stay as they are, and every process gets rank 0's `extra` and scaling
        state.

        The options `betas`, `eps` and `weight_decay` of the optimizer's groups stay as they are, so that a run can
        continue with other values. Everything else comes from the checkpoint: the learning rate, the entries of
        schedulers, and also `betas` where a scheduler moves them (`OneCycleLR`, `CyclicLR`).

        Args:
            step: The checkpoint's step.
            model: See `save`.
            optimizer: The optimizer of its parameters, in the same groups. `load` drops its gradients. `None` skips its
                state.
            extra: See `save`; it can have fewer names. Objects load their state. Other values are replaced, with
                tensors in the host's memory.

        Raises:
            TrainingCheckpointError: The checkpoint does not exist, is damaged, or does not fit. The model may then be
                loaded in part.
            TypeError: The model is of another kind.
            ValueError: Weights exist in a quantized format only; see `save`.
        """
        steps = self.steps()
        if step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise TrainingCheckpointError(f"{self.folder} has no checkpoint of step {step}: {there}.")
        problems = self._problems(step)
        if problems:
            raise self._not_loaded(step, steps, DamagedFileError("; ".join(problems)))
        model = unwrapped(model)
        weights = weights_of(model)
        reader = Reader(self.path(step))
        try:
            paths = set(reader.read_metadata().planner_data.values())
        except Exception as error:
            raise self._not_loaded(step, steps, error) from error
        ranks = {path[1] for path in paths if len(path) == 2 and path[0] == "ranks"}
        same_ranks = len(ranks) == self._ranks
        own = str(self._rank if same_ranks else 0)

        state: dict[str, Any] = {"model": weights, "ranks": {own: b""}}
        if optimizer is not None:
            saved = {path[2:] for path in paths if len(path) == 4 and path[:2] == ("optimizer", "state")}
            empty = empty_optimizer_state(model, optimizer, {path[0] for path in saved})
            kept, kept_there = {key for each in empty.values() for key in each}, {path[1] for path in saved}
            if kept < kept_there:  # torch refuses missing entries, but ignores additional ones
                raise TrainingCheckpointError(
                    f"optimizer keeps {sorted(kept)} of a parameter, but the checkpoint's optimizer kept "
                    f"{sorted(kept_there)}: go on with one of the same kind (in a training run, with the same "
                    "precision.quantized_weights)."
                )
            state["optimizer"] = {"state": empty, "groups": b""}
        whole = gather_halves(state)
        try:
            state_dict_loader.load(
                whole,
                storage_reader=reader,
                planner=Planner(),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            raise self._not_loaded(step, steps, error) from error
        state = scatter_halves(whole, state)
        try:
            own_values = from_bytes(state["ranks"][own])
            groups = None if optimizer is None else from_bytes(state["optimizer"]["groups"])
        except PickleFileError as error:
            raise self._not_loaded(step, steps, DamagedFileError(f"a value in it {error}")) from error

        # Load this state first: it has the scales of delayed scaling, and loading the weights quantizes with them.
        set_own_state(own_values, model, {} if extra is None else extra, same_ranks)
        set_model_state_dict(model, state["model"])
        if optimizer is not None and groups is not None:
            set_optimizer_state(model, optimizer, state["optimizer"]["state"], groups)
        if not same_ranks:
            warnings.warn(
                f"step {step} was saved by {len(ranks)} processes and is loaded by {self._ranks}: weights and the "
                "optimizer's state are the same, random numbers go on as they are, and extra comes from rank 0 (in a "
                "run of llama-te-train the place of all ranks in the data: no document is lost or repeated).",
                stacklevel=2,
            )

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}{_PARTIAL}"

    def _found(self) -> list[int]:
        if not self.folder.exists():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _STEP.fullmatch(path.name)))

    def _claim(self, step: int) -> None:
        folder = self.folder.resolve()
        lock = _LOCKS.get(folder)
        try:
            if lock is None or not lock.is_held:
                lock = _LOCKS[folder] = FolderLock(folder)
        except FolderInUseError as error:
            raise TrainingCheckpointError(f"step {step} cannot be saved: {error}") from error
        except OSError as error:
            raise self._failed(step, error) from error
        self._lock = lock

    def _refuse_step(self, step: int) -> None:
        newest = max(self._found(), default=-1)
        if isinstance(step, bool) or not isinstance(step, int) or step <= newest:
            raise ValueError(
                f"step={step!r}: it must be an integer larger than {newest}"
                + (f", since {self.path(newest)} exists. Remove it to go back behind it." if newest >= 0 else ".")
            )

    def _begin(self, step: int, model: PreTrainedModel) -> None:
        self._refuse_step(step)  # before the lock makes the folder
        self._claim(step)
        self._refuse_step(step)  # another run may just have ended there
        try:
            for leftover in self.folder.glob(f"step-*{_PARTIAL}"):
                shutil.rmtree(leftover)
            self._partial(step).mkdir(parents=True)
            saved_config(model).save_pretrained(self._partial(step))
        except OSError as error:
            raise self._failed(step, error) from error

    def _write(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint that `_begin` has begun. This runs in the thread."""
        # Do not copy ahead: the thread would copy on GPU 0, whichever GPU this process has.
        writer = Writer(self._partial(step), per_thread_copy_ahead=0)
        try:
            state_dict_saver.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            checksums = dict(self._on_all_ranks(lambda: list(writer.checksums.items())))
            self._on_rank_0(lambda: self._finish(step, checksums))
        except (Exception, CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            raise self._failed(step, error, _size(state)) from error
        self._on_rank_0(self._remove_old)

    def _finish(self, step: int, checksums: Mapping[str, Checksum]) -> None:
        partial = self._partial(step)
        record_checksums(partial, checksums)
        for path in [*partial.iterdir(), partial]:
            sync(path)
        partial.rename(self.path(step))
        sync(self.folder)

    def _remove_old(self) -> None:
        for step in self._found()[: -self.keep]:
            try:
                with removing(self.path(step)):
                    # A half-removed checkpoint must not look complete.
                    self.path(step).rename(self._partial(step))
                    shutil.rmtree(self._partial(step))
            except FolderInUseError:
                continue  # a later save removes it
            except OSError as error:
                raise TrainingCheckpointError(f"{self.path(step)} cannot be removed: {reason(error)}.") from error

    def _problems(self, step: int) -> list[str]:
        """Compare a checkpoint's files with their sizes and checksums, and return what is wrong, in all processes."""
        if step in self._accepted:
            return []
        folder = self.path(step)
        with contextlib.ExitStack() as held:
            try:
                self._on_rank_0(lambda: held.enter_context(reading(folder)))  # another run may remove old checkpoints
                problems = self._compared(folder)
            except DamagedChecksumsError as error:
                return [str(error)]
            except OSError as error:
                raise TrainingCheckpointError(f"{folder} cannot be read: {reason(error)}.") from error
        if not problems:
            self._accepted.add(step)
        return problems

    def _compared(self, folder: Path) -> list[str]:
        checksums = self._on_rank_0(lambda: read_checksums(folder))
        if checksums is None:
            return self._on_rank_0(lambda: _problems_without_checksums(folder))
        own = sorted(checksums, key=lambda name: checksums[name].size)[self._rank :: self._ranks]
        found = self._on_all_ranks(lambda: [file_problem(folder, name, checksums[name]) for name in own])
        return [problem for problem in found if problem is not None]

    def _set_aside(self, damaged: Mapping[int, Sequence[str]], step: int) -> None:
        for each in damaged:
            target = self.path(each).with_suffix(_DAMAGED)
            try:
                if target.exists():
                    shutil.rmtree(target)
                self.path(each).rename(target)
            except OSError as error:
                raise TrainingCheckpointError(f"{self.path(each)} cannot be renamed: {reason(error)}.") from error
        sync(self.folder)
        warnings.warn(
            f"{self.folder} has a damaged checkpoint: {_damages(damaged)}. The run goes on from step {step}, and keeps "
            f"the damaged one as {', '.join(self.path(each).with_suffix(_DAMAGED).name for each in damaged)}.",
            stacklevel=2,
        )

    def _failed(self, step: int, error: BaseException, size: int | None = None) -> TrainingCheckpointError:
        newest = max(self._found(), default=None)
        stays = "There is no checkpoint yet." if newest is None else f"The last checkpoint is of step {newest}."
        cause, room = first_error(error)[0], ""
        if size is not None and isinstance(cause, OSError) and is_full(cause):
            room = f" (a checkpoint has {size / 1e9:.2f} GB, and {free_gigabytes(self.folder)} are free)"
        return TrainingCheckpointError(f"step {step} cannot be saved to {self.folder}: {reason(error)}{room}. {stays}")

    def _not_loaded(self, step: int, steps: list[int], error: BaseException) -> TrainingCheckpointError:
        message = f"{self.path(step)} cannot be loaded: {reason(error)}."
        if isinstance(first_error(error)[0], DamagedFileError):
            newest = max((other for other in steps if other != step), default=None)
            message += f" Remove {self.path(step)} to " + (
                "begin again." if newest is None else f"go on from step {newest}."
            )
        return TrainingCheckpointError(message)

    def _on_all_ranks(self, action: Callable[[], list[T]]) -> list[T]:
        """Run an action in all processes, and return all results, or raise the first error, in each of them."""
        outcomes: list[Any] = [None]
        try:
            outcomes = [action()]
        except Exception as error:  # all processes must raise any error
            outcomes = [error]
        if self._group is not None:
            own, outcomes = outcomes[0], [None] * self._ranks
            dist.all_gather_object(outcomes, own, group=self._group)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [each for outcome in outcomes for each in outcome]

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        return on_rank_0(action, self._group)


def _size(state: Any) -> int:
    """Return the bytes of the tensors of a state, of all processes for distributed tensors."""
    if isinstance(state, Mapping):
        return sum(map(_size, state.values()))
    return state.numel() * state.element_size() if isinstance(state, torch.Tensor) else 0


def _problems_without_checksums(folder: Path) -> list[str]:
    missing = [name for name in (".metadata", "config.json") if not (folder / name).is_file()]
    if not missing:
        warnings.warn(
            f"{folder} has no {CHECKSUMS}, as older versions saved it: nobody can tell whether its files have changed.",
            stacklevel=2,
        )
    return [f"{name} is missing" for name in missing]


def _damages(damaged: Mapping[int, Sequence[str]]) -> str:
    return "; ".join(f"step {step}: {', '.join(problems)}" for step, problems in damaged.items())
