"""NVLlamaConfig's defaults, checks, writing and reading."""

import json
import re

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from conftest import TINY
from llama_te_core import NVLlamaConfig, NVLlamaModel
from llama_te_core.checkpoint_format import has_te_layout

TE_FIELDS = {
    "attn_input_format": "bshd",
    "self_attn_mask_type": "causal",
    "layer_precision": ["fp8", None, "fp4"],
    "use_quantized_model_init": True,
}
LLAMA_FIELDS = {
    "head_dim": 80,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    "attention_dropout": 0.25,
    "rms_norm_eps": 1e-4,
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
}


def make(**fields):
    return NVLlamaConfig(**{**TINY, **fields})


def test_defaults():
    config = NVLlamaConfig()
    assert config.attn_input_format == "thd"
    assert config.self_attn_mask_type == "padding_causal"
    assert config.layer_precision is None
    assert config.use_quantized_model_init is False
    assert config.layer_implementation == "auto"
    assert config.model_type == "nv_llama"
    assert isinstance(config, LlamaConfig)
    theirs = LlamaConfig().to_dict()
    ours = config.to_dict()
    assert {name for name in theirs if ours[name] != theirs[name]} == {"model_type"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_input_format": "sbhd"}, r"attn_input_format='sbhd' is not known: use one of 'thd', 'bshd'"),
        ({"attn_input_format": None}, r"attn_input_format"),
        ({"self_attn_mask_type": "no_mask"}, r"self_attn_mask_type='no_mask'.*'padding_causal', 'causal'"),
        ({"layer_implementation": "te"}, r"layer_implementation='te'.*'auto', 'transformer_engine', 'reference'"),
        ({"attention_bias": True}, r"attention_bias=True is not supported.*no biases"),
        ({"mlp_bias": True}, r"mlp_bias=True is not supported.*no biases"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported.*'silu'"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"layer_precision": ["fp8", "fp16", None]}, r"layer_precision\[1\]='fp16' is not known"),
        (
            {"layer_precision": ["FP8", None, None]},
            r"layer_precision\[0\]='FP8' is not known: use 'fp8', 'fp4' or None",
        ),
        ({"layer_precision": ["fp8", None]}, r"layer_precision has 2 entries, but num_hidden_layers=3"),
        ({"layer_precision": []}, r"layer_precision has 0 entries, but num_hidden_layers=3"),
        ({"layer_precision": [8, None, None]}, r"layer_precision\[0\]=8 is not known"),
        ({"layer_precision": "fp8"}, r"layer_precision='fp8' is not a list: give one entry for each layer"),
        ({"layer_precision": 3}, r"layer_precision=3 is not a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_json_round_trip(tmp_path):
    config = make(**LLAMA_FIELDS, **TE_FIELDS, pretraining_tp=2)
    config.save_pretrained(tmp_path)
    loaded = NVLlamaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in {**LLAMA_FIELDS, **TE_FIELDS, "pretraining_tp": 2}.items():
        if name != "rope_parameters":
            assert getattr(loaded, name) == value, name
    assert loaded.rope_parameters["factor"] == 2.0
    assert type(AutoConfig.from_pretrained(tmp_path)) is NVLlamaConfig
    assert NVLlamaConfig(**config.to_dict()).to_dict() == config.to_dict()
    again = NVLlamaConfig.from_dict(config.to_dict())
    assert (again.to_dict(), again.pretraining_tp) == (config.to_dict(), 2)


def test_loading_and_saving_again_changes_nothing(tmp_path):
    make(**LLAMA_FIELDS, **TE_FIELDS).save_pretrained(tmp_path / "one")
    NVLlamaConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("one", "two"))
    assert one == two
    assert one["auto_map"]["AutoModelForCausalLM"] == "llama_te.NVLlamaForCausalLM"
    assert (tmp_path / "two" / "llama_te.py").is_file()


def test_the_implementation_is_of_this_process_and_not_saved(tmp_path):
    config = make(layer_implementation="reference")
    assert "layer_implementation" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert "layer_implementation" not in (tmp_path / "config.json").read_text()
    assert NVLlamaConfig.from_pretrained(tmp_path).layer_implementation == "auto"
    explicit = NVLlamaConfig.from_pretrained(tmp_path, layer_implementation="reference")
    assert explicit.layer_implementation == "reference"


def test_a_llama_checkpoint_gives_its_configuration(tmp_path):
    theirs = LlamaConfig(**{**TINY, **LLAMA_FIELDS})
    theirs.save_pretrained(tmp_path)
    config = NVLlamaConfig.from_pretrained(tmp_path, layer_precision=["fp8", None, "fp8"], attn_input_format="bshd")
    assert config.model_type == "nv_llama"
    assert config.layer_precision == ["fp8", None, "fp8"]
    assert config.attn_input_format == "bshd"
    ours = config.to_dict()
    changed = {name for name, value in theirs.to_dict().items() if ours[name] != value}
    assert changed == {"model_type"}
    with pytest.raises(ValueError, match=r"layer_precision has 1 entries, but num_hidden_layers=3"):
        NVLlamaConfig.from_pretrained(tmp_path, layer_precision=["fp8"])
    with pytest.raises(ValueError, match=r"attn_input_format='sbhd' is not known"):
        NVLlamaConfig.from_pretrained(tmp_path, attn_input_format="sbhd")


def test_fields_that_are_set_later_are_checked_by_the_model():
    config = make()
    config.layer_precision = ["fp8", "fp5", None]
    with pytest.raises(ValueError, match=r"layer_precision\[1\]='fp5' is not known"):
        NVLlamaModel(config)
    config = make()
    config.attn_input_format = "sbhd"
    with pytest.raises(ValueError, match=r"attn_input_format='sbhd' is not known"):
        NVLlamaModel(config)


def test_older_names_of_fields_are_read(tmp_path):
    """Llama 3.1's own config.json has the older names `rope_theta` and `rope_scaling`."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields = {"model_type": "llama", **TINY, "rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = NVLlamaConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == {**scaling, "rope_theta": 500000.0}
    assert config.dtype == LlamaConfig.from_pretrained(tmp_path).dtype
    assert config.rope_parameters == LlamaConfig.from_pretrained(tmp_path).rope_parameters


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    MistralConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type='mistral'.*Llama checkpoints only"):
        NVLlamaConfig.from_pretrained(tmp_path)


class OtherConfig(LlamaConfig):
    """A configuration class of other code for this layout: fields of its own, some in `__init__` alone."""

    attn_input_format: str = "thd"
    self_attn_mask_type: str = "padding_causal"

    def __init__(self, layer_precision=None, use_quantized_model_init=False, **kwargs):
        super().__init__(**kwargs)
        self.layer_precision = layer_precision
        self.use_quantized_model_init = use_quantized_model_init


def test_classes_of_other_code_with_this_layout_read_the_file(tmp_path):
    ours = make(**LLAMA_FIELDS, **TE_FIELDS, pretraining_tp=2)
    ours.save_pretrained(tmp_path / "ours")
    theirs = OtherConfig.from_pretrained(tmp_path / "ours")
    different = {name for name, value in ours.to_dict().items() if getattr(theirs, name, None) != value}
    assert different == {"hidden_act"}
    theirs.architectures = ["NVLlamaForCausalLM"]
    theirs.save_pretrained(tmp_path / "theirs")
    again = NVLlamaConfig.from_pretrained(tmp_path / "theirs")
    assert {**again.to_dict(), "architectures": None} == {**ours.to_dict(), "architectures": None}
    assert has_te_layout(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    assert not has_te_layout(LlamaConfig().to_dict())


def test_a_configuration_is_changed_in_place_like_any_other(tmp_path):
    config = make()
    config.pretraining_tp = 4
    config.use_cache = False
    config.save_pretrained(tmp_path)
    loaded = NVLlamaConfig.from_pretrained(tmp_path)
    assert (loaded.pretraining_tp, loaded.use_cache) == (4, False)
    assert repr(config)
    assert json.loads(config.to_json_string())["use_cache"] is False


def test_angles_of_an_unknown_type_are_refused() -> None:
    spiral = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type='spiral': it must be one of default, linear, "):
        NVLlamaConfig(**TINY, rope_parameters=spiral)
    config = NVLlamaConfig(**TINY)
    config.rope_parameters = spiral
    with pytest.raises(ValueError, match="rope_type='spiral': it must be one of default, linear, "):
        NVLlamaModel(config)


NUMBERS = [
    *(("num_hidden_layers", value, "a whole number from 1 to 1,024") for value in (-1, 0, 1025, 10**9)),
    *(("num_attention_heads", value, "a whole number from 1 to 1,024") for value in (-4, 0, 2**20)),
    *(("num_key_value_heads", value, "a whole number from 1 to 1,024") for value in (-2, 0)),
    *(("hidden_size", value, "a whole number from 1 to 16,777,216") for value in (-64, 0, 10**15)),
    *(("intermediate_size", value, "a whole number from 1 to 67,108,864") for value in (-1, 0, 10**30)),
    *(("vocab_size", value, "a whole number from 1 to 2,147,483,647") for value in (-1, 0, 2**31)),
    *(("max_position_embeddings", value, "a whole number from 1 to 1,099,511,627,776") for value in (-1, 0, 2**63)),
    *(("head_dim", value, "a whole number from 1 to 65,536") for value in (-2, 0)),
    ("head_dim", 15, "even"),
    *(("rms_norm_eps", value, "a finite number from 0") for value in (float("nan"), float("inf"), -1e-6)),
    *(("attention_dropout", value, "a finite number from 0 up to 1") for value in (float("nan"), -0.5, 1.5)),
    *(("rope_theta", value, "a finite number above 0") for value in (float("nan"), float("inf"), 0, -1e4, "1e4", True)),
]


@pytest.mark.parametrize(("name", "value", "allowed"), NUMBERS, ids=lambda value: str(value)[:20])
def test_numbers_that_no_model_has_are_refused(name, value, allowed, tmp_path):
    message = rf"{name}={re.escape(repr(value))} .*must be {allowed}"
    with pytest.raises(ValueError, match=message):
        make(**{name: value})
    config = make()
    if name != "rope_theta":
        setattr(config, name, value)
    else:
        config.rope_parameters = {"rope_type": "default", "rope_theta": value}
    with pytest.raises(ValueError, match=message):
        NVLlamaModel(config)
    make().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(ValueError, match=message):
        NVLlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear", "factor": float("nan")}, r"factor=nan .* must be a finite number above 0"),
        ({"rope_type": "linear", "factor": 0.0}, r"factor=0.0 .* must be a finite number above 0"),
        ({"rope_type": "linear", "factor": "2"}, r"factor='2' .* must be a finite number above 0"),
        ({"rope_type": "linear", "factor": -(10**400)}, r"factor=-10+ .* must be a finite number above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": float("inf")}, r"beta_fast=inf .* must be a finite number"),
        ({"rope_type": "longrope", "short_factor": [1.0, 0.0]}, r"short_factor=\[1.0, 0.0\] .* list of finite numbers"),
        ({"rope_type": "longrope", "long_factor": 3}, r"long_factor=3 .* must be a list of finite numbers above 0"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            r"low_freq_factor=4.0 .* must be less than high_freq_factor=4.0",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_numbers_of_rotary_embeddings_that_no_model_has_are_refused(rope, message, name):
    with pytest.raises(ValueError, match=message):
        make(**{name: {"rope_theta": 1e4, **rope}})


def test_the_largest_sizes_are_accepted():
    make(num_hidden_layers=1024, max_position_embeddings=2**40, vocab_size=2**31 - 1, attention_dropout=None)
