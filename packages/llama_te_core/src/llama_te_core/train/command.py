"""The command `llama-te-train`, and `python -m llama_te_core.train` for torchrun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from typing import Any

from .config import TrainConfig

_DESCRIPTION = """Trains a Llama as a configuration says. --config takes a YAML file or the name of a preset
({presets}); given again, the later one changes the one before. Each value has an option, as in
--optimizer.learning_rate 1e-4 or --model.shape.num_hidden_layers 8. A run whose folder has checkpoints goes on from the
last one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line by default.

    Returns:
        The exit status: 0, also when SIGTERM stopped the run; 1 for an error, 2 for one in the arguments.
    """
    try:
        config = read_config(sys.argv[1:] if arguments is None else arguments)
        from .checkpoints import CheckpointError
        from .loop import RefusedRunError, train
        from .metrics import NonFiniteLossError
    except ImportError as error:
        print(f"llama-te-train: {error}: pip install 'llama-te-core[train]'", file=sys.stderr)
        return 1
    try:
        train(config)
    except (CheckpointError, NonFiniteLossError, RefusedRunError) as error:
        print(f"llama-te-train: {error}", file=sys.stderr)
        return 1
    return 0


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that arguments mean; where they mean none, the process says why and ends with status 2.

    Args:
        arguments: As on the command line.

    Raises:
        ImportError: jsonargparse is not installed.
    """
    parser = make_parser()
    options = parser.parse_args(_with_presets(arguments))
    try:
        sections = parser.instantiate(options)
        return TrainConfig(**{field.name: getattr(sections, field.name) for field in fields(TrainConfig)})
    except ValueError as error:
        parser.error(str(error))
        raise  # not reached: `error` ends the process


def make_parser() -> Any:
    """The parser of the command, a `jsonargparse.ArgumentParser`.

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
    """The configurations that come along: their files, by name."""
    folder = resources.files(__package__) / "presets"
    return {file.name.removesuffix(".yaml"): str(file) for file in sorted(folder.iterdir(), key=str)}


def _with_presets(arguments: Sequence[str]) -> list[str]:
    """The arguments with the files of presets in place of their names."""
    known = presets()
    words: list[str] = []
    for word in arguments:
        if words and words[-1] == "--config":
            word = known.get(word, word)
        elif word.startswith("--config="):
            name = word.removeprefix("--config=")
            word = "--config=" + known.get(name, name)
        words.append(word)
    return words
