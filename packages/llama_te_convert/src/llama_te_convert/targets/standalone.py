"""Checkpoints that load with transformers alone, without these packages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llama_te_core import NVLlamaConfig, NVLlamaPreTrainedModel
from llama_te_core.checkpoint_format import CHECKSUMS, LOADER, STANDALONE, auto_map
from llama_te_core.models.remote_code import write_standalone_code

from ..configs.config_file import CONFIG_NAME, has_te_layout, read_config
from ..errors import CheckpointError
from ..sources.recorded_checksums import refuse_changed
from ..sources.side_files import copy_side_files, find_side_files
from .new_folder import kept_whole, new_target, written_whole
from .writer import RECORD


def export_te_checkpoint(
    model_or_folder: NVLlamaPreTrainedModel | str | os.PathLike[str], folder: str | os.PathLike[str]
) -> None:
    """Write a checkpoint together with the source code of its model.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` and the other Auto classes load it with
    transformers, and with Transformer Engine where a GPU is available. The key/value cache is in llama_te_infer:
    without it, `generate` computes the whole text again for each token. A model loaded this way saves such a checkpoint
    again.

    Args:
        model_or_folder: A model of `llama_te_core`, or the folder of a saved one. All files of the folder are copied,
            after a comparison with their recorded checksums if it has some.
        folder: The target folder, which must be missing or empty.

    Raises:
        CheckpointError: A folder is not valid, or cannot be read or written.
        TypeError: `model_or_folder` is another model.
    """
    folder = Path(folder)
    new_target(folder)
    if isinstance(model_or_folder, NVLlamaPreTrainedModel):
        with written_whole(folder) as unfinished:
            model_or_folder.save_pretrained(unfinished)
            (unfinished / f"{LOADER}.py").unlink()
            _add_code(unfinished)
    elif isinstance(model_or_folder, str | os.PathLike):
        source = Path(model_or_folder)
        with kept_whole(source), written_whole(folder) as unfinished:
            refuse_changed(source)
            _read_te_config(source)
            copy_side_files(find_side_files(source, _is_copied), unfinished)
            _add_code(unfinished)
    else:
        raise TypeError(
            f"model_or_folder is a {type(model_or_folder).__name__}: give an NVLlama model of llama_te_core or the "
            "folder of one. Convert a Hugging Face model with convert_llama_hf_to_te first, and merge a PeftModel "
            "(merge_and_unload)."
        )


def _is_copied(name: str, is_folder: bool) -> bool:
    last = name.rpartition("/")[2]
    return not last.startswith(".") and not last.endswith(".py") and last not in ("__pycache__", CHECKSUMS, RECORD)


def _add_code(folder: Path) -> None:
    write_standalone_code(folder)
    config = _read_te_config(folder)
    config["auto_map"] = auto_map(STANDALONE)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _read_te_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder} is not the folder of a checkpoint: it has no {CONFIG_NAME}.")
    config = read_config(folder)
    if not has_te_layout(config):
        raise CheckpointError(
            f"{folder / CONFIG_NAME} has model_type={config.get('model_type')!r}, but only checkpoints of the "
            f"Transformer Engine layout ({NVLlamaConfig.model_type!r}) can be exported: convert it first."
        )
    return config
