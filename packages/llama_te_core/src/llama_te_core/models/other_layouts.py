"""`from_pretrained` of checkpoints that do not have the Transformer Engine layout: they are converted while loading."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..checkpoint_format import has_te_layout
from .configuration_nvllama import NVLlamaConfig
from .conversion import conversion

# Arguments of `from_pretrained` that choose and download the files.
_HUB = ("cache_dir", "force_download", "local_files_only", "token")
_FILES = (*_HUB, "gguf_file", "revision", "subfolder", "use_safetensors", "variant", "weights_only")
# Arguments of `from_pretrained` that only reading the tensors from files of this layout can use, and their defaults.
_WITHOUT_EFFECT: dict[str, Any] = {
    "adapter_kwargs": None,
    "adapter_name": "default",
    "disable_mmap": None,
    "key_mapping": None,
    "offload_buffers": False,
    "offload_folder": None,
    "proxies": None,
}
# Other arguments of `from_pretrained`. It gives all the rest to the configuration or to the model.
_LOADING = frozenset(
    (
        "_from_auto",
        "_from_pipeline",
        "attn_implementation",
        "device_map",
        "device_mesh",
        "distributed_config",
        "dtype",
        "fusion_config",
        "generation_config",
        "ignore_mismatched_sizes",
        "kernel_config",
        "allow_all_kernels",
        "low_cpu_mem_usage",
        "max_memory",
        "output_loading_info",
        "quantization_config",
        "torch_dtype",
        "tp_plan",
        "tp_size",
        "tqdm_class",
        "trust_remote_code",
        "use_kernels",
    )
)


def has_other_layout(source: Any, arguments: dict[str, Any]) -> bool:
    """Whether a GGUF file or the `config.json` of a checkpoint says that it has another layout.

    Args:
        source: The first argument of `from_pretrained`.
        arguments: Its keyword arguments.

    Raises:
        RuntimeError: It has another layout, and llama-te-convert is not installed.
    """
    if source is None or arguments.get("state_dict") is not None:
        return False
    if arguments.get("gguf_file") or (str(source).endswith(".gguf") and os.path.isfile(source)):
        conversion(f"loading the GGUF file {arguments.get('gguf_file') or source}")
        return True
    names = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        content, _ = PreTrainedConfig.get_config_dict(
            source, **{name: arguments[name] for name in names if name in arguments}
        )
    except (OSError, ValueError):  # transformers raises it again, with its advice
        return False
    if "model_type" not in content or has_te_layout(content):
        return False
    try:
        conversion(f"loading {str(source)!r}, a checkpoint of the Hugging Face layout,")
    except RuntimeError:
        if not content.get("architectures") and content["model_type"] == "llama":
            return False  # its tensors may have this layout, as in files without the names of their classes
        raise
    return True


def converted(source: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Convert a checkpoint, and return the keyword arguments of `from_pretrained(None, ...)` that load the result.

    Args:
        source: The first argument of `from_pretrained`.
        arguments: Its keyword arguments. They keep their meaning.

    Returns:
        The new arguments; `None` if the tensors have the Transformer Engine layout already.

    Raises:
        ValueError: An argument has no effect while a checkpoint is converted, or the checkpoint does not convert.
    """
    hook = conversion(f"loading {str(source)!r}")
    loaded = hook.load_converted(
        str(source),
        gguf_file=arguments.get("gguf_file"),
        revision=arguments.get("revision"),
        subfolder=arguments.get("subfolder") or "",
        variant=arguments.get("variant"),
        allow_pickle=not arguments.get("use_safetensors"),
        hub_options={name: arguments[name] for name in _HUB if name in arguments},
    )
    if loaded is None:
        return None
    _refuse_without_effect(arguments)
    rest = {name: value for name, value in arguments.items() if name not in (*_FILES, *_WITHOUT_EFFECT, "config")}
    result = {name: rest.pop(name) for name in list(rest) if name in _LOADING}
    config = arguments.get("config")
    if isinstance(config, PreTrainedConfig):
        result |= rest
        if not isinstance(config, NVLlamaConfig):
            config = hook.te_config(config.to_dict())
    else:
        fields = loaded.config if config is None else NVLlamaConfig.from_pretrained(config)
        config, unused = NVLlamaConfig.from_dict(fields.to_dict(), return_unused_kwargs=True, **rest)
        result |= unused
    if result.get("generation_config") is None and (loaded.folder / "generation_config.json").is_file():
        result["generation_config"] = GenerationConfig.from_pretrained(loaded.folder)
    return {**result, "config": config, "state_dict": loaded.tensors}


def _refuse_without_effect(arguments: dict[str, Any]) -> None:
    given = {
        name: arguments[name] for name, default in _WITHOUT_EFFECT.items() if arguments.get(name, default) != default
    }
    for name, value in (("use_safetensors", False), ("weights_only", False)):
        if arguments.get(name) is value:
            given[name] = value
    device_map = arguments.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        given["device_map"] = device_map
    for name, value in given.items():
        raise ValueError(
            f"{name}={value!r} has no effect while a checkpoint is converted to the Transformer Engine layout: leave "
            "it out, or convert the checkpoint first (llama-te-convert to-te) and load the result."
        )


def name_source(model: Any, source: Path | str) -> None:
    """Record the checkpoint that a model was loaded from, as `from_pretrained` does."""
    model.name_or_path = model.config.name_or_path = str(source)
