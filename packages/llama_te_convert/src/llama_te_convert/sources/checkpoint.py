"""Opening a checkpoint of any format that conversions read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .safetensors import INDEX, SINGLE, SafetensorsFolder
from .tensor_source import Checkpoint, CheckpointError, first_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DISTRIBUTED = ".metadata"
# What a conversion reads of a repository on the hub, and what it carries along.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*", "README.md"]


def find_checkpoint(location: str, *, allow_pickle: bool = False) -> Path:
    """The folder or file of a checkpoint; one on the hub is downloaded into huggingface_hub's cache.

    Args:
        location: A local folder, a GGUF file, or the id of a repository on the hub ("organisation/name").
        allow_pickle: Whether `.bin` files are downloaded too.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    path = Path(location).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(location):
        raise CheckpointError(f"{location} does not exist, and is no id of a repository on the hub (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_PATTERNS, "*.bin"] if allow_pickle else _HUB_PATTERNS
    try:
        return Path(snapshot_download(location, allow_patterns=patterns))
    except Exception as error:  # whatever keeps it from coming, in one line
        raise CheckpointError(
            f"{location} is no local path, and the hub does not give it: {first_line(error)}"
        ) from error


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint: safetensors (one file or shards), GGUF, or PyTorch's distributed format.

    Args:
        path: A folder, or a GGUF file.
        allow_pickle: Whether to read `pytorch_model.bin` files, with torch's restricted unpickler.

    Raises:
        CheckpointError: It is none, or not a valid one.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file, but no GGUF file: give the folder of the checkpoint.")
        from .gguf import GGUFSource, gguf_config

        return Checkpoint(str(path), gguf_config(path), GGUFSource(path))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return Checkpoint(str(path), read_config(path), SafetensorsFolder(path))
    if (path / _DISTRIBUTED).exists():
        from .dcp import DCPSource

        return Checkpoint(str(path), read_config(path), DCPSource(path))
    if any((path / name).exists() for name in _PICKLED):
        if not allow_pickle:
            raise CheckpointError(
                f"{path} has its tensors in pickle files (pytorch_model.bin), which can run code when they are read: "
                "say --allow-pickle to have them read with torch's restricted unpickler."
            )
        from .torch_save import PickleSource

        return Checkpoint(str(path), read_config(path), PickleSource(path))
    raise CheckpointError(
        f"{path} has no tensors: looked for {SINGLE}, {INDEX}, {_DISTRIBUTED} and {_PICKLED[0]}. For GGUF, name the "
        "file."
    )


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The content of a folder's `config.json`, or of another file of this kind.

    Raises:
        CheckpointError: It is missing or no JSON object.
    """
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object.")
    return config
