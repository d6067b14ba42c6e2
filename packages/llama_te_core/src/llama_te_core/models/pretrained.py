"""The base class of the models: initialisation, loading and saving."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import initialization as init

from ..checkpoint_format import CHECKSUMS
from ..compat.torch import local_range
from ..compat.transformers import progress_bars_on_terminals_only
from ..layers.quantizers import QUANTIZE_OTHERWISE
from ..layers.selection import choose_backend
from .configuration_nvllama import NVLlamaConfig
from .other_layouts import converted, has_other_layout, name_source


class NVLlamaPreTrainedModel(PreTrainedModel):
    """The base of all models here: configuration, initialisation, loading and saving.

    With Transformer Engine's layers, a model is built on the current GPU in `config.dtype`, unless a context chooses
    another device or dtype: see `TransformerEngineBackend.construction_context`.

    Attributes:
        layer_backend: The implementation of the decoder layers.

    Raises:
        RuntimeError: Transformer Engine is asked for and cannot run here.
        ValueError: The configuration has a value that Llama on Transformer Engine does not know.
    """

    config_class = NVLlamaConfig
    config: NVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReferenceLayer", "TransformerLayer"]  # noqa: RUF012  (transformers' own attribute)
    _skip_keys_device_placement = ["inference_params"]  # noqa: RUF012
    # The layers compute attention, whatever transformers chooses.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _in_construction_context(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, config: NVLlamaConfig) -> None:
        super().__init__(config)
        config.check()
        self.layer_backend = choose_backend(config.layer_implementation)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding) and isinstance(module.weight, DTensor):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.padding_idx is not None:
                _clear_row(module.weight, module.padding_idx)
            return
        # transformers takes every class with "LayerNorm" in its name for a norm, and would fill its weights with ones.
        if not self.layer_backend.is_own_module(module):
            super()._init_weights(module)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "layer_norm_weight":
                init.ones_(parameter)
            elif not self.layer_backend.is_quantized(parameter):  # quantizing has initialised it
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def init_empty_weights(self, device: torch.device | str | None = None) -> None:
        """Give a model that was built on the meta device memory and fresh random weights.

        This works after FSDP2's `fully_shard`: each process then allocates its shard alone.

        Args:
            device: The device of the weights; the current GPU by default, the CPU where there is none.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        for module in self.modules():
            own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
            if not any(tensor.is_meta for tensor in own):
                continue
            if not self.layer_backend.initialize_quantized(module):
                module.to_empty(device=device, recurse=False)
                self._init_weights(module)
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint. The arguments are the same as in transformers.

        Where llama-te-convert is installed, this also loads a Hugging Face Llama or Mistral, and the GGUF file of a
        Llama: they are converted while loading. The CPU's memory then holds all tensors of the checkpoint. Arguments
        without effect on such a checkpoint are refused.

        Args:
            pretrained_model_name_or_path: A folder, the id of a repository on the hub, or a GGUF file.
            *args: See `PreTrainedModel.from_pretrained`.
            **kwargs: See there.

        Raises:
            RuntimeError: The checkpoint has another layout, and llama-te-convert is not installed.
            ValueError: The checkpoint lacks tensors of the decoder, or cannot be converted. Or an argument has no
                effect, or asks transformers to split or to quantize the model by modules that these layers lack.
        """
        _refuse_changes_by_transformers(kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        source = pretrained_model_name_or_path
        with progress_bars_on_terminals_only():
            if has_other_layout(source, kwargs) and (of_converted := converted(source, kwargs)) is not None:
                model, info = super().from_pretrained(None, *args, output_loading_info=True, **of_converted)
                name_source(model, source)
            else:
                model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        decoder = "" if model.base_model is model else f"{cls.base_model_prefix}."
        missing = sorted(key for key in info["missing_keys"] if key.startswith(decoder))
        if missing:
            unexpected = sorted(info["unexpected_keys"], key=lambda key: ("layers." not in key, key))
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} lacks {len(missing)} tensors of the decoder, such as "
                f"{missing[0]!r}"
                + (f", and has others, such as {unexpected[0]!r}" if unexpected else "")
                + ". It belongs to another model, or is not complete."
            )
        model.quantize_loaded_weights()
        return (model, info) if with_info else model

    def quantize_loaded_weights(self) -> None:
        """Quantize loaded weights of modules that were built to hold quantized weights.

        `config.use_quantized_model_init` builds such modules, and so does `te.quantized_model_init`. `from_pretrained`
        calls this itself.

        Raises:
            RuntimeError: The weights are not on a GPU.
        """
        self.layer_backend.quantize_loaded_weights(self)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, with transformers' arguments. Quantized weights become weights in the model's dtype.

        Checksums of other files that a conversion has left in the folder are removed.
        """
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = self.layer_backend.dense_state_dict(self)
        if os.path.isdir(save_directory):
            Path(save_directory, CHECKSUMS).unlink(missing_ok=True)
        with progress_bars_on_terminals_only():
            super().save_pretrained(save_directory, *args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter into the model, with transformers' arguments.

        Raises:
            ValueError: transformers leaves weights of the adapter as they were initialised: DoRA's, in 5.17.
        """
        info = super().load_adapter(*args, **kwargs)
        if info.missing_keys:
            raise ValueError(
                f"load_adapter did not load {len(info.missing_keys)} weights of the adapter, such as "
                f"{min(info.missing_keys)!r}: load it with peft.PeftModel.from_pretrained(model, ...)."
            )
        return info

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: a checkpoint's `auto_map` points at the installed package, so no source is copied."""


def _in_construction_context(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor build its modules where the layers want them, a model's heads and embeddings included."""

    @functools.wraps(init)
    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        dtype = getattr(config, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        backend = choose_backend(getattr(config, "layer_implementation", "auto"))
        with backend.construction_context(dtype):
            init(self, config, *args, **kwargs)

    return construct


def _refuse_changes_by_transformers(arguments: dict[str, Any]) -> None:
    """Refuse arguments of `from_pretrained` with which transformers looks for the modules of its own Llama."""
    for name in ("tp_plan", "tp_size", "device_mesh", "distributed_config"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name}={arguments[name]!r} is not supported: transformers' plan names modules that the decoder "
                "layers do not have. Load the model without it, then split it with "
                "llama_te_core.parallel.parallelize.parallelize(model, mesh), in processes that torchrun started."
            )
    for name in ("quantization_config", "load_in_8bit", "load_in_4bit"):
        value = arguments.get(name) or getattr(arguments.get("config"), name, None)
        if value:
            raise ValueError(f"{name}={value!r} is not supported: {QUANTIZE_OTHERWISE}")


def _clear_row(weight: DTensor, row: int) -> None:
    """Fill one row of a matrix with zeros. Processes share the matrix by rows; the owner of the row writes.

    `weight[row]` would not do: some versions of torch refuse it where two dimensions of the mesh share the rows.
    """
    part = weight.to_local()
    _, offset = local_range(weight, weight)
    if 0 <= row - offset[0] < part.shape[0]:
        part[row - offset[0]].zero_()
