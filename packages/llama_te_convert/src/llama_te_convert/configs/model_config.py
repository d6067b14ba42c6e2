"""Configurations converted by the configuration classes of transformers and `llama_te_core`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llama_te_core import checkpoint_format

from ..errors import CheckpointError
from .architectures import architecture_of, renamed
from .config_file import has_te_layout

# Importing transformers takes seconds, and a plain Llama converts without it.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llama_te_core import NVLlamaConfig


def te_config(config_hf: Mapping[str, Any], **changes: Any) -> NVLlamaConfig:
    """Convert a Hugging Face configuration to the Transformer Engine layout.

    Args:
        config_hf: The content of a Hugging Face checkpoint's `config.json`, or `to_dict()` of its configuration.
        **changes: Fields to set.

    Returns:
        A configuration with all fields of the source. `architectures` names the classes of `llama_te_core`.

    Raises:
        CheckpointError: The architecture is not known, or the layers do not support the configuration.
    """
    import transformers

    from llama_te_core import NVLlamaConfig

    if has_te_layout(config_hf):
        raise CheckpointError("the configuration has the Transformer Engine layout already: there is nothing to do.")
    architecture = architecture_of(config_hf)
    # Its own class knows the defaults of missing fields, and the names that older files use.
    source = _construct(getattr(transformers, architecture.config_class), _fields(config_hf))
    fields = _fields(_construct(source.to_dict, {}))
    fields["architectures"] = renamed(source.architectures, architecture.te_classes)
    fields |= {**changes, "source_model_type": architecture.model_type}
    architecture.check(fields)
    return _whole(_construct(NVLlamaConfig, fields))


def hf_config(config_te: Mapping[str, Any], **changes: Any) -> PreTrainedConfig:
    """Convert a configuration of the Transformer Engine layout back to the Hugging Face layout.

    Args:
        config_te: The content of the `config.json` of a checkpoint with the Transformer Engine layout, or `to_dict()`
            of its configuration.
        **changes: Fields to set.

    Returns:
        A configuration of the architecture that the model was converted from. `architectures` names its classes.

    Raises:
        CheckpointError: The configuration has the other layout, or is not valid.
    """
    import transformers

    from llama_te_core import NVLlamaConfig

    if not has_te_layout(config_te):
        raise CheckpointError(
            f"model_type={config_te.get('model_type')!r} does not belong to the Transformer Engine layout, whose "
            f"model_type is {checkpoint_format.MODEL_TYPE!r}."
        )
    architecture = architecture_of(config_te)
    config_class = getattr(transformers, architecture.config_class)
    source = _construct(lambda **fields: NVLlamaConfig.from_dict(fields), _fields(config_te))
    fields = _fields(_construct(source.to_dict, {}))
    for name in _foreign_fields(config_class, fields):
        fields.pop(name, None)
    fields["architectures"] = renamed(source.architectures, architecture.hf_classes)
    return _whole(_construct(config_class, {**fields, **architecture.only, **changes}))


def quantization_problem(config: Mapping[str, Any]) -> str | None:
    """Say that a checkpoint has quantized weights.

    Args:
        config: The content of its `config.json`.

    Returns:
        A sentence with the quantization method; `None` for ordinary weights.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    # A GGUF file is quantized, but its reader returns ordinary weights.
    if quantization is None or method == "gguf":
        return None
    return f"the model is quantized by {method!r}: convert one with ordinary weights."


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with quantized weights.

    Raises:
        CheckpointError: The message has the quantization method.
    """
    problem = quantization_problem(config)
    if problem is not None:
        raise CheckpointError(problem)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields as constructor arguments, copied because transformers completes rope's in place.

    Raises:
        CheckpointError: The model is quantized, or a number is not valid.
    """
    refuse_quantized(config)
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise CheckpointError(f"architectures={named!r} must be a list of names of classes.")
    try:
        checkpoint_format.check_values(config)  # transformers accepts most of these numbers, or divides by them
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    left = ("model_type", "transformers_version", "quantization_config")
    return {name: copy.deepcopy(value) for name, value in config.items() if name not in left}


def _foreign_fields(config_class: Any, fields: Mapping[str, Any]) -> list[str]:
    """Fields that a configuration has only because `NVLlamaConfig` declares them.

    A Llama field that the other architecture lacks stays if its value is not the default.
    """
    import transformers

    from llama_te_core import NVLlamaConfig

    own = {each.name for each in dataclasses.fields(config_class)}
    of_llama = {each.name: each.default for each in dataclasses.fields(transformers.LlamaConfig)}
    declared = {each.name for each in dataclasses.fields(NVLlamaConfig)} - own
    return ["auto_map"] + [
        name for name in declared if name not in of_llama or fields.get(name, of_llama[name]) == of_llama[name]
    ]


def _whole(config: Any) -> Any:
    """Return a configuration, which can also be written."""
    _construct(config.to_dict, {})
    return config


def _construct(make: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return make(**fields)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"the configuration is not valid: {type(error).__name__}: {problem}") from error
