"""Reading `config.json`, and the few values that a conversion of tensors needs from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from llama_te_core.checkpoint_format import check_values, has_te_layout
from llama_te_core.files.input_files import read_json

from ..errors import CheckpointError
from ..layout.row_order import HeadSizes

__all__ = ["CONFIG_NAME", "has_te_layout", "head_sizes", "is_size", "read_config"]

CONFIG_NAME = "config.json"


def read_config(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint.

    Args:
        folder: The checkpoint's folder.
        name: The file.

    Raises:
        CheckpointError: The file is missing or is no regular file, or `read_json` refuses its content.
    """
    path = folder / name
    try:
        return read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.") from error


def head_sizes(config: Mapping[str, Any], path: str) -> HeadSizes:
    """The attention sizes in a `config.json`, with the defaults of transformers.

    Args:
        config: The content of the file.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: A size is missing, they are not the sizes of a Llama, or another value is not valid.
    """
    try:
        check_values(config)
    except ValueError as error:
        raise CheckpointError(f"the configuration of {path} is not valid: {error}") from error
    heads: Any = config.get("num_attention_heads")
    groups: Any = config.get("num_key_value_heads") or heads
    size: Any = config.get("head_dim")
    hidden: Any = config.get("hidden_size")
    if size is None and is_size(hidden) and is_size(heads):
        size = hidden // heads
    if not all(map(is_size, (heads, groups, size))) or heads % groups:
        raise CheckpointError(
            f"the configuration of {path} has num_attention_heads={heads!r}, num_key_value_heads={groups!r} and "
            f"head_dim={size!r}: a Llama needs positive whole numbers, and key/value heads that divide the heads."
        )
    return HeadSizes(heads, groups, size)


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a positive integer, and no bool."""
    return type(value) is int and value > 0
