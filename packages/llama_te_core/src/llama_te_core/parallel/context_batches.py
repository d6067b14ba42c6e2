"""Batches for context parallelism: each process gets its part of each sequence.

`context_part` cuts a batch for one rank. `DataCollatorForContextParallel` cuts it for all ranks in the process that
loads data, and `ContextParallelDataLoaderWrapper` gives each process its part. The two classes have the names and the
meaning that they have in NVIDIA's BioNeMo recipes.

Shapes: B sequences, S columns of a padded batch, T packed tokens, L tokens (or columns) of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ..data.labels import IGNORED_LABEL, next_token_labels
from ..layers.packed_rows import SHARED_ROW, check_offsets, is_one_sequence_a_row, refuse_unless
from ..layers.sequence_layout import token_places, whole_places

# The names of a mesh's dimensions, ours first and the recipe's second.
_CONTEXT, _TENSOR = ("context", "cp"), ("tensor", "tp")


def context_part(batch: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Return one context rank's part of a batch. `whole_places` says which tokens of a sequence a rank gets.

    Args:
        batch: The model's arguments: `input_ids` [B, S] with `attention_mask` [B, S], or packed, [1, T], with
            `cu_seq_lens_q`. The function cuts all tensors that begin with the shape of `input_ids`.
        rank: The rank, from 0.
        ranks: The number of ranks; with one, the batch stays as it is.

    Returns:
        The model's arguments, with about 1/ranks of the tokens. There is no mask and there are no positions: each row
        begins with its tokens, and the padding after them counts as part of the sequence, to which no token attends.
        `cu_seq_lens_q` and `max_length_q` still describe the whole sequences, as the layers expect.

    Raises:
        ValueError: Packed sequences are no multiples of 2 * `ranks`, or `cu_seq_lens_q` is missing for packed rows.
            For a batch on a GPU an assertion fails instead (see `check_offsets`).
    """
    if ranks == 1:
        return dict(batch)
    cut = _cut_padded if batch.get("cu_seq_lens_q") is None else _cut_packed
    return cut(dict(batch), rank, ranks)


def _cut_packed(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    batch.pop("attention_mask", None)  # both follow from the sequences
    batch.pop("position_ids", None)
    padded = batch.get("cu_seq_lens_q_padded")
    offsets = batch["cu_seq_lens_q"] if padded is None else padded
    tokens = batch["input_ids"].shape[1]
    check_offsets(batch["cu_seq_lens_q"], padded, tokens, batch.get("max_length_q"), 2 * ranks)
    part_offsets = offsets // ranks
    row_L, place_L = token_places(part_offsets, tokens // ranks)
    return _select(batch, offsets[row_L] + whole_places(place_L, part_offsets.diff()[row_L], rank, ranks))


def _cut_padded(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    mask_BS = batch.pop("attention_mask", None)
    rows, width = batch["input_ids"].shape
    # Packed rows could not be cut as one sequence each.
    one_sequence = is_one_sequence_a_row(mask_BS, batch.pop("position_ids", None))
    if one_sequence is not None:
        refuse_unless(one_sequence, f"{SHARED_ROW} Context ranks cut packed sequences by cu_seq_lens_q: pass it.")
    if mask_BS is not None:
        order_BS = torch.argsort(mask_BS == 0, dim=1, stable=True)
        row_B1 = torch.arange(rows, device=order_BS.device)[:, None]
        batch = {
            name: value[row_B1, order_BS] if _is_per_token(value, rows, width) else value
            for name, value in batch.items()
        }
    missing = -width % (2 * ranks)
    if missing:
        for name, value in batch.items():
            if _is_per_token(value, rows, width):
                filling = IGNORED_LABEL if name in ("labels", "shift_labels") else 0
                batch[name] = F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=filling)
    place_L = torch.arange((width + missing) // ranks, device=batch["input_ids"].device)
    return _select(batch, whole_places(place_L, len(place_L), rank, ranks))


def _select(batch: dict[str, Any], source_L: torch.Tensor) -> dict[str, Any]:
    rows, width = batch["input_ids"].shape
    return {
        name: value[:, source_L.to(value.device)] if _is_per_token(value, rows, width) else value
        for name, value in batch.items()
    }


def _is_per_token(value: Any, rows: int, width: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (rows, width)


@dataclass
class DataCollatorForContextParallel:
    """Cuts the batch of another collator into the parts of all context ranks.

    One process loads data for the ranks that share it, and `ContextParallelDataLoaderWrapper` distributes the parts.

    Args:
        collator: Makes a batch: of packed sequences (`DataCollatorWithFlattening` with
            `pad_sequences_to_be_divisible_by`, a multiple of twice the number of context ranks), or a padded one.
        device_mesh: A mesh with a dimension "cp" or "context" and perhaps one "tp" or "tensor". Others do not count.
        qkv_format: "thd" for packed sequences, "bshd" for padded batches.
        is_causal_lm: Shift the labels before cutting, since the label of a piece's last token is in another piece: the
            parts then have `shift_labels`, and `labels` are `None`.

    Raises:
        ValueError: The mesh has no names, or the format is unknown.
    """

    collator: Callable[[Any], Mapping[str, Any]]
    device_mesh: DeviceMesh
    qkv_format: str = "thd"
    is_causal_lm: bool = False

    def __post_init__(self) -> None:
        names = self.device_mesh.mesh_dim_names
        if not names:
            raise ValueError(
                f"device_mesh={self.device_mesh} has no names: give init_device_mesh mesh_dim_names with 'cp'."
            )
        if self.qkv_format not in ("thd", "bshd"):
            raise ValueError(f"qkv_format={self.qkv_format!r} must be 'thd' or 'bshd'.")
        self.cp_world_size = _size(self.device_mesh, names, _CONTEXT)
        self.tp_world_size = _size(self.device_mesh, names, _TENSOR)
        order = [name for name in names if name in (*_CONTEXT, *_TENSOR)]
        self._tensor_is_outer = bool(order) and order[0] in _TENSOR

    def __call__(self, features: Any) -> list[dict[str, Any]]:
        """Make the parts of one batch.

        Returns:
            A part for each process of the flattened context and tensor dimensions, in the mesh's order. Tensor ranks
            get equal parts.

        Raises:
            ValueError: The batch does not fit the format, or `context_part` refuses it.
        """
        batch = dict(self.collator(features))
        packed = batch.get("cu_seq_lens_q") is not None
        if packed != (self.qkv_format == "thd"):
            raise ValueError(
                f"qkv_format={self.qkv_format!r}, but the collator's batch has {'' if packed else 'no '}cu_seq_lens_q: "
                "'thd' takes packed sequences, 'bshd' padded batches."
            )
        mask = batch.get("attention_mask")
        if self.is_causal_lm:
            labels = batch["labels"]
            aligned = mask is not None and mask.shape == labels.shape
            batch["shift_labels"] = next_token_labels(labels, mask if aligned else None)
            batch["labels"] = None
        if packed:
            offsets = batch.get("cu_seq_lens_q_padded", batch["cu_seq_lens_q"])
            batch["max_length_q"] = batch["max_length_k"] = int(offsets.diff().max())
        parts = [context_part(batch, rank, self.cp_world_size) for rank in range(self.cp_world_size)]
        for part in parts:
            part.pop("attention_mask", None)  # one rank keeps the whole batch, and has the same fields as several
        if self._tensor_is_outer:
            return parts * self.tp_world_size
        return [part for part in parts for _ in range(self.tp_world_size)]


def _on_cpu(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in part.items()}


class ContextParallelDataLoaderWrapper:
    """A data loader that gives each process its part of each batch.

    The first process of the group loads the batches, and sends each process its part. So all parts are of the same
    batch, whatever the order in which a data set yields its samples. An error of the loader is raised in all processes.
    Tensors of the parts are on the CPU, also if the loader has them on a GPU, which the other processes do not use.

    Args:
        dataloader: In the first process of the group, a loader whose batches are lists of parts, as
            `DataCollatorForContextParallel` makes them; `None` in the others.
        cp_tp_mesh: The processes, one dimension: the context ranks, or the flattened context and tensor ranks.

    Raises:
        ValueError: A loader is missing in the first process, or given in another.
    """

    def __init__(self, dataloader: Iterable[Sequence[Any]] | None, cp_tp_mesh: DeviceMesh) -> None:
        first = cp_tp_mesh.get_local_rank() == 0
        if (dataloader is not None) != first:
            raise ValueError(
                f"dataloader is {'missing' if first else 'given'} in process {cp_tp_mesh.get_local_rank()} of the "
                "group: the first process has a loader, and the others have None."
            )
        self.dataloader = dataloader
        self._group = cp_tp_mesh.get_group()
        self._ranks = cp_tp_mesh.size()
        self._iterator: Iterator[Sequence[Any]] | None = None

    def __iter__(self) -> ContextParallelDataLoaderWrapper:
        """Begin the loader's next pass."""
        if self.dataloader is not None:
            self._iterator = iter(self.dataloader)
        return self

    def __next__(self) -> Any:
        """Return this process's part of the next batch. All processes of the group call this together.

        Raises:
            StopIteration: The pass is over.
            RuntimeError: The loader failed; the first process raises the loader's own error.
        """
        parts: list[Any] | None = None
        failure: Exception | None = None
        if self.dataloader is not None:
            try:
                parts = self._next_parts()
            except Exception as error:  # the other processes wait, and must hear of it, whatever it is
                failure = error
                parts = [_Failure(error)] * self._ranks
        received: list[Any] = [None]
        dist.scatter_object_list(received, parts, group=self._group, group_src=0)
        if failure is not None:
            raise failure
        if isinstance(received[0], _Failure):
            received[0].raise_here()
        return received[0]

    def _next_parts(self) -> list[Any]:
        if self._iterator is None:
            raise TypeError("next() without iter() before it: use the loader in a for loop.")
        parts = next(self._iterator)
        if not isinstance(parts, (list, tuple)) or len(parts) != self._ranks:
            found = f"{len(parts)} parts" if isinstance(parts, (list, tuple)) else f"a {type(parts).__name__}"
            raise ValueError(
                f"a batch is {found}, but {self._ranks} processes share it: give the loader "
                "collate_fn=DataCollatorForContextParallel(...) with the mesh of these processes."
            )
        return [_on_cpu(part) for part in parts]

    def close(self) -> None:
        """End the pass. The loader's workers end with it."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state in the first process, and an empty one in the others.

        Raises:
            TypeError: The loader has no state: torchdata's `StatefulDataLoader` has.
        """
        return {} if self.dataloader is None else {"dataloader": self._stateful().state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the result of `state_dict` in the same process.

        Raises:
            TypeError: See `state_dict`.
        """
        if self.dataloader is not None:
            self._stateful().load_state_dict(state_dict["dataloader"])

    def _stateful(self) -> Any:
        if not hasattr(self.dataloader, "state_dict"):
            raise TypeError(
                f"dataloader is a {type(self.dataloader).__name__}, which has no state to save: use torchdata's "
                "StatefulDataLoader."
            )
        return self.dataloader

    @property
    def num_workers(self) -> int:
        """The number of the loader's worker processes here."""
        return int(getattr(self.dataloader, "num_workers", 0))


class _Failure:
    """Tells the other processes that the loader has no more batches, or failed. An error itself may not pickle."""

    def __init__(self, error: Exception) -> None:
        self.message = None if isinstance(error, StopIteration) else f"{type(error).__name__}: {error}"

    def raise_here(self) -> NoReturn:
        if self.message is None:
            raise StopIteration
        raise RuntimeError(f"the loader in the first process of the group failed: {self.message}")


def _size(mesh: DeviceMesh, names: Sequence[str], wanted: Sequence[str]) -> int:
    sizes = [mesh.size(names.index(name)) for name in wanted if name in names]
    return sizes[0] if sizes else 1
