"""Conversion of checkpoints on disk, tensor by tensor, in memory that does not grow with them."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .configs.architectures import architecture_of, hf_config, refuse_quantized, te_config
from .configs.plain_config import plain_fields, write_plain_config
from .layout.row_ranges import HeadSizes, outputs, targets
from .sources.checkpoint import find_checkpoint, open_checkpoint
from .sources.tensor_source import Checkpoint, CheckpointError
from .targets.writer import RECORD, is_finished, shards, write_checkpoint
from .verify.inspection import inspect, tensor_problems

# torch takes seconds to import, and most conversions do without it.
if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5_000_000_000  # as transformers has it
_WORKERS = 2  # writing is the kernel copying to its page cache: more than one core of it keeps a fast disk busy

# What is not carried along: other formats of the weights, and code that belongs to the source's layout.
_LEFT = re.compile(
    r"\..*|config\.json|conversion\.json|.*\.(safetensors|bin|pt|pth|gguf|msgpack|h5|onnx|ot|py|distcp)"
    r"|.*\.(safetensors|bin)\.index\.json"
)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        folder: The converted checkpoint.
        tensors: Tensors in it.
        bytes: Their bytes.
        kept_bytes: Of these, what an earlier run had written.
        seconds: How long it took.
    """

    folder: str
    tensors: int
    bytes: int
    kept_bytes: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        """Rate of what was written now."""
        return (self.bytes - self.kept_bytes) / 1e6 / max(self.seconds, 1e-9)


def convert_checkpoint(
    source: str,
    folder: str | Path,
    *,
    to_te: bool,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_changes: Mapping[str, Any] | Callable[[Checkpoint], Mapping[str, Any]] | None = None,
    fp8: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Convert a checkpoint between the Hugging Face and the Transformer Engine layout.

    Args:
        source: A folder, the id of a repository on the hub, or a GGUF file.
        folder: Where the result goes. It appears when it is complete; a run that was interrupted goes on with what an
            earlier one left in `folder` + ".partial".
        to_te: To the Transformer Engine layout (else from it to Hugging Face's).
        dtype: What floating-point tensors become; as they are by default.
        max_shard_bytes: Most bytes of a file, where a tensor fits.
        config_changes: Fields of the new configuration to set, or what makes them of the open checkpoint.
        fp8: Write the decoder's linear weights in FP8 with a scale for each, as serving engines read them.
        allow_pickle: Whether to read `pytorch_model.bin` files.
        progress: Called with the bytes done and those there are.

    Raises:
        CheckpointError: In one line, what is wrong with the source, the target or the options.
    """
    begin = time.perf_counter()
    path, folder = find_checkpoint(source, allow_pickle=allow_pickle), Path(folder)
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    with contextlib.closing(checkpoint.source), ThreadPoolExecutor(1) as background:
        if checkpoint.is_te == to_te:
            layout = "Transformer Engine" if to_te else "Hugging Face"
            raise CheckpointError(f"{path} has the {layout} layout already.")
        if fp8 and to_te:
            raise CheckpointError("fp8 is a layout of Hugging Face checkpoints: it goes with a conversion to them.")
        refuse_quantized(checkpoint.config)
        changes = dict((config_changes(checkpoint) if callable(config_changes) else config_changes) or {})
        dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
        if dtype_name is not None:
            changes = {"dtype": dtype_name, **changes}
        # transformers, which a plain Llama does without, takes seconds to import; tensors are written in the meantime.
        write_config = background.submit(_config_writer, checkpoint, changes, fp8)
        table = architecture_of(checkpoint.config).table
        sizes = HeadSizes.of(checkpoint.config, checkpoint.path)
        made = targets(checkpoint.source, sizes, to_te=to_te, dtype=dtype_name, table=table)
        planned = outputs(made, checkpoint.source)
        if fp8:
            from .targets.fp8 import fp8_outputs

            planned = fp8_outputs(made, checkpoint.source)
        record = {
            "made_by": f"llama-te-convert {__version__}",
            "tensors": {
                "layout": "transformer_engine" if to_te else "huggingface",
                "source": str(path.resolve()),
                "files": _files(path),
                "dtype": str(dtype),
                "fp8": fp8,
                "max_shard_bytes": max_shard_bytes,
            },
            "config_changes": changes,
        }
        total = sum(output.info.nbytes for output in planned)
        done = 0

        def count(written: int) -> None:
            nonlocal done
            if write_config.done():
                write_config.result()  # if it cannot be made there is no use in going on
            done += written
            progress(done, total)

        def write_rest(target: Path) -> None:
            _carry_along(path, target)
            write_config.result()(target)

        kept = total
        if not is_finished(folder, record):
            kept = write_checkpoint(
                shards(planned, max_shard_bytes),
                folder,
                record,
                write_rest=write_rest,
                workers=_WORKERS if checkpoint.source.concurrent else 1,
                progress=count,
            )
    return Report(str(folder), len(planned), total, kept, time.perf_counter() - begin)


def _config_writer(checkpoint: Checkpoint, changes: dict[str, Any], fp8: bool) -> Callable[[Path], None]:
    """What writes the new configuration, if the old one is valid and the checkpoint has the tensors that it says."""
    fields = None if changes or fp8 else plain_fields(checkpoint.config)
    if fields is not None:
        _refuse(checkpoint, tensor_problems(checkpoint, fields))
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
        more = f" And {len(problems) - 1} more: llama-te-convert inspect tells them." if len(problems) > 1 else ""
        raise CheckpointError(f"{checkpoint.path}: {problems[0]}{more}")


def _carry_along(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation configuration, licence and the like."""
    if source.is_file():
        from .sources.gguf import save_gguf_tokenizer

        save_gguf_tokenizer(source, target)
        return
    for path in source.iterdir():
        if _LEFT.fullmatch(path.name):
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def _files(path: Path) -> list[list[Any]]:
    """Name, size and time of change of a checkpoint's files: whether it is still the same."""
    paths = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    return [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in paths if each.name != RECORD]
