"""AdamW of a model's weights, and the FP32 weights that it keeps of those that exist in FP8 only.

The steps of AdamW are far smaller than the distance between two numbers of FP8: added to FP8 weights, they would be
lost. So the optimizer has each such weight in FP32 too, changes that, and rounds the FP8 one from it after each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..layers.backend import is_transformer_engine
from ..models.modeling_nvllama import NVLlamaForCausalLM
from ..parallel.tensor import local_part
from ..precision.plan import transformer_engine
from .config import OptimizerConfig

# What Transformer Engine calls the FP32 weight in the optimizer's state of a parameter.
MASTER = "master_param"


def make_optimizer(model: NVLlamaForCausalLM, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW of a model's parameters; norms' weights do not decay.

    Of a model without quantized weights it is torch's, fused on a GPU. Otherwise it is Transformer Engine's, with FP32
    weights and states, split as the weights are. They begin with what `set_value` was given, where it was called. From
    then on the model's state dict has the FP32 weights in place of the quantized ones, and what is loaded into it is
    quantized.

    Args:
        model: With its weights; split or not.
        config: Rates and decays.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    quantized = set(quantized_parameters(model))
    if not quantized:
        return torch.optim.AdamW(groups, **options, fused=parameters[0].device.type == "cuda")
    optimizer: Any = transformer_engine().optimizers.FusedAdam(groups, **options, master_weights=True)
    for parameter in parameters:
        optimizer.initialize_state(parameter, store_param_remainders=False)
        if parameter not in quantized:
            if parameter.dtype == torch.float32:
                del optimizer.state[parameter][MASTER]  # it needs no second one
        elif hasattr(parameter, "value_before_rounding"):
            optimizer.set_scaled_state(parameter, MASTER, parameter.value_before_rounding)
            del parameter.value_before_rounding

    def show_masters(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            if MASTER in state:
                state_dict[prefix + name] = state[MASTER]

    model.register_state_dict_post_hook(show_masters)
    result: torch.optim.Optimizer = optimizer
    return result


@torch.no_grad()
def quantized_parameters(model: NVLlamaForCausalLM) -> list[nn.Parameter]:
    """Those that exist in a quantized format only; all processes have the same ones, or their parts of them."""
    if not model.config.use_quantized_model_init or not any(map(is_transformer_engine, model.model.layers)):
        return []
    from ..layers.te import is_quantized

    return [parameter for parameter in model.parameters() if is_quantized(local_part(parameter))]


@torch.no_grad()
def scale_parts_as_one(model: NVLlamaForCausalLM) -> None:
    """Round the parts of each quantized weight with one scale, whatever is copied into them from now on.

    A process that gathers the parts takes the scale of its own for all of them. Current scaling has it from the largest
    value, which the processes then look for together. Transformer Engine sees to that when FSDP gathers for the first
    time, which is too late for the values that training begins with.

    Args:
        model: After `parallelize`, with memory.
    """
    for parameter in quantized_parameters(model):
        part: Any = local_part(parameter)
        if isinstance(parameter, DTensor):
            part.amax_reduction_group = parameter.device_mesh.get_group("shard")


@torch.no_grad()
def set_value(parameter: nn.Parameter, value: torch.Tensor, quantized: bool) -> None:
    """Give a parameter the value that training begins with.

    Args:
        parameter: Split or not.
        value: All of it, or this process's part.
        quantized: Whether it is one of `quantized_parameters`, which round the value: the parameter then has the FP32
            one as an attribute, until `make_optimizer` takes it.
    """
    local_part(parameter).copy_(value)
    if quantized:
        kept: Any = parameter
        kept.value_before_rounding = value.to(torch.float32, copy=True)  # the value can be a view of the whole
