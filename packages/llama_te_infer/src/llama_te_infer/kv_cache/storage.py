"""The memory for keys and values: what contiguous and paged storage have in common.

Shapes: B rows of the batch, T new tokens, L keys per row, K key/value heads, D size of a head, P pages per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from llama_te_core.compat.accelerate import execution_devices

from .cache_format import CacheFormat, LayerMemory


class KVStorage(Protocol):
    """Memory for the keys and values of all layers.

    Attributes:
        cache: The memory of each allocated layer, by the layer's number.
        format: Of keys and values.
        page_table: int32 [rows, P]; `None` for contiguous storage.
    """

    cache: dict[int, LayerMemory]
    format: CacheFormat

    @property
    def page_table(self) -> torch.Tensor | None:
        """See the class."""
        ...

    def allocate_memory(self, layer_number: int) -> None:
        """Allocate the tensors of a layer."""
        ...

    def slots(self, row_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        """Return the slot mapping: the index of each token in a layer's flattened memory."""
        ...

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first rows' keys and values as [B, L, K, D] of the format's dtype, with L ≥ `keys`."""
        ...


class CacheManager(KVStorage, Protocol):
    """Storage that also decides which memory each row uses."""

    def reset(self) -> None:
        """Forget all sequences."""
        ...

    def assign_rows(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Give rows room for `lengths` tokens; row i continues the first `starts[i]` tokens of row `sources[i]`."""
        ...

    def reorder(self, source_rows: torch.Tensor, lengths: Sequence[int]) -> None:
        """Let row i continue row `source_rows[i]`, in all layers; both have `lengths[i]` tokens."""
        ...


def tensors_of(cache: dict[int, LayerMemory]) -> list[torch.Tensor]:
    """Return the memory of all layers in one list."""
    return [tensor for memory in cache.values() for tensor in memory]


def cache_device(model: Any) -> torch.device:
    """Return the device of a model's cache: where its layers compute, wherever accelerate keeps their weights.

    Args:
        model: An `NVLlamaForCausalLM` or `NVLlamaModel`.

    Raises:
        ValueError: The layers compute on several devices.
    """
    devices = execution_devices(model.base_model.layers)
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(
            f"the layers compute on {names}, but a cache is on one device: load the model on one device, such as "
            'device_map={"": 0}, or pass use_cache=False.'
        )
    return devices.pop()


def default_device() -> torch.device:
    """Return the current GPU, or the CPU of a machine without one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
