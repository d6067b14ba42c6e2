"""The engine and the tokenizer for a checkpoint, whatever its format.

Importing this module imports neither torch nor transformers, so that a process can load the tokenizer alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .settings import EngineSettings

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.pooling import PoolingEngine

Task = Literal["generate", "embed", "classify"]
FP8_RECIPES = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
# Fields of transformers' GenerationConfig that mean the same in `SamplingParams`.
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def check_source(source: str, name: str = "MODEL") -> None:
    """Refuse a file that is no checkpoint.

    Args:
        source: What is given.
        name: Of the argument.

    Raises:
        ValueError: It is one.
    """
    path = Path(source)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{name}={source} is a file, but no .gguf file: give a folder, a GGUF file or a hub id.")


def task_of(model: str, runner: str, convert: str) -> Task:
    """Return what a model is to do, from the operator's options and the architecture that its config.json names.

    Args:
        model: As in `EngineSettings`. Without a folder, the architecture is not known before the model loads.
        runner: "auto", "generate" or "pooling".
        convert: "auto", "none", "embed" or "classify".

    Raises:
        ValueError: The options contradict each other, or the checkpoint.
    """
    architecture = ""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # loading says what is wrong
        architecture = str(json.loads((Path(model) / "config.json").read_text())["architectures"][0])
    is_classifier = architecture.endswith("ForSequenceClassification")
    if runner == "generate" and convert in ("embed", "classify"):
        raise ValueError(f"--convert {convert} contradicts --runner generate: leave one of them out.")
    if convert == "classify" and architecture and not is_classifier:
        raise ValueError(
            f"--convert classify needs a checkpoint for sequence classification, but {model} has {architecture}."
        )
    if runner == "generate" and is_classifier:
        raise ValueError(f"--runner generate is not possible: {model} has {architecture}, which writes no text.")
    if convert in ("embed", "classify"):
        return "embed" if convert == "embed" else "classify"
    if runner == "generate":
        return "generate"
    if is_classifier:
        return "classify"
    has_no_head = architecture.endswith("Model")
    if convert == "none" and runner == "pooling" and not has_no_head:
        raise ValueError(
            f"--runner pooling --convert none is not possible: {model} is no classifier. Give another one."
        )
    return "embed" if runner == "pooling" or has_no_head else "generate"


def make_engine(settings: EngineSettings, say: Callable[[str], None]) -> tuple[Engine, dict[str, Any]]:
    """Load a checkpoint, and make an engine for it.

    Args:
        settings: The operator's settings.
        say: Called with what is about to happen, in words.

    Returns:
        The engine, and the fields of `SamplingParams` that the checkpoint's `generation_config.json` sets.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: A setting or the checkpoint does not fit.
    """
    say("importing torch")
    from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
    from llama_te_core.compat.transformer_engine import make_recipe

    from ..engine.engine import Engine

    say("loading the weights")
    options: dict[str, Any] = {}
    if settings.fp8_recipe is not None:
        place, fields = _place_of(settings)
        content, _ = NVLlamaConfig.get_config_dict(place, **fields)
        options["fp8_recipe"] = make_recipe(FP8_RECIPES[settings.fp8_recipe])
        options["layer_precision"] = ["fp8"] * content["num_hidden_layers"]
    model = _load_model(NVLlamaForCausalLM, settings, **options)
    say("making the engine")
    engine = Engine(
        model,
        load_tokenizer(settings),
        max_batch_size=settings.max_batch_size,
        max_sequence_length=settings.max_sequence_length,
        page_size=settings.page_size,
        total_num_pages=settings.total_num_pages,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        prefill_budget=settings.prefill_budget,
        prefix_caching=settings.prefix_caching,
        kv_cache_dtype=settings.kv_cache_dtype,
    )
    if model.device.type == "cuda":
        say("warming up")
        engine.warm_up()
    config = model.generation_config
    return engine, {name: value for name in _SAMPLING_FIELDS if (value := getattr(config, name, None)) is not None}


def make_pooling_engine(
    settings: EngineSettings, task: Task, max_requests: int | None, say: Callable[[str], None]
) -> PoolingEngine:
    """Load a checkpoint, and make an engine for its embeddings or classes.

    Args:
        settings: The operator's settings.
        task: "embed" or "classify".
        max_requests: As in `PoolingEngine`.
        say: Called with what is about to happen, in words.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: A setting or the checkpoint does not fit.
    """
    say("importing torch")
    from llama_te_core import NVLlamaForSequenceClassification, NVLlamaModel

    from ..engine.pooling import PoolingEngine

    say("loading the weights")
    model = _load_model(NVLlamaModel if task == "embed" else NVLlamaForSequenceClassification, settings)
    return PoolingEngine(
        model,
        load_tokenizer(settings),
        max_sequence_length=settings.max_sequence_length,
        max_batch_tokens=settings.prefill_budget,
        max_requests=max_requests,
    )


def _load_model(model_class: Any, settings: EngineSettings, **options: Any) -> Any:
    """Load the weights of a checkpoint, in evaluation mode, on the settings' device or else a GPU if there is one.

    Args:
        model_class: The class of the model.
        settings: The operator's settings.
        options: Further ones of `from_pretrained`.
    """
    import torch

    place, fields = _place_of(settings)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model_class.from_pretrained(place, dtype=settings.dtype, device_map=device, **fields, **options).eval()


def load_weights(checkpoint: str) -> Any:
    """Load a checkpoint of any kind that MODEL may be, on the CPU.

    Returns:
        An `NVLlamaForCausalLM` in the checkpoint's dtype.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: It does not fit.
    """
    from llama_te_core import NVLlamaForCausalLM

    check_source(checkpoint, "checkpoint")
    # The model into which the weights go has its own precision.
    plain = {"layer_implementation": "reference", "layer_precision": None, "use_quantized_model_init": False}
    return _load_model(NVLlamaForCausalLM, EngineSettings(checkpoint, device="cpu"), **plain)


def load_tokenizer(settings: EngineSettings) -> Any:
    """Return the tokenizer of a checkpoint, or the one that the settings name.

    Raises:
        ValueError: Its files are damaged, or there are none.
    """
    from llama_te_core.data.tokenizer_files import load_tokenizer

    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    place, fields = _place_of(settings)
    return load_tokenizer(place, **fields)


def _place_of(settings: EngineSettings) -> tuple[str | Path, dict[str, Any]]:
    """Return the folder or hub id of a checkpoint, and what `from_pretrained` needs to find it there."""
    check_source(settings.model)
    fields: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
    path = Path(settings.model)
    if path.is_file():
        return path.parent, {"gguf_file": path.name, **fields}
    return settings.model, fields
