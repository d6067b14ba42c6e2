"""Conversion of PEFT's LoRA adapters from the Transformer Engine layout to the Hugging Face layout.

An adapter adds B·A to a weight. A fused weight has the rows of several Hugging Face weights, and B has the same rows.
Each Hugging Face weight gets its rows of B, and all of A. No number changes.
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
from .configs.config_file import CONFIG_NAME, has_te_layout, head_sizes, read_config
from .errors import CheckpointError, first_line
from .layout.mapping import convert_tensors, map_names
from .sources.checkpoint import check_hub_id, not_on_the_hub
from .targets.new_folder import check_new_folder

# Importing torch takes seconds, and refusing a configuration does without it.
if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT nests the wrappers if it adapts several weights of a module.
_FACTOR = re.compile(re.escape(_PREFIX) + r"(?P<module>.*?)(?:\.base_layer)*\.lora_A\.weight")
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Other initialisations change the weights of the model too, and those have other shapes in the other layout.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapted:
    """A Hugging Face module whose weight has an adapter.

    Attributes:
        module: Its name.
        rank: Columns of B.
        alpha: Factor of B·A. PEFT divides it by the rank, or by the root of the rank.
    """

    module: str
    rank: int
    alpha: float


def convert_adapter(source: str | Path, folder: str | Path, *, base: str | None = None) -> list[Adapted]:
    """Convert a LoRA adapter for a model with the Transformer Engine layout to one for the model in transformers.

    Args:
        source: Folder that PEFT saved the adapter to.
        folder: The target folder, which must be missing or empty.
        base: The model of the adapter, of which `config.json` is read: a folder of either layout, or the id of a
            repository on the hub. `None` takes the model that the adapter names. The result names a Hugging Face model.

    Returns:
        The modules that have an adapter now.

    Raises:
        CheckpointError: The adapter, the model or the folder is not valid.
    """
    source, folder = Path(source), Path(folder)
    config = read_config(source, CONFIG)
    _check(config, source)
    check_new_folder(folder)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{source / CONFIG} does not name the adapter's model (base_model_name_or_path): name it with --base."
        )
    base_config = _base_config(base)
    try:
        tensors, adapted = _convert(_load(source / TENSORS), config, base_config, base)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source / TENSORS} does not fit the layers of {base}: {error}") from error
    is_te = has_te_layout(base_config)
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
            raise CheckpointError(f"{source / CONFIG} has {name}={config.get(name)!r}, which is not a number.")


def _base_config(base: str) -> dict[str, Any]:
    path = Path(base).expanduser()
    if not path.exists():
        check_hub_id(base)
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(base, CONFIG_NAME)).parent
        except Exception as error:  # any failure of the download is reported in one line
            raise not_on_the_hub(base, error) from error
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
    """The tensors of the new adapter, and the modules that they adapt.

    Raises:
        ValueError: The tensors are not an adapter of the model, or it cannot be converted.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    whole = dict(tensors)
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        a, b = whole.pop(name), whole.pop(name.removesuffix(_A) + _B, None)
        if b is None:
            raise ValueError(f"{name} has no B.")
        weight = _weight_name(match["module"], a, b, base_config)
        if "layernorm" in match["module"] and not _is_named(weight, config.get("target_parameters")):
            raise ValueError(
                f"{match['module']} was adapted as a whole module (target_modules), together with its norm. The "
                "other layout has no such module: adapt its weights (target_parameters)."
            )
        factors[weight] = (a, b)

    rules, sizes = architecture_of(base_config).rules, head_sizes(base_config, base)
    mappings = map_names(factors, to_te=False, rules=rules)
    rows = convert_tensors(mappings, {name: b for name, (_, b) in factors.items()}, sizes, to_te=False)
    made: dict[str, torch.Tensor] = {}
    adapted = []
    for mapping in mappings:
        a, _ = factors[mapping.te]
        alpha = _alpha(mapping.te, config)
        for name in mapping.hf:
            module = name.removesuffix(".weight")
            made[_PREFIX + module + _A] = a.clone()
            made[_PREFIX + module + _B] = rows[name]
            adapted.append(Adapted(module, len(a), alpha))
    # A tensor that PEFT saved whole, such as the head, must be the same in the other layout.
    names = (name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in whole)
    for mapping in map_names(names, to_te=False, rules=rules):
        if mapping.hf != (mapping.te,):
            raise ValueError(
                f"{mapping.te} is saved whole (modules_to_save), but is {', '.join(mapping.hf)} in the other layout."
            )
    return made | whole, adapted


def _weight_name(module: str, a: torch.Tensor, b: torch.Tensor, base_config: Mapping[str, Any]) -> str:
    """The name of an adapted weight. The file names only the module, but the weights of an MLP differ in shape."""
    if not module.endswith("layernorm_mlp"):
        return f"{module}.weight"
    outer, inner = base_config.get("hidden_size"), base_config.get("intermediate_size")
    shape = (b.shape[0], a.shape[1])
    shapes = {(2 * inner if isinstance(inner, int) else None, outer): "fc1_weight", (outer, inner): "fc2_weight"}
    if shape not in shapes:
        raise ValueError(
            f"an adapter of {module} is for a weight of {list(shape)}, but the model, with hidden_size={outer!r} and "
            f"intermediate_size={inner!r}, has no such weight."
        )
    return f"{module}.{shapes[shape]}"


def _is_named(weight: str, targets: Iterable[str] | None) -> bool:
    return any(weight == target or weight.endswith(f".{target}") for target in targets or ())


def _alpha(weight: str, config: Mapping[str, Any]) -> float:
    """The alpha of a weight. `alpha_pattern` names the weight or its module, as PEFT was told to adapt it."""
    name = weight if _is_named(weight, config.get("target_parameters")) else weight.rpartition(".")[0]
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, config["lora_alpha"])


def _target_modules(adapted: Sequence[Adapted], layers: Any) -> list[str]:
    """The last parts of the names, such as `q_proj`, if they are adapted in all layers; otherwise the whole names."""
    ends = Counter(each.module.rpartition(".")[2] for each in adapted)
    if all(count == layers for count in ends.values()):
        return sorted(ends)
    return [each.module for each in adapted]
