"""The error and the warning of the package, and the one-line form of errors from other libraries."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written. The message fits on one line, and the command prints it."""


class CheckpointWarning(UserWarning):
    """A checkpoint can be read in more than one way. The message fits on one line, and the command prints it."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
