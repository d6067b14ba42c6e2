"""Checkpoints that load where transformers is, and none of these packages."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from llama_te_core import NVLlamaConfig, NVLlamaPreTrainedModel
from llama_te_core.checkpoint_format import LOADER, STANDALONE, auto_map
from llama_te_core.models.remote_code import write_standalone_code

from ..sources.tensor_source import CheckpointError


def export_te_checkpoint(
    model_or_folder: NVLlamaPreTrainedModel | str | os.PathLike[str], folder: str | os.PathLike[str]
) -> None:
    """Write a checkpoint that brings the source code of its model along.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, and the other Auto classes, load it with
    transformers, and with Transformer Engine where there is a GPU for it. Without a key/value cache, which is in
    llama_te_infer, `generate` reads the whole text again for each token. What is saved from a model that was loaded so
    is such a checkpoint again.

    Args:
        model_or_folder: A model of `llama_te_core`, or the folder that one was saved to; all that is in it goes along.
        folder: Where to; it must not be there yet, or be empty.

    Raises:
        CheckpointError: One of the folders is not as it should be, or cannot be read or written.
        TypeError: `model_or_folder` is another model.
    """
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} is there already: name a folder that is not, or an empty one.")
        if isinstance(model_or_folder, NVLlamaPreTrainedModel):
            model_or_folder.save_pretrained(folder)
            (folder / f"{LOADER}.py").unlink()
            config = _read_config(folder)
        elif isinstance(model_or_folder, str | os.PathLike):
            config = _read_config(Path(model_or_folder))
            ignored = shutil.ignore_patterns(f"{LOADER}.py", "__pycache__", ".*")
            shutil.copytree(model_or_folder, folder, ignore=ignored, dirs_exist_ok=True)
        else:
            raise TypeError(
                f"model_or_folder is a {type(model_or_folder).__name__}: give an NVLlama model of llama_te_core or the "
                "folder of one. A Hugging Face model is converted with convert_llama_hf_to_te first."
            )
        write_standalone_code(folder)
        config["auto_map"] = auto_map(STANDALONE)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"the export to {folder} failed: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no folder of a checkpoint: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}).") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != NVLlamaConfig.model_type:
        raise CheckpointError(
            f"{path} has model_type={found!r}, but only checkpoints of the Transformer Engine layout "
            f"({NVLlamaConfig.model_type!r}) are exported: convert it first."
        )
    return dict(config)
