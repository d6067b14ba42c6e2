"""Copies between the host and the device that make neither wait for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on the device.

    The GPU reads pinned memory by itself, and PyTorch reuses that memory only after the GPU has read it.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start the copy of a GPU's tensor to pinned memory. The copy is complete when the current stream has passed it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
