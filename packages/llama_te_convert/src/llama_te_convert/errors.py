"""The error and the warning of the package, and their one-line forms."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written. The message fits on one line, and the command prints it."""


class CheckpointWarning(UserWarning):
    """A checkpoint can be read in more than one way. The message fits on one line, and the command prints it."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(message: object, most: int = 4000) -> str:
    """A message as one line that a terminal can show: names and values in it may come from foreign files.

    Args:
        message: The message.
        most: The largest number of characters. The middle of a longer message is left out.
    """
    text = str(message)
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
