"""Checkpoints in one file or in shards, and the index that names the shard of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..configs.config_file import read_config
from ..errors import CheckpointError
from .file_names import is_index, is_plain_name


def shard_files(folder: Path, entry: str) -> Iterator[tuple[Path, list[str]]]:
    """The files of a checkpoint, in the order in which transformers reads them.

    Args:
        folder: The checkpoint's folder.
        entry: The only file of the checkpoint, or the index of its shards.

    Yields:
        A file, and the tensors that the index expects in it. A file may have more: transformers reads them all.

    Raises:
        CheckpointError: The index cannot be read, is not valid, or names a file outside of the folder.
    """
    if not is_index(entry):
        yield folder / entry, []
        return
    names: dict[str, list[str]] = {}
    for name, file in read_index(folder / entry).items():
        names.setdefault(file, []).append(name)
    for file in sorted(names):
        yield folder / file, names[file]


def check_shard(path: Path, expected: Iterable[str], found: Collection[str], earlier: Mapping[str, Any]) -> None:
    """Refuse a file that lacks a tensor that the index expects in it, or has one that an earlier file has too.

    Args:
        path: The file.
        expected: The tensors that the index expects in it.
        found: The tensors in it.
        earlier: The tensors of the files before it.

    Raises:
        CheckpointError: The message names the file and the tensor.
    """
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{path} does not have the tensor {name!r}, which the index says it has.")
    for name in found:
        if name in earlier:
            raise CheckpointError(
                f"{path} has the tensor {name!r}, which another file of the checkpoint has too: the files belong to "
                "different saves. Get the checkpoint again, or save it into a new folder."
            )


def read_index(path: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index.

    Raises:
        CheckpointError: The file is not an index, or it names a file outside of its own folder.
    """
    file_of: Any = read_config(path.parent, path.name).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{path} is not a checkpoint's index: it has no weight_map that names files.")
    for name, file in file_of.items():
        if not is_plain_name(file):
            raise CheckpointError(f"{path} says that {name!r} is in {file!r}: shards must lie in the folder itself.")
    return file_of
