"""What happens to files: deleted, cut off, flipped bits, swapped names. Each changes one file of a folder."""

from __future__ import annotations

import os
from pathlib import Path


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_and_keep_the_time(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(path: Path) -> None:
    """Give a file the name of the next one in the folder, and the other way round."""
    files = sorted(each for each in path.parent.iterdir() if each.is_file() and each.name != "checksums.json")
    other = files[(files.index(path) + 1) % len(files)]
    held = path.with_name("held")
    path.rename(held)
    other.rename(path)
    held.rename(other)


DAMAGES = {
    "deleted": delete,
    "truncated": truncate,
    "flipped": flip,
    "swapped": swap,
    "flipped with its old time": flip_and_keep_the_time,
}
