"""Checks the earlier run in a run's folder, so that another run does not mix with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...models.configuration_nvllama import NVLlamaConfig
from ..config.yaml_file import read_yaml

# Fields that change a model's results, but not the shapes of its weights.
_MEANING = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps")
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings")


def check_same_model(checkpoint: Path, config: NVLlamaConfig) -> None:
    """Refuse to continue from a checkpoint of another model.

    Args:
        checkpoint: The folder of a checkpoint, with the model's `config.json`.
        config: The configuration of this run's model.

    Raises:
        ValueError: The shapes or the meaning of the weights differ.
    """
    saved, own = NVLlamaConfig.from_pretrained(checkpoint).to_dict(), config.to_dict()
    other = [f"{name}={saved[name]!r} (here {own[name]!r})" for name in _SHAPE + _MEANING if saved[name] != own[name]]
    if other:
        raise ValueError(
            f"{checkpoint} is of another model, with {', '.join(other)}: go on with that model, or give another folder."
        )


def check_folder(folder: Path) -> None:
    """Refuse a run's folder that can neither be made nor be written.

    Raises:
        OSError: The message says why.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(f"folder={str(folder)!r} is a link to nothing: make its target, or give a folder.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder={str(folder)!r} is a file: give a folder, there or not.")
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"folder={str(folder)!r} cannot be written: give another folder, or the right to write.")


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to begin in a folder that holds another run without checkpoints.

    A run with the same settings that stopped before its first checkpoint begins again.

    Args:
        folder: The run's folder. It need not exist.
        settings: The whole configuration, by sections.

    Raises:
        FileExistsError: The folder holds another run.
        ValueError: The earlier run's configuration cannot be read.
    """
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        return
    before = read_yaml(folder / "config.yaml")
    own = yaml.safe_load(yaml.safe_dump(dict(settings)))  # YAML turns tuples into lists
    names = sorted(name for name in own if not isinstance(before, dict) or before.get(name) != own[name])
    if names:
        raise FileExistsError(
            f"folder={str(folder)!r} has a run with another {' and '.join(names)}, and no checkpoint of it: give "
            "another folder, or remove that one."
        )
