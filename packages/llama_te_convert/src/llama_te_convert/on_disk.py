"""Conversion of checkpoints on disk, in chunks of rows, so that memory does not grow with the checkpoint."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_te_core.files.folder_lock import is_lock

from .configs.architectures import architecture_of
from .configs.config_file import head_sizes
from .configs.model_config import hf_config, refuse_quantized, te_config
from .configs.plain_config import plain_fields, write_plain_config
from .errors import CheckpointError
from .layout.row_ranges import converted_tensors
from .sources.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, refuse_adapter
from .sources.own_head import has_own_head
from .sources.recorded_checksums import refuse_changed
from .sources.side_files import SideFile, copy_side_files, find_side_files
from .targets.new_folder import check_apart, kept_whole, target_folder, writing
from .targets.stream import stream
from .targets.writer import RECORD, is_finished, shards, write_checkpoint
from .verify.inspection import inspect
from .verify.problems import tensor_problems
from .version import VERSION

# Importing torch takes seconds, and most conversions do without it.
if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5_000_000_000  # 5 GB, as in files of transformers
_WORKERS = 2  # the kernel copies into its page cache, and one core of that does not keep a fast disk busy

# Files that are not copied: weights in any format, and code that belongs to the source's layout.
_NOT_COPIED = re.compile(
    r"\..*|config\.json|conversion\.json|checksums\.json|.*\.(safetensors|bin|pt|pth|gguf|msgpack|h5|onnx|ot|py|distcp)"
    r"|.*\.(safetensors|bin)\.index(\..*)?\.json",
    re.IGNORECASE,  # a target may be on a disk that takes both for one name
)
_COPIED_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class Report:
    """The report of a conversion.

    Attributes:
        folder: The converted checkpoint.
        tensors: Number of tensors in it.
        bytes: Bytes of these tensors.
        kept_bytes: Bytes that an earlier run had written.
        seconds: Duration of this run.
    """

    folder: str
    tensors: int
    bytes: int
    kept_bytes: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        """The rate at which this run wrote."""
        return (self.bytes - self.kept_bytes) / 1e6 / max(self.seconds, 1e-9)


def convert_checkpoint(
    source: str,
    folder: str | Path,
    *,
    to_te: bool,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_changes: Mapping[str, Any] | Callable[[Checkpoint], Mapping[str, Any]] | None = None,
    fp8: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    checking: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Convert a checkpoint between the Hugging Face and the Transformer Engine layout.

    If the checkpoint stores a head with other values than the embeddings although `tie_word_embeddings` is true, the
    result has that head and `tie_word_embeddings=False`: transformers does not tie such a model.

    Args:
        source: A folder, the id of a repository on the hub, or a GGUF file.
        folder: The target folder. It appears when it is complete. Until then the files are in `folder` + ".partial",
            and the next run with the same arguments continues there.
        to_te: Whether to convert to the Transformer Engine layout (otherwise to the Hugging Face layout).
        revision: A branch, a tag or a commit of a repository on the hub; `None` takes its main branch.
        subfolder: The folder of the checkpoint inside the source.
        variant: The variant of the weights, such as "fp16" for `model.fp16.safetensors`.
        dtype: New dtype of floating-point tensors; `None` keeps theirs.
        max_shard_bytes: Largest size of a file in bytes. A larger tensor gets a file of its own.
        config_changes: Fields of the new configuration to set, or a function that makes them from the open checkpoint.
        fp8: Whether to write the decoder's linear weights in FP8 with a scale for each, as serving engines read them.
        allow_pickle: Whether to read `pytorch_model.bin` files.
        progress: Called with the bytes that are written and the bytes in total.
        checking: Called with the bytes whose checksum is compared with a recorded one, and the bytes in total. These
            are the files of a local source with `checksums.json`, or of a target that is there already.

    Returns:
        The report of the conversion.

    Raises:
        CheckpointError: The source, the target or an option is not valid; a file cannot be read or written; or a file
            of the source, or of a result that is there already, differs from its recorded checksum.
    """
    begin = time.perf_counter()
    target = target_folder(Path(folder))
    path = find_checkpoint(source, revision=revision, subfolder=subfolder, allow_pickle=allow_pickle)
    check_apart(path, target)
    if not to_te and path.is_file():  # before the file is read, which takes long
        raise CheckpointError(
            f"{path} is a {'GGUF ' if path.suffix == '.gguf' else ''}file, which has no Transformer Engine layout: "
            "to-hf converts the folder of a checkpoint of that layout. llama-te-convert to-te reads GGUF files."
        )
    refuse_adapter(path)
    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(kept_whole(path))
        is_there = target.is_dir() and any(target.iterdir())  # the finished result, whose checksums count
        # huggingface_hub takes care of its own files. It may not have downloaded all of a repository's.
        if Path(source).expanduser().exists() and not is_there:
            refuse_changed(path, checking)
        checkpoint = open_checkpoint(path, variant=variant, allow_pickle=allow_pickle)
        until_the_end.enter_context(contextlib.closing(checkpoint.source))
        background = until_the_end.enter_context(ThreadPoolExecutor(1))
        if checkpoint.is_te == to_te:
            layout = "Transformer Engine" if to_te else "Hugging Face"
            raise CheckpointError(f"{path} has the {layout} layout already.")
        if fp8 and to_te:
            raise CheckpointError("fp8 is a layout of Hugging Face checkpoints: it needs a conversion to that layout.")
        refuse_quantized(checkpoint.config)
        changes = dict((config_changes(checkpoint) if callable(config_changes) else config_changes) or {})
        dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
        if dtype_name is not None:
            changes = {"dtype": dtype_name, **changes}
        if has_own_head(checkpoint):
            changes = {"tie_word_embeddings": False, **changes}
        # Importing transformers takes seconds, so the tensors are written meanwhile. A plain Llama does without it.
        write_config = background.submit(_config_writer, checkpoint, changes, fp8)
        rules = architecture_of(checkpoint.config).rules
        sizes = head_sizes(checkpoint.config, checkpoint.path)
        converted = converted_tensors(checkpoint.source.tensors, sizes, to_te=to_te, dtype=dtype_name, rules=rules)
        if fp8:
            from .targets.fp8 import fp8_streams

            streams = fp8_streams(converted, checkpoint.source)
        else:
            streams = [stream(tensor, checkpoint.source) for tensor in converted]
        fields = plain_fields(checkpoint.config)
        if fields is not None:
            _refuse(checkpoint, tensor_problems(checkpoint, fields))
        if fields is None or changes.keys() - {"dtype"}:
            write_config.result()  # raises before anything is written if the configuration cannot be converted
        side_files = find_side_files(path, _is_copied) if path.is_dir() else []
        record = {
            "made_by": f"llama-te-convert {VERSION}",
            "tensors": {
                "layout": "transformer_engine" if to_te else "huggingface",
                "source": str(path.resolve()),
                **({} if variant is None else {"variant": variant}),
                "files": _files(path),
                "dtype": str(dtype),
                "fp8": fp8,
                "max_shard_bytes": max_shard_bytes,
            },
            "config_changes": changes,
        }
        total = sum(tensor.info.nbytes for tensor in streams)
        done = 0

        def count(written: int) -> None:
            nonlocal done
            if write_config.done():
                write_config.result()  # raises if the configuration cannot be converted, so that the run ends early
            done += written
            progress(done, total)

        def write_rest(unfinished: Path) -> None:
            _write_other_files(path, side_files, unfinished)
            write_config.result()(unfinished)

        kept, planned = total, shards(streams, max_shard_bytes)
        if not is_finished(planned, target, record, checking):
            with writing(target):
                if not is_finished(planned, target, record, checking):  # another process may have made it in between
                    kept = write_checkpoint(
                        planned,
                        target,
                        record,
                        write_rest=write_rest,
                        workers=_WORKERS if checkpoint.source.concurrent else 1,
                        progress=count,
                    )
    return Report(str(folder), len(streams), total, kept, time.perf_counter() - begin)


def _config_writer(checkpoint: Checkpoint, changes: dict[str, Any], fp8: bool) -> Callable[[Path], None]:
    """Convert the configuration and return the function that writes it to a folder.

    If it is not plain, the tensors are checked against it too: `convert_checkpoint` checks those of a plain one itself.
    """
    fields = None if changes or fp8 else plain_fields(checkpoint.config)
    if fields is not None:
        return functools.partial(write_plain_config, fields, to_te=not checkpoint.is_te)

    try:
        config = (hf_config if checkpoint.is_te else te_config)(checkpoint.config, **changes)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the configuration of {checkpoint.path}: {error}") from error
    _refuse(checkpoint, inspect(checkpoint).problems)
    if fp8:
        from .targets.fp8 import fp8_quantization_config

        config.quantization_config = fp8_quantization_config()
    return config.save_pretrained


def _refuse(checkpoint: Checkpoint, problems: Sequence[str]) -> None:
    if problems:
        more = f" And {len(problems) - 1} more: llama-te-convert inspect lists them." if len(problems) > 1 else ""
        raise CheckpointError(f"{checkpoint.path}: {problems[0]}{more}")


def _is_copied(name: str, is_folder: bool) -> bool:
    return name == _COPIED_FOLDER if is_folder else _NOT_COPIED.fullmatch(name) is None


def _write_other_files(source: Path, side_files: list[SideFile], target: Path) -> None:
    """Write the tokenizer, chat template, generation configuration, licence and similar files."""
    if source.is_file():
        from .sources.gguf import save_gguf_tokenizer

        save_gguf_tokenizer(source, target)
    copy_side_files(side_files, target)


def _files(path: Path) -> list[list[Any]]:
    """Name, size and modification time of a checkpoint's files, by which a later run recognises the same source."""
    paths = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    return [
        [each.name, each.stat().st_size, each.stat().st_mtime_ns]
        for each in paths
        if each.name != RECORD and not is_lock(each.name)
    ]
