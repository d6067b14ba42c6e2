"""Writes a checkpoint completely or not at all, and continues an interrupted run.

All files are written into a folder beside the target, `NAME.partial`. The last step renames that folder to `NAME`. A
shard gets its final name when it is complete and on the disk, so a later run does not write it again. `conversion.json`
records the source and the options: a run with other ones does not continue the folder. `checksums.json` records the
sizes and checksums of the files, first of the shards that are complete, then of all files. A later run believes them
alone, and not the names of files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llama_te_core.checkpoint_format import CHECKSUMS
from llama_te_core.files.checksums import (
    Checksum,
    DamagedChecksumsError,
    RunningChecksum,
    file_problem,
    read_checksums,
    record_checksums,
    write_checksums,
)
from llama_te_core.files.disk import disk_error, free_gigabytes, is_full, sync, sync_all

from ..errors import CheckpointError, CheckpointWarning
from ..sources.file_names import SAFETENSORS, left_over
from ..sources.recorded_checksums import changed_files
from ..sources.safetensors import header_bytes
from .stream import TensorStream

RECORD = "conversion.json"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint.

    Attributes:
        name: Its name.
        tensors: Its tensors, in order.
    """

    name: str
    tensors: tuple[TensorStream, ...]

    @property
    def header(self) -> bytes:
        """The bytes that precede the tensors."""
        return header_bytes({tensor.name: tensor.info for tensor in self.tensors})

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors)


def shards(tensors: list[TensorStream], max_shard_bytes: int) -> list[Shard]:
    """Distribute tensors over files.

    Args:
        tensors: The tensors, in their order.
        max_shard_bytes: Largest size of a file in bytes. A larger tensor gets a file of its own.
    """
    groups: list[list[TensorStream]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.info.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.info.nbytes
    if len(groups) == 1:
        return [Shard(SAFETENSORS.single_file, tuple(groups[0]))]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def is_finished(
    planned: list[Shard],
    folder: Path,
    record: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Whether `folder` already holds the result of the conversion, with the sizes and checksums that were recorded.

    Args:
        planned: The shards of the result.
        folder: The target folder.
        record: The source and the options of the conversion, as JSON types.
        progress: Called with the bytes whose checksum is computed, and the bytes in total.

    Raises:
        CheckpointError: The folder holds something else, or the result has changed. It stays untouched.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if _read_record(folder) != record:
        raise CheckpointError(
            f"{folder} exists and is not the result of this conversion: name another folder, or remove it first."
        )
    changes = changed_files(folder, progress)
    if changes is None:
        raise CheckpointError(
            f"{folder} has no {CHECKSUMS}: it was changed since this conversion, for example by save_pretrained. "
            "Name another folder, or remove it first."
        )
    changes += [f"{name} is not of this conversion" for name in left_over(folder, _weights(planned))]
    if changes:
        raise CheckpointError(
            f"{folder} has changed since this conversion: {'; '.join(changes)}. Name another, or remove this one."
        )
    return True


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
        folder: The target folder, which must be missing or empty, and which this process has locked.
        record: The source and the options of the conversion, as JSON types. An unfinished folder belongs to this
            conversion if its entry `tensors` is the same; other entries may differ.
        write_rest: Writes the configuration, the tokenizer and other files into the folder that it is given.
        workers: Number of files to write at the same time.
        progress: Called with a number of new bytes; the first calls have the bytes of earlier runs.

    Returns:
        Bytes of tensors that earlier runs had written.

    Raises:
        CheckpointError: The disk is full or cannot be written, or the source cannot be read; complete files are kept.
            Or the unfinished folder belongs to another conversion.
    """
    partial = folder.with_name(folder.name + ".partial")

    checksums: dict[str, Checksum] = {}  # of the shards that are complete

    def missing() -> list[Shard]:
        return [shard for shard in planned if shard.name not in checksums]

    def missing_bytes() -> int:
        return sum(len(shard.header) + shard.tensor_bytes for shard in missing())

    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        _claim(partial, record)
        checksums = _written_earlier(planned, partial, progress)
        _check_space(partial, missing_bytes())
        kept = sum(shard.tensor_bytes for shard in planned if shard.name in checksums)
        _write_shards(partial, missing(), checksums, workers, progress)
        if len(planned) > 1:
            _write_index(partial / SAFETENSORS.index_file, planned)
        write_rest(partial)
        record_checksums(partial, checksums)
        sync_all(partial)
        partial.rename(folder)
        sync(folder.parent)
    except CheckpointError:
        raise
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        if is_full(found):
            raise CheckpointError(
                f"the disk of {partial} is full: make room and run the same command again, which continues from there. "
                f"Tensors need {missing_bytes() / 1e9:.2f} GB more, and {free_gigabytes(partial)} are free."
            ) from error
        raise CheckpointError(f"{found.filename or partial} cannot be written: {found.strerror or found}.") from error
    return kept


def _written_earlier(planned: list[Shard], partial: Path, progress: Callable[[int], None]) -> dict[str, Checksum]:
    """The checksums of the shards that an earlier run has completed and that have not changed since."""
    try:
        recorded = read_checksums(partial) or {}
    except DamagedChecksumsError:
        recorded = {}
    checksums, again = {}, []
    for shard in planned:
        if not (partial / shard.name).exists():
            continue
        if shard.name not in recorded or recorded[shard.name].size != len(shard.header) + shard.tensor_bytes:
            again.append(f"{shard.name} has no valid checksum")
        elif (problem := file_problem(partial, shard.name, recorded[shard.name])) is not None:
            again.append(problem)
        else:
            checksums[shard.name] = recorded[shard.name]
            progress(shard.tensor_bytes)
    if again:
        warnings.warn(f"{partial}: {'; '.join(again)}. It is written again.", CheckpointWarning, stacklevel=2)
    return checksums


def _write_shards(
    folder: Path, missing: list[Shard], checksums: dict[str, Checksum], workers: int, progress: Callable[[int], None]
) -> None:
    """Write shards, and add their checksums to `checksums` and to the folder's file of them."""
    stopped = threading.Event()
    lock = threading.Lock()

    def count(written: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another shard failed")
        with lock:
            progress(written)

    def record(shard: Shard, checksum: Checksum) -> None:
        with lock:
            write_checksums(folder, checksums | {shard.name: checksum})
            checksums[shard.name] = checksum

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_write_shard, folder / shard.name, shard, record, count) for shard in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # interrupts too, since the threads would otherwise finish their shards
            stopped.set()
            for future in futures:
                future.cancel()
            raise


def _write_shard(
    path: Path, shard: Shard, record: Callable[[Shard, Checksum], None], progress: Callable[[int], None]
) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    running = RunningChecksum()
    try:
        with unfinished.open("wb", buffering=0) as file:
            _write(file, shard.header)
            running.update(shard.header)
            for tensor in shard.tensors:
                written = 0
                for chunk in tensor.chunks():
                    _write(file, chunk)
                    running.update(chunk)
                    written += chunk.nbytes
                    progress(chunk.nbytes)
                assert written == tensor.info.nbytes, tensor.name
            os.fsync(file.fileno())
        record(shard, running.checksum)  # before the shard has its name: a run that is killed here writes it again
    except OSError as error:
        error.filename = error.filename or str(path)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # leaves its room to the next run
        raise
    unfinished.rename(path)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _write_index(path: Path, planned: list[Shard]) -> None:
    index = {
        "metadata": {"total_size": sum(shard.tensor_bytes for shard in planned)},
        "weight_map": {tensor.name: shard.name for shard in planned for tensor in shard.tensors},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weights(planned: list[Shard]) -> set[str]:
    return {*(shard.name for shard in planned), SAFETENSORS.index_file}


def _claim(partial: Path, record: Mapping[str, Any]) -> None:
    """Record this conversion in the unfinished folder, unless another conversion began it."""
    found = _read_record(partial)
    ours = isinstance(found, dict) and found.get("tensors") == record["tensors"]
    if not ours and any(path.name != RECORD + _UNFINISHED for path in partial.iterdir()):
        raise CheckpointError(
            f"{partial} is the unfinished result of another conversion: finish that one, or remove the folder."
        )
    unfinished = partial / (RECORD + _UNFINISHED)
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync(unfinished)
    unfinished.rename(partial / RECORD)


def _read_record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder} needs {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free.")
