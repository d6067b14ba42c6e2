"""The batches of a run: for this process's place in the mesh, on its device, resumed exactly."""

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
from .text_data import TextBatches, TextData, merge_states


class Batch(NamedTuple):
    """A packed batch as the model takes it.

    Attributes:
        arguments: The model's, on the device: see `shard_context`.
        tokens: The number of tokens before cutting, padding included.
        squared_lengths: The sum of the squares of the sequences' lengths, to which attention's work is proportional.
    """

    arguments: dict[str, Any]
    tokens: int
    squared_lengths: int


class UnusableDocumentError(ValueError):
    """A run has reached a document that it cannot use."""


class BatchStream:
    """Batches without end, with a state from which any number of processes can go on.

    Args:
        data: The data; its `epochs` are None.
        mesh: The processes; None for one.
        device: The device of the batches.
        workers: Processes that read and tokenise.

    Raises:
        FileNotFoundError: There is no such source.
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
            data.tokens(document)  # raises now, and not in a worker after the model is loaded
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
        except ValueError as error:
            # The message of a worker's error is a whole traceback.
            *_, message = str(error).strip().splitlines()
            raise UnusableDocumentError(message.removeprefix("ValueError: ")) from error
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
        """End the workers; there are no more batches."""
        iterator: Any = self._iterator
        self._iterator = None
        if self.workers and iterator is not None:
            # Python's exit sends them a SIGTERM, which they ignore, and waits for them for ever.
            shut_down_workers(iterator)

    def state_dict(self) -> dict[str, Any]:
        """Return the place of all data-parallel ranks; all processes call this together and get the same."""
        rank, _ = data_rank(self.mesh)
        state = self._loader.state_dict()
        states: list[Any] = [(rank, state)]
        if dist.is_initialized() and self.ranks > 1:
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, (rank, state))
        # Processes of one data-parallel rank have the same.
        by_rank = dict(states)
        return {"ranks": [by_rank[rank] for rank in sorted(by_rank)], "workers": self.workers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved place, with any number of ranks and workers.

        Args:
            state_dict: The result of `state_dict`.

        Raises:
            ValueError: It belongs to other documents, or to another order.
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
                # Its own generator: the start of the loader must not change the random numbers of training.
                generator=torch.Generator(),
                pin_memory=self.device.type == "cuda",
            )


def _leave_signals_to_the_process(worker: int) -> None:
    # Where all processes of a job get the signal, a worker that ended would end this process too, before it saves a
    # checkpoint. Workers end together with the process.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
