"""Locks of folders between processes. The kernel releases them when a process ends, also after SIGKILL.

Writers exclude each other by a lock file, which names its holder. It lies inside a folder that grows, such as that of a
training run, or beside a folder that appears by a rename, such as that of a conversion. Readers share a lock on a
folder itself, so that no process removes or replaces what they read.

The locks are those of flock(2). On NFS the lock file works between hosts, and the readers' lock on one host alone.
Where a file system has no locks, a warning says so once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shlex
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"
_LONGEST = 300  # characters of a holder's line in an error; a command can have any length
_SECONDS_OF_MISSES = 2  # no file can be made in folders such as /proc, which say so by the same error
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(RuntimeError):
    """Another process uses a folder. The message names it where it can."""


class _Descriptor:
    """An open file or folder that carries a lock; a fork of this process does not keep it open."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_open = True
        _descriptors.add(self)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            os.close(self.number)


_descriptors: weakref.WeakSet[_Descriptor] = weakref.WeakSet()


def _close_in_child() -> None:
    # A lock lives as long as any process has the descriptor open. Workers of a killed run would hold it for seconds.
    for descriptor in list(_descriptors):
        descriptor.close()


os.register_at_fork(after_in_child=_close_in_child)


class FolderLock:
    """The lock of the one process that may write to a folder. It is held until `close`, or until the process ends.

    Args:
        folder: The folder, for messages.
        file: The lock file, which `close` removes; `folder/.lock` by default. Folders on the way to it are made, and
            removed by `close` if they are empty.

    Raises:
        FolderInUseError: Another process, or another lock of this one, holds it. The message names the holder.
        OSError: The lock file cannot be made.
    """

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        self._file = file or folder / _LOCK
        self._process = os.getpid()
        self._made = [each for each in self._file.parents if not each.exists()]
        self._descriptor = self._take(folder)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the name of its holder
            os.ftruncate(self._descriptor.number, 0)
            os.write(self._descriptor.number, f"{_this_process()}\n".encode())
        self._closed = weakref.finalize(self, _release, self._descriptor, self._file, self._made, self._process)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_held(self) -> bool:
        """Whether this process still keeps others out; not after a fork, nor after somebody removed the lock file."""
        return self._descriptor.is_open and _is_at(self._descriptor.number, self._file)

    def close(self) -> None:
        """Let other processes write."""
        self._closed()

    def _take(self, folder: Path) -> _Descriptor:
        end = time.monotonic() + _SECONDS_OF_MISSES
        while True:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                number = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except (FileNotFoundError, FileExistsError):  # the last holder removed the folder that it had made
                if time.monotonic() > end:
                    raise
                continue
            descriptor = _Descriptor(number)
            if not _lock(descriptor, fcntl.LOCK_EX, self._file):
                holder = _holder(descriptor)
                raise FolderInUseError(
                    f"{folder} is being written by {holder}: wait for it to end, or name another folder."
                )
            if _is_at(number, self._file):
                return descriptor
            descriptor.close()  # the last holder removed the file after it was opened here


def lock_beside(folder: Path) -> FolderLock:
    """Take the lock of a folder that appears by a rename; see `FolderLock`."""
    return FolderLock(folder, folder.with_name(f".{folder.name}{_LOCK}"))


def is_lock(name: str) -> bool:
    """Tell whether a file is one of these locks, by its name."""
    return name.startswith(".") and name.endswith(_LOCK)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep other processes of llama-te from removing or replacing a folder.

    Raises:
        FolderInUseError: One is doing so now.
    """
    with _folder(folder, fcntl.LOCK_SH, "is being removed or replaced by another process: give the command again."):
        yield


@contextlib.contextmanager
def removing(folder: Path) -> Iterator[None]:
    """Remove or replace a folder within this context, where no reader has it.

    Raises:
        FolderInUseError: Another process is reading it.
    """
    with _folder(folder, fcntl.LOCK_EX, "is being read by another process, so it stays: wait for that process to end."):
        yield


@contextlib.contextmanager
def _folder(folder: Path, kind: int, problem: str) -> Iterator[None]:
    descriptor = _Descriptor(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    try:
        if not _lock(descriptor, kind, folder) or not _is_at(descriptor.number, folder):
            raise FolderInUseError(f"{folder} {problem}")
        yield
    finally:
        descriptor.close()


def _lock(descriptor: _Descriptor, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor.number, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            descriptor.close()
            raise
        _warn_without_locks(path.parent)
    return True


@functools.cache
def _warn_without_locks(folder: Path) -> None:
    warnings.warn(
        f"the file system of {folder} has no locks (flock): let no other process write there at the same time.",
        stacklevel=2,
    )


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path, follow_symlinks=True))
    except FileNotFoundError:
        return False


def _this_process() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [sys.executable])
    return f"pid {os.getpid()} on host {socket.gethostname()} since {since} ({command})".replace("\n", " ")


def _holder(descriptor: _Descriptor) -> str:
    line = os.pread(descriptor.number, _LONGEST, 0).decode(errors="replace").partition("\n")[0]
    descriptor.close()
    return "".join(each for each in line if each.isprintable()) or "another process"


def _release(descriptor: _Descriptor, file: Path, made: list[Path], process: int) -> None:
    if not descriptor.is_open or os.getpid() != process:
        return
    with contextlib.suppress(OSError):  # a folder that is gone, or not empty
        if _is_at(descriptor.number, file):
            file.unlink()
        for folder in made:
            folder.rmdir()
    descriptor.close()
