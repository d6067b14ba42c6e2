"""Writing a checkpoint so that it is there whole or not at all, and an interrupted run goes on where it was.

Everything is made in a folder beside the target, `NAME.partial`, which gets its own name as the last thing. A shard
gets its name there when it is complete and on the disk, so that a shard with its name is never made again. What is
being made is written down in `conversion.json`: a run with another source or other options does not go on with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..layout.row_ranges import Output
from ..sources.safetensors import INDEX, SINGLE, header_bytes
from ..sources.tensor_source import CheckpointError

RECORD = "conversion.json"
_LOCK = ".lock"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def header(self) -> bytes:
        """What stands before the tensors' bytes."""
        return header_bytes({output.name: output.info for output in self.outputs})

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(output.info.nbytes for output in self.outputs)


def shards(outputs: list[Output], max_shard_bytes: int) -> list[Shard]:
    """Tensors in their order, in files of at most so many bytes where a tensor fits."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.info.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.info.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def is_finished(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether `folder` is already what the conversion would make.

    Raises:
        CheckpointError: It is something else, which will not be touched.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if _read_record(folder) == record:
        return True
    raise CheckpointError(
        f"{folder} exists and is not what this conversion makes: name another folder, or remove it first."
    )


def write_checkpoint(
    planned: list[Shard],
    folder: Path,
    record: Mapping[str, Any],
    *,
    write_rest: Callable[[Path], None],
    workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Write a checkpoint, or finish one that an earlier run began.

    Args:
        planned: Its files.
        folder: Where it goes; nothing may be there but an empty folder.
        record: What is being made, as JSON types. An unfinished folder is this conversion's if its `tensors` are the
            same; the rest may have changed.
        write_rest: Writes configuration, tokenizer and what else goes along into the folder that it is given.
        workers: Files that are written at the same time.
        progress: Called with numbers of bytes written, for those of earlier runs too.

    Returns:
        Bytes of tensors that earlier runs had written already.

    Raises:
        CheckpointError: The disk is full or refuses to be written to, or the source cannot be read; what is complete
            is kept. Or another conversion's unfinished folder is in the way.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        with _locked(partial):
            _claim(partial, record)
            missing = [shard for shard in planned if not _is_complete(partial / shard.name, shard)]
            _check_space(partial, sum(len(shard.header) + shard.tensor_bytes for shard in missing))
            kept = sum(shard.tensor_bytes for shard in planned if shard not in missing)
            progress(kept)
            _write_shards(partial, missing, workers, progress)
            if len(planned) > 1:
                _write_index(partial / INDEX, planned)
            write_rest(partial)
            for path in partial.iterdir():
                _sync(path)
            (partial / _LOCK).unlink()
            partial.rename(folder)
            _sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"the disk of {partial} is full: make room and run the same command again, which goes on from there."
            ) from error
        raise CheckpointError(f"{error.filename or partial} cannot be written: {error.strerror or error}.") from error
    return kept


def _write_shards(folder: Path, missing: list[Shard], workers: int, progress: Callable[[int], None]) -> None:
    stopped = threading.Event()
    lock = threading.Lock()

    def count(written: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another shard failed")
        with lock:
            progress(written)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_write_shard, folder / shard.name, shard, count) for shard in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # interrupts too: threads would go on to the end of their shards
            stopped.set()
            for future in futures:
                future.cancel()
            raise


def _write_shard(path: Path, shard: Shard, progress: Callable[[int], None]) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with unfinished.open("wb", buffering=0) as file:
            _write(file, shard.header)
            for output in shard.outputs:
                written = 0
                for part in output.parts():
                    _write(file, part)
                    written += part.nbytes
                    progress(part.nbytes)
                assert written == output.info.nbytes, output.name
            os.fsync(file.fileno())
    except OSError:
        unfinished.unlink(missing_ok=True)  # room for the run after this one
        raise
    unfinished.rename(path)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _write_index(path: Path, planned: list[Shard]) -> None:
    index = {
        "metadata": {"total_size": sum(shard.tensor_bytes for shard in planned)},
        "weight_map": {output.name: shard.name for shard in planned for output in shard.outputs},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_complete(path: Path, shard: Shard) -> bool:
    return path.exists() and path.stat().st_size == len(shard.header) + shard.tensor_bytes


def _claim(partial: Path, record: Mapping[str, Any]) -> None:
    """Write down what is being made, or see that it is what an earlier run began."""
    found = _read_record(partial)
    ours = isinstance(found, dict) and found.get("tensors") == record["tensors"]
    if not ours and any(path.name not in (_LOCK, RECORD + _UNFINISHED) for path in partial.iterdir()):
        raise CheckpointError(f"{partial} is what another conversion left unfinished: finish that one, or remove it.")
    unfinished = partial / (RECORD + _UNFINISHED)
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _sync(unfinished)
    unfinished.rename(partial / RECORD)


def _read_record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keep a second process off the folder."""
    with (partial / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process is writing to {partial}: wait for it.") from error
        yield


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder} needs {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free.")


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
