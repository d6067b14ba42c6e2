"""Removal of references to the source's code from what a conversion writes."""

from __future__ import annotations

import warnings
from pathlib import Path

from llama_te_core.files.foreign_code import drop_foreign_code

from ..errors import CheckpointError, CheckpointWarning


def drop_references(folder: Path) -> None:
    """Remove the references to code from a folder's side files, with a warning.

    Raises:
        CheckpointError: A side file is not valid.
    """
    try:
        changed = drop_foreign_code(folder)
    except ValueError as error:
        raise CheckpointError(f"a side file cannot be used: {error}.") from error
    if changed:
        warnings.warn(
            f"{', '.join(changed)} named code of the source (auto_map), which trust_remote_code=True would run: the "
            "result does not name it.",
            CheckpointWarning,
            stacklevel=2,
        )
