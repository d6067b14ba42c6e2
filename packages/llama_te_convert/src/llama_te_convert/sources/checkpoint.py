"""Opening a checkpoint of any supported format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.config_file import has_te_layout, read_config
from ..errors import CheckpointError, first_line
from .file_names import DCP_METADATA, SAFETENSORS, TORCH_SAVE
from .safetensors import SafetensorsFolder
from .tensor_source import TensorSource

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Files to download from a repository on the hub: those that a conversion reads or copies.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*", "README.md"]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: Its location, for messages.
        config: The content of its `config.json`, or the equivalent that was read from a GGUF file.
        source: Its tensors.
    """

    path: str
    config: dict[str, Any]
    source: TensorSource

    @property
    def is_te(self) -> bool:
        """Whether it has the Transformer Engine layout."""
        return has_te_layout(self.config)


def find_checkpoint(location: str, *, allow_pickle: bool = False) -> Path:
    """Find the folder or file of a checkpoint. A repository on the hub is downloaded into huggingface_hub's cache.

    Args:
        location: A local folder, a GGUF file, or the id of a repository on the hub ("organisation/name").
        allow_pickle: Whether to download `.bin` files too.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    path = Path(location).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(location):
        raise CheckpointError(f"{location} does not exist, and is not the id of a repository on the hub (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_PATTERNS, "*.bin"] if allow_pickle else _HUB_PATTERNS
    try:
        return Path(snapshot_download(location, allow_patterns=patterns))
    except Exception as error:  # any failure of the download is reported in one line
        raise not_on_the_hub(location, error) from error


def not_on_the_hub(location: str, error: Exception) -> CheckpointError:
    """The error for a checkpoint that is neither a local path nor available on the hub."""
    return CheckpointError(
        f"{location} is not a local path, and cannot be downloaded from the hub: {first_line(error)}"
    )


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint: safetensors (one file or shards), GGUF, or PyTorch's distributed format.

    Args:
        path: A folder, or a GGUF file.
        allow_pickle: Whether to read `pytorch_model.bin` files, with torch's restricted unpickler.

    Raises:
        CheckpointError: The path is not a checkpoint, or the checkpoint is not valid.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file, but not a GGUF file: give the folder of the checkpoint.")
        from .gguf import GGUFSource, gguf_config

        return Checkpoint(str(path), gguf_config(path), GGUFSource(path))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    if any((path / name).exists() for name in SAFETENSORS):
        return Checkpoint(str(path), read_config(path), SafetensorsFolder(path))
    if (path / DCP_METADATA).exists():
        from .dcp import DCPSource

        return Checkpoint(str(path), read_config(path), DCPSource(path))
    if any((path / name).exists() for name in TORCH_SAVE):
        if not allow_pickle:
            raise CheckpointError(
                f"{path} has its tensors in pickle files ({TORCH_SAVE.single_file}), which can run code when they are "
                "read: say --allow-pickle to read them with torch's restricted unpickler."
            )
        from .torch_save import TorchSaveSource

        return Checkpoint(str(path), read_config(path), TorchSaveSource(path))
    raise CheckpointError(
        f"{path} has no tensors: looked for {', '.join(SAFETENSORS)}, {DCP_METADATA} and {TORCH_SAVE.single_file}. For "
        "GGUF, name the file."
    )
