"""The checkpoint before a run and the folders after it: conversion and export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..files.checksums import record_checksums
from ..models.causal_lm import NVLlamaForCausalLM
from ..models.conversion import conversion
from ..parallel.mesh import process_rank
from ..parallel.parallelize import whole_state_dict


def converted(checkpoint: str, folder: Path) -> Path:
    """Convert a Hugging Face checkpoint to the Transformer Engine layout, on rank 0, and return the folder.

    Args:
        checkpoint: A folder, hub id or GGUF file.
        folder: The folder of the result; all processes see it.
    """
    if process_rank() == 0:
        conversion(f"model.checkpoint={checkpoint!r}").convert_checkpoint(checkpoint, folder, to_te=True)
    if dist.is_initialized():
        dist.barrier()
    return folder


def export_te(model: NVLlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a model for `from_pretrained`. Rank 0 gathers it on the host and writes it; all processes call this.

    Args:
        model: Split or not.
        tokenizer: Written beside the model; None for none.
        folder: Replaced if it exists.
    """
    state = whole_state_dict(model)
    if process_rank() != 0:
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    record_checksums(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def export_hf(folder_te: Path, folder_hf: Path) -> None:
    """Convert an exported folder to Hugging Face's layout, on rank 0.

    Args:
        folder_te: The folder that `export_te` wrote.
        folder_hf: Replaced if it exists.
    """
    if process_rank() == 0:
        shutil.rmtree(folder_hf, ignore_errors=True)
        conversion("export.hf=True").convert_checkpoint(str(folder_te), folder_hf, to_te=False)
