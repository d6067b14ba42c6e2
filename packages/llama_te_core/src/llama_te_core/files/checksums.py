"""Sizes and checksums of a folder's files, recorded beside them in `checksums.json`.

The program that writes a folder writes this file last. So a folder can be checked later: after a disk has lost bytes,
after a copy that was not complete, or after somebody has changed a file. The file has this form:

    {
      "files": {
        "config.json": {
          "size": 612,
          "xxh3_128": "0b8f..."
        }
      },
      "xxh3_128": "9ac1..."
    }

Names are relative to the folder, with `/`. The last entry is the checksum of `files`, so damage of `checksums.json` is
noticed too. XXH3 (https://xxhash.com) finds accidents. It does not stop a person who writes matching checksums.
"""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash

from ..checkpoint_format import CHECKSUMS
from .disk import is_unfinished, replace_text
from .folder_lock import is_lock
from .input_files import MAX_JSON_BYTES, json_object, open_file, read_bytes

_CHUNK_BYTES = 2**20
_DAMAGES = (errno.EINVAL, errno.EFBIG, errno.EIO)  # a file of another kind, one that is too large, a bad sector
_HEX = re.compile("[0-9a-f]{32}")


class DamagedChecksumsError(ValueError):
    """`checksums.json` itself is damaged. The message names it."""


class Checksum(NamedTuple):
    """The size of a file in bytes, and the XXH3 checksum of its bytes, 128 bits in hexadecimal."""

    size: int
    xxh3_128: str


class RunningChecksum:
    """The checksum of bytes that arrive one part after the other."""

    def __init__(self) -> None:
        self._size = 0
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._size += memoryview(data).nbytes
        self._hash.update(data)

    @property
    def checksum(self) -> Checksum:
        """The checksum of all bytes so far."""
        return Checksum(self._size, self._hash.hexdigest())


class ChecksumWriter(io.RawIOBase):
    """Writes to a file, one byte after the other, and computes the checksum of what it writes.

    Args:
        file: An open file without content. Closing this object closes it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._running = RunningChecksum()

    @property
    def checksum(self) -> Checksum:
        """The checksum of all bytes so far."""
        return self._running.checksum

    def writable(self) -> bool:  # noqa: D102
        return True

    def write(self, data: Any) -> int:  # noqa: D102
        count = self._file.write(data)
        self._running.update(memoryview(data).cast("B")[:count])
        return count

    def tell(self) -> int:  # noqa: D102
        return self._file.tell()

    def fileno(self) -> int:  # noqa: D102
        return self._file.fileno()

    def flush(self) -> None:  # noqa: D102
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:  # noqa: D102
        self._file.close()
        super().close()


def write_checksums(folder: Path, checksums: Mapping[str, Checksum]) -> None:
    """Write `checksums.json`: see `replace_text`."""
    replace_text(folder / CHECKSUMS, _text(checksums))


def record_checksums(folder: Path, known: Mapping[str, Checksum] | None = None) -> None:
    """Write `checksums.json` for all files in a folder and its subfolders.

    Args:
        folder: The folder.
        known: Checksums that were computed while the files were written. Other files are read.

    Raises:
        OSError: A file cannot be read, or has another size than the known one.
    """
    known, checksums = known or {}, {}
    for name in file_names(folder):
        checksums[name] = known[name] if name in known else file_checksum(folder / name)
        size = (folder / name).stat().st_size
        if size != checksums[name].size:
            raise OSError(errno.EIO, f"has {size} bytes after {checksums[name].size} were written", str(folder / name))
    write_checksums(folder, checksums)


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Read a folder's `checksums.json`, by the names of the files.

    Returns:
        The checksums; `None` where the folder has no such file.

    Raises:
        DamagedChecksumsError: The file is damaged, or does not have the form of such a file.
        OSError: The file cannot be read.
    """
    try:
        content = read_bytes(folder / CHECKSUMS, MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in _DAMAGES:
            raise DamagedChecksumsError(f"{CHECKSUMS} is damaged: {error.strerror}") from error
        raise
    try:
        files = json_object(content)["files"]
        checksums = {name: Checksum(**each) for name, each in files.items()}
        if not all(_is_inside(name) and _is_valid(each) for name, each in checksums.items()):
            raise ValueError
        if _text(checksums).encode() != content:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedChecksumsError(f"{CHECKSUMS} is damaged") from error
    return checksums


def file_checksum(path: Path, progress: Callable[[int], None] = lambda count: None) -> Checksum:
    """Read a file and return its checksum.

    Args:
        path: The file.
        progress: Called with the number of bytes of each part that is read.
    """
    running, buffer = RunningChecksum(), memoryview(bytearray(_CHUNK_BYTES))
    with open_file(path, buffering=0) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            running.update(buffer[:count])
            progress(count)
    return running.checksum


def file_problem(
    folder: Path, name: str, recorded: Checksum, progress: Callable[[int], None] = lambda count: None
) -> str | None:
    """Compare a file with its recorded size and checksum.

    Args:
        folder: The folder.
        name: The file's name in it.
        recorded: The file's size and checksum.
        progress: Called with the number of bytes of each part that is read.

    Returns:
        What is wrong, in a few words that begin with the name; `None` if the file is as it was.

    Raises:
        OSError: The file is there, and this process cannot open it.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        changed = f" ({_when(path, folder / CHECKSUMS)})"
        if size != recorded.size and path.is_file():
            return f"{name} has {size} bytes in place of {recorded.size}{changed}"
        if file_checksum(path, progress) != recorded:
            return f"{name} has other bytes than {CHECKSUMS} says{changed}"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        if error.errno in _DAMAGES:
            return f"{name} cannot be read ({error.strerror})"
        raise
    return None


def problems(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str] | None:
    """Compare a folder's files with their recorded sizes and checksums. Other files may be there too.

    Args:
        folder: The folder.
        progress: Called with the bytes that are read and the bytes in total.

    Returns:
        What is wrong with each damaged or missing file; `None` if the folder has no `checksums.json`.

    Raises:
        OSError: A file is there, and this process cannot open it.
    """
    try:
        checksums = read_checksums(folder)
    except DamagedChecksumsError as error:
        return [str(error)]
    if checksums is None:
        return None
    total, done = sum(each.size for each in checksums.values()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(done, total)

    found = (file_problem(folder, name, checksum, count) for name, checksum in checksums.items())
    return [problem for problem in found if problem is not None]


def file_names(folder: Path) -> Iterator[str]:
    """The names of a folder's files, also in subfolders, without `checksums.json`, locks and unfinished files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CHECKSUMS and not is_lock(path.name) and not is_unfinished(path.name):
            yield name


def _text(checksums: Mapping[str, Checksum]) -> str:
    files = {name: checksum._asdict() for name, checksum in checksums.items()}
    own = xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
    return json.dumps({"files": files, "xxh3_128": own}, indent=2, sort_keys=True) + "\n"


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return not {"", ".", ".."} & set(parts) and not {"\\", "\0"} & set(name)


def _is_valid(checksum: Checksum) -> bool:
    size, digest = checksum
    return type(size) is int and size >= 0 and isinstance(digest, str) and _HEX.fullmatch(digest) is not None


def _when(path: Path, checksums: Path) -> str:
    """Whether a file is newer than the checksums. A copy may have new times, so this decides nothing."""
    newer = path.stat().st_mtime_ns > checksums.stat().st_mtime_ns
    return f"written after {CHECKSUMS}" if newer else f"older than {CHECKSUMS}"
