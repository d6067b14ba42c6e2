"""LoRA by PEFT on the decoder layers.

A layer's modules compute a norm and products together, so PEFT could adapt a norm with a product, or a whole MLP alone.
Instead PEFT adapts weights here, in two ways. A layer of either implementation computes with W + scale·B·A (or DoRA's
weight), and merging changes nothing.

1. `target_modules` names projections as on transformers' Llama: "q_proj", "gate_proj", "all-linear", or nothing at all
   for PEFT's default. Adapters have the names and the shapes of adapters for transformers' Llama, so one file serves
   both. `with_projections` lets PEFT find the projections.
2. `target_parameters` names fused weights, such as `WEIGHTS`: see `on_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor

from .compat import peft
from .compat.torch import forward_hooks
from .compat.transformer_engine import is_quantized
from .layers.projections import PROJECTIONS, LayerProjections, Projection
from .models.decoder import NVLlamaModel

WEIGHTS = (
    "self_attention.layernorm_qkv.weight",
    "self_attention.proj.weight",
    "layernorm_mlp.fc1_weight",
    "layernorm_mlp.fc2_weight",
)

# Other initialisations change the base weights too, but PEFT saves the adapter for the original ones.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def on_weights(config: LoraConfig) -> LoraConfig:
    """Complete a configuration that names fused weights of the decoder layers.

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
    _check_initialisation(config)
    peft.set_wrapper_factory(config, _adapt)
    return config


@contextmanager
def with_projections(model: nn.Module, config: Any) -> Iterator[None]:
    """Show PEFT the projections of a model's decoder layers while it adds an adapter.

    PEFT enters this context by whatever way an adapter is added: see `compat.peft_injection`.

    Args:
        model: Any model; one of another package stays as it is.
        config: The adapter's configuration.

    Raises:
        ValueError: The layers cannot compute such an adapter.
    """
    decoder = next((module for module in model.modules() if isinstance(module, NVLlamaModel)), None)
    if decoder is None:
        with nullcontext():
            yield
        return
    if not isinstance(config, LoraConfig):
        _refuse_projections(config)
        yield
        return
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = peft.default_targets("llama")
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == peft.ALL_LINEAR:
        config.target_modules = set(PROJECTIONS)
    peft.set_wrapper_factory(config, _adapt)
    projections = [_projections_of(layer, decoder.config) for layer in decoder.layers]
    for each in projections:
        each.show()
    others: list[nn.Module] = []
    try:
        yield
    finally:
        for each in projections:
            others += each.hide()
    for other in others:
        if not isinstance(other, AdaptedProjection):
            raise ValueError(
                f"{type(config).__name__} makes {type(other).__name__} of a projection, which the decoder layers "
                "cannot compute: use LoraConfig."
            )


def _projections_of(layer: nn.Module, config: Any) -> LayerProjections:
    own: Any = layer
    if not hasattr(layer, "projections"):
        own.projections = LayerProjections(layer, config, _weight_of)
    projections: LayerProjections = own.projections
    return projections


def _refuse_projections(config: Any) -> None:
    """Refuse adapters other than LoRA of projections: PEFT would not find them, or adapt a few other modules."""
    targets = getattr(config, "target_modules", ()) or ()
    names = [targets] if isinstance(targets, str) else list(targets)
    if any(name.lower() == peft.ALL_LINEAR or name.endswith(PROJECTIONS) for name in names):
        raise ValueError(
            f"{type(config).__name__} with target_modules={targets!r} is not supported: the decoder layers fuse these "
            "projections into four weights, which LoraConfig alone can adapt (plain LoRA and DoRA)."
        )


def _check_initialisation(config: LoraConfig) -> None:
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported, since it changes the weights under "
            f"the adapter: use one of {', '.join(map(repr, _INITIALISATIONS))}."
        )


class AdaptedProjection(peft.LoraLinear):
    """PEFT's LoRA of one projection. The decoder layer reads its weight and never calls it."""

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; see PEFT.

        Raises:
            ValueError: The configuration asks for something that a weight cannot express.
        """
        _check_initialisation(config)
        if config.lora_dropout and not config.inference_mode:
            raise ValueError(
                f"lora_dropout={config.lora_dropout} is not supported in training, since the layers compute with the "
                "sum of weight and adapter: use lora_dropout=0. Loading a trained adapter for inference works."
            )
        if config.lora_bias:
            raise ValueError("lora_bias=True is not supported: the layers have no biases.")
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        variant = peft.unknown_variant(self, adapter_name)
        if variant is not None:
            raise ValueError(f"{variant} is not supported: use plain LoRA or use_dora=True.")

    def adapted_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with all active adapters; the same object where none is active.

        Args:
            weight: The projection's own weight [n, E].

        Raises:
            RuntimeError: `adapter_names` was given for this forward pass, or the weights are split over processes.
        """
        if isinstance(weight, DTensor):
            raise RuntimeError("an adapter of projections does not work on tensor ranks: merge it before splitting.")
        if forward_hooks(self):
            raise RuntimeError(
                "adapter_names chooses an adapter for each row, but the layers compute all rows with the same weight: "
                "call the model once for each adapter, with set_adapter."
            )
        if self.disable_adapters or self.merged:
            return weight
        total = weight
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            delta = self.get_delta_weight(name)
            total = total + delta
            if self.use_dora[name]:
                # As in PEFT, the norm leaves other adapters out, and is a constant in the backward pass.
                factor = self.lora_magnitude_vector[name].weight / (weight + delta).norm(dim=1).detach()
                total = factor[:, None] * total
        return total if total is weight else total.to(weight.dtype)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into the fused weight; see PEFT."""
        with self.get_base_layer().editing():
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Take merged adapters out of the fused weight again; see PEFT."""
        with self.get_base_layer().editing():
            super().unmerge()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; see PEFT. Switching off takes merged adapters out at once."""
        super().enable_adapters(enabled)
        if not enabled and self.merged:
            self.unmerge()


def _weight_of(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    assert isinstance(module, AdaptedProjection)
    return module.adapted_weight(weight)


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


def _adapt(
    module: nn.Module, adapter_name: str, *, parameter_name: str | None = None, **arguments: Any
) -> nn.Module | None:
    """Return the wrapper for a parameter or a projection; `None` leaves any other module to PEFT."""
    if isinstance(module, Projection):
        _refuse_quantized(module.fused.parameter, module.fused.name, module.fused.owner)
        return AdaptedProjection(module, adapter_name, **arguments)
    if parameter_name is None:
        return None
    adapted = ParamWrapper(module, adapter_name, parameter_name=parameter_name, **arguments)
    _refuse_quantized(adapted.get_param(), parameter_name, adapted.get_base_layer())
    return adapted


def _refuse_quantized(parameter: torch.Tensor, name: str, owner: nn.Module) -> None:
    if is_quantized(parameter):
        raise ValueError(
            f"{name} of {type(owner).__name__} is held in a quantized format only, "
            "to which an adapter cannot add anything: load the model with use_quantized_model_init=False. Its layers "
            "still compute in FP8."
        )
