"""Activation offload: layers keep their activations in the host's memory between the forward and the backward pass."""

from __future__ import annotations

from ..models.causal_lm import NVLlamaForCausalLM


def offload_activations(model: NVLlamaForCausalLM, layers: int) -> None:
    """Let the first layers keep their activations in the host's memory: less GPU memory, for copies both ways.

    Args:
        model: It is changed. Call this before `parallelize`, so that FSDP gathers weights around the layers.
        layers: The number of first layers, fewer than all.
    """
    if layers:
        model.layer_backend.offload_activations(list(model.model.layers), layers)
