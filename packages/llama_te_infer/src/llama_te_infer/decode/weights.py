"""The weights of the model as the kernels take them.

Shapes: E hidden size, Q features of the fused projection, X features of the attention's output, F size of the MLP.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llama_te_core.compat.transformer_engine import fp8_parts


class Weight(NamedTuple):
    """A weight as the kernels take it.

    Attributes:
        values: [N, K], bfloat16 or float8_e4m3fn.
        scale: float32 [1], the factor of FP8 values.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


class LayerWeights(NamedTuple):
    """The weights of a decoder layer."""

    attention_norm_E: torch.Tensor
    qkv_QE: Weight
    proj_EX: Weight
    mlp_norm_E: torch.Tensor
    fc1_FE: Weight
    fc2_EF: Weight


LAYER_PARAMETERS = (
    "self_attention.layernorm_qkv.layer_norm_weight",
    "self_attention.layernorm_qkv.weight",
    "self_attention.proj.weight",
    "layernorm_mlp.layer_norm_weight",
    "layernorm_mlp.fc1_weight",
    "layernorm_mlp.fc2_weight",
)
"""The names of these weights in a layer of either implementation."""


def weights_of(layer: Any) -> LayerWeights | None:
    """Return the weights of a decoder layer; `None` if the kernels do not take the format of one of them."""
    attention, mlp = layer.self_attention, layer.layernorm_mlp
    products = [
        _weight(parameter)
        for parameter in (attention.layernorm_qkv.weight, attention.proj.weight, mlp.fc1_weight, mlp.fc2_weight)
    ]
    qkv, proj, fc1, fc2 = products
    if qkv is None or proj is None or fc1 is None or fc2 is None:
        return None
    return LayerWeights(
        attention.layernorm_qkv.layer_norm_weight.detach(), qkv, proj, mlp.layer_norm_weight.detach(), fc1, fc2
    )


def layer_weights(model: Any) -> list[LayerWeights]:
    """Return the weights of the layers; only of the first ones where the kernels do not take the format of a weight."""
    layers = []
    for layer in model.model.layers:
        weights = weights_of(layer)
        if weights is None:
            break
        layers.append(weights)
    return layers


def addresses_of(model: Any, layers: list[LayerWeights]) -> list[int]:
    """Return the address of each weight that a step reads: they change when weights are replaced, not when written.

    Args:
        model: An `NVLlamaForCausalLM`.
        layers: From `layer_weights`.
    """
    tensors = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    for weights in layers:
        for part in weights:
            tensors += part if isinstance(part, tuple) else [part]
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def _weight(parameter: torch.Tensor) -> Weight | None:
    if type(parameter) in (torch.Tensor, torch.nn.Parameter):
        return Weight(parameter.detach())
    parts = fp8_parts(parameter)
    return None if parts is None else Weight(*parts)
