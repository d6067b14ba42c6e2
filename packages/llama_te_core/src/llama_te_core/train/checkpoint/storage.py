"""Reads and writes the files of a checkpoint, and gives the reason of a failure in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ...files.checksums import Checksum, ChecksumWriter
from ...files.dcp_metadata import DCPMetadata, Place
from ...files.disk import disk_error, is_full
from ...files.input_files import open_file
from ...files.pickles import PickleFileError
from ...files.torch_archive import Region, load_value


class _FileSystem(FileSystem):
    """torch's file system, which computes the checksums of what it writes.

    Attributes:
        checksums: By the names under which the files were written.
    """

    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            if mode != "wb":
                yield file
                return
            writer = ChecksumWriter(cast(BinaryIO, file))
            yield writer
            self.checksums[Path(path).name] = writer.checksum


class Writer(FileSystemWriter):
    """torch's writer, which computes checksums and raises the disk's own error if it cannot write.

    If the disk refuses, torch.save raises its own error about positions, with the disk's error as its context.
    Processes lose this context when they exchange errors.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fs = self._files = _FileSystem()

    @property
    def checksums(self) -> dict[str, Checksum]:
        """The checksums of the tensor files that this process has written, by their names."""
        return {name: each for name, each in self._files.checksums.items() if name.endswith(".distcp")}

    def write_data(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            raise disk_error(error) or error from None


class DamagedFileError(RuntimeError):
    """A file of a checkpoint is missing, or its bytes have changed."""


class Reader(StorageReader):
    """Reads a checkpoint of torch.distributed.checkpoint without running code in it. Errors name the damaged file.

    torch's own reader unpickles `.metadata` and values that are not tensors. Use this one with a `Planner`.

    Args:
        folder: The checkpoint's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cached_property
    def _metadata(self) -> DCPMetadata:
        with _reading(".metadata"):
            return DCPMetadata(self._folder / ".metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: D102
        metadata = self._metadata
        with _reading(".metadata"):
            tensors = {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    tensor.shape,
                    [ChunkStorageMetadata(part.offsets, part.sizes) for part in metadata.parts(name)],
                )
                for name, tensor in metadata.tensors.items()
            }
        values = {name: BytesStorageMetadata() for name in metadata.values}
        return Metadata({**tensors, **values}, {name: metadata.path(name) for name in (*tensors, *values)})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:  # noqa: D102
        with _reading(".metadata"):
            places = [self._metadata.place(item.storage_index.fqn, item.storage_index.offset) for item in plan.items]
        files: dict[str, list[tuple[ReadItem, Place]]] = {}
        for item, place in zip(plan.items, places, strict=True):
            files.setdefault(place.file, []).append((item, place))
        for name, items in files.items():
            with _reading(name), open_file(self._folder / name, buffering=0) as file:
                for item, place in items:
                    self._read(item, Region(file.fileno(), place.begin, place.length), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, stored: Region, planner: LoadPlanner) -> None:
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, cast(io.BytesIO, stored))
            return
        tensor, name = load_value(stored), item.storage_index.fqn
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != self._metadata.tensors[name].dtype:
            raise PickleFileError(f"has a value in the place of {name} that is not the tensor of the metadata")
        for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dimension, start, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != tensor.shape:
            raise PickleFileError(f"has a part of {name} with another shape")
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    # The rest of the interface: nothing to do for files that all processes see.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:  # noqa: D102
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:  # noqa: D102
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:  # noqa: D102
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: D102
        return True


class Planner(DefaultLoadPlanner):
    """torch's planner, which loads values that are not tensors without running code in them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: D102
        *parents, key = self.mappings[read_item.dest_index.fqn]
        target: Any = self.original_state_dict
        for each in parents:
            target = target[each]
        target[key] = load_value(cast(Region, value))


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedFileError(f"{name} is missing") from error
    except PickleFileError as error:
        raise DamagedFileError(f"{name} {error}") from error
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise  # the machine's fault, not the file's
    except Exception as error:  # damaged bytes can raise anything
        raise DamagedFileError(f"{name} is damaged ({reason(error)})") from error


def first_error(error: BaseException) -> tuple[BaseException, str]:
    """Return the first failed process's error and its rank in words; for one process, the error itself."""
    if not isinstance(error, CheckpointException):
        return error, ""
    number, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    return error, f" (rank {number})"


def reason(error: BaseException) -> str:
    """Return the reason of an error in one line. Of several processes' errors, the first one counts."""
    error, rank = first_error(error)
    if isinstance(error, OSError) and is_full(error):
        return f"the disk is full{rank}: make room, or keep fewer checkpoints"
    if isinstance(error, DamagedFileError):
        return f"{error}{rank}"
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0].rstrip('.')}" if lines else "") + rank
