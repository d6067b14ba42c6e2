"""Configurations of plain Llamas, converted without torch and transformers.

Importing those takes longer than converting a small checkpoint. A plain Llama has only the fields of a Llama, with
values of the expected kind. The classes of transformers write a predictable `config.json` for it, and this module
writes the same bytes. `model_config` converts every other configuration with those classes, which know what else is
allowed and which error to raise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from llama_te_core import checkpoint_format

from .architectures import ARCHITECTURES, architecture_of, renamed
from .config_file import CONFIG_NAME, has_te_layout, is_size

_LLAMA = ARCHITECTURES["llama"]


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_float(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return type(value) is int or _is_float(value)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_label_number(value: Any) -> bool:
    return type(value) is str and re.fullmatch(r"0|[1-9][0-9]{0,8}", value) is not None


def _is_dict(value: Any, is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> bool:
    return type(value) is dict and all(map(is_key, value)) and all(map(is_value, value.values()))


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return type(value) is list and all(map(is_item, value))


class _Field(NamedTuple):
    """A field of a configuration.

    Attributes:
        default: Its value if the file leaves it out.
        is_plain: Whether a value is of the expected kind.
    """

    default: Any
    is_plain: Callable[[Any], bool]


# The fields of every configuration. transformers writes them only if they differ from the default.
_COMMON = {
    "architectures": _Field(None, lambda value: value is None or _is_list(value, _is_text)),
    "dtype": _Field(None, lambda value: value in (None, "bfloat16", "float16", "float32")),
    "id2label": _Field({"0": "LABEL_0", "1": "LABEL_1"}, lambda value: _is_dict(value, _is_label_number, _is_text)),
    "label2id": _Field({"LABEL_0": 0, "LABEL_1": 1}, lambda value: _is_dict(value, _is_text, _is_token)),
    "problem_type": _Field(
        None, lambda value: value in (None, "regression", "single_label_classification", "multi_label_classification")
    ),
}
# The fields of a Llama. The defaults of head_dim and num_key_value_heads depend on other fields.
_OF_LLAMA = {
    "attention_bias": _Field(False, lambda value: value is False),
    "attention_dropout": _Field(0.0, _is_number),
    "bos_token_id": _Field(1, lambda value: value is None or _is_token(value)),
    "eos_token_id": _Field(2, lambda value: value is None or _is_token(value) or _is_list(value, _is_token)),
    "head_dim": _Field(None, lambda value: value is None or is_size(value)),
    "hidden_act": _Field("silu", lambda value: value == "silu"),
    "hidden_size": _Field(4096, is_size),
    "initializer_range": _Field(0.02, lambda value: _is_float(value) and 0 <= value <= 1),
    "intermediate_size": _Field(11008, is_size),
    "max_position_embeddings": _Field(2048, is_size),
    "mlp_bias": _Field(False, lambda value: value is False),
    "num_attention_heads": _Field(32, is_size),
    "num_hidden_layers": _Field(32, is_size),
    "num_key_value_heads": _Field(None, lambda value: value is None or is_size(value)),
    "pad_token_id": _Field(None, lambda value: value is None or _is_token(value)),
    "pretraining_tp": _Field(1, is_size),
    "rms_norm_eps": _Field(1e-6, _is_float),
    "tie_word_embeddings": _Field(False, _is_flag),
    "use_cache": _Field(True, _is_flag),
    "vocab_size": _Field(32000, is_size),
}
# Entries of a file that are not fields of the model.
_LEFT = ("_commit_hash", "_name_or_path", "model_type", "transformers_version")

_ROPE_FIELDS: tuple[str, ...] = ("rope_parameters", "rope_scaling", "rope_theta")  # older files have the last two
_ROPE_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"


class _Rope(NamedTuple):
    """The parameters of one type of rotary embeddings, besides its name and `rope_theta`."""

    needed: frozenset[str]
    optional: frozenset[str]


_ROPE = {
    "default": _Rope(frozenset(), frozenset()),
    "linear": _Rope(frozenset(("factor",)), frozenset()),
    "dynamic": _Rope(frozenset(("factor",)), frozenset()),
    "llama3": _Rope(frozenset(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)), frozenset()),
    "yarn": _Rope(
        frozenset(("factor", _ORIGINAL)),
        frozenset(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
    ),
    "longrope": _Rope(frozenset(("short_factor", "long_factor", _ORIGINAL)), frozenset(("attention_factor", "factor"))),
}


def plain_fields(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """All fields that the configuration of a plain Llama has in transformers.

    Args:
        config: The content of its `config.json`, in either layout.

    Returns:
        The fields in the Hugging Face layout as JSON types, with defaults for missing ones. `None` if the configuration
        is not plain.
    """
    if architecture_of(config) is not _LLAMA:
        return None
    given = dict(config)
    if has_te_layout(config):
        given = checkpoint_format.config_fields(config)
        given.pop("auto_map", None)
        if any(given.pop(name, value) != value for name, value in checkpoint_format.FIELDS.items()):
            return None
    for name in _LEFT:
        given.pop(name, None)
    old_dtype = given.pop("torch_dtype", None)
    if given.get("dtype") is None:
        given["dtype"] = old_dtype
    rope = {name: given.pop(name) for name in _ROPE_FIELDS if name in given}
    if ("id2label" in given) != ("label2id" in given):
        return None
    known = _COMMON | _OF_LLAMA
    fields = {name: given.pop(name, field.default) for name, field in known.items()}
    if given or not all(field.is_plain(fields[name]) for name, field in known.items()):
        return None
    heads = fields["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // heads
    rope_parameters = _rope_parameters(rope, fields["max_position_embeddings"])
    if rope_parameters is None or not _is_consistent({**fields, "rope_parameters": rope_parameters}):
        return None
    try:
        transformers_version = version("transformers")
    except PackageNotFoundError:  # transformers is on the path, but not installed
        return None
    return {
        **fields,
        "architectures": renamed(fields["architectures"], _LLAMA.hf_classes),
        "model_type": _LLAMA.model_type,
        "rope_parameters": rope_parameters,
        "transformers_version": transformers_version,
    }


def _is_consistent(fields: Mapping[str, Any]) -> bool:
    try:
        checkpoint_format.check_values(fields)
    except ValueError:
        return False
    eos = fields["eos_token_id"]
    tokens = [fields["bos_token_id"], fields["pad_token_id"], *(eos if isinstance(eos, list) else [eos])]
    return (
        fields["hidden_size"] % fields["num_attention_heads"] == 0
        and fields["num_attention_heads"] % fields["num_key_value_heads"] == 0
        and fields["head_dim"] % 2 == 0
        and all(token is None or token < fields["vocab_size"] for token in tokens)
        and not (fields["problem_type"] == "single_label_classification" and len(fields["id2label"]) == 1)
    )


def _rope_parameters(given: Mapping[str, Any], positions: int) -> dict[str, Any] | None:
    """The field `rope_parameters`, made from the old fields if the file has those. `None` if they are not plain."""
    found = [given[name] for name in ("rope_parameters", "rope_scaling") if given.get(name) is not None]
    if len(found) > 1 or not all(isinstance(each, dict) for each in found):
        return None
    rope = {"rope_theta": given.get("rope_theta", _ROPE_THETA), **(found[0] if found else {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    known = _ROPE.get(rope["rope_type"]) if _is_text(rope["rope_type"]) else None
    if known is None or not _is_text(rope.get("type", "")):
        return None
    if _ORIGINAL in known.needed:
        rope.setdefault(_ORIGINAL, positions)
    values = {name: value for name, value in rope.items() if name not in ("rope_type", "type")}
    names = values.keys() - {"rope_theta"}
    is_plain = (
        known.needed <= names <= known.needed | known.optional
        and all(_is_list(values.pop(name), _is_number) for name in ("short_factor", "long_factor") if name in values)
        and is_size(values.pop(_ORIGINAL, 1))
        and all(map(_is_number, values.values()))
    )
    return rope if is_plain else None


def write_plain_config(fields: Mapping[str, Any], folder: Path, *, to_te: bool) -> None:
    """Write the files that `save_pretrained` of the configuration would write.

    Args:
        fields: The result of `plain_fields`.
        folder: The target folder.
        to_te: Whether to write the Transformer Engine layout (otherwise the Hugging Face layout).
    """
    written = {name: value for name, value in fields.items() if name not in _COMMON or value != _COMMON[name].default}
    if to_te:
        loader = folder / f"{checkpoint_format.LOADER}.py"
        loader.write_text(checkpoint_format.LOADER_SOURCE, encoding="utf-8")
        if "architectures" in written:
            written["architectures"] = renamed(written["architectures"], _LLAMA.te_classes)
        written |= {
            **checkpoint_format.FIELDS,
            "auto_map": checkpoint_format.AUTO_MAP,
            "model_type": checkpoint_format.MODEL_TYPE,
        }
        text = checkpoint_format.config_text(written)
    else:
        if "id2label" in written:  # sorted as numbers, not as texts
            written["id2label"] = {int(key): label for key, label in written["id2label"].items()}
        text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
