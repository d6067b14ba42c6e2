"""Names of the files in a checkpoint's folder, by which its format is recognised."""

from __future__ import annotations

from typing import NamedTuple


class WeightFiles(NamedTuple):
    """The files of a format that stores tensors in one file or in shards.

    Attributes:
        single_file: The file of a checkpoint without shards.
        index_file: The file that names the shard of each tensor.
    """

    single_file: str
    index_file: str


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json")
TORCH_SAVE = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json")
DCP_METADATA = ".metadata"
