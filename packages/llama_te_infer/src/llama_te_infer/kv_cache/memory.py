"""The memory of a device, compared with what a cache needs before anything is allocated."""

from __future__ import annotations

import os

import torch

PAGE_BYTES_ON_HOST = 64  # of a page in the lists of a pool


def total_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory, or of the machine's for a CPU; `None` where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that PyTorch could still allocate on a GPU; for a CPU as `total_memory`."""
    if device.type != "cuda":
        return total_memory(device)
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch's reserved but unused memory is free too.
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def check_fits(arguments: str, needed: int, available: int | None, device: torch.device) -> None:
    """Refuse sizes that need more memory than there is.

    Args:
        arguments: The sizes, for the message.
        needed: Bytes.
        available: Bytes; `None` if unknown.
        device: Where they would be.

    Raises:
        ValueError: There is less memory.
    """
    if available is not None and needed > available:
        raise ValueError(
            f"{arguments}: this needs {needed / 2**30:,.1f} GiB, and {device} has {available / 2**30:,.1f} GiB for it. "
            "Make the sizes smaller."
        )
