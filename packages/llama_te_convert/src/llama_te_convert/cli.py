"""The command `llama-te-convert`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError, CheckpointWarning, one_line
from .option_types import assignment, layer_precision, size
from .progress import Progress
from .sources.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from .targets.new_folder import kept_whole
from .version import VERSION

_DTYPES = ("bfloat16", "float16", "float32")
_EPILOG = """
examples:
  llama-te-convert to-te ./Llama-3.2-1B ./llama-te
  llama-te-convert to-te SmolLM2-135M-Instruct.Q4_1.gguf ./smollm2-te --dtype bfloat16
  llama-te-convert to-te ./Llama-3.1-8B ./llama-te --layer-precision "1:-1=fp8" --set attn_input_format=bshd
  llama-te-convert to-hf ./llama-te ./llama-hf
  llama-te-convert to-hf ./llama-te ./llama-fp8 --fp8
  llama-te-convert adapter-to-hf ./adapter ./adapter-hf --base ./Llama-3.1-8B
  llama-te-convert adapter-to-te ./adapter ./adapter-te --base ./llama-te
  llama-te-convert verify ./llama-te
  llama-te-convert verify ./Llama-3.2-1B ./llama-te
  llama-te-convert inspect ./llama-te

The same command continues a conversion that was stopped. The result appears when it is complete.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Arguments of the command; `None` takes those of the process.

    Returns:
        The exit status: 0 for success, 1 for an error or a difference, 130 for an interrupt.
    """
    options = parser().parse_args(arguments)
    try:
        with _printed_warnings():
            return int(options.run(options))
    except CheckpointError as error:
        print(f"llama-te-convert: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llama-te-convert: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _printed_warnings() -> Iterator[None]:
    """Print a warning about a checkpoint as one line, as errors are printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *arguments: Any, **rest: Any) -> None:
            if issubclass(category, CheckpointWarning):
                print(f"llama-te-convert: warning: {one_line(message)}", file=sys.stderr)
            else:
                others(message, category, *arguments, **rest)

        warnings.showwarning = show
        yield


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(
        prog="llama-te-convert",
        description="Converts Llama checkpoints between the Hugging Face and the Transformer Engine layout, compares "
        "them and inspects them. Memory does not grow with their size.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"llama-te-convert {VERSION}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_conversion(commands, "to-te", "convert a Hugging Face checkpoint to the Transformer Engine layout", to_te=True)
    _add_conversion(
        commands, "to-hf", "convert a checkpoint of the Transformer Engine layout to Hugging Face's", to_te=False
    )
    _add_adapter(
        commands,
        "adapter-to-te",
        "convert a LoRA adapter of PEFT for the Hugging Face model to one for the fused weights of the Transformer "
        "Engine layout",
        to_te=True,
    )
    _add_adapter(
        commands,
        "adapter-to-hf",
        "convert a LoRA adapter of PEFT for the Transformer Engine layout to one for the Hugging Face model",
        to_te=False,
    )
    _add_verify(commands)
    _add_inspect(commands)
    return top


def _add_conversion(commands: Any, name: str, text: str, *, to_te: bool) -> None:
    command = commands.add_parser(name, help=text, description=_sentence(text))
    sources = "a folder, an id on the hub (owner/name)" + (", or a GGUF file" if to_te else "")
    command.add_argument("source", metavar="SRC", help=sources)
    command.add_argument("folder", metavar="DST", type=Path, help="the new folder")
    command.add_argument("--dtype", choices=_DTYPES, help="cast floating-point tensors (default: keep their dtype)")
    command.add_argument(
        "--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="most bytes of a file (default: 5GB)"
    )
    command.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="FIELD=VALUE", dest="changes",
        help="set a field of the new configuration (may be repeated); VALUE is JSON, or a string if it is not",
    )  # fmt: skip
    if to_te:
        command.add_argument(
            "--layer-precision", metavar="SPEC",
            help='precision of layers, as "1:-1=fp8" or "0=none,1:8=fp8,8:=fp4"; ranges as in Python',
        )  # fmt: skip
    else:
        command.add_argument(
            "--fp8", action="store_true",
            help="write linear weights in FP8 (e4m3) with one scale each, as serving engines read them",
        )  # fmt: skip
    _add_choice_of_files(command)
    command.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, which runs no code in it"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_convert, to_te=to_te, layer_precision=None, fp8=False)


def _add_adapter(commands: Any, name: str, text: str, *, to_te: bool) -> None:
    command = commands.add_parser(name, help=text, description=_sentence(text))
    command.add_argument("source", metavar="SRC", help="the folder that PEFT saved the adapter to")
    command.add_argument("folder", metavar="DST", type=Path, help="the new folder")
    command.add_argument(
        "--base", metavar="MODEL",
        help="the model of the adapter in either layout, a folder or an id on the hub (default: the model that the "
        "adapter names)",
    )  # fmt: skip
    command.set_defaults(run=_convert_adapter, to_te=to_te)


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="compare two checkpoints tensor by tensor, or the files of a folder with their recorded checksums",
        description="With A and B: compare two checkpoints, of either layout, tensor by tensor; status 1 if they "
        "differ. With A alone: compare the files of a folder with the sizes and checksums that were recorded when they "
        "were written. The folder is one that llama-te-convert or llama-te-train wrote, or a training run with several "
        "of them. It prints OK, damaged, missing or extra (not recorded) for each file; status 1 if a file is damaged "
        "or missing, or a folder of the run has no checksums.",
    )
    command.add_argument("a", metavar="A", help="a folder, an id on the hub or a GGUF file; without B, a folder")
    command.add_argument("b", metavar="B", nargs="?", help="the other checkpoint")
    command.add_argument(
        "--tolerance", action="store_true",
        help="allow one rounding to the coarser of the two dtypes (default: compare bits)",
    )  # fmt: skip
    command.add_argument("--logits", metavar="TEXT", help="also run both models on this text and compare their logits")
    command.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_verify)


def _add_inspect(commands: Any) -> None:
    text = "list the tensors of a checkpoint, the tensors that they convert to, and its problems"
    command = commands.add_parser("inspect", help=text, description=_sentence(text + "; status 1 if it has problems"))
    command.add_argument("source", metavar="SRC", help="a folder, an id on the hub or a GGUF file")
    _add_choice_of_files(command)
    command.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_inspect)


def _add_choice_of_files(command: Any) -> None:
    """Add the options of transformers' `from_pretrained` that choose the files of SRC."""
    command.add_argument("--revision", help="a branch, a tag or a commit of the repository on the hub")
    command.add_argument("--subfolder", default="", metavar="NAME", help="the folder of the checkpoint inside SRC")
    command.add_argument("--variant", metavar="NAME", help='the variant of the weights, as "fp16"')


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _convert(options: argparse.Namespace) -> int:
    from .on_disk import convert_checkpoint

    def changes(checkpoint: Checkpoint) -> dict[str, Any]:
        fields = dict(options.changes)
        if options.layer_precision is not None:
            fields["layer_precision"] = layer_precision(options.layer_precision, _layers(checkpoint))
        return fields

    dtype = None
    if options.dtype is not None:
        from .sources.torch_tensors import torch_dtype

        dtype = torch_dtype(options.dtype)
    with Progress(options.folder.name) as bar, Progress("checksums", after=2) as checking:
        report = convert_checkpoint(
            options.source,
            options.folder,
            to_te=options.to_te,
            revision=options.revision,
            subfolder=options.subfolder,
            variant=options.variant,
            dtype=dtype,
            max_shard_bytes=options.max_shard_size,
            config_changes=changes,
            fp8=options.fp8,
            allow_pickle=options.allow_pickle,
            progress=bar.update,
            checking=checking.update,
        )
    if options.json:
        print(json.dumps({**vars(report), "megabytes_per_second": report.megabytes_per_second}))
    elif report.kept_bytes == report.bytes:
        print(
            f"{report.folder} is there already: {report.tensors} tensors, {report.bytes / 1e9:.2f} GB. Nothing to do."
        )
    else:
        kept = f", {report.kept_bytes / 1e9:.2f} GB of it by an earlier run" if report.kept_bytes else ""
        print(
            f"{report.folder}: {report.tensors} tensors, {report.bytes / 1e9:.2f} GB{kept}, in {report.seconds:.1f} s, "
            f"{report.megabytes_per_second:.0f} MB/s."
        )
    return 0


def _convert_adapter(options: argparse.Namespace) -> int:
    from .adapter import convert_adapter

    adapted = convert_adapter(options.source, options.folder, base=options.base, to_te=options.to_te)
    rank = max((each.rank for each in adapted), default=0)
    print(f"{options.folder}: an adapter of {len(adapted)} weights, of rank {rank}.")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.b is None:
        return _verify_files(options)
    from .verify.compare import TOLERANCES, compare
    from .verify.logits import compare_logits

    paths = [find_checkpoint(each, allow_pickle=options.allow_pickle) for each in (options.a, options.b)]
    with contextlib.ExitStack() as stack:
        opened = []
        for path in paths:
            stack.enter_context(kept_whole(path))
            opened.append(open_checkpoint(path, allow_pickle=options.allow_pickle))
            stack.callback(opened[-1].source.close)
        a, b = opened
        total = sum(info.nbytes for info in a.source.tensors.values())
        bar = stack.enter_context(Progress("compare"))
        comparison = compare(
            a, b, tolerances=TOLERANCES if options.tolerance else None, progress=lambda done: bar.update(done, total)
        )
    result: dict[str, Any] = comparison.to_dict()
    lines, equal = comparison.lines(), comparison.equal
    if options.logits is not None:
        logits = compare_logits(paths[0], paths[1], options.logits)
        result["logits"] = logits.to_dict()
        lines += logits.lines()
    print(json.dumps(result) if options.json else "\n".join(map(one_line, lines)))
    return 0 if equal else 1


def _verify_files(options: argparse.Namespace) -> int:
    from .verify.recorded_files import is_whole, lines, to_dict, verify_files

    for name in ("tolerance", "logits", "allow_pickle"):
        if getattr(options, name):
            raise CheckpointError(f"--{name.replace('_', '-')} has no effect on one folder: name two checkpoints.")
    with Progress("checksums", after=2) as bar:
        files = verify_files(Path(options.a).expanduser(), bar.update)
    print(json.dumps(to_dict(files)) if options.json else "\n".join(lines(files)))
    return 0 if is_whole(files) else 1


def _inspect(options: argparse.Namespace) -> int:
    from .verify.inspection import inspect

    path = find_checkpoint(
        options.source,
        revision=options.revision,
        subfolder=options.subfolder,
        allow_pickle=options.allow_pickle,
    )
    total = done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        bar.update(done, total)

    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_whole(path))
        checkpoint = open_checkpoint(path, variant=options.variant, allow_pickle=options.allow_pickle)
        stack.enter_context(contextlib.closing(checkpoint.source))
        total = sum(info.nbytes for info in checkpoint.source.tensors.values())
        bar = stack.enter_context(Progress("read"))
        inspection = inspect(checkpoint, values=True, progress=read)
    print(json.dumps(inspection.to_dict()) if options.json else "\n".join(map(one_line, inspection.lines())))
    return 1 if inspection.problems else 0


def _layers(checkpoint: Checkpoint) -> int:
    layers = checkpoint.config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise CheckpointError(f"the configuration of {checkpoint.path} has no num_hidden_layers.")
    return layers
