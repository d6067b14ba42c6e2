"""Calibrates, saves and loads the state of delayed scaling.

Delayed scaling scales a tensor by the largest values of earlier steps. Each module of Transformer Engine keeps these
values and the scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..compat.transformer_engine import delayed_scaling_state, set_delayed_scaling_state


def calibrate(model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """Let layers with delayed scaling learn their scales from examples, for inference.

    Delayed scaling scales activations by their largest values in earlier passes. Training records these values; a
    model that was never trained in FP8 has scales of 1. This function runs each batch through the model with gradients
    enabled, since TE records activations only then. The last `amax_history_len` (see the recipe) batches count. Weights
    stay as they are.

    Args:
        model: A model of this package on a GPU.
        batches: Arguments of the model's forward pass, with texts similar to the later ones.

    Raises:
        ValueError: No layer has delayed scaling, or there is no batch.
    """
    plan = next((module.precision for module in model.modules() if hasattr(module, "precision")), None)
    if plan is None or not plan.has_delayed_scaling():
        raise ValueError(
            "no layer of the model has delayed scaling, the only one with scales to learn: set layer_precision and "
            "pass fp8_recipe=DelayedScaling(), or leave calibrate out."
        )
    count = 0
    with torch.enable_grad():
        for batch in batches:
            model(**batch)
            count += 1
    if count == 0:
        raise ValueError("batches is empty: pass one batch at least, better as many as amax_history_len.")


def scaling_state(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Copy the state of delayed scaling to the host.

    A model's state dict leaves this state out, since released checkpoints do not need it. A resumed run needs it.

    Returns:
        The state of each module by its name. For the N tensors of the forward pass and of the backward pass, it has the
        float32 scales [N] and the largest values of earlier steps [steps, N]. Modules without delayed scaling, and
        modules that have not computed yet, are left out.
    """
    states = {name: delayed_scaling_state(module) for name, module in model.named_modules()}
    return {name: state for name, state in states.items() if state}


def set_scaling_state(model: torch.nn.Module, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Set the state that `scaling_state` returned.

    Args:
        model: A model of the same kind, on its device. Modules that `states` lacks, and modules that are not TE's, stay
            as they are. They find their scales in their first steps.
        states: The result of `scaling_state`.
    """
    for name, module in model.named_modules():
        if name in states:
            set_delayed_scaling_state(module, states[name])
