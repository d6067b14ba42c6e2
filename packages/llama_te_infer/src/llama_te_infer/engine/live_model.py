"""What an engine does with a model that is trained meanwhile: it borrows the model, and takes new weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# What DistributedDataParallel, FSDP, activation checkpointing and torch.compile put into the names of parameters.
_OF_WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode, and let it train again afterwards.

    In training mode layers would checkpoint activations, record amax histories for FP8 and drop parts of adapters.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def copy_weights(model: nn.Module, weights: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy weights into a model's own, one after the other: they keep their addresses, dtypes and formats.

    Args:
        model: Receives the weights.
        weights: Names and tensors of any dtype and device, or a module with them. A `DTensor` is gathered, so all ranks
            that have a part of it must call this. Of names and tensors, weights that do not come stay as they are.

    Raises:
        ValueError: A name or a shape is not the model's. Of a module nothing has been written then; of names and
            tensors, the weights before it.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(weights, nn.Module):
        weights = _checked_weights(model, weights, own)
    for name, tensor in weights:
        parameter = _parameter_for(own, name, tensor)
        parameter.copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _checked_weights(
    model: nn.Module, source: nn.Module, own: dict[str, nn.Parameter]
) -> list[tuple[str, torch.Tensor]]:
    """Return the weights of a module once all of them are known to fit, without those that are there twice.

    Raises:
        ValueError: They do not fit.
    """
    for name in _HEADS:  # other heads have the same shapes
        ours, theirs = (getattr(getattr(each, "config", None), name, None) for each in (model, source))
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"weights has {name}={theirs}, but the engine's model has {name}={ours}.")
    given: dict[str, torch.Tensor] = {}
    for name, weight in source.named_parameters(remove_duplicate=False):
        _parameter_for(own, name, weight)
        given[_without_wrappers(name)] = weight
    if missing := sorted(own.keys() - given.keys()):
        raise ValueError(
            f"weights lacks {len(missing)} weights of the engine's model, such as {missing[0]!r}: give a model of the "
            "same size."
        )
    chosen: dict[nn.Parameter, tuple[str, torch.Tensor]] = {}
    for name, tensor in given.items():
        first, other = chosen.setdefault(own[name], (name, tensor))
        if other is not tensor:
            raise ValueError(f"weights has two tensors for {first!r} and {name!r}, which the engine's model shares.")
    return list(chosen.values())


def _parameter_for(own: dict[str, nn.Parameter], name: str, tensor: torch.Tensor) -> nn.Parameter:
    """Return the parameter of a model that a tensor of this name fits.

    Raises:
        ValueError: There is none.
    """
    parameter = own.get(_without_wrappers(name))
    if parameter is None:
        raise ValueError(
            f"weights has {name!r}, which the engine's model does not have: give the names of its "
            f"named_parameters(), such as {next(iter(own))!r}. Merge adapters first, and convert a Hugging Face "
            "Llama with llama_te_convert.convert_llama_hf_to_te."
        )
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"weights has {name!r} of shape {tuple(tensor.shape)}, but the engine's model needs "
            f"{tuple(parameter.shape)}."
        )
    return parameter


def _without_wrappers(name: str) -> str:
    for part in _OF_WRAPPERS:
        name = name.replace(part, "")
    return name
