"""The model, the tokenizer and the defaults of a checkpoint, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FP8_RECIPES = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
# Fields of transformers' GenerationConfig that mean the same in `SamplingParams`.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass
class LoadedModel:
    """What a server needs of a checkpoint.

    Attributes:
        model: An `NVLlamaForCausalLM` in evaluation mode.
        tokenizer: A tokenizer of transformers.
        sampling_defaults: Fields of `SamplingParams` that the checkpoint's `generation_config.json` sets.
    """

    model: Any
    tokenizer: Any
    sampling_defaults: dict[str, Any]


def load(
    source: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    fp8_recipe: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a checkpoint.

    Args:
        source: A folder with the Transformer Engine or the Hugging Face layout, a GGUF file, or a hub id. All but the
            first need llama-te-convert.
        dtype: "auto" for the checkpoint's own, or a name such as "bfloat16".
        device: Such as "cuda:0"; by default a GPU if there is one.
        fp8_recipe: Compute all layers in FP8 with this recipe: "delayed", "current" or "block".
        tokenizer: The folder or hub id of another tokenizer.
        revision: Of a hub repository.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: An argument or the checkpoint does not fit.
    """
    from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
    from llama_te_core.compat.transformer_engine import make_recipe
    from llama_te_core.data.tokenizer_files import load_tokenizer

    path = Path(source)
    fields: dict[str, Any] = {} if revision is None else {"revision": revision}
    file: dict[str, Any] = {}
    place: str | Path = source
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"MODEL={source} is a file, but no .gguf file: give a folder, a GGUF file or a hub id.")
        place, file = path.parent, {"gguf_file": path.name}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": dtype, "device_map": device, **fields, **file}
    if fp8_recipe is not None:
        content, _ = NVLlamaConfig.get_config_dict(place, **fields, **file)
        options["fp8_recipe"] = make_recipe(FP8_RECIPES[fp8_recipe])
        options["layer_precision"] = ["fp8"] * content["num_hidden_layers"]
    model = NVLlamaForCausalLM.from_pretrained(place, **options).eval()
    own = {} if tokenizer is not None else file
    loaded = load_tokenizer(tokenizer or place, **(fields if tokenizer is None else {}), **own)
    config = model.generation_config
    defaults = {name: value for name in _SAMPLING_FIELDS if (value := getattr(config, name, None)) is not None}
    return LoadedModel(model, loaded, defaults)
