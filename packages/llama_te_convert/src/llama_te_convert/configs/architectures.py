"""The architectures that convert to the Transformer Engine layout.

Each entry of `ARCHITECTURES` has the conversion rules, the classes in transformers, and the configuration fields that
the layers support with one value only. A converted configuration keeps the entry's name in `source_model_type`, for the
way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from ..layout.rules import LLAMA, MISTRAL, Rule
from .config_file import has_te_layout

HEADS: dict[str, str] = {
    "base": "{}Model",
    "causal LM": "{}ForCausalLM",
    "sequence classification": "{}ForSequenceClassification",
    "token classification": "{}ForTokenClassification",
    "question answering": "{}ForQuestionAnswering",
}


def _classes(prefix: str) -> dict[str, str]:
    """The class name of each head, for a family of classes with this prefix."""
    return {head: name.format(prefix) for head, name in HEADS.items()}


TE_CLASSES = _classes("NVLlama")


@dataclass(frozen=True)
class Architecture:
    """One architecture of Hugging Face checkpoints.

    Attributes:
        model_type: Its name in `config.json`.
        rules: The conversion rules of its tensors.
        config_class: Name of its configuration class in transformers.
        classes: Names of its model classes in transformers, by head.
        only: Configuration fields that the layers support with one value only, and that value.
    """

    model_type: str
    rules: tuple[Rule, ...]
    config_class: str
    classes: Mapping[str, str]
    only: Mapping[str, Any] = field(default_factory=dict)

    @property
    def te_classes(self) -> dict[str, str]:
        """Names of the model classes of `llama_te_core`, by the names in transformers."""
        return {self.classes[head]: name for head, name in TE_CLASSES.items()}

    @property
    def hf_classes(self) -> dict[str, str]:
        """Names of the model classes of transformers, by the names in `llama_te_core`."""
        return {te: hf for hf, te in self.te_classes.items()}

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that the layers do not support.

        Args:
            config: A configuration with all of its fields.

        Raises:
            CheckpointError: The message has the field, its value and the supported one.
        """
        for name, value in self.only.items():
            if config.get(name, value) != value:
                raise CheckpointError(
                    f"{name}={config[name]!r} is not supported: the layers run a {self.model_type!r} model with "
                    f"{name}={value!r} only. Use such a checkpoint."
                )


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", LLAMA, "LlamaConfig", _classes("Llama")),
        Architecture("mistral", MISTRAL, "MistralConfig", _classes("Mistral"), only={"sliding_window": None}),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a checkpoint of either layout.

    Args:
        config: The content of its `config.json`.

    Raises:
        CheckpointError: The architecture does not convert.
    """
    is_te = has_te_layout(config)
    name = "source_model_type" if is_te else "model_type"
    found = config.get(name, "llama" if is_te else None)
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise CheckpointError(
            f"{name}={found!r} is not known: only checkpoints of {', '.join(map(repr, ARCHITECTURES))} convert. Load "
            "other models with transformers."
        )
    return ARCHITECTURES[found]


def te_class(model_hf: Any) -> Any:
    """The class of `llama_te_core` that a model of transformers converts to.

    Raises:
        TypeError: The model does not convert.
    """
    import transformers

    import llama_te_core

    classes = [
        (name, TE_CLASSES[head])
        for architecture in ARCHITECTURES.values()
        for head, name in architecture.classes.items()
    ]
    for name, te_name in classes:
        # transformers imports a model's code when its class is looked up, so the name is compared first.
        if type(model_hf).__name__ == name and type(model_hf) is getattr(transformers, name):
            return getattr(llama_te_core, te_name)
    raise _unknown_class("model_hf", model_hf, [name for name, _ in classes])


def hf_class(model_te: Any) -> Any:
    """The class of transformers that a model of `llama_te_core` converts to.

    Raises:
        TypeError: The model does not convert.
    """
    import transformers

    import llama_te_core

    for head, name in TE_CLASSES.items():
        if type(model_te) is getattr(llama_te_core, name):
            return getattr(transformers, architecture_of(model_te.config.to_dict()).classes[head])
    raise _unknown_class("model_te", model_te, list(TE_CLASSES.values()))


def _unknown_class(argument: str, model: Any, known: list[str]) -> TypeError:
    if any(each.__module__.partition(".")[0] == "peft" for each in type(model).__mro__):
        return TypeError(
            f"{argument} is a {type(model).__name__} of PEFT: convert the model that its merge_and_unload() returns, "
            "or convert the adapter alone with llama-te-convert adapter-to-te or adapter-to-hf."
        )
    return TypeError(f"{argument} is a {type(model).__name__}: this conversion takes one of {', '.join(known)}.")


def renamed(architectures: list[str] | None, names: Mapping[str, str]) -> list[str] | None:
    """The field `architectures` with classes renamed. A class without a new name keeps its own."""
    return None if architectures is None else [names.get(name, name) for name in architectures]
