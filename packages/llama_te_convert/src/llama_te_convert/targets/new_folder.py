"""The check that a target folder holds nothing yet."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def check_new_folder(folder: Path) -> None:
    """Refuse a target that exists and is not an empty folder.

    Raises:
        CheckpointError: The message names the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already: name a new folder, or an empty one.")
