"""The architectures that convert to the Transformer Engine layout, and what their configurations become there.

Each is one entry of `ARCHITECTURES`: its tensors, its classes in transformers, and what of its configuration the layers
cannot compute. A converted configuration remembers the entry in `source_model_type`, for the way back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..layout.mapping import LLAMA, MISTRAL, Row
from ..sources.tensor_source import CheckpointError
from .core_format import checkpoint_format

# transformers takes seconds to import, and knowing an architecture's tensors does without it.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llama_te_core import NVLlamaConfig

HEADS: dict[str, str] = {
    "base": "{}Model",
    "causal LM": "{}ForCausalLM",
    "sequence classification": "{}ForSequenceClassification",
    "token classification": "{}ForTokenClassification",
    "question answering": "{}ForQuestionAnswering",
}


def _classes(prefix: str) -> dict[str, str]:
    """The class of each head, where all begin with `prefix`."""
    return {head: name.format(prefix) for head, name in HEADS.items()}


TE_CLASSES = _classes("NVLlama")


@dataclass(frozen=True)
class Architecture:
    """One architecture of Hugging Face checkpoints.

    Attributes:
        model_type: Its name in `config.json`.
        table: Which of its tensors make which tensor of the other layout.
        config_class: Name of its configuration in transformers.
        classes: Names of its models in transformers, by head.
        only: Fields of its configuration that the layers can compute with one value alone, and that value.
    """

    model_type: str
    table: tuple[Row, ...]
    config_class: str
    classes: Mapping[str, str]
    only: Mapping[str, Any] = field(default_factory=dict)

    @property
    def te_classes(self) -> dict[str, str]:
        """Names of the models of `llama_te_core` by those in transformers."""
        return {self.classes[head]: name for head, name in TE_CLASSES.items()}

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that the layers cannot compute.

        Args:
            config: A configuration with all of its fields.

        Raises:
            CheckpointError: With the field, its value and the one that works.
        """
        for name, value in self.only.items():
            if config.get(name, value) != value:
                raise CheckpointError(
                    f"{name}={config[name]!r} is not supported: the layers compute a {self.model_type!r} model with "
                    f"{name}={value!r} only. Use a checkpoint of that kind."
                )


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", LLAMA, "LlamaConfig", _classes("Llama")),
        Architecture("mistral", MISTRAL, "MistralConfig", _classes("Mistral"), only={"sliding_window": None}),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a checkpoint, in either layout.

    Args:
        config: The content of its `config.json`.

    Raises:
        CheckpointError: It is of none that converts.
    """
    is_te = config.get("model_type") == checkpoint_format.MODEL_TYPE
    name = "source_model_type" if is_te else "model_type"
    found = config.get(name, "llama" if is_te else None)
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise CheckpointError(
            f"{name}={found!r} is not known: checkpoints of {', '.join(map(repr, ARCHITECTURES))} can be converted."
        )
    return ARCHITECTURES[found]


def te_config(config_hf: Mapping[str, Any], **changes: Any) -> NVLlamaConfig:
    """The configuration of a converted checkpoint.

    Args:
        config_hf: The content of a Hugging Face checkpoint's `config.json`, or its `to_dict()`.
        **changes: Fields to set.

    Returns:
        With all fields of the source; `architectures` names the classes of `llama_te_core`.

    Raises:
        CheckpointError: The architecture is not known, or the layers cannot compute what the configuration asks for.
    """
    import transformers

    from llama_te_core import NVLlamaConfig

    if config_hf.get("model_type") == checkpoint_format.MODEL_TYPE:
        raise CheckpointError("the configuration has the Transformer Engine layout already: there is nothing to do.")
    architecture = architecture_of(config_hf)
    # Its own class knows the defaults of what the file leaves out, and the names that older files use.
    source = _construct(getattr(transformers, architecture.config_class), _fields(config_hf))
    fields = _fields(source.to_dict())
    fields["architectures"] = renamed(source.architectures, architecture.te_classes)
    fields |= {**changes, "source_model_type": architecture.model_type}
    architecture.check(fields)
    return _construct(NVLlamaConfig, fields)


def hf_config(config_te: Mapping[str, Any], **changes: Any) -> PreTrainedConfig:
    """The configuration of a checkpoint that is converted back.

    Args:
        config_te: The content of the `config.json` of a checkpoint with the Transformer Engine layout, or its
            `to_dict()`.
        **changes: Fields to set.

    Returns:
        Of the class of the architecture that the model is one of, in `architectures` too.

    Raises:
        CheckpointError: The configuration has another layout, or is not valid.
    """
    import transformers

    from llama_te_core import NVLlamaConfig

    if config_te.get("model_type") != checkpoint_format.MODEL_TYPE:
        raise CheckpointError(
            f"model_type={config_te.get('model_type')!r} is no configuration of the Transformer Engine layout "
            f"({checkpoint_format.MODEL_TYPE!r})."
        )
    architecture = architecture_of(config_te)
    config_class = getattr(transformers, architecture.config_class)
    source = _construct(lambda **fields: NVLlamaConfig.from_dict(fields), _fields(config_te))
    fields = _fields(source.to_dict())
    for name in _foreign_fields(config_class, fields):
        fields.pop(name, None)
    names = {te: hf for hf, te in architecture.te_classes.items()}
    fields["architectures"] = renamed(source.architectures, names)
    return _construct(config_class, {**fields, **architecture.only, **changes})


def te_class(model_hf: Any) -> Any:
    """The class of `llama_te_core` that a model of transformers becomes.

    Raises:
        TypeError: There is none.
    """
    import transformers

    import llama_te_core

    classes = [
        (name, TE_CLASSES[head])
        for architecture in ARCHITECTURES.values()
        for head, name in architecture.classes.items()
    ]
    for name, te_name in classes:
        # The class is looked for once its name fits, since transformers imports a model's code when it is asked for it.
        if type(model_hf).__name__ == name and type(model_hf) is getattr(transformers, name):
            return getattr(llama_te_core, te_name)
    raise _unknown_class("model_hf", model_hf, [name for name, _ in classes])


def hf_class(model_te: Any) -> Any:
    """The class of transformers that a model of `llama_te_core` becomes.

    Raises:
        TypeError: There is none.
    """
    import transformers

    import llama_te_core

    for head, name in TE_CLASSES.items():
        if type(model_te) is getattr(llama_te_core, name):
            return getattr(transformers, architecture_of(model_te.config.to_dict()).classes[head])
    raise _unknown_class("model_te", model_te, list(TE_CLASSES.values()))


def _unknown_class(argument: str, model: Any, known: list[str]) -> TypeError:
    return TypeError(f"{argument} is a {type(model).__name__}: this conversion takes one of {', '.join(known)}.")


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are no ordinary ones.

    Raises:
        CheckpointError: With the method of its quantization.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    # That of GGUF speaks of the file: once it is read, the weights are ordinary ones.
    if quantization is not None and method != "gguf":
        raise CheckpointError(f"the model is quantized by {method!r}: convert one with ordinary weights.")


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields as constructor arguments: copies, since transformers completes rope's in place."""
    refuse_quantized(config)
    left = ("model_type", "transformers_version", "quantization_config")
    return {name: copy.deepcopy(value) for name, value in config.items() if name not in left}


def _foreign_fields(config_class: Any, fields: Mapping[str, Any]) -> list[str]:
    """Fields that a configuration has only because `NVLlamaConfig` declares them.

    Those of a Llama that another architecture lacks stay where they say something.
    """
    import transformers

    from llama_te_core import NVLlamaConfig

    own = {each.name for each in dataclasses.fields(config_class)}
    of_llama = {each.name: each.default for each in dataclasses.fields(transformers.LlamaConfig)}
    declared = {each.name for each in dataclasses.fields(NVLlamaConfig)} - own
    return ["auto_map"] + [
        name for name in declared if name not in of_llama or fields.get(name, of_llama[name]) == of_llama[name]
    ]


def renamed(architectures: list[str] | None, names: Mapping[str, str]) -> list[str] | None:
    """The field `architectures` with other names for classes; what has none stays."""
    return None if architectures is None else [names.get(name, name) for name in architectures]


def _construct(make: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return make(**fields)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"the configuration is not valid: {type(error).__name__}: {problem}") from error
