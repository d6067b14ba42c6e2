"""Names of the files in a checkpoint's folder, and the order in which transformers looks for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError


class WeightFiles(NamedTuple):
    """The files of a format that stores tensors in one file or in shards.

    Attributes:
        single_file: The file of a checkpoint without shards.
        index_file: The file that names the shard of each tensor.
    """

    single_file: str
    index_file: str

    def of_variant(self, variant: str | None) -> WeightFiles:
        """The names that `save_pretrained(variant=...)` of transformers gives these files."""
        if not variant:
            return self
        return WeightFiles(*(f".{variant}.".join(name.rsplit(".", 1)) for name in self))

    def find(self, folder: Path) -> str | None:
        """The file that transformers reads first: the single file, else the index. `None` if neither is there."""
        return next((name for name in self if (folder / name).exists()), None)


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json")
TORCH_SAVE = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json")
DCP_METADATA = ".metadata"
# A file of this name makes transformers read the folder as one of its distributed checkpoints, before any other file.
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
ADAPTER_CONFIG = "adapter_config.json"

_WEIGHTS = re.compile(r"(?!adapter_).*\.safetensors|pytorch_model.*\.bin|.*\.index(\..*)?\.json|\.metadata")
_VARIANT = re.compile(
    r"model\.(?P<of_safetensors>(?!safetensors)[^-]+?)(-\d+-of-\d+)?\.safetensors"
    r"|pytorch_model\.(?P<of_bin>[^-]+?)(-\d+-of-\d+)?\.bin"
)


def is_index(name: str) -> bool:
    """Whether a file of weights is an index of shards."""
    return name.endswith(".json")


def variants(folder: Path) -> list[str]:
    """The variants, such as "fp16", of which a folder has weights."""
    matches = (_VARIANT.fullmatch(path.name) for path in folder.iterdir())
    return sorted({match["of_safetensors"] or match["of_bin"] for match in matches if match is not None})


def left_over(folder: Path, read: set[str]) -> list[str]:
    """The files of weights in a folder, in any format, that are not among the files that are read."""
    names = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(name for name in names if _WEIGHTS.fullmatch(name) and name not in read)


def weights_named_by_config(config: Mapping[str, Any], folder: Path) -> str | None:
    """The file of weights that `transformers_weights` in a `config.json` names.

    Raises:
        CheckpointError: It does not name a safetensors file, or an index of such files, in the folder itself.
    """
    name = config.get("transformers_weights")
    if name is None:
        return None
    if (
        not isinstance(name, str)
        or not name.endswith((".safetensors", ".safetensors.index.json"))
        or not is_plain_name(name)
    ):
        raise CheckpointError(
            f"the configuration of {folder} has transformers_weights={name!r}: it must name a .safetensors file, or "
            "an index of such files, in the folder itself."
        )
    return name


def is_plain_name(file: object) -> bool:
    """Whether a value names a file of a folder itself, and of no other folder, by characters that can be printed."""
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\") and file.isprintable()
