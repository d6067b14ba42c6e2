"""The checkpoint before a run and the folders after it: conversion and export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..checkpoint_format import CHECKSUMS
from ..files.checksums import problems, record_checksums
from ..files.disk import new_folder, writing_to
from ..files.foreign_code import drop_foreign_code
from ..models.causal_lm import NVLlamaForCausalLM
from ..models.conversion import conversion
from ..parallel.mesh import on_rank_0
from ..parallel.parallelize import whole_state_dict


def converted(checkpoint: str, folder: Path) -> Path:
    """Convert a Hugging Face checkpoint to the Transformer Engine layout, on rank 0, and return the folder.

    Args:
        checkpoint: A folder, hub id or GGUF file.
        folder: The folder of the result; all processes see it.
    """

    def convert() -> None:
        conversion(f"model.checkpoint={checkpoint!r}").convert_checkpoint(checkpoint, folder, to_te=True)

    on_rank_0(convert)
    return folder


def refuse_changed(folder: Path) -> None:
    """Refuse to begin from a checkpoint whose files differ from their recorded sizes and checksums.

    Rank 0 compares; all processes call this.

    Args:
        folder: The folder; one without `checksums.json` is accepted.

    Raises:
        ValueError: A file is damaged or missing.
    """
    changes = on_rank_0(lambda: problems(folder))
    if changes:
        raise ValueError(
            f"model.checkpoint={str(folder)!r} has changed since {CHECKSUMS} was written: {'; '.join(changes)}. Get "
            f"the files from a copy. If the change is your own, remove {folder / CHECKSUMS} instead."
        )


def export_te(model: NVLlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a model for `from_pretrained`. Rank 0 gathers it on the host and writes it; all processes call this.

    Args:
        model: Split or not.
        tokenizer: Written beside the model; None for none.
        folder: Replaced if it exists, when the new one is complete.

    Raises:
        DiskError: The folder cannot be written; an earlier one stays.
        FolderInUseError: Another process is reading an earlier folder, which stays.
    """
    state = whole_state_dict(model)

    def write() -> None:
        with writing_to(folder), new_folder(folder) as unfinished:
            model.save_pretrained(unfinished, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
                _drop_references(unfinished)
            record_checksums(unfinished)

    on_rank_0(write)


def _drop_references(folder: Path) -> None:
    changed = drop_foreign_code(folder)
    if changed:
        warnings.warn(
            f"{', '.join(changed)} of the tokenizer named code (auto_map), which trust_remote_code=True would run: the "
            "export does not name it.",
            stacklevel=2,
        )


def export_hf(folder_te: Path, folder_hf: Path) -> None:
    """Convert an exported folder to Hugging Face's layout, on rank 0; all processes call this.

    Args:
        folder_te: The folder that `export_te` wrote.
        folder_hf: Replaced if it exists, when the new one is complete.

    Raises:
        CheckpointError: The conversion has failed, for example on a full disk; an earlier folder stays.
        DiskError: The folder cannot be written; an earlier one stays.
        FolderInUseError: Another process is reading an earlier folder, which stays.
    """

    def convert() -> None:
        with writing_to(folder_hf), new_folder(folder_hf) as unfinished:
            conversion("export.hf=True").convert_checkpoint(str(folder_te), unfinished, to_te=False)

    on_rank_0(convert)
