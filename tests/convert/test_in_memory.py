"""Round trips of whole models in memory."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import (
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
)

PAIRS = [
    (LlamaModel, NVLlamaModel),
    (LlamaForCausalLM, NVLlamaForCausalLM),
    (LlamaForSequenceClassification, NVLlamaForSequenceClassification),
    (LlamaForTokenClassification, NVLlamaForTokenClassification),
    (LlamaForQuestionAnswering, NVLlamaForQuestionAnswering),
]
both_ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# A value other than the default for every configuration field that the tiny models leave at its default.
FIELDS = {
    "head_dim": 80,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-4,
    "use_cache": False,
    "eos_token_id": [2, 3],
    "pretraining_tp": 2,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "attention_dropout": 0.1,
    "output_hidden_states": True,
    "chunk_size_feed_forward": 7,
    "problem_type": "single_label_classification",
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "classifier_dropout": 0.3,
    "a_field_of_somebody_else": {"nested": [1, None]},
}


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_ties
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("hf_class", "te_class"), PAIRS, ids=lambda each: each.__name__)
def test_round_trip(tiny_llama, hf_class, te_class, training, tied, dtype):
    model_hf = tiny_llama(hf_class, tie_word_embeddings=tied, num_labels=3).to(dtype).train(training)
    model_te = convert_llama_hf_to_te(model_hf)
    back = convert_llama_te_to_hf(model_te)
    assert (type(model_te), type(back)) == (te_class, hf_class)
    assert_same_weights(back, model_hf)
    assert model_te.training == back.training == training
    assert model_te.dtype == back.dtype == dtype
    assert model_te.config.dtype == back.config.dtype == model_hf.config.dtype
    if hf_class is LlamaForCausalLM:
        for model in (model_te, back):
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # The second conversion gives the same, and no two models share a weight.
    again = convert_llama_hf_to_te(back)
    assert_same_weights(again, model_te)
    pointers = [
        {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        for model in (model_hf, model_te, back, again)
    ]
    assert len(set.union(*pointers)) == sum(map(len, pointers))


def test_weights_of_several_dtypes_keep_theirs(tiny_llama):
    model_hf = tiny_llama().to(torch.bfloat16)
    for name, module in model_hf.named_modules():
        if name.endswith("norm"):
            module.float()
    model_te = convert_llama_hf_to_te(model_hf)
    assert model_te.model.norm.weight.dtype == torch.float32
    assert model_te.model.layers[0].self_attention.layernorm_qkv.layer_norm_weight.dtype == torch.float32
    assert model_te.model.layers[0].self_attention.layernorm_qkv.weight.dtype == torch.bfloat16
    assert_same_weights(convert_llama_te_to_hf(model_te), model_hf)


@pytest.mark.parametrize("hf_class", [pair[0] for pair in PAIRS], ids=lambda each: each.__name__)
def test_every_field_of_the_configuration_survives(tiny_llama, hf_class):
    model_hf = tiny_llama(hf_class, attn_implementation="eager", **FIELDS)
    model_hf.config.name_or_path = "meta/somewhere"
    model_hf.config.architectures = [hf_class.__name__]
    before = model_hf.config.to_dict()
    model_te = convert_llama_hf_to_te(model_hf)
    back = convert_llama_te_to_hf(model_te)
    assert model_hf.config.to_dict() == before
    assert back.config.to_dict() == before
    assert back.config.name_or_path == model_te.config.name_or_path == "meta/somewhere"
    assert back.config._attn_implementation == model_te.config._attn_implementation == "eager"
    te = model_te.config.to_dict()
    # Only the class of the model differs.
    assert {name for name, value in before.items() if te[name] != value} == {"model_type", "architectures"}
    assert te["architectures"] == [type(model_te).__name__]
    assert set(te) - set(before) == {
        "attn_input_format",
        "self_attn_mask_type",
        "layer_precision",
        "use_quantized_model_init",
        "source_model_type",
        "auto_map",
    }


def test_the_attention_of_transformers_is_kept_for_the_way_back(tiny_llama):
    """The layers use their own attention, whatever the source uses."""
    model_hf = tiny_llama(attn_implementation="flex_attention")
    assert model_hf.config._attn_implementation == "flex_attention"
    model_te = convert_llama_hf_to_te(model_hf)
    assert model_te(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 257)
    assert convert_llama_te_to_hf(model_te).config._attn_implementation == "flex_attention"


def test_fields_of_this_layout_survive_a_second_round(tiny_llama):
    fields = {"attn_input_format": "bshd", "self_attn_mask_type": "causal", "layer_precision": ["fp8", None, "fp8"]}
    model_te = convert_llama_hf_to_te(tiny_llama(), **fields)
    back = convert_llama_te_to_hf(model_te)
    assert not set(fields) & set(back.config.to_dict())
    assert convert_llama_hf_to_te(back, **fields).config.to_dict() == model_te.config.to_dict()


def test_architectures_that_name_another_class_are_kept(tiny_llama):
    model_hf = tiny_llama(LlamaModel)
    model_hf.config.architectures = ["LlamaForCausalLM"]
    assert convert_llama_hf_to_te(model_hf).config.architectures == ["LlamaForCausalLM"]


def test_config_kwargs_are_applied(tiny_llama):
    model_te = convert_llama_hf_to_te(
        tiny_llama(), attn_input_format="bshd", layer_precision=[None, "fp8", None], layer_implementation="reference"
    )
    assert model_te.config.attn_input_format == "bshd"
    assert model_te.model.precision.layers == [None, "fp8", None]
    assert model_te.config.layer_implementation == "reference"
    assert convert_llama_te_to_hf(model_te, use_cache=False, rms_norm_eps=0.5).config.rms_norm_eps == 0.5
    with pytest.raises(ValueError, match=r"layer_precision\[0\]='fp16' is not known"):
        convert_llama_hf_to_te(tiny_llama(), layer_precision=["fp16", None, None])
    with pytest.raises(ValueError, match=r"attn_input_format='sbhd' is not known"):
        convert_llama_hf_to_te(tiny_llama(), attn_input_format="sbhd")


def test_config_kwargs_that_the_weights_do_not_fit_are_an_error(tiny_llama):
    model_hf = tiny_llama()
    with pytest.raises(ValueError, match=r"fc1_weight becomes \[192, 64\], but the configuration asks for \[256, 64\]"):
        convert_llama_hf_to_te(model_hf, intermediate_size=128)
    with pytest.raises(ValueError, match=r"It has no source for: model\.layers\.3\."):
        convert_llama_hf_to_te(model_hf, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"It has no place for: model\.layers\.2\."):
        convert_llama_te_to_hf(convert_llama_hf_to_te(model_hf), num_hidden_layers=2)


def test_the_generation_config_survives_as_a_copy(tiny_llama):
    model_hf = tiny_llama()
    model_hf.generation_config.update(top_k=7, temperature=0.3, do_sample=True)
    model_te = convert_llama_hf_to_te(model_hf)
    back = convert_llama_te_to_hf(model_te)
    for model in (model_te, back):
        assert model.generation_config.to_dict() == model_hf.generation_config.to_dict()
    model_te.generation_config.top_k = 9
    assert (model_hf.generation_config.top_k, back.generation_config.top_k) == (7, 7)


def test_the_configuration_survives_as_a_copy(tiny_llama):
    model_hf = tiny_llama(**FIELDS)
    model_te = convert_llama_hf_to_te(model_hf)
    model_te.config.rope_parameters["factor"] = 99.0
    model_te.config.a_field_of_somebody_else["nested"].append(2)
    assert model_hf.config.rope_parameters["factor"] == 8.0
    assert model_hf.config.a_field_of_somebody_else == {"nested": [1, None]}


@pytest.mark.parametrize("wrong", ["gpt2", "qwen2", "te"])
def test_another_model_is_refused(tiny_llama, wrong):
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)),
        "qwen2": lambda: Qwen2ForCausalLM(
            Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
        "te": lambda: convert_llama_hf_to_te(tiny_llama()),
    }[wrong]()
    with pytest.raises(TypeError, match=rf"model_hf is a {type(model).__name__}: .* takes one of LlamaModel, Llama"):
        convert_llama_hf_to_te(model)


def test_a_plain_llama_is_no_te_model(tiny_llama):
    with pytest.raises(TypeError, match=r"model_te is a LlamaForCausalLM: .* takes one of NVLlamaModel, NVLlama"):
        convert_llama_te_to_hf(tiny_llama())


def test_a_model_without_weights_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"on the meta device: it has no weights to convert"):
        convert_llama_hf_to_te(tiny_llama().to("meta"))
    with pytest.raises(ValueError, match=r"on the meta device"):
        convert_llama_te_to_hf(convert_llama_hf_to_te(tiny_llama()).to("meta"))


def test_biases_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"attention_bias=True is not supported"):
        convert_llama_hf_to_te(tiny_llama(attention_bias=True))
    with pytest.raises(ValueError, match=r"mlp_bias=True is not supported"):
        convert_llama_hf_to_te(tiny_llama(mlp_bias=True))
    model_hf = tiny_llama(attention_bias=True)
    model_hf.config.attention_bias = False  # the checkpoint has biases, but its configuration denies them
    with pytest.raises(ValueError, match=r"No rule for: model\.layers\.0\.self_attn\.q_proj\.bias, "):
        convert_llama_hf_to_te(model_hf)


def test_token_classification_without_a_bias(tiny_llama):
    model_hf = tiny_llama(LlamaForTokenClassification, token_classification_bias=False)
    if model_hf.score.bias is not None:
        pytest.skip("this version of transformers does not know the field")
    assert_same_weights(convert_llama_te_to_hf(convert_llama_hf_to_te(model_hf)), model_hf)


def test_an_adapters_tensor_is_named(tiny_llama):
    model_hf = tiny_llama()
    model_hf.model.layers[1].self_attn.lora_A = torch.nn.Linear(4, 2, bias=False)
    with pytest.raises(
        ValueError, match=r"adapters of PEFT, such as model\.layers\.1\.self_attn\.lora_A\.weight: merge"
    ):
        convert_llama_hf_to_te(model_hf)


def test_weights_quantized_in_memory_are_refused(tiny_llama):
    model_hf = tiny_llama()
    model_hf.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match=r"quantized by 'bitsandbytes': convert one with ordinary weights"):
        convert_llama_hf_to_te(model_hf)


class QuantizedLikeTransformerEngine(torch.Tensor):
    """A tensor that holds half of its value."""

    __module__ = "transformer_engine.pytorch.tensor.float8_tensor"

    def dequantize(self):
        return 2 * self.as_subclass(torch.Tensor)


def test_weights_held_in_a_quantized_format_are_dequantized(tiny_llama):
    model_hf = tiny_llama()
    model_te = convert_llama_hf_to_te(model_hf)
    for layer in model_te.model.layers:
        for module, name in (
            (layer.self_attention.layernorm_qkv, "weight"),
            (layer.self_attention.proj, "weight"),
            (layer.layernorm_mlp, "fc1_weight"),
            (layer.layernorm_mlp, "fc2_weight"),
        ):
            half = getattr(module, name).detach() / 2
            quantized = torch.Tensor._make_subclass(QuantizedLikeTransformerEngine, half)
            setattr(module, name, torch.nn.Parameter(quantized))
    back = convert_llama_te_to_hf(model_te)
    assert_same_weights(back, model_hf)
    assert all(type(parameter.data) is torch.Tensor for parameter in back.parameters())


def test_converted_models_are_ready_to_use(tiny_llama, tmp_path):
    """Converted models train, save and load, and have their rotary angles and other buffers."""
    model_hf = tiny_llama()
    back = convert_llama_te_to_hf(convert_llama_hf_to_te(model_hf))
    ids_BS = torch.arange(3, 13).view(2, 5)
    torch.testing.assert_close(back(ids_BS).logits, model_hf(ids_BS).logits, atol=0, rtol=0)
    assert not any(tensor.is_meta for tensor in (*back.parameters(), *back.buffers()))
    back(ids_BS, labels=ids_BS).loss.backward()
    assert all(parameter.grad is not None for parameter in back.parameters())
    back.save_pretrained(tmp_path / "hf")
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path / "hf"), model_hf)
    assert type(LlamaConfig.from_pretrained(tmp_path / "hf")) is LlamaConfig
    assert not (tmp_path / "hf" / "llama_te.py").exists()
    convert_llama_hf_to_te(model_hf).save_pretrained(tmp_path / "te")
    loaded = NVLlamaForCausalLM.from_pretrained(tmp_path / "te")
    assert_same_weights(convert_llama_te_to_hf(loaded), model_hf)


def test_a_loaded_checkpoint_keeps_every_field(tiny_llama, tmp_path):
    """A Hugging Face folder becomes a folder of the TE layout, and then a Hugging Face folder again."""
    tiny_llama(**FIELDS).save_pretrained(tmp_path / "hf")
    model_hf = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    convert_llama_hf_to_te(model_hf).save_pretrained(tmp_path / "te")
    back = convert_llama_te_to_hf(NVLlamaForCausalLM.from_pretrained(tmp_path / "te"))
    back.save_pretrained(tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "hf" / name).read_text()
    assert_same_weights(back, model_hf)


def test_a_model_of_a_real_checkpoint(smollm2):
    model_te = convert_llama_hf_to_te(smollm2)
    back = convert_llama_te_to_hf(model_te)
    assert_same_weights(back, smollm2)
    expected = smollm2.config.to_dict()
    expected.pop("quantization_config", None)  # describes the GGUF file; the weights in memory are ordinary ones
    assert back.config.to_dict() == expected
    ids_1S = torch.arange(100, 130)[None]
    with torch.no_grad():
        torch.testing.assert_close(model_te(ids_1S).logits, smollm2(ids_1S).logits, atol=1e-4, rtol=0)
