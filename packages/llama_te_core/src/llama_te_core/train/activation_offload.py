"""Layers that keep their activations in the host's memory between the forward and the backward pass."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.autograd.graph import save_on_cpu

from ..layers.backend import is_transformer_engine
from ..models.modeling_nvllama import NVLlamaForCausalLM
from ..precision.plan import transformer_engine


class _Forward(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


def offload_activations(model: NVLlamaForCausalLM, layers: int) -> None:
    """Have the first layers keep their activations in the host's memory: less of the GPU's, for copies to and fro.

    Transformer Engine copies large activations, and no weights, while other layers compute. Reference layers wait for
    each copy, and take their weights along.

    Args:
        model: It is changed; call this before `parallelize`, so that what gathers weights stays around the layers.
        layers: So many first ones, fewer than there are.
    """
    if not layers:
        return
    every = list(model.model.layers)
    if not is_transformer_engine(every[0]):
        for layer in every[:layers]:
            layer.forward = functools.partial(_forward_on_host, layer.forward)
        return
    context, synchronize = transformer_engine().get_cpu_offload_context(
        enabled=True, num_layers=layers, model_layers=len(every)
    )
    for layer in every:  # all of them, since the context counts: copies go on while the others compute
        layer.forward = functools.partial(_forward_with_context, layer.forward, context, synchronize)


def _forward_on_host(forward: _Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
    with save_on_cpu(pin_memory=True):
        return forward(*args, **kwargs)


def _forward_with_context(
    forward: _Forward, context: AbstractContextManager[Any], synchronize: _Forward, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if not torch.is_grad_enabled():  # nothing is kept, and `synchronize` refuses what has no gradient
        return forward(*args, **kwargs)
    with context:
        output = forward(*args, **kwargs)
    return synchronize(output)
