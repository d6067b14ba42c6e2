"""LoRA by PEFT on the weights of the decoder layers.

A layer's modules compute a norm and products together, so PEFT's `target_modules` would adapt a norm with a product, or
a whole MLP. PEFT's `target_parameters` adapt single weights: a layer of either implementation computes with
W + scale·B·A, and merging changes nothing.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn

from .compat import peft
from .compat.transformer_engine import is_quantized

WEIGHTS = (
    "self_attention.layernorm_qkv.weight",
    "self_attention.proj.weight",
    "layernorm_mlp.fc1_weight",
    "layernorm_mlp.fc2_weight",
)

# Other initialisations change the base weights too, but PEFT saves the adapter for the original ones.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def on_weights(config: LoraConfig) -> LoraConfig:
    """Let PEFT adapt weights of the decoder layers, in `get_peft_model` and `PeftModel.from_pretrained`.

    PEFT knows modules of Transformer Engine. If a configuration names a weight, PEFT adapts the whole module: it
    applies B·A to the norm's input, and such an adapter cannot merge. After this call PEFT adapts the weight. PEFT does
    not save this setting, so call this function before loading too.

    Args:
        config: A configuration of any rank. `target_parameters` names weights of the layers by the ends of their names.
            Without `target_parameters` and `target_modules` the adapter covers all of `WEIGHTS`.

    Returns:
        `config` itself.

    Raises:
        ValueError: These layers have no adapter for `init_lora_weights`.
    """
    if config.target_modules is None and not config.target_parameters:
        config.target_parameters = list(WEIGHTS)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported, since it changes the weights under "
            f"the adapter: use one of {', '.join(map(repr, _INITIALISATIONS))}."
        )
    peft.set_wrapper_factory(config, _adapt_weight)
    return config


def _of_base_layer(name: str) -> property:
    return property(
        lambda wrapper: getattr(wrapper.base_layer, name),
        lambda wrapper, value: setattr(wrapper.base_layer, name, value),
    )


class ParamWrapper(peft.ParamWrapper):
    """PEFT's wrapper, with the attributes that Transformer Engine's attention reads and sets on its projections.

    The class keeps PEFT's name, since PEFT recognises its wrappers by the class name.
    """

    name = _of_base_layer("name")
    output_quantizer_role = _of_base_layer("output_quantizer_role")
    grad_input_quantizer_role = _of_base_layer("grad_input_quantizer_role")


def _adapt_weight(
    module: nn.Module, adapter_name: str, *, parameter_name: str | None = None, **arguments: Any
) -> nn.Module | None:
    """Return the wrapper for a parameter; `None` leaves a whole module to PEFT."""
    if parameter_name is None:
        return None
    adapted = ParamWrapper(module, adapter_name, parameter_name=parameter_name, **arguments)
    if is_quantized(adapted.get_param()):
        raise ValueError(
            f"{parameter_name} of {type(adapted.get_base_layer()).__name__} is held in a quantized format only, "
            "to which an adapter cannot add anything: load the model with use_quantized_model_init=False. Its layers "
            "still compute in FP8."
        )
    return adapted
