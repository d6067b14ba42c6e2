"""Configurations of plain Llamas: the files written without torch and transformers equal those of their classes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from conftest import TINY
from llama_te_convert.configs.model_config import hf_config, te_config
from llama_te_convert.configs.plain_config import _COMMON, _OF_LLAMA, plain_fields, write_plain_config
from llama_te_convert.sources.checkpoint import Checkpoint
from llama_te_convert.verify.model_fields import model_fields
from llama_te_core import NVLlamaConfig

LABELS: dict[str, Any] = {
    "id2label": {str(i): f"label {i}" for i in range(12)},
    "label2id": {f"label {i}": i for i in range(12)},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2, 3.5] * 4, "factor": 2.0},
}
# The configuration of Llama 3.2 1B.
LLAMA_3_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
PLAIN: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "Llama 3.2": LLAMA_3_2,
    "no head_dim": {**TINY, "head_dim": None, "num_key_value_heads": None},
    "a head_dim of its own": {**TINY, "head_dim": 80},
    "tied": {**TINY, "tie_word_embeddings": True, "use_cache": False},
    "no tokens": {**TINY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 3},
    "both dtypes": {**TINY, "dtype": "float16", "torch_dtype": "float32"},
    "no dtype": {**TINY, "dtype": None, "torch_dtype": None},
    "where it was": {**TINY, "_name_or_path": "/tmp/llama", "_commit_hash": None},
    "large numbers": {**TINY, "hidden_size": 2**24, "head_dim": 2**16, "max_position_embeddings": 2**40},
    "other numbers": {**TINY, "attention_dropout": 0, "rms_norm_eps": 1e-12, "pretraining_tp": 4},
    "classes of others": {**TINY, "architectures": ["Another", "LlamaModel"]},
    "no classes": {**TINY, "architectures": []},
    "labels": {**TINY, **LABELS, "architectures": ["LlamaForSequenceClassification"]},
    "two labels": {**TINY, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    "one label": {**TINY, "id2label": {"0": "x"}, "label2id": {"x": 0}, "problem_type": "regression"},
    "a problem": {**TINY, **LABELS, "problem_type": "single_label_classification"},
    "questions": {**TINY, "architectures": ["LlamaForQuestionAnswering"]},
    **{
        f"rope {name}": {**TINY, "rope_parameters": {"rope_type": name, "rope_theta": 5e5, **rope}}
        for name, rope in ROPES.items()
    },
    **{
        f"old rope {name}": {**TINY, "rope_theta": 1000000, "rope_scaling": {"type": name, **rope}}
        for name, rope in ROPES.items()
    },
    "no rope": {**TINY, "rope_scaling": None, "rope_theta": 500000.0},
    "rope of no type": {**TINY, "rope_parameters": {"rope_theta": 5e5}},
}
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "another field": {"a_field_of_somebody_else": 1},
    "a generation parameter": {"temperature": 0.6},
    "a bias": {"attention_bias": True},
    "a number as text": {"hidden_size": "64"},
    "a flag as number": {"use_cache": 1},
    "no number": {"rms_norm_eps": float("nan")},
    "an epsilon as integer": {"rms_norm_eps": 1},
    "heads that do not divide": {"num_attention_heads": 5},
    "groups that do not divide": {"num_key_value_heads": 3},
    "an odd head": {"head_dim": 17},
    "a token beyond": {"eos_token_id": [2, 257]},
    "a token before": {"pad_token_id": -1},
    "another activation": {"hidden_act": "gelu"},
    "another dtype": {"dtype": "float64"},
    "labels with numbers of another kind": {"id2label": {"007": "x", "٣": "y"}, "label2id": {"x": 7, "y": 3}},
    "labels one way": {"id2label": {"0": "x"}},
    "one of one label": {"id2label": {"0": "x"}, "label2id": {"x": 0}, "problem_type": "single_label_classification"},
    "an unknown rope": {"rope_scaling": {"rope_type": "another", "factor": 2.0}},
    "a rope of no name": {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
    "a rope that lacks": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "a rope with more": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "more": 1}},
    "a rope that is none": {"rope_parameters": [1]},
    "two ropes": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
    "a factor as text": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "original positions": {"original_max_position_embeddings": 32},
}


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def by_classes(content: dict[str, Any], folder: Path) -> dict[str, str]:
    config = (hf_config if content["model_type"] == "nv_llama" else te_config)(content)
    config.save_pretrained(folder)
    return files(folder)


def plainly(content: dict[str, Any], folder: Path) -> dict[str, str] | None:
    fields = plain_fields(content)
    if fields is None:
        return None
    folder.mkdir()
    write_plain_config(fields, folder, to_te=content["model_type"] != "nv_llama")
    return files(folder)


@pytest.mark.parametrize("name", PLAIN)
def test_both_ways_are_byte_for_byte_what_the_classes_write(tmp_path: Path, name: str) -> None:
    content = {"model_type": "llama", **PLAIN[name]}
    before = json.dumps(content)
    te = by_classes(content, tmp_path / "te")
    assert te.keys() == {"config.json", "llama_te.py"}
    assert plainly(content, tmp_path / "plain te") == te
    assert json.dumps(content) == before
    content_te = json.loads(te["config.json"])
    hf = by_classes(content_te, tmp_path / "hf")
    assert hf.keys() == {"config.json"}
    assert plainly(content_te, tmp_path / "plain hf") == hf
    content_hf = json.loads(hf["config.json"])
    assert plainly(content_hf, tmp_path / "again") == by_classes(content_hf, tmp_path / "te again") == te
    for each in (content, content_te):  # the fields that tensors are checked against
        expected = model_fields(Checkpoint("somewhere", each, None))  # type: ignore[arg-type]
        fields = plain_fields(each)
        assert fields is not None
        fields["rope_parameters"].pop("type", None)
        for field in expected.keys() - {"id2label", "is_encoder_decoder"}:
            assert fields[field] == expected[field], field
        assert len(fields["id2label"]) == len(expected["id2label"])


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_the_classes_must_look_at(name: str) -> None:
    content = {"model_type": "llama", **TINY}
    assert plain_fields(content) is not None
    assert plain_fields({**content, **NOT_PLAIN[name]}) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_input_format": "bshd"},
        {"attn_input_format": "sbhd"},
        {"layer_precision": ["fp8", None, None]},
        {"use_quantized_model_init": True},
        {"source_model_type": "mistral"},
    ],
    ids=str,
)
def test_a_te_configuration_with_more_than_the_defaults(tmp_path: Path, fields: dict[str, Any]) -> None:
    NVLlamaConfig(**TINY).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert plain_fields(content) is not None
    assert plain_fields({**content, **fields}) is None


def test_mistrals_have_defaults_of_their_own() -> None:
    assert plain_fields(MistralConfig(**TINY, sliding_window=None).to_dict()) is None


def test_defaults_are_those_of_transformers() -> None:
    declared = {field.name: field.default for field in dataclasses.fields(LlamaConfig)}
    for name, field in _OF_LLAMA.items():
        assert field.default == declared[name] and type(field.default) is type(declared[name]), name
    theirs = json.loads(json.dumps(LlamaConfig().to_dict()))
    for name, field in _COMMON.items():
        assert field.default == theirs[name], name
    every = {*_OF_LLAMA, *_COMMON, "rope_parameters"}
    own = {name for name in declared if name not in {field.name for field in dataclasses.fields(LlamaConfig.__base__)}}
    assert own <= every, "a field that is new in transformers"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([0.0, 0.02, 0.5, 1.0, 1e-6, -1.0, 1e4, float("inf"), "silu", "float16", "x", [], [1, 2], {}]),
    st.sampled_from([{"type": name, **rope} for name, rope in ROPES.items()]),
    st.sampled_from([{"rope_type": name, "rope_theta": 1e4, **rope} for name, rope in ROPES.items()]),
    st.sampled_from([LABELS["id2label"], LABELS["label2id"]]),
)
NAMES = st.sampled_from([*_COMMON, *_OF_LLAMA, "rope_parameters", "rope_scaling", "rope_theta", "torch_dtype", "extra"])


@settings(deadline=None, derandomize=True, database=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(NAMES, VALUES, max_size=4))
def test_whatever_is_taken_for_plain_is_what_the_classes_write(tmp_path_factory, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("plain")
    content = {"model_type": "llama", **TINY, **json.loads(json.dumps(fields))}
    made = plainly(content, folder / "plain")
    if made is not None:
        assert made == by_classes(content, folder / "classes")


def test_a_plain_llama_is_converted_without_torch_and_transformers(tiny_llama, tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    code = (
        "import sys\n"
        "from llama_te_convert.cli import main\n"
        "hf, te, back = sys.argv[1:]\n"
        "assert main(['to-te', hf, te]) == main(['to-hf', te, back]) == 0\n"
        "print([name for name in ('torch', 'transformers', 'llama_te_core.models') if name in sys.modules])"
    )
    folders = [str(tmp_path / name) for name in ("hf", "te", "back")]
    done = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()
