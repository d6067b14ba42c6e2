"""LoRA adapters of PEFT, from the Transformer Engine layout to Hugging Face's.

An adapter adds B·A to a weight. Where a weight's rows are those of several Hugging Face weights, B's rows are theirs:
each gets its rows of B, and all of A. No number is changed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .configs.architectures import architecture_of
from .configs.core_format import checkpoint_format
from .layout.mapping import convert_tensors, plan
from .layout.row_ranges import HeadSizes
from .sources.checkpoint import read_config
from .sources.tensor_source import CheckpointError, first_line

# torch takes seconds to import, and refusing a configuration does without it.
if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Several weights of a module are adapted by adapters within each other.
_FACTOR = re.compile(re.escape(_PREFIX) + r"(?P<module>.*?)(?:\.base_layer)*\.lora_A\.weight")
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Others change the weights of the model as well, which have other shapes in the other layout.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapted:
    """A Hugging Face module whose weight has an adapter.

    Attributes:
        module: Its name.
        rank: Columns of B.
        alpha: What B·A is multiplied by, before it is divided by the rank (or its root).
    """

    module: str
    rank: int
    alpha: float


def convert_adapter(source: str | Path, folder: str | Path, *, base: str | None = None) -> list[Adapted]:
    """Write a LoRA adapter for a model with the Transformer Engine layout as one for the model in transformers.

    Args:
        source: Folder that PEFT saved the adapter to.
        folder: Where the result goes; it must not be there yet, or be empty.
        base: The model that it is for, a folder of either layout or the id of one on the hub, of which `config.json` is
            read; by default what the adapter names. A Hugging Face model is named in the result.

    Returns:
        What has an adapter now.

    Raises:
        CheckpointError: In one line, what is wrong with the adapter, the model or the folder.
    """
    source, folder = Path(source), Path(folder)
    config = read_config(source, CONFIG)
    _check(config, source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already: name a folder that is not, or an empty one.")
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{source / CONFIG} does not name the model that the adapter is for (base_model_name_or_path): say --base."
        )
    base_config = _base_config(base)
    try:
        tensors, adapted = _convert(_load(source / TENSORS), config, base_config, base)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source / TENSORS} is no adapter of the layers of {base}: {error}") from error
    is_te = base_config.get("model_type") == checkpoint_format.MODEL_TYPE
    config |= {
        "auto_mapping": None,
        "base_model_name_or_path": None if is_te else base,
        "exclude_modules": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "target_modules": _target_modules(adapted, base_config.get("num_hidden_layers")),
        "target_parameters": None,
        "rank_pattern": {each.module: each.rank for each in adapted if each.rank != config["r"]},
        "alpha_pattern": {each.module: each.alpha for each in adapted if each.alpha != config["lora_alpha"]},
    }
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return adapted


def _check(config: Mapping[str, Any], source: Path) -> None:
    allowed = {"peft_type": ("LORA",), "init_lora_weights": _INITIALISATIONS, "layer_replication": (None,)}
    for name, values in allowed.items():
        if config.get(name, values[0]) not in values:
            raise CheckpointError(
                f"{source / CONFIG} has {name}={config[name]!r}: adapters with {' or '.join(map(repr, values))} can be "
                "converted. Merge this one (merge_and_unload) and convert the model."
            )
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise CheckpointError(f"{source / CONFIG} has {name}={config.get(name)!r}, which is no number.")


def _base_config(base: str) -> dict[str, Any]:
    path = Path(base).expanduser()
    if not path.exists():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(base, "config.json")).parent
        except Exception as error:  # whatever keeps it from coming, in one line
            raise CheckpointError(
                f"{base} is no local path, and the hub does not give it: {first_line(error)}"
            ) from error
    return read_config(path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def _convert(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base_config: Mapping[str, Any], base: str
) -> tuple[dict[str, torch.Tensor], list[Adapted]]:
    """The tensors of the new adapter, and what they adapt.

    Raises:
        ValueError: There is no such adapter.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    whole = dict(tensors)
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        a, b = whole.pop(name), whole.pop(name.removesuffix(_A) + _B, None)
        if b is None:
            raise ValueError(f"{name} is without its B.")
        weight = _weight_name(match["module"], a, b, base_config)
        if "layernorm" in match["module"] and not _is_named(weight, config.get("target_parameters")):
            raise ValueError(
                f"{match['module']} was adapted as a module, norm included (target_modules): no weight is."
            )
        factors[weight] = (a, b)

    table, sizes = architecture_of(base_config).table, HeadSizes.of(base_config, base)
    steps = plan(factors, to_te=False, table=table)
    rows = convert_tensors(steps, {name: b for name, (_, b) in factors.items()}, sizes, to_te=False)
    made: dict[str, torch.Tensor] = {}
    adapted = []
    for step in steps:
        a, _ = factors[step.te]
        alpha = _alpha(step.te, config)
        for name in step.hf:
            module = name.removesuffix(".weight")
            made[_PREFIX + module + _A] = a.clone()
            made[_PREFIX + module + _B] = rows[name]
            adapted.append(Adapted(module, len(a), alpha))
    # What is saved whole, such as the head, must be the same in the other layout.
    names = (name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in whole)
    for step in plan(names, to_te=False, table=table):
        if step.hf != (step.te,):
            raise ValueError(f"{step.te} is saved whole (modules_to_save), and is {', '.join(step.hf)} elsewhere.")
    return made | whole, adapted


def _weight_name(module: str, a: torch.Tensor, b: torch.Tensor, base_config: Mapping[str, Any]) -> str:
    """Which weight of a module it is; the file does not say, but in an MLP no two have one shape."""
    if not module.endswith("layernorm_mlp"):
        return f"{module}.weight"
    outer, inner = base_config.get("hidden_size"), base_config.get("intermediate_size")
    shape = (b.shape[0], a.shape[1])
    shapes = {(2 * inner if isinstance(inner, int) else None, outer): "fc1_weight", (outer, inner): "fc2_weight"}
    if shape not in shapes:
        raise ValueError(
            f"an adapter of {module} is one of a weight of {list(shape)}, which the model, with hidden_size={outer!r} "
            f"and intermediate_size={inner!r}, has not."
        )
    return f"{module}.{shapes[shape]}"


def _is_named(weight: str, targets: Iterable[str] | None) -> bool:
    return any(weight == target or weight.endswith(f".{target}") for target in targets or ())


def _alpha(weight: str, config: Mapping[str, Any]) -> float:
    """`lora_alpha`, or what `alpha_pattern` says, which names a weight or its module as PEFT was told to adapt it."""
    name = weight if _is_named(weight, config.get("target_parameters")) else weight.rpartition(".")[0]
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, config["lora_alpha"])


def _target_modules(adapted: Sequence[Adapted], layers: Any) -> list[str]:
    """The ends of names that all layers have, such as `q_proj`; whole names where only some are adapted."""
    ends = Counter(each.module.rpartition(".")[2] for each in adapted)
    if all(count == layers for count in ends.values()):
        return sorted(ends)
    return [each.module for each in adapted]
