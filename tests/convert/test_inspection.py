"""Inspection of valid and broken checkpoints."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralConfig,
    MistralForQuestionAnswering,
)

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.layout.tensor_info import TensorInfo
from llama_te_convert.sources.checkpoint import Checkpoint
from llama_te_convert.sources.torch_tensors import info_of
from llama_te_convert.verify.inspection import DtypeUse, inspect
from llama_te_convert.verify.model_fields import ModelSizes

QKV = "model.layers.{}.self_attention.layernorm_qkv.weight"


class Described:
    """Tensors that have names, dtypes and shapes, and cannot be read."""

    concurrent = True

    def __init__(self, tensors):
        self.tensors = tensors

    def read(self, name, start, stop):
        raise AssertionError("an inspection reads no values")

    def close(self):
        pass


def described(model):
    infos = {name: info_of(each) for name, each in model.named_parameters()}
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return Checkpoint("somewhere", config, Described(infos))


def changed(checkpoint, tensors=None, without=(), **fields):
    """The checkpoint with some tensors and fields replaced or added, and without some tensors."""
    infos = {**checkpoint.source.tensors, **(tensors or {})}
    kept = {name: info for name, info in infos.items() if name not in without}
    return Checkpoint(checkpoint.path, {**checkpoint.config, **fields}, Described(kept))


def info(*shape, dtype="float32"):
    return TensorInfo(dtype, shape)


@pytest.fixture(scope="module")
def hf():
    return described(LlamaForCausalLM(LlamaConfig(**TINY)))


@pytest.fixture(scope="module")
def te():
    return described(convert_llama_hf_to_te(LlamaForCausalLM(LlamaConfig(**TINY))))


# --- valid checkpoints ------------------------------------------------------------------------------------------------


def test_a_hugging_face_folder(opened, tiny_llama, tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    found = inspect(opened(tmp_path))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (found.layout, found.architecture, found.problems) == ("Hugging Face", "LlamaForCausalLM", ())
    assert found.sizes == ModelSizes(3, 64, 96, 4, 2, 16, 257, "default", False)
    assert found.dtypes == {
        "bfloat16": DtypeUse(29, parameters - 64, 2 * (parameters - 64)),
        "float32": DtypeUse(1, 64, 256),
    }
    assert (found.parameters, found.bytes, len(found.tensors)) == (parameters, 2 * parameters + 128, 30)
    by_name = {each.name: each for each in found.tensors}
    assert by_name["model.layers.2.mlp.up_proj.weight"].others == ("model.layers.2.layernorm_mlp.fc1_weight",)
    assert by_name["model.layers.2.mlp.up_proj.weight"].shape == (96, 64)
    assert found.mapping[QKV.format(1)] == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    assert len(found.mapping) == 21
    lines = found.lines()
    assert lines[0] == f"{tmp_path}: LlamaForCausalLM, Hugging Face layout"
    assert lines[1] == (
        "layers 3, hidden size 64, MLP 96, heads 4, key/value heads 2, head size 16, vocabulary 257, rope default, "
        "untied embeddings"
    )
    assert lines[2] == f"30 tensors, {parameters:,} parameters, {found.bytes / 1000:.2f} KB"
    assert "  float32: 1 tensors, 64 parameters, 256 bytes" in lines
    assert "tensors -> in the Transformer Engine layout:" in lines
    text = [" ".join(line.split()) for line in lines]
    assert (
        "model.layers.{0..2}.self_attn.k_proj.weight bfloat16 [32, 64] -> self_attention.layernorm_qkv.weight" in text
    )
    assert "model.norm.weight float32 [64] -> the same" in text
    assert lines[-1] == "nothing wrong found"
    assert len(lines) == 6 + 12 + 1


def test_a_transformer_engine_folder(opened, tiny_llama, tmp_path):
    convert_llama_hf_to_te(tiny_llama(tie_word_embeddings=True)).save_pretrained(tmp_path)
    found = inspect(opened(tmp_path))
    assert (found.layout, found.architecture, found.problems) == ("Transformer Engine", "NVLlamaForCausalLM", ())
    assert found.sizes.tied is True and len(found.tensors) == 20
    by_name = {each.name: each for each in found.tensors}
    assert by_name[QKV.format(0)].others == tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    text = [" ".join(line.split()) for line in found.lines()]
    assert (
        "model.layers.{0..2}.self_attention.layernorm_qkv.weight float32 [128, 64] -> "
        "self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight"
    ) in text
    assert "tied embeddings" in text[1] and "untied" not in text[1]


@pytest.mark.parametrize("layout", ["hf", "te"])
@pytest.mark.parametrize(
    "hf_class",
    [LlamaModel, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering],
    ids=lambda each: each.__name__,
)
def test_other_heads(tiny_llama, hf_class, layout):
    model = tiny_llama(hf_class, num_labels=3)
    checkpoint = described(model if layout == "hf" else convert_llama_hf_to_te(model))
    assert inspect(checkpoint).problems == ()
    head = [name for name in checkpoint.source.tensors if name.startswith(("score.weight", "qa_outputs.weight"))]
    assert len(head) == (hf_class is not LlamaModel)
    for name in head:
        assert inspect(changed(checkpoint, without=[name])).problems == (f"{name} is needed, but missing.",)
        (problem,) = inspect(changed(checkpoint, {name: info(9, 64)})).problems
        assert problem.startswith(f"{name} is [9, 64], but the configuration asks for [")
    norm = next(name for name in checkpoint.source.tensors if name.endswith("norm.weight") and "layers" not in name)
    assert inspect(changed(checkpoint, without=[norm])).problems == (f"{norm} is needed, but missing.",)


def test_another_architecture():
    model = MistralForQuestionAnswering(MistralConfig(**{**TINY, "sliding_window": None, "head_dim": 24}))
    found = inspect(described(model))
    assert found.problems == () and found.sizes.head_dim == 24
    assert found.mapping["transformer.norm.weight"] == ("model.norm.weight",)
    found = inspect(described(convert_llama_hf_to_te(model)))
    assert found.problems == ()
    assert found.mapping["transformer.norm.weight"] == ("model.norm.weight",)
    sliding = inspect(changed(described(model), sliding_window=16))
    assert sliding.problems[0].startswith("Transformer Engine layers cannot run it: sliding_window=16 is not supported")


@pytest.mark.parametrize("layout", ["hf", "te"])
def test_it_is_json(hf, te, layout):
    checkpoint = {"hf": hf, "te": te}[layout]
    found = inspect(checkpoint)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content == found.to_dict()
    assert [each["name"] for each in content["tensors"]] == list(checkpoint.source.tensors)
    assert content["dtypes"] == {
        "float32": {"tensors": 30 if layout == "hf" else 21, "parameters": 125504, "bytes": 502016}
    }
    assert content["sizes"]["key_value_heads"] == 2
    assert content["mapping"]["model.layers.0.layernorm_mlp.fc1_weight"] == [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]


def test_a_real_checkpoint(smollm2):
    found = inspect(described(smollm2))
    assert found.problems == ()
    text = [" ".join(line.split()) for line in found.lines()]
    assert text[1] == (
        "layers 30, hidden size 576, MLP 1536, heads 9, key/value heads 3, head size 64, vocabulary 49152, "
        "rope default, tied embeddings"
    )
    assert text[2] == "272 tensors, 134,515,008 parameters, 538.06 MB"
    assert (
        "model.layers.{0..29}.self_attn.q_proj.weight float32 [576, 576] -> self_attention.layernorm_qkv.weight" in text
    )
    assert len(text) == 5 + 11 + 1


def test_many_layers_of_two_kinds_are_two_lines(te):
    names = {name: te.source.tensors[name] for name in te.source.tensors if "layers" not in name}
    for layer in range(126):
        for name in te.source.tensors:
            if name.startswith("model.layers.0."):
                dtype = "bfloat16" if layer in (0, 7, 125) else "float32"
                names[name.replace("0", str(layer), 1)] = TensorInfo(dtype, te.source.tensors[name].shape)
    found = inspect(Checkpoint("p", {**te.config, "num_hidden_layers": 126}, Described(names)))
    assert found.problems == ()
    text = [" ".join(line.split()[:2]) for line in found.lines()]
    assert QKV.format("{0,7,125}") + " bfloat16" in text
    assert QKV.format("{1..6,8..124}") + " float32" in text


# --- broken checkpoints -----------------------------------------------------------------------------------------------


def test_tensors_that_are_missing_or_have_no_rule(hf, te):
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": info(64) for layer in range(3)}
    without = ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.k_proj.weight", "lm_head.weight"]
    found = inspect(changed(hf, biases, without))
    assert set(found.problems) == {
        "there is no rule for model.layers.{0..2}.self_attn.q_proj.bias.",
        "model.layers.{1..2}.self_attn.k_proj.weight is needed, but missing.",
        "lm_head.weight is needed, but missing.",
    }
    assert found.lines()[-4] == "3 wrong:"
    assert sorted(found.lines()[-3:]) == sorted(f"  {problem}" for problem in found.problems)
    by_name = {each.name: each for each in found.tensors}
    assert by_name["model.layers.0.self_attn.q_proj.bias"].others == ()
    assert by_name["model.layers.1.self_attn.q_proj.weight"].others == (QKV.format(1),)
    assert any("q_proj.bias" in line and line.endswith("-> no rule") for line in found.lines())
    found = inspect(changed(te, {"model.layers.1.self_attention._extra_state": info(4)}, [QKV.format(0)]))
    assert set(found.problems) == {
        "there is no rule for model.layers.1.self_attention._extra_state.",
        f"{QKV.format(0)} is needed, but missing.",
    }


def test_old_buffers_are_nothing_wrong(hf):
    found = inspect(changed(hf, {"model.layers.0.self_attn.rotary_emb.inv_freq": info(8)}))
    assert found.problems == ()
    assert any(line.endswith("-> computed from the configuration") for line in found.lines())


def test_shapes_that_the_configuration_does_not_agree_with(hf, te):
    wrong = {f"model.layers.{layer}.mlp.up_proj.weight": info(90, 64) for layer in (0, 2)}
    assert inspect(changed(hf, {**wrong, "model.norm.weight": info(64, 1)})).problems == (
        "model.layers.{0,2}.mlp.up_proj.weight is [90, 64], but the configuration asks for [96, 64].",
        "model.norm.weight is [64, 1], but the configuration asks for [64].",
    )
    assert inspect(changed(te, num_key_value_heads=4)).problems == (
        QKV.format("{0..2}") + " is [128, 64], but the configuration asks for [192, 64].",
    )
    assert set(inspect(changed(te, vocab_size=300)).problems) == {
        "model.embed_tokens.weight is [257, 64], but the configuration asks for [300, 64].",
        "lm_head.weight is [257, 64], but the configuration asks for [300, 64].",
    }


def test_layers_that_the_configuration_does_not_agree_with(hf, te):
    for checkpoint in (hf, te):
        assert inspect(changed(checkpoint, num_hidden_layers=2)).problems == (
            "the checkpoint has layers 2, but the configuration has 2 layers.",
        )
        assert inspect(changed(checkpoint, num_hidden_layers=1024)).problems == (
            "the configuration has 1024 layers, but layers 3..1023 are missing.",
        )
        # No loop could go through this many layers.
        problems = inspect(changed(checkpoint, num_hidden_layers=10**15)).problems
        assert f"num_hidden_layers={10**15} must be a whole number from 1 to 1,024." in " ".join(problems)
        assert f"the configuration has {10**15} layers, but layers 3..{10**15 - 1} are missing." in problems
        without = [name for name in checkpoint.source.tensors if name.startswith("model.layers.1.")]
        assert inspect(changed(checkpoint, without=without)).problems == (
            "the configuration has 3 layers, but layers 1 are missing.",
        )


def test_dtypes_that_cannot_become_one_tensor(hf):
    half = {f"model.layers.{layer}.self_attn.v_proj.weight": info(32, 64, dtype="float16") for layer in (0, 1)}
    assert inspect(changed(hf, half)).problems == (
        "model.layers.{0..1}.self_attn.q_proj.weight and the 2 that become one tensor with it must have one dtype, but "
        "have float32, float32, float16.",
    )


def test_a_model_type_of_the_other_layout_is_named(hf, te):
    # Names of our classes show the layout too: the recipe's checkpoints have the model type of a plain Llama.
    assert inspect(changed(te, model_type="llama")).problems == ()
    first = inspect(changed(te, model_type="llama", architectures=["LlamaForCausalLM"])).problems
    assert any(problem.startswith("18 tensors have names of the Transformer Engine layout, but") for problem in first)
    second = inspect(changed(hf, model_type="nv_llama")).problems
    assert any(problem.startswith("27 tensors have names of the Hugging Face layout, but model_") for problem in second)
    assert any(
        problem.endswith("'nv_llama', which has the Transformer Engine one: correct model_type in config.json.")
        for problem in second
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not known"),
        ({"model_type": ["llama"]}, "model_type=['llama'] is not known"),
        ({"attention_bias": True}, "Transformer Engine layers cannot run it: attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "Transformer Engine layers cannot run it: hidden_act='gelu' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "the model is quantized by 'awq': convert one with"),
        ({"quantization_config": 3}, "the model is quantized by 3: convert one with"),
        ({"hidden_size": "64"}, "the configuration of somewhere cannot be used: "),
        ({"num_attention_heads": 0}, "the configuration of somewhere cannot be used: "),
        ({"rope_parameters": [1]}, "the configuration of somewhere cannot be used: "),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_converted(hf, fields, message):
    found = inspect(changed(hf, **fields))
    assert any(message in problem for problem in found.problems), found.problems
    assert len(found.problems) == 1
    assert len(found.tensors) == 30 and len(found.mapping) == 21


def test_a_gguf_file_has_ordinary_weights(hf):
    assert inspect(changed(hf, quantization_config={"quant_method": "gguf"})).problems == ()


def test_a_broken_layer_precision_is_named(te):
    (problem,) = inspect(changed(te, layer_precision=["fp8"])).problems
    assert "layer_precision has 1 entries, but num_hidden_layers=3" in problem


def test_an_empty_checkpoint():
    found = inspect(Checkpoint("nothing", {}, Described({})))
    assert found.tensors == () and found.mapping == {} and found.dtypes == {}
    assert (found.parameters, found.bytes, found.architecture) == (0, 0, None)
    assert found.sizes == ModelSizes(*[None] * 9)
    assert any("model_type=None is not known" in problem for problem in found.problems)
    assert "model.embed_tokens.weight is needed, but missing." in found.problems
    assert found.lines()[1].startswith("layers unknown, hidden size unknown, ")
    assert found.lines()[0] == "nothing: no architecture named, Hugging Face layout"


@pytest.mark.parametrize(
    "name", ["", "\n", "model.layers.007.mlp.up_proj.weight", "layers.", "model.layers.9" + "9" * 5000]
)
def test_odd_names(hf, name):
    found = inspect(changed(hf, {name: info(2)}))
    assert name in {each.name for each in found.tensors}
    assert any(name in problem for problem in found.problems) or "layers 7," in str(found.problems)
    assert any(name in line for line in found.lines())


def test_a_tampered_file(opened, tiny_llama, tmp_path):
    convert_llama_hf_to_te(tiny_llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[QKV.format(2)]
    tensors[QKV.format(1)] = tensors[QKV.format(1)][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspect(opened(tmp_path)).problems == (
        f"{QKV.format(2)} is needed, but missing.",
        f"{QKV.format(1)} is [127, 64], but the configuration asks for [128, 64].",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters", "rope_scaling", "rope_theta", "id2label",
    "tie_word_embeddings", "quantization_config", "pretraining_tp", "layer_precision", "dtype", "source_model_type",
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from(("hf", "te")),
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
    removed=st.sets(st.integers(0, 20), max_size=5),
    added=st.dictionaries(
        st.text(max_size=8) | st.sampled_from((QKV.format(9), "score.bias", "transformer.norm.weight")),
        st.lists(st.integers(0, 3), max_size=3).map(lambda shape: info(*shape)),
        max_size=3,
    ),
)
def test_nothing_that_is_broken_raises(hf, te, layout, fields, removed, added):
    checkpoint = {"hf": hf, "te": te}[layout]
    without = [name for i, name in enumerate(checkpoint.source.tensors) if i in removed]
    broken = changed(checkpoint, added, [name for name in without if name not in added], **fields)
    found = inspect(broken)
    assert [each.name for each in found.tensors] == list(broken.source.tensors)
    assert found.parameters == sum(math.prod(each.shape) for each in broken.source.tensors.values())
    assert found.lines()
    json.dumps(found.to_dict(), allow_nan=False)
    for name in set(without) - set(added):
        if "layers" not in name:
            assert any(name in problem for problem in found.problems) or name == "lm_head.weight"
