"""The choice between the two implementations of the decoder layer."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn

from ..compat.transformer_engine import transformer_engine
from .backend import LayerBackend
from .reference import ReferenceBackend, ReferenceLayer
from .te import TransformerEngineBackend


@functools.cache
def transformer_engine_problem() -> str | None:
    """Return why TE layers cannot run in this process, in one line; `None` where they can.

    The first call imports Transformer Engine if there is a GPU.
    """
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    try:
        transformer_engine().TransformerLayer  # noqa: B018  (without its compiled parts, the package lacks the layer)
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return "Transformer Engine is not installed (pip install 'llama-te-core[cu13]', see the README)"
        return f"the installed Transformer Engine does not import: {_first_line(error)}"
    except Exception as error:  # a broken installation raises anything: OSError, RuntimeError, AssertionError
        return f"the installed Transformer Engine does not import: {_first_line(error)}"
    return None


def choose_backend(requested: str) -> LayerBackend:
    """Choose the implementation of a model's layers.

    Args:
        requested: `NVLlamaConfig.layer_implementation`: "auto" takes Transformer Engine where it can run, and plain
            PyTorch elsewhere, with one warning in a process.

    Raises:
        RuntimeError: Transformer Engine is asked for and cannot run here.
    """
    if requested == ReferenceBackend.name:
        return ReferenceBackend()
    problem = transformer_engine_problem()
    if problem is None:
        return TransformerEngineBackend()
    if requested == TransformerEngineBackend.name:
        raise RuntimeError(
            f"layer_implementation='transformer_engine', but {problem}. "
            "Use 'auto' or 'reference' to run the layers in plain PyTorch."
        )
    _warn_once(problem)
    return ReferenceBackend()


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"Layers run in plain PyTorch, since {problem}.", stacklevel=2)


def is_transformer_engine(layer: nn.Module) -> bool:
    """Tell whether a decoder layer of a model of this package is Transformer Engine's."""
    return not isinstance(layer, ReferenceLayer)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
