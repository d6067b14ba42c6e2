"""A fake disk that takes some bytes of each of a checkpoint's tensor files, and then is full."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from torch.distributed.checkpoint.filesystem import FileSystem


class _File(io.FileIO):
    def __init__(self, path, size: int) -> None:
        super().__init__(path, "w")
        self.size = size

    def write(self, data) -> int:
        if self.tell() + len(data) > self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@contextmanager
def full_disk(size: int = 10_000) -> Iterator[None]:
    usual = FileSystem.create_stream

    @contextmanager
    def create_stream(self, path, mode):
        if Path(path).suffix == ".distcp" and mode == "wb":
            with io.BufferedWriter(_File(path, size)) as file:
                yield file
        else:
            with usual(self, path, mode) as file:
                yield file

    with mock.patch.object(FileSystem, "create_stream", create_stream):
        yield
