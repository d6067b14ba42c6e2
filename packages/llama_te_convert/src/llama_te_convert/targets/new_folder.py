"""The target folder of a command: checked before any work, and locked while this process writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from llama_te_core.files.checksums import record_checksums
from llama_te_core.files.disk import DiskError, new_folder, writing_to
from llama_te_core.files.folder_lock import FolderInUseError, lock_beside, reading

from ..errors import CheckpointError


def target_folder(folder: Path) -> Path:
    """Return the real path of a target folder, with links followed, where a new folder can take its place.

    A folder that holds files is not checked further: it may be the finished result.

    Raises:
        CheckpointError: There is something else, or the folder cannot be written. The message names the folder.
    """
    try:
        real = folder.resolve()
        if real.exists() and not real.is_dir():
            raise CheckpointError(f"{folder} is a file: name a new folder, or an empty one.")
        if real.is_dir() and any(real.iterdir()):
            return real
        if real.is_dir() and real.samefile(Path.cwd()):
            raise CheckpointError(
                f"{folder} is the current folder, whose place the new folder would take: name a folder in it."
            )
        if os.path.ismount(real):
            raise CheckpointError(f"{folder} is a mount point, which cannot be replaced: name a folder in it.")
        there = next(each for each in real.parents if each.exists())
        if not there.is_dir():
            raise CheckpointError(f"{folder} cannot be made: {there} is a file.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise CheckpointError(f"{folder} cannot be made: {there} cannot be written. Name another folder.")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"{folder} cannot be used: {error}") from error
    return real


def check_apart(source: Path, folder: Path) -> None:
    """Refuse a target folder that holds the source: a message to remove the target would remove the source.

    Raises:
        CheckpointError: The message names both.
    """
    real = source.resolve()
    if folder.is_dir() and (real == folder or folder in real.parents):
        place = "is" if real == folder else "holds"
        raise CheckpointError(f"{folder} {place} the source, {source}: name a new folder.")


def new_target(folder: Path) -> Path:
    """Return the real path of a target folder that holds nothing yet; see `target_folder`.

    Raises:
        CheckpointError: The message names the folder.
    """
    real = target_folder(folder)
    if real.is_dir() and any(real.iterdir()):
        raise CheckpointError(f"{folder} exists already: name a new folder, or an empty one.")
    return real


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Write a new folder, which is there as a whole or not at all, with the checksums of its files.

    Yields:
        The path to write to, which does not exist yet.

    Raises:
        CheckpointError: The folder is not new, another process is writing it, or it cannot be written.
    """
    real = new_target(folder)
    with writing(real):
        new_target(folder)  # another process may have made it in between
        try:
            with writing_to(folder), new_folder(real) as unfinished:
                yield unfinished
                record_checksums(unfinished)
        except DiskError as error:
            raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder that will appear by a rename.

    Raises:
        CheckpointError: Another process is writing to it, or its parent cannot be written.
    """
    try:
        lock = lock_beside(folder)
    except FolderInUseError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be written: {error.strerror or error}.") from error
    with lock:
        yield


@contextlib.contextmanager
def kept_whole(source: Path) -> Iterator[None]:
    """Keep other processes from removing a checkpoint's folder while this process reads it.

    Raises:
        CheckpointError: One is doing so now.
    """
    if not source.is_dir():
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(reading(source))
        except FolderInUseError as error:
            raise CheckpointError(str(error)) from error
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error.strerror or error}.") from error
        yield
