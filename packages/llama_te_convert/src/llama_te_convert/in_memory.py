"""Conversion of models in memory, between transformers' Llama and Mistral and the Transformer Engine layout."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llama_te_core import NVLlamaPreTrainedModel
from llama_te_core.compat.transformers import attention_implementation

from .configs.architectures import architecture_of, hf_class, te_class
from .configs.model_config import hf_config, te_config
from .layout.mapping import check_names, convert_tensors, map_names
from .layout.row_order import HeadSizes
from .layout.rules import HEAD, Rule


def convert_llama_hf_to_te(model_hf: PreTrainedModel, **config_kwargs: Any) -> NVLlamaPreTrainedModel:
    """Convert a transformers Llama or Mistral, with or without a head, to the Transformer Engine layout.

    It works on any device, with or without Transformer Engine. The result has the same dtypes, device and tied weights,
    and shares no memory with `model_hf`. If the model has a head of its own although `tie_word_embeddings` is true, as
    transformers loads such a checkpoint, the result has that head and `tie_word_embeddings=False`.

    Args:
        model_hf: A `LlamaForCausalLM`, `LlamaModel` or one of the three task models, or a Mistral of these kinds.
        **config_kwargs: Fields of `NVLlamaConfig` to set, such as `attn_input_format="bshd"`.

    Returns:
        The `NVLlama...` model of the same kind.

    Raises:
        TypeError: `model_hf` is another model, or a model of PEFT.
        ValueError: The layers cannot run a model with these tensors or this configuration.
    """
    target = te_class(model_hf)
    content = model_hf.config.to_dict()
    config = te_config(content, **{**_in_memory_fields(model_hf, target), **config_kwargs})
    return _convert(model_hf, target, config, architecture_of(content).rules, to_te=True)


def convert_llama_te_to_hf(model_te: NVLlamaPreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """Convert a model with the Transformer Engine layout to a model of transformers: see `convert_llama_hf_to_te`.

    Weights that the model holds only in a quantized format are dequantized to the model's dtype.

    Args:
        model_te: One of the `NVLlama...` models.
        **config_kwargs: Fields of the configuration in transformers to set.

    Returns:
        The model of the same kind, `Llama...` or `Mistral...`, as the model was before its conversion.

    Raises:
        TypeError: `model_te` is another model.
        ValueError: The tensors do not fit the configuration.
    """
    target = hf_class(model_te)
    content = model_te.config.to_dict()
    config = hf_config(content, **{**_in_memory_fields(model_te, target), **config_kwargs})
    return _convert(model_te, target, config, architecture_of(content).rules, to_te=False)


def _in_memory_fields(source: PreTrainedModel, target_class: type[PreTrainedModel]) -> dict[str, Any]:
    """Configuration fields of a model in memory that a `config.json` lacks or has with another meaning."""
    architectures = source.config.architectures
    if architectures == [type(source).__name__]:
        architectures = [target_class.__name__]
    fields = {"architectures": architectures, "attn_implementation": attention_implementation(source.config)}
    if HEAD in _named_tensors(source):  # a tied head has the name of the embeddings
        fields["tie_word_embeddings"] = False
    return fields


def _convert(
    source: PreTrainedModel,
    target_class: type[PreTrainedModel],
    config: Any,
    rules: tuple[Rule, ...],
    *,
    to_te: bool,
) -> PreTrainedModel:
    tensors = {name: _dense(tensor) for name, tensor in _named_tensors(source).items()}
    adapters = [name for name in tensors if ".lora_" in name or ".base_layer." in name]
    if adapters:
        raise ValueError(
            f"the model has adapters of PEFT, such as {adapters[0]}: merge them into the weights (merge_and_unload of "
            "its PeftModel), or remove them (delete_adapter), and convert it then."
        )
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("the model is on the meta device: it has no weights to convert.")
    with torch.device("meta"), torch.no_grad():
        target = target_class(config)
    target.tie_weights()
    wanted = set(_named_tensors(target))
    mappings = map_names(tensors, to_te=to_te, rules=rules)
    fields = source.config.to_dict()
    sizes = HeadSizes(fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"])
    with torch.no_grad():
        converted = convert_tensors(mappings, tensors, sizes, to_te=to_te)
        check_names(converted, wanted)
        for name, tensor in converted.items():
            _check_shape(target, name, tensor)
        _fill(target, converted)
        if isinstance(target, NVLlamaPreTrainedModel):
            target.quantize_loaded_weights()
    target.tie_weights()
    target.train(source.training)
    if source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    return target


def _fill(target: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give a model on the meta device its parameters and buffers. Parameters keep the dtypes of `tensors`."""
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
    """Parameters by name. A tied parameter has one name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in an ordinary dtype. Weights that TE holds in a quantized format are dequantized."""
    return tensor.dequantize() if type(tensor).__module__.startswith("transformer_engine") else tensor


def _check_shape(target: nn.Module, name: str, tensor: torch.Tensor) -> None:
    wanted = target.get_parameter(name).shape
    if tensor.shape != wanted:
        raise ValueError(
            f"{name} becomes {list(tensor.shape)}, but the configuration asks for {list(wanted)}: "
            "the checkpoint and its configuration do not fit together."
        )
