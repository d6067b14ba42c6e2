"""The command `llama-te-train`, and `python -m llama_te_core.train` for torchrun."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .config.yaml_file import read_yaml

_DESCRIPTION = """Trains a Llama from a configuration. --config takes a YAML file or the name of a preset ({presets}); a
second --config changes the first one. Each value has an option, as in --optimizer.learning_rate 1e-4 or
--model.shape.num_hidden_layers 8. A run whose folder has checkpoints goes on from the last one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line by default.

    Returns:
        The exit status: 0, also when SIGTERM or Ctrl-C stopped the run between two steps; 1 for an error, 2 for one in
        the arguments, 130 for a second Ctrl-C or one before the first step.
    """
    try:
        config = read_config(sys.argv[1:] if arguments is None else arguments)
        from ..files.disk import DiskError
        from .checkpoint.checkpoints import TrainingCheckpointError
        from .data.documents import UnusableDocumentError
        from .loop import RefusedRunError, train
        from .metrics import NonFiniteLossError
    except ModuleNotFoundError as error:
        print(f"llama-te-train: {error}: pip install 'llama-te-core[train]'", file=sys.stderr)
        return 1
    try:
        train(config)
    except (TrainingCheckpointError, NonFiniteLossError, RefusedRunError, UnusableDocumentError, DiskError) as error:
        print(f"llama-te-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llama-te-train: ended by Ctrl-C, without saving", file=sys.stderr, flush=True)
        if arguments is None:
            os._exit(130)  # at once: Python would wait for the thread that writes a checkpoint, and for workers
        return 130
    return 0


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration of the arguments; for wrong ones, print the reason and exit with status 2.

    Args:
        arguments: As on the command line.

    Raises:
        ImportError: jsonargparse is not installed.
    """
    parser = make_parser()
    try:
        options = parser.parse_args(_words(arguments))
        sections = parser.instantiate(options)
        return TrainConfig(**{field.name: getattr(sections, field.name) for field in fields(TrainConfig)})
    except ValueError as error:
        parser.error(str(error))
        raise  # not reached: `error` ends the process


def make_parser() -> Any:
    """Make the parser of the command, a `jsonargparse.ArgumentParser`.

    Raises:
        ImportError: jsonargparse is not installed.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="llama-te-train",
        usage="llama-te-train [--config FILE] [--SECTION.NAME VALUE ...]",
        description=_DESCRIPTION.format(presets=", ".join(presets())),
    )
    parser.add_argument("--config", action="config", help="A YAML file, or the name of a preset.")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def presets() -> dict[str, str]:
    """Return the files of the presets by name."""
    folder = resources.files(__package__) / "presets"
    return {file.name.removesuffix(".yaml"): str(file) for file in sorted(folder.iterdir(), key=str)}


def _words(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for the parser: files of presets in place of their names, and _ for - in options.

    Raises:
        ValueError: `--config` has neither a file nor the name of a preset.
    """
    words: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if words and words[-1] == "--config":
            argument = _file(argument)
        elif option == "--config" and equals:
            argument = option + equals + _file(value)
        elif option.startswith("--"):
            argument = "--" + option.removeprefix("--").replace("-", "_") + equals + value
        words.append(argument)
    return words


def _file(name: str) -> str:
    """Return the file of a preset for its name; check any other file, which the parser then reads."""
    known = presets()
    if name not in known and re.fullmatch(r"[\w./-]*\w", name) and not Path(name).exists():
        raise ValueError(f"--config {name}: there is no such file, and presets are {', '.join(known)}.")
    if name not in known and os.path.lexists(name):
        try:
            read_yaml(name)
        except ValueError as error:
            raise ValueError(f"--config {error}") from error
    return known.get(name, name)
