"""The conversion of checkpoints, which the package llama_te_convert provides through an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

ENTRY_POINT_GROUP = "llama_te_core.conversion"


class Conversion(Protocol):
    """The interface that an entry point of the group `llama_te_core.conversion` provides."""

    def te_config(self, config_hf: Mapping[str, Any]) -> Any:
        """Return the `NVLlamaConfig` of a converted checkpoint.

        Args:
            config_hf: The content of the Hugging Face checkpoint's `config.json`.

        Raises:
            ValueError: The architecture is not known, or the layers cannot compute it.
        """
        ...

    def convert_checkpoint(self, source: str, folder: Path, *, to_te: bool) -> Any:
        """Convert a checkpoint.

        Args:
            source: A folder, hub id or GGUF file.
            folder: The folder of the result.
            to_te: From Hugging Face's layout to Transformer Engine's; else the other way.
        """
        ...


def conversion(why: str) -> Conversion:
    """Return the installed conversion.

    Args:
        why: The option that needs it, for the message.

    Raises:
        RuntimeError: There is none.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        found: Conversion = entry.load()
        return found
    raise RuntimeError(f"{why} needs the package llama-te-convert: pip install llama-te-convert")
