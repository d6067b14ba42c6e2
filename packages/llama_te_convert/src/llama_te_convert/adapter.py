"""Conversion of PEFT's LoRA adapters between the Transformer Engine layout and the Hugging Face layout.

An adapter adds scale·B·A to a weight. A fused weight has the rows of several Hugging Face weights, and B has the same
rows. To the Hugging Face layout, each weight gets its rows of B, and all of A. To the Transformer Engine layout, the
adapters of several weights become one: A has the rows of all of them, and B has blocks, with zeros elsewhere.

A model of `llama_te_core` also takes adapters of the single projections, as published ones are. Such an adapter has the
same form in both layouts.

Shapes: R rank, E columns of the weight, F rows of the weight.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_te_core.files.foreign_code import without_code

from .configs.architectures import architecture_of
from .configs.config_file import CONFIG_NAME, has_te_layout, head_sizes, is_size, read_config
from .errors import CheckpointError, CheckpointWarning
from .layout.mapping import TensorMapping, convert_tensors, map_known_names, map_names
from .layout.row_order import HeadSizes
from .layout.rules import Rule
from .sources.checkpoint import check_hub_id, not_on_the_hub
from .sources.recorded_checksums import refuse_changed
from .sources.safetensors import SafetensorsFile
from .targets.new_folder import new_target, written_whole

# Importing torch takes seconds, and refusing a configuration does without it.
if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT nests the wrappers if it adapts several weights of a module.
_FACTOR = re.compile(re.escape(_PREFIX) + r"(?P<module>.*?)(?:\.base_layer)*\.lora_A\.weight")
_A, _B = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDE = ".lora_magnitude_vector"  # of DoRA
_MAX_QUANTIFIERS = 3  # in a regular expression of `alpha_pattern`
# Other initialisations change the weights of the model too, and those have other shapes in the other layout.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapted:
    """A module or a fused weight that has an adapter.

    Attributes:
        module: Its name.
        rank: Columns of B.
        alpha: Factor of B·A. PEFT divides it by the rank, or by the root of the rank.
        is_weight: Whether `module` names a weight (`target_parameters`), not a module (`target_modules`).
    """

    module: str
    rank: int
    alpha: float
    is_weight: bool = False


def convert_adapter(
    source: str | Path, folder: str | Path, *, base: str | None = None, to_te: bool = False
) -> list[Adapted]:
    """Convert a LoRA adapter between a model with the Transformer Engine layout and the model in transformers.

    Args:
        source: Folder that PEFT saved the adapter to.
        folder: The target folder, which must be missing or empty.
        base: The model of the adapter, of which `config.json` is read: a folder of either layout, or the id of a
            repository on the hub. `None` takes the model that the adapter names. The result names the model if it has
            the layout of the result.
        to_te: Whether to make one adapter of each fused weight. Different scales of its parts are multiplied into B;
            all else is exact. The result has no dropout, which PEFT refuses on fused weights. An adapter with DoRA
            keeps its projections, which models of `llama_te_core` take as they are.

    Returns:
        The modules that have an adapter now.

    Raises:
        CheckpointError: The adapter, the model or the folder is not valid.
    """
    source, folder = Path(source), Path(folder)
    new_target(folder)
    refuse_changed(source)
    config = read_config(source, CONFIG)
    _check(config, source)
    if without_code(config):
        warnings.warn(
            f"not copied from {source}: the entry auto_map of {CONFIG!r} (it names code).", CheckpointWarning, 2
        )
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{source / CONFIG} does not name the adapter's model (base_model_name_or_path): name it with --base."
        )
    base_config = _base_config(base)
    loaded = _load(source / TENSORS)
    is_stacked = False
    try:
        if _has_projections(loaded):
            is_stacked = to_te and not config.get("use_dora")
            tensors, adapted = (_stack if is_stacked else _keep)(loaded, config, base_config, base)
        elif to_te:
            raise ValueError(
                "it adapts no projections, such as q_proj, so it has the Transformer Engine layout already"
            )
        else:
            tensors, adapted = _split(loaded, config, base_config, base)
    except CheckpointError:
        raise
    except (ValueError, RuntimeError) as error:  # torch's, for matrices that do not fit each other
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{source / TENSORS} does not fit the layers of {base}: {problem}") from error
    layers = base_config.get("num_hidden_layers")
    modules = _targets([each.module for each in adapted if not each.is_weight], layers, is_weight=False)
    weights = _targets([each.module for each in adapted if each.is_weight], layers, is_weight=True)
    config |= {
        "auto_mapping": None,
        "base_model_name_or_path": base if has_te_layout(base_config) == to_te else None,
        "exclude_modules": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "target_modules": modules or None,
        "target_parameters": weights or None,
        "rank_pattern": {each.module: each.rank for each in adapted if each.rank != config["r"]},
        "alpha_pattern": {each.module: each.alpha for each in adapted if each.alpha != config["lora_alpha"]},
    }
    if is_stacked:
        config["lora_dropout"] = 0.0
    from safetensors.torch import save_file

    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        save_file(tensors, unfinished / TENSORS, metadata={"format": "pt"})
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
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
        if not _is_number(config.get(name)):
            raise CheckpointError(f"{source / CONFIG} has {name}={config.get(name)!r}, which is not a number above 0.")
    patterns = config.get("alpha_pattern") or {}
    if (
        not isinstance(patterns, dict)
        or not all(map(_is_pattern, patterns))
        or not all(map(_is_number, patterns.values()))
    ):
        raise CheckpointError(
            f"{source / CONFIG} has alpha_pattern={patterns!r}: it must give a number to names of modules, or to "
            f"regular expressions with at most {_MAX_QUANTIFIERS} quantifiers, none of them after a group."
        )
    for name in ("target_modules", "target_parameters"):
        targets = config.get(name)
        if not (
            targets is None or isinstance(targets, str) or (isinstance(targets, list) and all(map(_is_text, targets)))
        ):
            raise CheckpointError(f"{source / CONFIG} has {name}={targets!r}: it must be a list of names.")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise CheckpointError(
            f"{source / CONFIG} has base_model_name_or_path={config['base_model_name_or_path']!r}, which is not a name."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pattern(text: str) -> bool:
    """Whether a regular expression is valid and cannot take exponential time."""
    if len(re.findall(r"[*+?{]", text)) > _MAX_QUANTIFIERS or re.search(r"\)[*+?{]", text):
        return False
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _base_config(base: str) -> dict[str, Any]:
    path = Path(base).expanduser()
    if not os.path.exists(path):  # unlike Path.exists, it takes names of any length
        check_hub_id(base)
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(base, CONFIG_NAME)).parent
        except Exception as error:  # any failure of the download is reported in one line
            raise not_on_the_hub(base, error) from error
    return read_config(path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists() and path.with_suffix(".bin").exists():
        raise CheckpointError(
            f"{path.with_suffix('.bin')} is a pickle file, which can run code when it is read: load the adapter with "
            "PEFT and save it again, which writes safetensors."
        )
    from .sources.torch_tensors import read_tensor

    # The safetensors package maps the file, and a file that gets shorter meanwhile would end the process.
    with contextlib.closing(SafetensorsFile(path)) as file:
        tensors = {name: read_tensor(file, name, 0, info.rows).clone() for name, info in file.tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith((_A, _B)) and (tensor.dim() != 2 or 0 in tensor.shape):
            raise CheckpointError(f"{path}: {name} is {list(tensor.shape)}, but a factor of an adapter is a matrix.")
    return tensors


def _has_projections(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any((match := _FACTOR.fullmatch(name)) and match["module"].endswith("_proj") for name in tensors)


def _factors(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Take the two factors of each adapter out of `tensors`, with the name of its module. An MLP may have two adapters.

    Yields:
        The name of a module, and its A and B.

    Raises:
        ValueError: A factor is missing.
    """
    for name in list(tensors):
        match = _FACTOR.fullmatch(name)
        if match is not None:
            a, b = tensors.pop(name), tensors.pop(name.removesuffix(_A) + _B, None)
            if b is None:
                raise ValueError(f"{name} has no B.")
            if b.shape[-1] != len(a):
                raise ValueError(f"{name} is {list(a.shape)}, but its B is {list(b.shape)}: they have different ranks.")
            yield match["module"], (a, b)


def _keep(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base_config: Mapping[str, Any], base: str
) -> tuple[dict[str, torch.Tensor], list[Adapted]]:
    """Keep an adapter of projections, which has one form for both layouts.

    Raises:
        ValueError: The model has no such module.
    """
    rules, rest = architecture_of(base_config).rules, dict(tensors)
    factors = dict(_factors(rest))
    _check_whole((name for name in rest if not name.endswith(_MAGNITUDE)), rules, to_te=True)
    known = map_known_names([f"{module}.weight" for module in factors], is_te=False, rules=rules)
    for module in factors:
        if f"{module}.weight" not in known:
            raise ValueError(f"the model has no module {module}.")
    adapted = [Adapted(module, len(a), _alpha(f"{module}.weight", config)) for module, (a, _) in factors.items()]
    return dict(tensors), adapted


def _stack(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base_config: Mapping[str, Any], base: str
) -> tuple[dict[str, torch.Tensor], list[Adapted]]:
    """Make one adapter of each fused weight from the adapters of its projections: see `_split` for the results."""
    whole = dict(tensors)
    factors = {f"{module}.weight": factor for module, factor in _factors(whole)}
    rules, sizes = architecture_of(base_config).rules, head_sizes(base_config, base)
    known = map_known_names(factors, is_te=False, rules=rules)
    for name in factors:
        if name not in known:
            raise ValueError(f"the model has no weight {name}.")
    parts = _part_rows(base_config, sizes)
    import torch

    made: dict[str, torch.Tensor] = {}
    adapted = []
    for mapping in {mapping.te: mapping for mapping in known.values()}.values():
        present = [name for name in mapping.hf if name in factors]
        rank = sum(len(factors[name][0]) for name in present)
        first = present[0]
        scale = _scale(_alpha(first, config), len(factors[first][0]), config)
        blocks, column = {}, 0
        for name in mapping.hf:
            if name in factors:
                a_RE, b_FR = factors[name]
                ratio = _scale(_alpha(name, config), len(a_RE), config) / scale
                block = b_FR.new_zeros(len(b_FR), rank)
                block[:, column : column + len(a_RE)] = b_FR if ratio == 1 else b_FR * ratio
                column += len(a_RE)
            else:
                block = factors[first][1].new_zeros(parts[name.split(".")[-2]], rank)
            blocks[name] = block
        if len(mapping.hf) == 1:
            blocks = {first: factors[first][1]}
        fused = convert_tensors([mapping], blocks, sizes, to_te=True)[mapping.te]
        is_weight = mapping.hf != (mapping.te,)
        name = mapping.te if is_weight else mapping.te.removesuffix(".weight")
        alpha = _alpha(first, config) * rank / len(factors[first][0])
        if config.get("use_rslora"):
            alpha = scale * math.sqrt(rank)
        adapted.append(Adapted(name, rank, int(alpha) if alpha == int(alpha) else alpha, is_weight))
        saved = _PREFIX + _saved_module(mapping.te, known)
        made[saved + _A] = torch.cat([factors[name][0] for name in present])
        made[saved + _B] = fused
    _check_whole(whole, rules, to_te=True)
    return made | whole, adapted


def _part_rows(base_config: Mapping[str, Any], sizes: HeadSizes) -> dict[str, int]:
    """Rows of the projections that are fused with others."""
    inner = base_config.get("intermediate_size")
    if not is_size(inner):
        raise ValueError(f"intermediate_size={inner!r} in the model's configuration is not a positive whole number")
    keys = sizes.num_key_value_heads * sizes.head_dim
    queries = sizes.num_attention_heads * sizes.head_dim
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}


def _scale(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _saved_module(weight: str, known: Mapping[str, TensorMapping]) -> str:
    """The name under which PEFT saves the adapter of a weight. Of an MLP with two, the first is inside the other."""
    module, _, parameter = weight.rpartition(".")
    second = f"{module}.fc2_weight"
    is_inside = parameter == "fc1_weight" and any(mapping.te == second for mapping in known.values())
    return f"{module}.base_layer" if is_inside else module


def _split(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base_config: Mapping[str, Any], base: str
) -> tuple[dict[str, torch.Tensor], list[Adapted]]:
    """The tensors of the new adapter, and the modules that they adapt.

    Raises:
        ValueError: The tensors are not an adapter of the model, or it cannot be converted.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    whole = dict(tensors)
    for module, (a, b) in _factors(whole):
        weight = _weight_name(module, a, b, base_config)
        if "layernorm" in module and not _is_named(weight, config.get("target_parameters")):
            raise ValueError(
                f"{module} was adapted as a whole module (target_modules), together with its norm. The "
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
    _check_whole(whole, rules, to_te=False)
    return made | whole, adapted


def _check_whole(names: Iterable[str], rules: Sequence[Rule], *, to_te: bool) -> None:
    """Refuse a tensor that PEFT saved whole, such as the head, if it is not the same in the other layout.

    Raises:
        ValueError: The message names the tensor.
    """
    plain = {name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in names}
    known = map_known_names(plain, is_te=not to_te, rules=rules)
    unknown = sorted(plain - known.keys())
    if unknown:
        raise ValueError(f"No rule for: {', '.join(unknown)}.")
    for name, mapping in known.items():
        if mapping.hf != (mapping.te,):
            others = ", ".join(mapping.hf) if name == mapping.te else mapping.te
            raise ValueError(f"{name} is saved whole (modules_to_save), but is {others} in the other layout.")


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


def _targets(names: Sequence[str], layers: Any, *, is_weight: bool) -> list[str]:
    """The ends of the names, such as `q_proj`, if they are adapted in all layers; otherwise the whole names."""
    ends = Counter(re.sub(r".*layers\.\d+\.", "", name) if is_weight else name.rpartition(".")[2] for name in names)
    if all(count == layers for count in ends.values()):
        return sorted(ends)
    return list(names)
