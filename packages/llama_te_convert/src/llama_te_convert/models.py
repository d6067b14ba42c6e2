"""Conversion of models in memory, between transformers' Llama and the Transformer Engine layout."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
)

from llama_te_core import (
    NVLlamaConfig,
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
    NVLlamaPreTrainedModel,
)

from .mapping import check_targets, convert_tensors, plan

_PAIRS: tuple[tuple[type[PreTrainedModel], type[NVLlamaPreTrainedModel]], ...] = (
    (LlamaModel, NVLlamaModel),
    (LlamaForCausalLM, NVLlamaForCausalLM),
    (LlamaForSequenceClassification, NVLlamaForSequenceClassification),
    (LlamaForTokenClassification, NVLlamaForTokenClassification),
    (LlamaForQuestionAnswering, NVLlamaForQuestionAnswering),
)
_TE_ONLY_FIELDS = (
    "attn_input_format",
    "self_attn_mask_type",
    "layer_precision",
    "use_quantized_model_init",
    "layer_implementation",
    "auto_map",
)


def convert_llama_hf_to_te(model_hf: PreTrainedModel, **config_kwargs: Any) -> NVLlamaPreTrainedModel:
    """Convert a transformers Llama, with or without a head, to the Transformer Engine layout.

    Works on any device, with or without Transformer Engine. Dtypes, device and tied weights are kept; the result
    shares no memory with `model_hf`.

    Args:
        model_hf: A `LlamaForCausalLM`, `LlamaModel`, or one of the three task models.
        **config_kwargs: Fields of `NVLlamaConfig` to set, such as `attn_input_format="bshd"`.

    Returns:
        The `NVLlama...` model of the same kind.

    Raises:
        TypeError: `model_hf` is not a Llama.
        ValueError: Its tensors or its configuration are not those of a Llama that the layers can run.
    """
    te_class = _counterpart(model_hf, "model_hf", dict(_PAIRS))
    fields = _fields(model_hf.config)
    config = NVLlamaConfig(**{**fields, **config_kwargs})
    _keep_architecture(config, type(model_hf), te_class)
    return _convert(model_hf, te_class, config, to_te=True)


def convert_llama_te_to_hf(model_te: NVLlamaPreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """Convert a model with the Transformer Engine layout to transformers' own Llama; see `convert_llama_hf_to_te`.

    Weights that are held in a quantized format only are returned to the model's dtype.

    Args:
        model_te: One of the `NVLlama...` models.
        **config_kwargs: Fields of `transformers.LlamaConfig` to set.

    Returns:
        The `Llama...` model of the same kind.

    Raises:
        TypeError: `model_te` is not one of these models.
        ValueError: Its tensors are not those of a Llama.
    """
    hf_class = _counterpart(model_te, "model_te", {te: hf for hf, te in _PAIRS})
    fields = {name: value for name, value in _fields(model_te.config).items() if name not in _TE_ONLY_FIELDS}
    config = LlamaConfig(**{**fields, **config_kwargs})
    _keep_architecture(config, type(model_te), hf_class)
    return _convert(model_te, hf_class, config, to_te=False)


def _fields(config: Any) -> dict[str, Any]:
    """The configuration's fields as constructor arguments."""
    fields = dict(config.to_dict())
    for name in ("model_type", "transformers_version"):
        fields.pop(name, None)
    quantization = fields.get("quantization_config")
    if quantization is not None:
        if quantization.get("quant_method") != "gguf":
            raise ValueError(
                f"the model is quantized by {quantization.get('quant_method')!r}: convert one with ordinary weights."
            )
        del fields["quantization_config"]  # speaks of the file: in memory its weights are ordinary ones
    fields["attn_implementation"] = config._attn_implementation
    return fields


def _counterpart(model: Any, argument: str, counterparts: dict[Any, Any]) -> Any:
    if type(model) not in counterparts:
        known = ", ".join(cls.__name__ for cls in counterparts)
        raise TypeError(f"{argument} is a {type(model).__name__}: this conversion takes one of {known}.")
    return counterparts[type(model)]


def _keep_architecture(config: Any, source: type, target: type) -> None:
    """A checkpoint names its class in `architectures`: the new configuration names the new class."""
    if config.architectures == [source.__name__]:
        config.architectures = [target.__name__]


def _convert(
    source: PreTrainedModel, target_class: type[PreTrainedModel], config: Any, *, to_te: bool
) -> PreTrainedModel:
    tensors = {name: _dense(tensor) for name, tensor in _named_tensors(source).items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("the model is on the meta device: it has no weights to convert.")
    with torch.device("meta"), torch.no_grad():
        target = target_class(config)
    target.tie_weights()
    wanted = set(_named_tensors(target))
    steps = plan(tensors, to_te=to_te)
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
