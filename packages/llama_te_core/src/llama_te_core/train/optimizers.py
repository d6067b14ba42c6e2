"""AdamW of a model's weights, with FP32 weights in place of those that exist in FP8 only.

The steps of AdamW are far smaller than the distance between two numbers of FP8: FP8 weights would lose them. So the
optimizer keeps each such weight in FP32 too, updates that, and rounds the FP8 weight from it after each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat.transformer_engine import MASTER_WEIGHT
from ..layers.collectives import local_part
from ..models.causal_lm import NVLlamaForCausalLM
from .config import OptimizerConfig


def make_optimizer(model: NVLlamaForCausalLM, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make AdamW of a model's parameters; norms' weights do not decay.

    Without quantized weights it is torch's, fused on a GPU. Otherwise it is Transformer Engine's, with FP32 weights and
    states, split as the weights are. The FP32 weights begin with the values that `set_value` got, where it was called.
    From then on the model's state dict has the FP32 weights in place of the quantized ones, and loading it quantizes
    them.

    Args:
        model: With its weights; split or not.
        config: Rates and decays.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    first_values = {each: each.value_before_rounding for each in parameters if hasattr(each, "value_before_rounding")}
    optimizer = model.layer_backend.make_adamw(groups, options, first_values)
    for parameter in first_values:
        del parameter.value_before_rounding

    def show_masters(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            if MASTER_WEIGHT in state:
                state_dict[prefix + name] = state[MASTER_WEIGHT]

    if quantized_parameters(model):
        model.register_state_dict_post_hook(show_masters)
    return optimizer


def quantized_parameters(model: NVLlamaForCausalLM) -> list[nn.Parameter]:
    """Return the parameters that exist in a quantized format only.

    All processes get the same ones, or their parts of them.
    """
    return model.layer_backend.quantized_parameters(model) if model.config.use_quantized_model_init else []


@torch.no_grad()
def scale_parts_as_one(model: NVLlamaForCausalLM) -> None:
    """Let processes round their parts of each quantized weight with one scale, from now on.

    A process that gathers the parts uses its own scale for all of them. Current scaling takes the scale from the
    largest value, for which the processes must look together. Transformer Engine arranges that when FSDP gathers for
    the first time, which is too late for the values that training begins with.

    Args:
        model: After `parallelize`, with memory.
    """
    for parameter in quantized_parameters(model):
        if isinstance(parameter, DTensor):
            model.layer_backend.share_scale(parameter, parameter.device_mesh.get_group("shard"))


@torch.no_grad()
def set_value(parameter: nn.Parameter, value: torch.Tensor, quantized: bool) -> None:
    """Set the value that a parameter begins training with.

    Args:
        parameter: Split or not.
        value: The whole value, or this process's part.
        quantized: Whether it is one of `quantized_parameters`, which round the value. The parameter then keeps the FP32
            value as an attribute until `make_optimizer` takes it.
    """
    local_part(parameter).copy_(value)
    if quantized:
        kept: Any = parameter
        kept.value_before_rounding = value.to(torch.float32, copy=True)  # the value can be a view of the whole
