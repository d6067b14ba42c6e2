"""Layers that compute their activations anew in the backward pass, instead of keeping them."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils import checkpoint as torch_checkpoint

from ..layers.backend import is_transformer_engine
from ..models.modeling_nvllama import NVLlamaForCausalLM


def checkpoint_activations(model: NVLlamaForCausalLM, layers: Literal["none", "selective", "full"]) -> None:
    """Have layers keep their input alone: a third more work for a fraction of the memory.

    Args:
        model: It is changed; call this before `parallelize`, so that weights are gathered around the whole.
        layers: "none", every second one ("selective"), or all ("full").
    """
    chosen = {"none": slice(0), "selective": slice(None, None, 2), "full": slice(None)}[layers]
    for layer in list(model.model.layers)[chosen]:
        forward = layer.forward
        if is_transformer_engine(layer):
            from ..layers.te import checkpoint

            layer.forward = functools.partial(checkpoint, forward)
        else:
            layer.forward = functools.partial(_checkpoint, forward)


def _checkpoint(forward: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    output: torch.Tensor = torch_checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return output
