"""What an engine does with a model that is trained meanwhile: it borrows the model, and takes new weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# What DistributedDataParallel, FSDP, activation checkpointing and torch.compile put into the names of parameters.
_OF_WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


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
            that have a part of it must call this. Weights that do not come stay as they are.

    Raises:
        ValueError: A name or a shape is not the model's. The weights before it have been written.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(weights, nn.Module):
        weights = weights.named_parameters()
    for name, tensor in weights:
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
        parameter.copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _without_wrappers(name: str) -> str:
    for part in _OF_WRAPPERS:
        name = name.replace(part, "")
    return name
