"""The conversion of checkpoints, which the package llama_te_convert provides through an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

# The training command reads this module before it knows whether torch is needed.
if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "llama_te_core.conversion"


class ConvertedCheckpoint(NamedTuple):
    """A checkpoint in memory, in the Transformer Engine layout.

    Attributes:
        config: Its `NVLlamaConfig`.
        tensors: Its tensors by name, on the CPU, in the dtypes of the source.
        folder: The folder of the source's other files.
    """

    config: Any
    tensors: dict[str, torch.Tensor]
    folder: Path


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

    def load_converted(
        self,
        source: str,
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        allow_pickle: bool = False,
        hub_options: Mapping[str, Any] | None = None,
    ) -> ConvertedCheckpoint | None:
        """Read a checkpoint and convert it to the Transformer Engine layout.

        Args:
            source: A folder, hub id or GGUF file.
            gguf_file: The GGUF file in the folder or repository.
            revision: A branch, a tag or a commit of the repository.
            subfolder: The folder of the checkpoint inside the source.
            variant: The variant of the weights, such as "fp16".
            allow_pickle: Whether to read `.bin` files.
            hub_options: Further arguments of huggingface_hub's downloads.

        Returns:
            The converted checkpoint; `None` if its tensors have the Transformer Engine layout already.

        Raises:
            ValueError: The checkpoint cannot be read or converted.
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
