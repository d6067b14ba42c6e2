"""The moment at which PEFT adds an adapter to a model. Checked against PEFT 0.21.

This module is apart from `compat.peft`, since it is imported whenever someone imports PEFT, which `compat.peft` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


def around_injection(context: Callable[[nn.Module, Any], AbstractContextManager[None]]) -> None:
    """Enter a context of the model and the adapter's configuration whenever PEFT adds an adapter to a model.

    All of PEFT's and transformers' ways to add one call the method that this function wraps.
    """
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with context(model, self.peft_config[adapter_name]):
            inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter
