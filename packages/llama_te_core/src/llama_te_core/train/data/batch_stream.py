"""The batches of a run: of this process's data-parallel rank, cut for its mesh, on its device, resumed exactly."""

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
        arguments: Of the model, on the device: `shift_labels`, and `num_items_in_batch` as `shard_context` has it.
        tokens: How many there were before cutting, padding included.
        squared_lengths: The sum of the squares of the sequences' lengths, which attention's work goes by.
    """

    arguments: dict[str, Any]
    tokens: int
    squared_lengths: int


class UnusableDocumentError(ValueError):
    """A document that cannot be trained on, met in the course of a run."""


class BatchStream:
    """Batches without end, with a state that any number of processes can go on from.

    Args:
        data: What they are made of; its epochs are None.
        mesh: Of the processes; None for one alone.
        device: Where batches are wanted.
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
            data.tokens(document)  # tells now what a worker would only once the model is loaded
            break
        self._loader = self._make_loader()
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Batch:
        """The next batch.

        Raises:
            UnusableDocumentError: A document cannot be used.
        """
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            batch = next(self._iterator)
        except ValueError as error:
            # A worker's has the whole traceback for its message.
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
            # At Python's exit they would get a SIGTERM, which they leave to this process, and be waited for for ever.
            shut_down_workers(iterator)

    def state_dict(self) -> dict[str, Any]:
        """The place of all data-parallel ranks, the same in all processes, which call this together."""
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
        """Go on from a saved place, with as many ranks and workers as there were or not.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: It is of other documents, or of another order.
        """
        states = state_dict["ranks"]
        rank, _ = data_rank(self.mesh)
        # A loader looks at its state when it starts, a worker's even later: one that does not fit is refused here.
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
                # Of its own, so that the random numbers of training do not depend on when the loader starts.
                generator=torch.Generator(),
                pin_memory=self.device.type == "cuda",
            )


def _leave_signals_to_the_process(worker: int) -> None:
    # Where all processes of a job get the signal, workers that ended would take the process with them, which is about
    # to save a checkpoint. They end when it does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
