"""The decoder layer on Transformer Engine. Importing this module imports Transformer Engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformer_engine.pytorch as te
from torch import nn

if TYPE_CHECKING:
    from .configuration_nvllama import NVLlamaConfig


def build_transformer_engine_layer(config: NVLlamaConfig, layer_number: int, softmax_scale: float) -> nn.Module:
    """A `te.TransformerLayer` with the sizes of `config`, in torch's default dtype and on its default device.

    Args:
        config: Sizes of the model.
        layer_number: Number of the layer, from 1, as TE counts.
        softmax_scale: What attention multiplies query·key by.

    Raises:
        RuntimeError: `use_quantized_model_init` on a device that holds no quantized weights.
    """
    device = torch.get_default_device()
    if config.use_quantized_model_init and device.type not in ("cuda", "meta"):
        raise RuntimeError(
            f"use_quantized_model_init=True needs the model to be built on a GPU, but the default device is {device}: "
            "build it under `with torch.device('cuda')`, or under 'meta' followed by init_empty_weights()."
        )

    def initialize(weight: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(weight, std=config.initializer_range)

    layer = te.TransformerLayer(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_gqa_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=float(config.attention_dropout or 0.0),
        layer_number=layer_number,
        attn_input_format=config.attn_input_format,
        self_attn_mask_type=config.self_attn_mask_type,
        normalization="RMSNorm",
        activation="swiglu",
        bias=False,
        fuse_qkv_params=True,
        qkv_weight_interleaved=True,
        init_method=initialize,
        output_layer_init_method=initialize,
        params_dtype=torch.get_default_dtype(),
        device=device,
    )
    # TransformerLayer has no argument for it; TE's own default is head_dim**-0.5.
    for module in layer.self_attention.core_attention.modules():
        if hasattr(module, "softmax_scale"):
            module.softmax_scale = softmax_scale
    _hide_extra_state(layer)
    return layer


def checkpoint(layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run `layer` without keeping its activations; TE's version, which also restores the state of FP8 scaling."""
    output: torch.Tensor = te.checkpoint(layer, *args, use_reentrant=False, **kwargs)
    return output


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a parameter is held in one of TE's quantized formats only."""
    return isinstance(parameter, te.QuantizedTensor)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in an ordinary dtype."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def quantize_loaded_weights(model: nn.Module) -> None:
    """Quantize the weights of layers that were built under `te.quantized_model_init`, from the values they hold.

    Loading a checkpoint replaces the quantized parameters by ordinary ones. TE quantizes what it initialises, so this
    has it initialise every weight with the value that is there.

    Raises:
        RuntimeError: The weights are not on a GPU.
    """
    module: Any  # of TE's own base class
    for module in model.modules():
        if not getattr(module, "primary_weights_in_fp8", False):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != "cuda":
                raise RuntimeError(
                    f"use_quantized_model_init=True, but {name} is on {parameter.device}: weights are quantized on a "
                    "GPU, so load the model there (device_map='cuda')."
                )
        initialisers = {name: meta.init_fn for name, meta in module.param_init_meta.items()}
        for meta in module.param_init_meta.values():
            meta.init_fn = _leave_as_it_is
        module.reset_parameters()
        for name, init_fn in initialisers.items():
            module.param_init_meta[name].init_fn = init_fn


def _leave_as_it_is(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _hide_extra_state(layer: nn.Module) -> None:
    """Keep TE's `_extra_state` entries out of the layer's state dict, and do not miss them when one is loaded.

    They hold the scales of FP8, which the first steps find again; a checkpoint without them fits either
    implementation of the layer.
    """

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith("_extra_state")]:
            del state_dict[key]

    def do_not_miss(module: nn.Module, incompatible_keys: Any) -> None:
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not key.endswith("_extra_state")]

    layer.register_state_dict_post_hook(drop)
    layer.register_load_state_dict_post_hook(do_not_miss)
