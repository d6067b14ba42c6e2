"""The stream of a run's batches: for this process's rank in the mesh, on its device, resumed exactly."""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchdata.stateful_dataloader import StatefulDataLoader

from ...compat.torchdata import shut_down_workers
from ...parallel.context import shard_context
from ...parallel.mesh import data_rank
from .documents import UnusableDocumentError
from .text_data import TextBatches, TextData, merge_states


class Batch(NamedTuple):
    """A packed batch, ready for the model.

    Attributes:
        arguments: The model's arguments, on the device: see `shard_context`.
        tokens: The number of tokens before context ranks share them out, padding included.
        squared_lengths: The sum of the squares of the sequences' lengths. Attention's work is proportional to it.
    """

    arguments: dict[str, Any]
    tokens: int
    squared_lengths: int


class BatchStream:
    """An endless stream of batches. Any number of processes can resume from its state.

    Args:
        data: The data; its `epochs` are None.
        mesh: The processes; None for one process.
        device: The device of the batches.
        workers: The number of processes that read and tokenise.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: The source, or its first document, cannot be used.
    """

    def __init__(self, data: TextData, mesh: DeviceMesh | None, device: torch.device, workers: int) -> None:
        self.mesh = mesh
        self.device = device
        self.workers = workers
        rank, self.ranks = data_rank(mesh)
        self.batches = TextBatches(data, rank, self.ranks)
        self.batches.check_documents(workers)
        for document in self.batches.source.documents(None):
            data.labelled_tokens(document)  # raises now, and not in a worker after the model is loaded
            break
        self._loader = self._make_loader()
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            UnusableDocumentError: A document cannot be used.
        """
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            batch = next(self._iterator)
        except UnusableDocumentError as error:
            # A worker's error has a whole traceback as its message.
            *_, message = str(error).strip().splitlines()
            raise UnusableDocumentError(
                message.partition(f"{UnusableDocumentError.__name__}: ")[2] or message
            ) from error
        lengths = batch["cu_seq_lens_q"].diff()
        arguments = shard_context(batch, self.mesh)
        return Batch(
            {
                name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            },
            batch["input_ids"].numel(),
            int(lengths.square().sum()),  # still on the host
        )

    def close(self) -> None:
        """End the workers. The stream yields no batch afterwards."""
        iterator: Any = self._iterator
        self._iterator = None
        if self.workers and iterator is not None:
            # At exit Python sends the workers a SIGTERM and waits for them. They ignore it, so it would wait for ever.
            shut_down_workers(iterator)

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all data-parallel ranks. All processes call this together and get the same result."""
        rank, _ = data_rank(self.mesh)
        state = self._loader.state_dict()
        states: list[Any] = [(rank, state)]
        if dist.is_initialized() and self.ranks > 1:
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, (rank, state))
        # Processes of one data-parallel rank have the same state.
        by_rank = dict(states)
        return {"ranks": [by_rank[rank] for rank in sorted(by_rank)], "workers": self.workers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position, with any number of ranks and workers.

        Args:
            state_dict: The result of `state_dict`.

        Raises:
            ValueError: The state belongs to other documents, or to another order.
        """
        states = state_dict["ranks"]
        rank, _ = data_rank(self.mesh)
        # A loader reads its state when it starts, and a worker even later: refuse a wrong state now.
        copy.copy(self.batches).load_state_dict(merge_states(states))
        self._loader = self._make_loader()
        self._iterator = None
        if len(states) == self.ranks and state_dict["workers"] == self.workers:
            self._loader.load_state_dict(states[rank])
        else:
            self.batches.load_state_dict(merge_states(states))
            self._loader = self._make_loader()

    def _make_loader(self) -> StatefulDataLoader[Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
            return StatefulDataLoader(
                self.batches,
                batch_size=None,
                num_workers=self.workers,
                worker_init_fn=_leave_signals_to_the_process,
                # The loader has its own generator, so that its start does not change training's random numbers.
                generator=torch.Generator(),
                pin_memory=self.device.type == "cuda",
            )


def _leave_signals_to_the_process(worker: int) -> None:
    # All processes of a job may get the signal. A worker that ended at the signal would end this process too, before it
    # saves a checkpoint. Workers end together with this process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
