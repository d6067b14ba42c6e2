"""Comparison of a folder with the sizes and checksums that its `checksums.json` records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llama_te_core.checkpoint_format import CHECKSUMS
from llama_te_core.files.checksums import problems

from ..errors import CheckpointError


def changed_files(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str] | None:
    """What is wrong with each file that is missing or has changed: see `llama_te_core.files.checksums.problems`.

    Raises:
        CheckpointError: A file is there, and this process cannot open it.
    """
    try:
        return problems(folder, progress)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error


def refuse_changed(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Refuse a source whose files differ from their recorded checksums. A folder without `checksums.json` is accepted.

    Args:
        folder: The source; it may be a file, which has no recorded checksum.
        progress: Called with the bytes that are read and the bytes in total.

    Raises:
        CheckpointError: A file is missing, has changed, or cannot be read.
    """
    changes = changed_files(folder, progress)
    if changes:
        raise CheckpointError(
            f"{folder} has changed since {CHECKSUMS} was written: {'; '.join(changes)}. Get the files from a copy. If "
            f"the change is your own, such as save_pretrained into this folder, remove {folder / CHECKSUMS} instead."
        )
