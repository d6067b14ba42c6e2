"""Conversion of models in memory, between transformers' Llama and Mistral and the Transformer Engine layout."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llama_te_core import NVLlamaPreTrainedModel
from llama_te_core.compat.transformers import attention_implementation

from .configs.architectures import architecture_of, hf_class, hf_config, te_class, te_config
from .layout.mapping import Row, check_targets, convert_tensors, plan


def convert_llama_hf_to_te(model_hf: PreTrainedModel, **config_kwargs: Any) -> NVLlamaPreTrainedModel:
    """Convert a transformers Llama or Mistral, with or without a head, to the Transformer Engine layout.

    Works on any device, with or without Transformer Engine. Dtypes, device and tied weights are kept; the result
    shares no memory with `model_hf`.

    Args:
        model_hf: A `LlamaForCausalLM`, `LlamaModel`, or one of the three task models; or those of Mistral.
        **config_kwargs: Fields of `NVLlamaConfig` to set, such as `attn_input_format="bshd"`.

    Returns:
        The `NVLlama...` model of the same kind.

    Raises:
        TypeError: `model_hf` is none of these.
        ValueError: Its tensors or its configuration are not those of a model that the layers can run.
    """
    target = te_class(model_hf)
    content = model_hf.config.to_dict()
    config = te_config(content, **{**_in_memory(model_hf, target), **config_kwargs})
    return _convert(model_hf, target, config, architecture_of(content).table, to_te=True)


def convert_llama_te_to_hf(model_te: NVLlamaPreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """Convert a model with the Transformer Engine layout to transformers' own; see `convert_llama_hf_to_te`.

    Weights that are held in a quantized format only are returned to the model's dtype.

    Args:
        model_te: One of the `NVLlama...` models.
        **config_kwargs: Fields of the configuration in transformers to set.

    Returns:
        The model of the same kind of the architecture that it was converted from: `Llama...` or `Mistral...`.

    Raises:
        TypeError: `model_te` is not one of these models.
        ValueError: Its tensors are not those of such a model.
    """
    target = hf_class(model_te)
    content = model_te.config.to_dict()
    config = hf_config(content, **{**_in_memory(model_te, target), **config_kwargs})
    return _convert(model_te, target, config, architecture_of(content).table, to_te=False)


def _in_memory(source: PreTrainedModel, target_class: type[PreTrainedModel]) -> dict[str, Any]:
    """What the configuration of a model has to say that is not in a `config.json`, or is about that file's model."""
    architectures = source.config.architectures
    if architectures == [type(source).__name__]:
        architectures = [target_class.__name__]
    return {"architectures": architectures, "attn_implementation": attention_implementation(source.config)}


def _convert(
    source: PreTrainedModel,
    target_class: type[PreTrainedModel],
    config: Any,
    table: tuple[Row, ...],
    *,
    to_te: bool,
) -> PreTrainedModel:
    tensors = {name: _dense(tensor) for name, tensor in _named_tensors(source).items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("the model is on the meta device: it has no weights to convert.")
    with torch.device("meta"), torch.no_grad():
        target = target_class(config)
    target.tie_weights()
    wanted = set(_named_tensors(target))
    steps = plan(tensors, to_te=to_te, table=table)
    with torch.no_grad():
        made = convert_tensors(steps, tensors, source.config, to_te=to_te)
        check_targets(made, wanted)
        for name, tensor in made.items():
            _check_shape(target, name, tensor)
        _fill(target, made)
        if isinstance(target, NVLlamaPreTrainedModel):
            target.quantize_loaded_weights()
    target.tie_weights()
    target.train(source.training)
    if source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    return target


def _fill(target: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give a model on the meta device its parameters, in the dtypes that they come in."""
    for name, tensor in tensors.items():
        module_name, _, parameter_name = name.rpartition(".")
        module = target.get_submodule(module_name)
        setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    device = next(iter(tensors.values())).device
    for module in target.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # transformers' rotary embedding: computed from the configuration, and not saved.
            for name, buffer in type(module)(target.config).named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def _named_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in an ordinary dtype: weights that TE holds in a quantized format are dequantized."""
    return tensor.dequantize() if type(tensor).__module__.startswith("transformer_engine") else tensor


def _check_shape(target: nn.Module, name: str, tensor: torch.Tensor) -> None:
    wanted = target.get_parameter(name).shape
    if tensor.shape != wanted:
        raise ValueError(
            f"{name} becomes {list(tensor.shape)}, but the configuration asks for {list(wanted)}: "
            "the checkpoint and its configuration do not fit together."
        )
