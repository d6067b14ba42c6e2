"""Which implementation of the decoder layer a model gets: Transformer Engine's or the reference."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from .reference import ReferenceLayer

if TYPE_CHECKING:
    from ..models.configuration_nvllama import NVLlamaConfig
    from ..precision.plan import PrecisionPlan


@functools.cache
def transformer_engine_problem() -> str | None:
    """Why TE layers cannot run in this process: one line, or `None` where they can.

    The first call imports Transformer Engine if there is a GPU.
    """
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    try:
        import transformer_engine.pytorch as te

        te.TransformerLayer  # noqa: B018  (a package without its compiled parts imports, but lacks the layer)
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return "Transformer Engine is not installed (pip install 'llama-te-core[cu13]', see the README)"
        return f"the installed Transformer Engine does not import: {_first_line(error)}"
    except Exception as error:  # a broken installation raises anything: OSError, RuntimeError, AssertionError
        return f"the installed Transformer Engine does not import: {_first_line(error)}"
    return None


def choose_implementation(requested: str) -> str:
    """Turn `layer_implementation` into "transformer_engine" or "reference".

    Raises:
        RuntimeError: Transformer Engine is asked for and cannot run here.
    """
    if requested == "reference":
        return "reference"
    problem = transformer_engine_problem()
    if problem is None:
        return "transformer_engine"
    if requested == "transformer_engine":
        raise RuntimeError(
            f"layer_implementation='transformer_engine', but {problem}. "
            "Use 'auto' or 'reference' to run the layers in plain PyTorch."
        )
    _warn_once(problem)
    return "reference"


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"Layers run in plain PyTorch, since {problem}.", stacklevel=2)


def build_layers(config: NVLlamaConfig, precision: PrecisionPlan, softmax_scale: float) -> nn.ModuleList:
    """The decoder layers of a model, all of the implementation that `config.layer_implementation` leads to.

    Parameters have torch's default dtype and device.

    Args:
        config: Sizes of the model.
        precision: What each layer computes in; TE layers may be constructed in that format.
        softmax_scale: What attention multiplies query·key by.
    """
    if choose_implementation(config.layer_implementation) == "reference":
        numbers = range(1, config.num_hidden_layers + 1)
        return nn.ModuleList(ReferenceLayer(config, number, softmax_scale) for number in numbers)
    from .te import build_transformer_engine_layer

    layers = []
    for index in range(config.num_hidden_layers):
        with precision.init_context(index, config.use_quantized_model_init):
            layers.append(build_transformer_engine_layer(config, index + 1, softmax_scale))
    return nn.ModuleList(layers)


def is_transformer_engine(layer: nn.Module) -> bool:
    """Whether a layer that `build_layers` made is TE's."""
    return not isinstance(layer, ReferenceLayer)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
