"""The files of a folder, or of all folders of a training run, compared with their recorded sizes and checksums."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_te_core.checkpoint_format import CHECKSUMS
from llama_te_core.files.checksums import DamagedChecksumsError, file_names, file_problem, read_checksums
from llama_te_core.files.folder_lock import FolderInUseError, reading

from ..configs.config_file import CONFIG_NAME
from ..errors import CheckpointError

State = Literal["OK", "damaged", "missing", "extra", "unknown"]
_SET_ASIDE = (".partial", ".damaged")  # folders that no program reads: unfinished ones, and damaged checkpoints


@dataclass(frozen=True)
class RecordedFile:
    """A file and its state.

    Attributes:
        name: Its name in the folder that is verified.
        state: "OK", "damaged", "missing", "extra" for a file that nothing is recorded of, or "unknown" for a folder
            without `checksums.json`.
        text: The name, and what is wrong.
    """

    name: str
    state: State
    text: str


def verify_files(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[RecordedFile]:
    """Compare files with their recorded sizes and checksums.

    Args:
        folder: A folder with `checksums.json`, or one with such folders in it, as a training run has.
        progress: Called with the bytes that are read and the bytes in total.

    Raises:
        CheckpointError: The folder does not exist, has nothing that can be verified, or has a file that this process
            cannot open.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    try:
        folders = [folder] if (folder / CHECKSUMS).exists() else sorted(_folders_inside(folder))
        if not any((each / CHECKSUMS).exists() for each in folders):
            raise CheckpointError(
                f"{folder} has no {CHECKSUMS}, and no folder in it has: nothing is recorded to compare its files "
                "with. To compare it with another checkpoint: llama-te-convert verify A B."
            )
        with contextlib.ExitStack() as held:
            return _verify(folder, [each for each in folders if _is_kept(each, held, folder)], progress)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error


def is_whole(files: list[RecordedFile]) -> bool:
    """Whether all recorded files are as they were."""
    return all(file.state in ("OK", "extra") for file in files)


def lines(files: list[RecordedFile]) -> list[str]:
    """A report: a line for each file, and a last one with their numbers."""
    counts = Counter(file.state for file in files)
    numbers = ", ".join(f"{number} {state}" for state, number in counts.items())
    return [*(f"{file.state}: {file.text}" for file in files), f"{len(files)} files: {numbers}."]


def to_dict(files: list[RecordedFile]) -> dict[str, Any]:
    """The report as JSON types."""
    return {"whole": is_whole(files), "files": [vars(file) for file in files]}


def _folders_inside(folder: Path) -> Iterator[Path]:
    """The folders of checkpoints in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.suffix not in _SET_ASIDE:
            if (path / CHECKSUMS).exists() or (path / CONFIG_NAME).exists():
                yield path
            else:
                yield from _folders_inside(path)


def _is_kept(folder: Path, held: contextlib.ExitStack, top: Path) -> bool:
    """Keep a training run from removing a folder meanwhile. Whether there is still such a folder."""
    try:
        held.enter_context(reading(folder))
    except FolderInUseError as error:
        if folder == top:
            raise CheckpointError(str(error)) from error
        return False
    except FileNotFoundError:
        return False
    return True


def _verify(top: Path, folders: list[Path], progress: Callable[[int, int], None]) -> list[RecordedFile]:
    files, recorded = [], {}
    for folder in folders:
        prefix = "" if folder == top else f"{folder.relative_to(top).as_posix()}/"
        try:
            checksums = read_checksums(folder)
        except DamagedChecksumsError as error:
            files.append(RecordedFile(prefix + CHECKSUMS, "damaged", prefix + str(error)))
            continue
        if checksums is None:
            name = prefix.rstrip("/")
            files.append(RecordedFile(name, "unknown", f"{name} has no {CHECKSUMS}"))
            continue
        recorded[folder, prefix] = checksums
    total, done = sum(each.size for checksums in recorded.values() for each in checksums.values()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(done, total)

    for (folder, prefix), checksums in recorded.items():
        for name, checksum in checksums.items():
            problem = file_problem(folder, name, checksum, count)
            state: State = "OK" if problem is None else "damaged" if (folder / name).exists() else "missing"
            files.append(RecordedFile(prefix + name, state, prefix + (problem or name)))
        extra = (name for name in file_names(folder) if name not in checksums)
        files += [RecordedFile(prefix + name, "extra", prefix + name) for name in extra]
    return files
