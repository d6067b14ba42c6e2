"""The files of a checkpoint beside its weights, which a conversion copies: tokenizer, chat template, licence.

Somebody else made the folder, and the copies may be published. So a symbolic link that leads out of it is not followed:
it could add any file that the user can read. The cache of huggingface_hub consists of links, `snapshots/REV/NAME` to
`blobs/HASH`, which stay in the folder of the repository.
"""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_te_core.files.foreign_code import without_code
from llama_te_core.files.input_files import open_file

from ..configs.config_file import read_config
from ..errors import CheckpointError, CheckpointWarning
from .safetensors import SafetensorsFile

MAX_BYTES = 100_000_000  # the largest tokenizer.json that we know has 33 MB
_CHUNK_BYTES = 2**20
_HUB_REPOSITORY = re.compile(r"models--.+")
# transformers runs the code that these files name, if `trust_remote_code` is set.
_MAY_NAME_CODE = re.compile(r".*_config\.json", re.IGNORECASE)


class SideFile(NamedTuple):
    """A file to copy.

    Attributes:
        name: Its path below the folder of the checkpoint.
        path: The file, without symbolic links.
        text: What is written instead of its content; `None` copies it.
    """

    name: str
    path: Path
    text: str | None


def find_side_files(folder: Path, is_copied: Callable[[str, bool], bool]) -> list[SideFile]:
    """Find the files to copy. A `CheckpointWarning` names those that are left out.

    Left out are links that lead out of the folder, links to folders, named pipes, devices and the like, files of more
    than `MAX_BYTES`, names that cannot be printed, and names that differ from another one in upper and lower case only.
    The entry `auto_map`, which names code, is left out of files such as `tokenizer_config.json`.

    Weights (`.safetensors`) may have any size and may be links to other places, if they are valid.

    Args:
        folder: The checkpoint's folder.
        is_copied: Whether to copy an entry, by its path below the folder, and whether it is a folder.

    Raises:
        CheckpointError: A configuration or a file of weights is not valid.
    """
    found: list[SideFile] = []
    left_out: list[str] = []
    seen: dict[str, str] = {}
    roots = _roots(folder)
    for name, entry in _entries(folder, "", is_copied, left_out):
        problem = _problem(name, entry, roots, seen)
        if problem is not None:
            left_out.append(f"{name!a} ({problem})")
            continue
        seen[name.casefold()] = name
        text = None
        if _MAY_NAME_CODE.fullmatch(entry.name):
            content = read_config(entry.parent, entry.name)
            if without_code(content):
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                left_out.append(f"the entry auto_map of {name!r} (it names code)")
        found.append(SideFile(name, entry.resolve(), text))
    if left_out:
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        warnings.warn(f"not copied from {folder}: {', '.join(left_out[:8])}{more}.", CheckpointWarning, stacklevel=2)
    return found


def copy_side_files(files: list[SideFile], target: Path) -> None:
    """Copy files into a folder.

    Raises:
        CheckpointError: A file cannot be read.
        OSError: A file cannot be written.
    """
    for each in files:
        path = target / each.name
        path.parent.mkdir(exist_ok=True, parents=True)
        if each.text is not None:
            path.write_text(each.text, encoding="utf-8")
            continue
        try:
            source = open_file(each.path, buffering=0)
        except OSError as error:
            raise CheckpointError(f"{each.path} cannot be read: {error.strerror or error}.") from error
        with source, path.open("wb", buffering=0) as copy:
            while True:
                try:
                    part = source.read(_CHUNK_BYTES)
                except OSError as error:
                    raise CheckpointError(f"{each.path} cannot be read: {error.strerror or error}.") from error
                if not part:
                    break
                view = memoryview(part)
                while view:
                    view = view[copy.write(view) :]


def _entries(
    folder: Path, below: str, is_copied: Callable[[str, bool], bool], left_out: list[str]
) -> Iterator[tuple[str, Path]]:
    """The entries to copy that are no folders, with their paths below the checkpoint's folder, in order."""
    for entry in sorted(folder.iterdir()):
        name = below + entry.name
        is_folder = entry.is_dir()
        if not is_copied(name, is_folder):
            continue
        if not is_folder:
            yield name, entry
        elif entry.is_symlink():  # it could lead into itself
            left_out.append(f"{name!a} (it is a link to a folder)")
        else:
            yield from _entries(entry, name + "/", is_copied, left_out)


def _roots(folder: Path) -> list[Path]:
    """The folders that a link may lead to: the checkpoint's own, and the repository in the hub's cache."""
    own = folder.resolve()
    return [
        own,
        *(
            each
            for each in own.parents
            if _HUB_REPOSITORY.fullmatch(each.name) and own.is_relative_to(each / "snapshots")
        ),
    ]


def _problem(name: str, entry: Path, roots: list[Path], seen: dict[str, str]) -> str | None:
    if not name.isprintable():
        return "its name cannot be printed"
    if name.casefold() in seen:
        return f"it differs from {seen[name.casefold()]!r} in upper and lower case only"
    try:
        target = entry.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        return f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    if name.endswith(".safetensors"):
        SafetensorsFile(entry).close()
        return None
    if not any(target.is_relative_to(root) for root in roots):
        return f"it is a link to {os.fspath(target)!r}, outside of the checkpoint"
    if status.st_size > MAX_BYTES:
        return f"it has {status.st_size:,} bytes, but at most {MAX_BYTES:,} are copied"
    return None
