"""LoRA by PEFT on the weights of the decoder layers.

The layers compute norms and products in one: what PEFT's `target_modules` would adapt is a norm with a product, or a
whole MLP. Its `target_parameters` adapt weights: a layer computes with W + scale·B·A, in either implementation, and
merging changes nothing.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer
from torch import nn

WEIGHTS = (
    "self_attention.layernorm_qkv.weight",
    "self_attention.proj.weight",
    "layernorm_mlp.fc1_weight",
    "layernorm_mlp.fc2_weight",
)

# Others change the weights underneath too, which are then no longer those that the adapter is saved for.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def on_weights(config: LoraConfig) -> LoraConfig:
    """Have PEFT adapt weights of the decoder layers; for `get_peft_model` and `PeftModel.from_pretrained`.

    PEFT knows modules of Transformer Engine, and adapts the module where a weight of it is asked for: B·A would be
    applied to what goes into the norm, which cannot be merged. A configuration that went through here does as it says.
    That is no part of what is saved, so it takes this when it is loaded, too.

    Args:
        config: Of any rank; `target_parameters` names weights of the layers by the ends of their names, all of
            `WEIGHTS` where neither they nor `target_modules` are given.

    Returns:
        `config` itself.

    Raises:
        ValueError: `target_modules` or `init_lora_weights` is something that these layers have no adapter for.
    """
    if config.target_modules is None and not config.target_parameters:
        config.target_parameters = list(WEIGHTS)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported, since it changes the weights that the "
            f"adapter is for: use one of {', '.join(map(repr, _INITIALISATIONS))}."
        )
    config._register_custom_module({nn.Module: _adapt_weight})  # which it calls
    return config


def _of_base_layer(name: str) -> property:
    return property(
        lambda wrapper: getattr(wrapper.base_layer, name),
        lambda wrapper, value: setattr(wrapper.base_layer, name, value),
    )


class ParamWrapper(layer.ParamWrapper):
    """PEFT's own wrapper, with what Transformer Engine's attention asks its projections for, and tells them.

    PEFT knows its wrappers by the name of their class.
    """

    name = _of_base_layer("name")
    output_quantizer_role = _of_base_layer("output_quantizer_role")
    grad_input_quantizer_role = _of_base_layer("grad_input_quantizer_role")


def _adapt_weight(
    module: nn.Module, adapter_name: str, *, parameter_name: str | None = None, **arguments: Any
) -> nn.Module | None:
    """The wrapper for a parameter; `None` leaves a whole module to PEFT."""
    if parameter_name is None:
        return None
    adapted = ParamWrapper(module, adapter_name, parameter_name=parameter_name, **arguments)
    if type(adapted.get_param()).__module__.startswith("transformer_engine"):
        raise ValueError(
            f"{parameter_name} of {type(adapted.get_base_layer()).__name__} is held in a quantized format only, which "
            "nothing can be added to: load the model with use_quantized_model_init=False. Its layers compute in FP8 "
            "all the same."
        )
    return adapted
