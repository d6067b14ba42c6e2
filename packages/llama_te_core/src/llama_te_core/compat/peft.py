"""Names of PEFT that its documentation does not promise. Checked against PEFT 0.21."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer, variants
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

# PEFT's wrapper of a module of which it adapts one parameter (`target_parameters`).
ParamWrapper: Any = layer.ParamWrapper


# PEFT's wrapper of a linear module.
LoraLinear: Any = layer.Linear
# PEFT's name of a `target_modules` with every linear module.
ALL_LINEAR = "all-linear"


def default_targets(model_type: str) -> set[str]:
    """Return the names of the modules that PEFT adapts where `target_modules` names none."""
    return set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])


def unknown_variant(adapted: nn.Module, adapter_name: str) -> str | None:
    """Return the name of an adapter's variant of LoRA; `None` for plain LoRA and for DoRA."""
    own: Any = adapted
    variant = own.lora_variant.get(adapter_name)
    return None if variant is None or isinstance(variant, variants.DoraLinearVariant) else type(variant).__name__


def set_wrapper_factory(config: LoraConfig, factory: Callable[..., nn.Module | None]) -> None:
    """Let PEFT ask a function for the wrapper of each module that it adapts.

    Args:
        config: PEFT does not save this part of it.
        factory: Called with the module, the adapter's name and further arguments, `parameter_name` among them. `None`
            leaves the module to PEFT.
    """
    config._register_custom_module({nn.Module: factory})
