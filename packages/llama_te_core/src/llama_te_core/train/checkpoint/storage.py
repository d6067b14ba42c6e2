"""Reads and writes the files of a checkpoint, and gives the reason of a failure in one line."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from ...compat.torch import file_of_item
from ...files.checksums import Checksum, ChecksumWriter
from ...files.disk import disk_error, is_full


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


class Reader(FileSystemReader):
    """torch's reader, whose errors name the damaged file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: D102
        with _reading(".metadata"):
            return super().read_metadata(*args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:  # noqa: D102
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
        raise DamagedFileError(f"{name} is missing") from error
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
