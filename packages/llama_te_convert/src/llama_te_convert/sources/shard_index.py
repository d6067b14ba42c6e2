"""Checkpoints in one file or in shards, and the index that names the shard of each tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .file_names import WeightFiles


def shard_files(folder: Path, names: WeightFiles) -> Iterator[tuple[Path, list[str] | None]]:
    """The files of a checkpoint.

    Args:
        folder: The checkpoint's folder.
        names: File names of its format.

    Yields:
        A file, and the tensors that the index expects in it. `None` without an index: the only file has all tensors.

    Raises:
        CheckpointError: The index cannot be read, is not valid, or names a file outside of the folder.
    """
    index = folder / names.index_file
    if not index.exists():
        yield folder / names.single_file, None
        return
    file_of = read_index(index)
    for file_name in dict.fromkeys(file_of.values()):
        yield folder / file_name, [name for name, file in file_of.items() if file == file_name]


def expected_tensors(path: Path, expected: list[str] | None, found: Collection[str]) -> Collection[str]:
    """The tensors to read from a file.

    Args:
        path: The file.
        expected: The tensors that the index expects in it; `None` for all.
        found: The tensors in it.

    Raises:
        CheckpointError: A tensor that the index expects is missing.
    """
    if expected is None:
        return found
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{path} does not have the tensor {name!r}, which the index says it has.")
    return expected


def read_index(path: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index.

    Raises:
        CheckpointError: The file is not an index, or it names a file outside of its own folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        file_of = dict(index["weight_map"].items())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's index: it has no valid weight_map ({error}).") from error
    for name, file in file_of.items():
        if not is_plain_name(file):
            raise CheckpointError(f"{path} says that {name!r} is in {file!r}: shards must lie in the folder itself.")
    return file_of


def is_plain_name(file: object) -> bool:
    """Whether a value names a file of a folder itself, and of no other folder."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0")
