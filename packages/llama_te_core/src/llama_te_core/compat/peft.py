"""Names of PEFT that its documentation does not promise. Checked against PEFT 0.21."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer
from torch import nn

# PEFT's wrapper of a module of which it adapts one parameter (`target_parameters`).
ParamWrapper: Any = layer.ParamWrapper


def set_wrapper_factory(config: LoraConfig, factory: Callable[..., nn.Module | None]) -> None:
    """Let PEFT ask a function for the wrapper of each module that it adapts.

    Args:
        config: PEFT does not save this part of it.
        factory: Called with the module, the adapter's name and further arguments, `parameter_name` among them. `None`
            leaves the module to PEFT.
    """
    config._register_custom_module({nn.Module: factory})
