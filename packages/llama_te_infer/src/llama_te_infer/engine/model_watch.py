"""Changes of a model between requests: weights, hooks and adapters.

Cached prefixes are valid only for the model that computed them. Reading all weights would find every change, and take
as long as a decoding step. So a watch compares what torch keeps about each tensor.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from llama_te_core.compat.torch import (
    after_each_optimizer_step,
    children_of,
    hook_numbers,
    own_tensors,
    storage_reference,
    tensor_state,
)
from llama_te_core.compat.transformer_engine import held_tensors

_watches: weakref.WeakSet[ModelWatch] = weakref.WeakSet()


class _State(NamedTuple):
    """Numbers and objects that change with the model."""

    modules: list[int]  # their identities
    tensors: list[int]  # storage, address and version of each
    extras: list[Any]  # hooks, replaced forward methods and adapters of the modules that have some


class ModelWatch:
    """Finds out whether a model has changed.

    A watch sees

    - writes in place, by the tensors' version counters: `parameter.mul_(...)`, `load_state_dict`;
    - steps of optimizers that hold one of the parameters, since fused kernels write without the counters;
    - replaced tensors, by their storage and address: `parameter.data = ...`, a new `Parameter`;
    - replaced modules and `forward` methods, and hooks;
    - PEFT's adapters: attached, removed, selected, disabled, merged or scaled.

    It cannot see writes that torch does not record: through `parameter.data` (`parameter.data.mul_(...)`), by kernels
    that take an address, and to tensors made in inference mode.

    Args:
        model: The model. The watch does not keep the memory of its tensors alive.

    Attributes:
        has_adapters: Whether PEFT has adapted the model. Then each forward pass counts as writes to adapted weights:
            call `accept` after it.
    """

    def __init__(self, model: nn.Module) -> None:
        _note_steps()
        self._model = model
        self._stepped = False  # whether an optimizer of one of the tensors has taken a step since `_record`
        self._record(*self._look())
        _watches.add(self)

    def has_changed(self) -> bool:
        """Return whether the model has changed since the last call, or since the watch began."""
        state, modules, tensors = self._look()
        # An object that is gone may have left its identity to another one.
        if state == self._state and not self._stepped and all(module() is not None for module in self._modules):
            return False
        self._record(state, modules, tensors)
        return True

    def accept(self) -> None:
        """Take the model as it is now for unchanged."""
        self._record(*self._look())

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Record that an optimizer has taken a step."""
        if not self._stepped:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._stepped = any(id(parameter) in self._tensors for parameter in parameters)

    def _record(self, state: _State, modules: list[nn.Module], tensors: list[torch.Tensor]) -> None:
        self._state = state
        self.has_adapters = any(map(_is_adapted, modules))
        self._modules = [weakref.ref(module) for module in modules]
        self._tensors = set(map(id, tensors))
        self._stepped = False
        # While these exist, no other storage has the identity of one of these storages.
        self._storages = [storage_reference(tensor) for tensor in tensors]

    def _look(self) -> tuple[_State, list[nn.Module], list[torch.Tensor]]:
        modules: list[nn.Module] = []
        tensors: list[torch.Tensor] = []
        numbers: list[int] = []
        extras: list[Any] = []
        remaining, found = [self._model], {self._model}
        while remaining:
            module = remaining.pop()
            modules.append(module)
            if extra := _extra(module):
                extras.append((len(modules), extra))
            tensors += own_tensors(module)
            for child in children_of(module):
                if child not in found:
                    found.add(child)
                    remaining.append(child)
        for tensor in tensors:  # gets longer by the tensors that hold the values of quantized ones
            numbers += tensor_state(tensor)
            if type(tensor) is not nn.Parameter:
                tensors += held_tensors(tensor)
        return _State(list(map(id, modules)), numbers, extras), modules, tensors


def _extra(module: nn.Module) -> tuple[Any, ...]:
    """Return what changes a module's results beside its tensors; nothing for most modules."""
    attributes = vars(module)
    extra = hook_numbers(module)
    if "forward" in attributes:
        extra += (attributes["forward"],)
    if _is_adapted(module):
        adapted: Any = module
        scaling = tuple(getattr(adapted, "scaling", {}).items())
        extra += (tuple(adapted.active_adapters), adapted.disable_adapters, tuple(adapted.merged_adapters), scaling)
    return extra


def _is_adapted(module: nn.Module) -> bool:
    return "merged_adapters" in vars(module)  # an attribute of PEFT's layers


@functools.cache
def _note_steps() -> None:
    after_each_optimizer_step(_note_step)


def _note_step(optimizer: torch.optim.Optimizer) -> None:
    for watch in list(_watches):
        watch.note_step(optimizer)
