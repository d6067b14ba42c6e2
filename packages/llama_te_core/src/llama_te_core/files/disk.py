"""Writing that a full or broken disk and a kill cannot leave half done, and the errors of a disk in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .folder_lock import removing

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_A_DISK = (*_FULL, errno.EIO, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG)
_UNFINISHED = ".unfinished"
_RUST = re.compile(r"\(os error (\d+)\)")


class DiskError(RuntimeError):
    """A file or folder cannot be written. The message names it, the reason, and the room on a full disk."""


def disk_error(error: BaseException) -> OSError | None:
    """Return the disk's own error behind an error, if there is one.

    Libraries hide it: torch raises an error of its own in its place, and safetensors and tokenizers, which are written
    in Rust, know only the text of it.
    """
    if isinstance(error, OSError):
        return error
    each: BaseException | None = error
    while each is not None:
        number = each.errno if isinstance(each, OSError) else None
        if number is None and (match := _RUST.search(str(each))) is not None:
            number = int(match[1])
        if number in _OF_A_DISK:
            return each if isinstance(each, OSError) else OSError(number, os.strerror(number))
        each = each.__cause__ or each.__context__
    return None


def is_full(error: OSError) -> bool:
    """Tell whether there is no room left, on the disk or for this user."""
    return error.errno in _FULL


def free_gigabytes(path: Path) -> str:
    """Return the room on a path's disk in words."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.2f} GB"


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into `DiskError`.

    Args:
        path: What is written, for errors that do not name it.

    Raises:
        DiskError: The disk refuses. Other errors stay as they are.
    """
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        room = f" ({free_gigabytes(path)} are free): make room" if is_full(found) else ""
        raise DiskError(f"{found.filename or path} cannot be written: {found.strerror or found}{room}.") from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_all(folder: Path) -> None:
    """Wait until a folder and all that it holds is on the disk."""
    for each in [*folder.rglob("*"), folder]:
        sync(each)


def replace_text(path: Path, text: str) -> None:
    """Give a file a new content, at once: whenever the process ends, the file has the old content or the new one."""
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # leaves its room
        raise


def is_unfinished(name: str) -> bool:
    """Tell by its name whether a file or folder is one that `replace_text` or `new_folder` is writing."""
    return name.startswith(".") and name.endswith(_UNFINISHED)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write a folder that is there as a whole or not at all, and that replaces an earlier one at its end.

    Only one process may do this at a time.

    Args:
        folder: The folder.

    Yields:
        The path to write to, which does not exist yet. If the context ends by an error, it is removed.

    Raises:
        FolderInUseError: Another process is reading the earlier folder, which stays.
        OSError: The disk refuses. The earlier folder stays.
    """
    aside = folder.with_name(f".{folder.name}{_UNFINISHED}")
    if aside.exists():
        shutil.rmtree(aside)  # of a process that was killed
    aside.mkdir(parents=True)
    try:
        written = aside / folder.name
        yield written
        sync_all(written)
        _replace(folder, written, aside / "before")
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(folder: Path, written: Path, before: Path) -> None:
    if not folder.exists():
        written.rename(folder)
        return
    with removing(folder):
        folder.rename(before)  # whole: one that is removed in part could still be loaded
        try:
            written.rename(folder)
        except OSError:
            before.rename(folder)
            raise
