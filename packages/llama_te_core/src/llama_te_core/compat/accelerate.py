"""Names of accelerate that its documentation does not promise. Checked against accelerate 1.15."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def execution_devices(module: nn.Module) -> set[torch.device]:
    """Return the devices on which a module and its submodules compute.

    accelerate may keep weights elsewhere, on the CPU or on disk, where `nn.Module` sees the device "meta". Its hooks
    bring them to the execution device. Without hooks a module computes where its weights are.
    """
    devices = set()
    for each in module.modules():
        weights = list(each.parameters(recurse=False))
        if weights:
            hook: Any = getattr(each, "_hf_hook", None)
            device = getattr(hook, "execution_device", None)
            devices |= {weight.device for weight in weights} if device is None else {_indexed(device)}
    return devices


def _indexed(device: int | str | torch.device) -> torch.device:
    """Return a device as tensors name it: "cuda" is the current GPU."""
    # An empty tensor knows it without a rule for each kind of device.
    return torch.empty(0, device=device).device
