"""A data set that fills each batch up to a budget of tokens, for packed (THD) training."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

Sample = Mapping[str, Any]


class TokenPackingDataset(IterableDataset[list[Sample]]):
    """Groups tokenised samples into batches whose token counts fill a budget.

    Each item is a whole batch, a list of samples in their original order, so the DataLoader must not batch again:
    ``DataLoader(packing, batch_size=None, collate_fn=DataCollatorWithFlattening(...))``.

    Without ``split_samples`` a batch ends before the sample that would exceed the budget. ``split_samples`` cuts that
    sample: the batch gets exactly the budget, and the rest of the sample starts the next batch. Each piece becomes a
    sequence of its own: its tokens do not attend to the earlier piece, and its first token is not a training target.
    The cut divides ``input_ids`` and all fields of the same length (lists, tuples, arrays, tensors). Each piece repeats
    the other fields. Samples without tokens are skipped.

    **Workers.** Each DataLoader worker packs its own share and has its own last batch. A torch or Hugging Face
    ``IterableDataset`` must shard itself over workers. This class shards everything else (map-style data sets, lists,
    other iterables): each worker takes every ``num_workers``-th sample. The inner data set must always shard itself
    over ranks (``datasets.distributed.split_dataset_by_node``).

    **Resuming.** ``state_dict`` and ``load_state_dict`` continue exactly after the last yielded batch, provided that
    the inner data set gives the same order again (set its epoch first). Resuming skips the used samples by index where
    the data set has indices. Otherwise it reads them again, since the state of a streaming data set may be inexact
    (shuffle buffers). A state belongs to one worker and one number of workers. With ``num_workers > 0`` use torchdata's
    ``StatefulDataLoader``, which saves each worker's state; iterating elsewhere with such a state is an error.

    Args:
        dataset: Samples: mappings with ``input_ids``, one list, array or 1-D tensor of tokens. A one-shot iterator
            serves a single pass.
        max_tokens_per_batch: The budget.
        drop_last: Drop the last samples if they do not fill a batch.
        split_samples: Cut samples at the budget.
        pad_sequences_to_be_divisible_by: The collator's argument of the same name. The budget then counts each sample
            with the padding that the collator will add. With ``split_samples`` the budget must be a multiple of it.

    Raises:
        ValueError: An argument is out of its range. While iterating: a sample is longer than the budget without
            ``split_samples``, or has no usable ``input_ids``.
    """

    def __init__(
        self,
        dataset: Iterable[Sample],
        max_tokens_per_batch: int,
        drop_last: bool = True,
        split_samples: bool = False,
        pad_sequences_to_be_divisible_by: int | None = None,
    ) -> None:
        if isinstance(dataset, Mapping):
            raise ValueError(
                f"dataset is a {type(dataset).__name__} with the keys {list(dataset)}; it must be an iterable of "
                "samples. Choose one split, such as dataset['train']."
            )
        _check_at_least_one("max_tokens_per_batch", max_tokens_per_batch)
        if pad_sequences_to_be_divisible_by is not None:
            _check_at_least_one("pad_sequences_to_be_divisible_by", pad_sequences_to_be_divisible_by)
        self.dataset = dataset
        self.max_tokens_per_batch = max_tokens_per_batch
        self.drop_last = drop_last
        self.split_samples = split_samples
        self.pad_sequences_to_be_divisible_by = pad_sequences_to_be_divisible_by
        self._check_budget_divides()
        # The position after the last batch: the number of samples drawn, and the samples that wait for the next batch.
        self._drawn = 0
        self._carried: list[Sample] = []
        self._resume_on: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[list[Sample]]:
        may_be_empty = self._resume_on is not None
        self._start()
        batch: list[Sample] = []
        room = self.max_tokens_per_batch
        for sample in self._incoming():
            rest: Sample | None = sample
            while rest is not None:
                fitting, rest = self._divide(rest, room)
                if fitting is not None:
                    batch.append(fitting)
                    room -= self._cost(fitting)
                if rest is not None or room == 0:
                    self._carried = [] if rest is None else [rest]
                    may_be_empty = True
                    yield batch
                    batch, room = [], self.max_tokens_per_batch
        self._carried = []
        if batch and not self.drop_last:
            yield batch
        elif batch and not may_be_empty:
            warnings.warn(
                f"No batch was filled: all {self.max_tokens_per_batch - room} tokens fit in less than "
                f"max_tokens_per_batch={self.max_tokens_per_batch} and drop_last=True drops them. Lower the budget, "
                "pass drop_last=False, or use fewer DataLoader workers.",
                stacklevel=2,
            )

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the inner data set, if it has ``set_epoch`` (a shuffled streaming data set has)."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, for ``load_state_dict``.

        Returns:
            A dict: ``drawn``, the number of samples used; ``carried``, the used samples that wait for the next batch
            (at most one, perhaps a piece); ``worker``, the worker's number and the number of workers.
        """
        return {"drawn": self._drawn, "carried": self._carried, "worker": self._resume_on or _worker()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Start the next iteration at a saved position; later ones start at the beginning.

        Args:
            state_dict: The result of ``state_dict`` of a data set made with the same arguments.
        """
        self._drawn = state_dict["drawn"]
        self._carried = list(state_dict["carried"])
        worker, workers = state_dict["worker"]
        self._resume_on = (worker, workers)

    def _start(self) -> None:
        if self._resume_on is None:
            self._drawn, self._carried = 0, []
        elif self._resume_on != _worker():
            raise RuntimeError(
                f"load_state_dict was given the state of worker {self._resume_on[0]} of {self._resume_on[1]}, but this "
                f"is worker {_worker()[0]} of {_worker()[1]}: samples would repeat or be missed. Keep num_workers as "
                "it was, and with num_workers > 0 use torchdata's StatefulDataLoader, which saves each worker's state."
            )
        self._resume_on = None

    def _incoming(self) -> Iterator[Sample]:
        yield from self._carried
        for sample in self._own_share():
            self._drawn += 1
            if _token_count(sample) > 0:
                yield sample

    def _own_share(self) -> Iterator[Sample]:
        if isinstance(self.dataset, IterableDataset):
            return islice(self.dataset, self._drawn, None)
        worker, workers = _worker()
        start = worker + self._drawn * workers
        if hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__"):
            dataset: Any = self.dataset
            return (dataset[index] for index in range(start, len(dataset), workers))
        return islice(self.dataset, start, None, workers)

    def _divide(self, sample: Sample, room: int) -> tuple[Sample | None, Sample | None]:
        """Return the part of the sample for the open batch, and the part for the next batch."""
        cost = self._cost(sample)
        if cost <= room:
            return sample, None
        if self.split_samples:
            return _cut(sample, room)
        if cost > self.max_tokens_per_batch:
            padded = "" if cost == _token_count(sample) else f" ({cost} with padding)"
            raise ValueError(
                f"a sample has {_token_count(sample)} tokens{padded}, more than max_tokens_per_batch="
                f"{self.max_tokens_per_batch}. Pass split_samples=True, raise the budget, or truncate when tokenising."
            )
        return None, sample

    def _cost(self, sample: Sample) -> int:
        return _round_up(_token_count(sample), self.pad_sequences_to_be_divisible_by or 1)

    def _check_budget_divides(self) -> None:
        multiple = self.pad_sequences_to_be_divisible_by
        if self.split_samples and multiple is not None and self.max_tokens_per_batch % multiple:
            raise ValueError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}; with split_samples=True it must be a multiple "
                f"of pad_sequences_to_be_divisible_by={multiple}, or no batch could be filled exactly. "
                f"Use {_round_up(self.max_tokens_per_batch, multiple)}."
            )


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _round_up(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple


def _token_count(sample: Sample) -> int:
    input_ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    length = _length(input_ids)
    nested = isinstance(input_ids, (list, tuple)) and length != 0 and isinstance(input_ids[0], (list, tuple))
    if length is None or nested or getattr(input_ids, "ndim", 1) != 1:
        raise ValueError(
            f"a sample's input_ids is {type(input_ids).__name__} in {type(sample).__name__}; each sample must be a "
            "mapping whose input_ids is one flat list, array or 1-D tensor of tokens. Tokenise one text per sample, "
            "without return_tensors."
        )
    return length


def _cut(sample: Sample, tokens: int) -> tuple[Sample, Sample]:
    count = _token_count(sample)
    head, tail = dict(sample), dict(sample)
    for name, value in sample.items():
        if _length(value) == count:
            head[name], tail[name] = value[:tokens], value[tokens:]
    return head, tail


def _length(value: Any) -> int | None:
    """Return the length of the first dimension of a list, tuple, array or tensor; None for other values."""
    if isinstance(value, (list, tuple)):
        return len(value)
    return len(value) if getattr(value, "ndim", 0) > 0 else None


def _check_at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
