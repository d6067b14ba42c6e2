"""Configurations of plain Llamas, converted without torch and transformers.

Importing those takes longer than converting a small checkpoint. What their classes make of a `config.json` is clear
where it has the fields of a Llama alone, with values of the kind that they should have: this module makes the same of
it, byte for byte. Any other is left to the classes (`architectures`), which know what else is allowed and what to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from .architectures import ARCHITECTURES, architecture_of, renamed
from .core_format import checkpoint_format

_LLAMA = ARCHITECTURES["llama"]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


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
    """A field of a configuration: what it is where a file leaves it out, and whether a value is plain."""

    default: Any
    is_plain: Callable[[Any], bool]


# Of every configuration in transformers, which writes those alone that are not the default.
_COMMON = {
    "architectures": _Field(None, lambda value: value is None or _is_list(value, _is_text)),
    "dtype": _Field(None, lambda value: value in (None, "bfloat16", "float16", "float32")),
    "id2label": _Field({"0": "LABEL_0", "1": "LABEL_1"}, lambda value: _is_dict(value, _is_label_number, _is_text)),
    "label2id": _Field({"LABEL_0": 0, "LABEL_1": 1}, lambda value: _is_dict(value, _is_text, _is_token)),
    "problem_type": _Field(
        None, lambda value: value in (None, "regression", "single_label_classification", "multi_label_classification")
    ),
}
# Of a Llama, which has two more: head_dim and num_key_value_heads, whose defaults depend on others.
_OF_LLAMA = {
    "attention_bias": _Field(False, lambda value: value is False),
    "attention_dropout": _Field(0.0, _is_number),
    "bos_token_id": _Field(1, lambda value: value is None or _is_token(value)),
    "eos_token_id": _Field(2, lambda value: value is None or _is_token(value) or _is_list(value, _is_token)),
    "head_dim": _Field(None, lambda value: value is None or _is_size(value)),
    "hidden_act": _Field("silu", lambda value: value == "silu"),
    "hidden_size": _Field(4096, _is_size),
    "initializer_range": _Field(0.02, lambda value: _is_float(value) and 0 <= value <= 1),
    "intermediate_size": _Field(11008, _is_size),
    "max_position_embeddings": _Field(2048, _is_size),
    "mlp_bias": _Field(False, lambda value: value is False),
    "num_attention_heads": _Field(32, _is_size),
    "num_hidden_layers": _Field(32, _is_size),
    "num_key_value_heads": _Field(None, lambda value: value is None or _is_size(value)),
    "pad_token_id": _Field(None, lambda value: value is None or _is_token(value)),
    "pretraining_tp": _Field(1, _is_size),
    "rms_norm_eps": _Field(1e-6, _is_float),
    "tie_word_embeddings": _Field(False, _is_flag),
    "use_cache": _Field(True, _is_flag),
    "vocab_size": _Field(32000, _is_size),
}
# What is in a file and no field of the model.
_LEFT = ("_commit_hash", "_name_or_path", "model_type", "transformers_version")

_ROPE_FIELDS: tuple[str, ...] = ("rope_parameters", "rope_scaling", "rope_theta")  # the last two are of older files
_ROPE_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"


class _Rope(NamedTuple):
    """The parameters of a type of rotary embeddings, besides its name and `rope_theta`."""

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
    """All fields of a plain Llama, as its configuration in transformers has them.

    Args:
        config: The content of its `config.json`, in either layout.

    Returns:
        In the Hugging Face layout, with defaults for what the file leaves out, as JSON types. `None` if the classes
        have to look at it.
    """
    if architecture_of(config) is not _LLAMA:
        return None
    given = dict(config)
    if config.get("model_type") == checkpoint_format.MODEL_TYPE:
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
    if rope_parameters is None or not _is_consistent(fields):
        return None
    try:
        transformers_version = version("transformers")
    except PackageNotFoundError:  # used from a source folder
        return None
    names = {te: hf for hf, te in _LLAMA.te_classes.items()}
    return {
        **fields,
        "architectures": renamed(fields["architectures"], names),
        "model_type": _LLAMA.model_type,
        "rope_parameters": rope_parameters,
        "transformers_version": transformers_version,
    }


def _is_consistent(fields: Mapping[str, Any]) -> bool:
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
    """The field of that name, from it or from its old ones; `None` if it is not plain."""
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
        and _is_size(values.pop(_ORIGINAL, 1))
        and all(map(_is_number, values.values()))
    )
    return rope if is_plain else None


def write_plain_config(fields: Mapping[str, Any], folder: Path, *, to_te: bool) -> None:
    """Write what `save_pretrained` of the configuration would.

    Args:
        fields: What `plain_fields` returned.
        folder: Where to.
        to_te: As that of the Transformer Engine layout (else of Hugging Face's).
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
        if "id2label" in written:  # in the order of numbers
            written["id2label"] = {int(key): label for key, label in written["id2label"].items()}
        text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
