"""The command `llama-te-convert`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from . import __version__
from .sources.tensor_source import Checkpoint, CheckpointError

_DTYPES = ("bfloat16", "float16", "float32")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PRECISIONS = {"fp8": "fp8", "fp4": "fp4", "none": None}
_EPILOG = """
examples:
  llama-te-convert to-te ./Llama-3.2-1B ./llama-te
  llama-te-convert to-te SmolLM2-135M-Instruct.Q4_1.gguf ./smollm2-te --dtype bfloat16
  llama-te-convert to-te ./Llama-3.1-8B ./llama-te --layer-precision "1:-1=fp8" --set attn_input_format=bshd
  llama-te-convert to-hf ./llama-te ./llama-hf
  llama-te-convert to-hf ./llama-te ./llama-fp8 --fp8
  llama-te-convert adapter-to-hf ./adapter ./adapter-hf --base ./Llama-3.1-8B
  llama-te-convert verify ./Llama-3.2-1B ./llama-te
  llama-te-convert inspect ./llama-te

A conversion that was stopped goes on when the same command is given again. Its result appears when it is complete.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for an error or a difference, 130 when it was interrupted."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except CheckpointError as error:
        print(f"llama-te-convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llama-te-convert: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    top = argparse.ArgumentParser(
        prog="llama-te-convert",
        description="Converts Llama checkpoints between the Hugging Face and the Transformer Engine layout, compares "
        "them and looks into them, in memory that does not grow with their size.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"llama-te-convert {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, to_te, text in (
        ("to-te", True, "convert a Hugging Face checkpoint to the Transformer Engine layout"),
        ("to-hf", False, "convert a checkpoint of the Transformer Engine layout to Hugging Face's"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        what = "a folder, an id on the hub (owner/name)" + (", or a GGUF file" if to_te else "")
        command.add_argument("source", metavar="SRC", help=what)
        command.add_argument("folder", metavar="DST", type=Path, help="the new folder")
        command.add_argument("--dtype", choices=_DTYPES, help="cast floating-point tensors (default: as they are)")
        command.add_argument(
            "--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="of a file, as in 5GB (default)"
        )
        command.add_argument(
            "--set", type=_assignment, action="append", default=[], metavar="FIELD=VALUE", dest="changes",
            help="set a field of the new configuration (may be repeated); VALUE is JSON, or else a text",
        )  # fmt: skip
        if to_te:
            command.add_argument(
                "--layer-precision", metavar="SPEC",
                help='precision of layers, as "1:-1=fp8" or "0=none,1:8=fp8,8:=fp4": ranges are those of Python',
            )  # fmt: skip
        else:
            command.add_argument(
                "--fp8", action="store_true",
                help="write linear weights in FP8 (e4m3) with one scale each, as serving engines read them",
            )  # fmt: skip
        command.add_argument(
            "--allow-pickle", action="store_true", help="also read pytorch_model.bin, by torch's restricted unpickler"
        )
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        command.set_defaults(run=_convert, to_te=to_te, layer_precision=None, fp8=False)
    text = "convert a LoRA adapter of PEFT for the Transformer Engine layout to one for the Hugging Face model"
    adapter = commands.add_parser("adapter-to-hf", help=text, description=text[0].upper() + text[1:] + ".")
    adapter.add_argument("source", metavar="SRC", help="the folder that PEFT saved it to")
    adapter.add_argument("folder", metavar="DST", type=Path, help="the new folder")
    adapter.add_argument(
        "--base", metavar="MODEL",
        help="the Hugging Face model that it is for, a folder or an id on the hub (default: sizes are taken from the "
        "model that the adapter names)",
    )  # fmt: skip
    adapter.set_defaults(run=_convert_adapter)
    text = "compare two checkpoints, of either layout, tensor by tensor"
    verify = commands.add_parser(
        "verify", help=text, description=text[0].upper() + text[1:] + "; status 1 if they differ."
    )
    verify.add_argument("a", metavar="A", help="a folder, an id on the hub or a GGUF file")
    verify.add_argument("b", metavar="B", help="likewise")
    verify.add_argument(
        "--tolerance",
        action="store_true",
        help="allow for rounding to the coarser of the two dtypes (default: no bit differs)",
    )
    verify.add_argument("--logits", metavar="TEXT", help="also run both models on this text and compare their logits")
    verify.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(run=_verify)
    text = "say what is in a checkpoint, what its tensors become, and what is wrong with it"
    inspect = commands.add_parser("inspect", help=text, description=text[0].upper() + text[1:] + ".")
    inspect.add_argument("source", metavar="SRC", help="a folder, an id on the hub or a GGUF file")
    inspect.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(run=_inspect)
    return top


def _convert(options: argparse.Namespace) -> int:
    from .on_disk import convert_checkpoint

    def changes(checkpoint: Checkpoint) -> dict[str, Any]:
        fields = dict(options.changes)
        if options.layer_precision is not None:
            fields["layer_precision"] = _layer_precision(options.layer_precision, _layers(checkpoint))
        return fields

    dtype = None
    if options.dtype is not None:
        from .sources.torch_tensors import torch_dtype

        dtype = torch_dtype(options.dtype)
    with _Progress(options.folder.name) as bar:
        report = convert_checkpoint(
            options.source,
            options.folder,
            to_te=options.to_te,
            dtype=dtype,
            max_shard_bytes=options.max_shard_size,
            config_changes=changes,
            fp8=options.fp8,
            allow_pickle=options.allow_pickle,
            progress=bar.update,
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

    adapted = convert_adapter(options.source, options.folder, base=options.base)
    print(f"{options.folder}: an adapter of {len(adapted)} weights, of rank {max(each.rank for each in adapted)}.")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .sources.checkpoint import find_checkpoint, open_checkpoint
    from .verify.logits import compare_logits
    from .verify.compare import TOLERANCES, compare

    paths = [find_checkpoint(each, allow_pickle=options.allow_pickle) for each in (options.a, options.b)]
    with contextlib.ExitStack() as stack:
        a, b = (open_checkpoint(path, allow_pickle=options.allow_pickle) for path in paths)
        stack.callback(a.source.close)
        stack.callback(b.source.close)
        total = sum(info.nbytes for info in a.source.tensors.values())
        bar = stack.enter_context(_Progress("compare"))
        comparison = compare(
            a, b, tolerances=TOLERANCES if options.tolerance else None, progress=lambda done: bar.update(done, total)
        )
    result: dict[str, Any] = comparison.to_dict()
    lines, equal = comparison.lines(), comparison.equal
    if options.logits is not None:
        logits = compare_logits(paths[0], paths[1], options.logits)
        result["logits"] = logits.to_dict()
        lines += logits.lines()
    print(json.dumps(result) if options.json else "\n".join(lines))
    return 0 if equal else 1


def _inspect(options: argparse.Namespace) -> int:
    from .sources.checkpoint import find_checkpoint, open_checkpoint
    from .verify.inspection import inspect

    path = find_checkpoint(options.source, allow_pickle=options.allow_pickle)
    checkpoint = open_checkpoint(path, allow_pickle=options.allow_pickle)
    with contextlib.closing(checkpoint.source):
        inspection = inspect(checkpoint)
    print(json.dumps(inspection.to_dict()) if options.json else "\n".join(inspection.lines()))
    return 0


# --- options ----------------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    number = text.upper().rstrip("KMGTIB")
    unit = text.upper()[len(number) :]
    try:
        size = int(float(number) * (_UNITS[unit] if unit else 1))
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write one as in 5GB, 500MB or 2GiB")
    return size


def _assignment(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no FIELD=VALUE")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value


def _layers(checkpoint: Checkpoint) -> int:
    layers = checkpoint.config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise CheckpointError(f"the configuration of {checkpoint.path} does not say num_hidden_layers.")
    return layers


def _layer_precision(spec: str, layers: int) -> list[str | None]:
    """A precision for each layer, from "1:-1=fp8": ranges of layers as in Python; layers that none names have none."""
    precision: list[str | None] = [None] * layers

    def refuse(entry: str, why: str) -> NoReturn:
        raise CheckpointError(
            f"--layer-precision {spec!r}: {entry!r} {why}. Write layers as 0, -1 or 1:-1, then = and one of "
            f"{', '.join(_PRECISIONS)}; several with commas."
        )

    for entry in spec.split(","):
        where, equals, what = entry.strip().partition("=")
        if not equals or what.strip().lower() not in _PRECISIONS:
            refuse(entry, "does not end in =fp8, =fp4 or =none")
        try:
            bounds = [int(bound) if bound.strip() else None for bound in where.split(":")]
        except ValueError:
            refuse(entry, "does not name layers by whole numbers")
        if len(bounds) == 1 and bounds[0] is not None:
            if not -layers <= bounds[0] < layers:
                refuse(entry, f"names a layer that is not there, of {layers}")
            chosen = [range(layers)[bounds[0]]]
        elif len(bounds) in (2, 3) and bounds[2:] != [0]:
            chosen = list(range(layers)[slice(*bounds)])
        else:
            refuse(entry, "does not name layers")
        for layer in chosen:
            precision[layer] = _PRECISIONS[what.strip().lower()]
    return precision


# --- progress ---------------------------------------------------------------------------------------------------------


class _Bar(Protocol):
    total: float | None
    n: float

    def refresh(self) -> object: ...
    def close(self) -> object: ...


class _Progress:
    """A bar on a terminal; elsewhere a line every ten seconds. Goes to standard error."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._bar: _Bar | None = None
        self._last = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if not sys.stderr.isatty():
            if now - self._last >= 10:
                self._last = now
                print(f"{self.what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.what, file=sys.stderr)
        if now - self._last >= 0.1 or done == total:
            self._last = now
            self._bar.n = done
            self._bar.refresh()
