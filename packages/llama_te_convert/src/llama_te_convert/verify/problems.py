"""Problems of a checkpoint, one sentence each: in its configuration, and in its tensors' names, shapes and dtypes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..configs.architectures import architecture_of
from ..configs.model_config import quantization_problem, te_config
from ..errors import CheckpointError
from ..layout.mapping import TensorMapping, map_known_names
from ..layout.rules import LLAMA, Rule, is_computed
from ..layout.tensor_info import TensorInfo
from ..sources.checkpoint import Checkpoint
from .expectation import Expectation
from .model_fields import model_fields
from .report_text import fold, fold_names


def rules_of(checkpoint: Checkpoint) -> tuple[Rule, ...]:
    """The conversion rules of a checkpoint; a Llama's rules if its architecture is not known."""
    try:
        return architecture_of(checkpoint.config).rules
    except CheckpointError:
        return LLAMA


def config_problems(checkpoint: Checkpoint) -> list[str]:
    """The problems of a checkpoint's configuration."""
    problem = quantization_problem(checkpoint.config)
    problems = [] if problem is None else [problem]
    cannot_run = _cannot_run(checkpoint)
    return [*problems, cannot_run] if cannot_run else problems


def _cannot_run(checkpoint: Checkpoint) -> str | None:
    """Why the layers cannot run a model whose configuration is valid otherwise."""
    if checkpoint.is_te:
        return None
    try:
        model_fields(checkpoint)
    except CheckpointError:
        return None  # `inspect` reports it
    config = copy.deepcopy(checkpoint.config)
    config.pop("quantization_config", None)  # `config_problems` reports it
    try:
        te_config(config)
    except Exception as error:  # an inspection reports every error, and raises none
        return f"Transformer Engine layers cannot run it: {' '.join(str(error).split())}"
    return None


def tensor_problems(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> list[str]:
    """The problems of a checkpoint's tensors: their names, shapes and dtypes.

    Args:
        checkpoint: An open checkpoint, of either layout.
        fields: All model fields of its configuration.
    """
    rules = rules_of(checkpoint)
    mappings = map_known_names(checkpoint.source.tensors, rules=rules, is_te=checkpoint.is_te)
    return [
        *_name_problems(checkpoint, mappings, rules),
        *Expectation(checkpoint, fields, rules).problems(),
        *_dtype_problems(checkpoint.source.tensors, {mapping.te: mapping.hf for mapping in mappings.values()}.values()),
    ]


def _name_problems(checkpoint: Checkpoint, mappings: Mapping[str, TensorMapping], rules: Sequence[Rule]) -> list[str]:
    unknown = [name for name in checkpoint.source.tensors if name not in mappings and not is_computed(name)]
    problems = []
    swapped = len(map_known_names(unknown, rules=rules, is_te=not checkpoint.is_te))
    if swapped:
        layouts = ("Hugging Face", "Transformer Engine")
        problems.append(
            f"{swapped} tensors have names of the {layouts[not checkpoint.is_te]} layout, but model_type is "
            f"{checkpoint.config.get('model_type')!r}, which has the {layouts[checkpoint.is_te]} one: "
            "correct model_type in config.json."
        )
    return problems + [f"there is no rule for {name}." for name in fold_names(unknown)]


def _dtype_problems(infos: Mapping[str, TensorInfo], groups: Iterable[tuple[str, ...]]) -> list[str]:
    """Hugging Face tensors that become one tensor must have one dtype."""
    mixed = []
    for names in groups:
        dtypes = [infos[name].dtype for name in names if name in infos]
        if len(set(dtypes)) > 1:
            mixed.append((names[0], (len(names), tuple(dtypes))))
    return [
        f"{name} and the {count - 1} that become one tensor with it must have one dtype, but have {', '.join(dtypes)}."
        for name, (count, dtypes) in fold(mixed)
    ]
