"""Architectures: round trips of their configurations, and a Mistral in the Transformer Engine layout."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_convert.configs.architectures import ARCHITECTURES, TE_CLASSES, architecture_of
from llama_te_convert.configs.model_config import hf_config, te_config
from llama_te_convert.errors import CheckpointError
from llama_te_convert.layout.mapping import map_names
from llama_te_core import (
    NVLlamaConfig,
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
)

MISTRAL = {
    MistralModel: NVLlamaModel,
    MistralForCausalLM: NVLlamaForCausalLM,
    MistralForSequenceClassification: NVLlamaForSequenceClassification,
    MistralForTokenClassification: NVLlamaForTokenClassification,
    MistralForQuestionAnswering: NVLlamaForQuestionAnswering,
}
every_mistral = pytest.mark.parametrize("hf_class", MISTRAL, ids=lambda each: each.__name__)
IDS_BS = torch.arange(3, 17).view(2, 7)


@pytest.fixture
def tiny_mistral():
    def make(hf_class=MistralForCausalLM, **fields):
        torch.manual_seed(0)
        # The head size is not hidden_size / heads, as in Mistral-Nemo.
        model = hf_class(MistralConfig(**{**TINY, "sliding_window": None, "head_dim": 24, "num_labels": 3, **fields}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model.eval()

    return make


def logits_of(model):
    outputs = model(IDS_BS)
    names = [name for name in ("logits", "start_logits", "end_logits") if name in outputs] or ["last_hidden_state"]
    return {name: outputs[name].detach() for name in names}


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


class TestMistral:
    @every_mistral
    def test_computes_the_same_and_comes_back_bit_for_bit(self, tiny_mistral, tmp_path, hf_class):
        model_hf = tiny_mistral(hf_class)
        model_te = convert_llama_hf_to_te(model_hf, layer_implementation="reference")
        assert type(model_te) is MISTRAL[hf_class]
        model_te.save_pretrained(tmp_path / "te")
        loaded, info = MISTRAL[hf_class].from_pretrained(
            tmp_path / "te", layer_implementation="reference", output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, expected in logits_of(model_hf).items():
            assert expected.std() > 0.1, "logits that differ from zero, for a tolerance that says something"
            # Measured: at most 4e-6.
            torch.testing.assert_close(logits_of(loaded)[name], expected, atol=1e-4, rtol=0)
        back = convert_llama_te_to_hf(loaded)
        assert type(back) is hf_class
        assert_same_weights(back, model_hf)
        for name, expected in logits_of(model_hf).items():
            assert torch.equal(logits_of(back)[name], expected)

    def test_generates_the_same_text(self, tiny_mistral):
        model_hf = tiny_mistral()
        model_te = convert_llama_hf_to_te(model_hf)
        arguments = {"max_new_tokens": 8, "do_sample": False, "use_cache": False}
        assert model_te.generate(IDS_BS, **arguments).tolist() == model_hf.generate(IDS_BS, **arguments).tolist()

    def test_tied_weights_and_dtypes_are_kept(self, tiny_mistral):
        model_hf = tiny_mistral(tie_word_embeddings=True).to(torch.bfloat16)
        model_te = convert_llama_hf_to_te(model_hf)
        back = convert_llama_te_to_hf(model_te)
        assert model_te.lm_head.weight is model_te.model.embed_tokens.weight
        assert back.lm_head.weight is back.model.embed_tokens.weight
        assert_same_weights(back, model_hf)

    @every_mistral
    def test_every_field_of_the_configuration_survives(self, tiny_mistral, tmp_path, hf_class):
        model_hf = tiny_mistral(
            hf_class,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            classifier_dropout=0.3,
            pretraining_tp=2,
            a_field_of_somebody_else={"nested": [1, None]},
        )
        model_hf.save_pretrained(tmp_path / "hf")
        model_hf = hf_class.from_pretrained(tmp_path / "hf")
        before = model_hf.config.to_dict()
        convert_llama_hf_to_te(model_hf).save_pretrained(tmp_path / "te")
        loaded = MISTRAL[hf_class].from_pretrained(tmp_path / "te")
        assert loaded.config.source_model_type == "mistral"
        back = convert_llama_te_to_hf(loaded)
        assert type(back.config) is MistralConfig
        back.save_pretrained(tmp_path / "back")
        text = (tmp_path / "back" / "config.json").read_text()
        assert text == (tmp_path / "hf" / "config.json").read_text()
        after = back.config.to_dict()
        assert (before.pop("_name_or_path"), after.pop("_name_or_path")) == (str(tmp_path / "hf"), str(tmp_path / "te"))
        assert after == before

    def test_a_sliding_window_is_refused(self, tiny_mistral):
        with pytest.raises(CheckpointError, match=r"sliding_window=16 is not supported: .*sliding_window=None only"):
            convert_llama_hf_to_te(tiny_mistral(sliding_window=16))
        # Mistral's own default for a missing field is a window.
        with pytest.raises(CheckpointError, match=r"sliding_window=4096 is not supported"):
            te_config({"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4})
        with pytest.raises(CheckpointError, match=r"sliding_window=8 is not supported"):
            convert_llama_hf_to_te(tiny_mistral(), sliding_window=8)

    def test_a_decoder_is_named_as_each_layout_has_it(self):
        """Transformers calls only the decoder of Llama question answering `transformer`; the TE layout always does."""
        hf = ["model.norm.weight", "qa_outputs.weight", "qa_outputs.bias"]
        te = ["transformer.norm.weight", "qa_outputs.weight", "qa_outputs.bias"]
        rules = ARCHITECTURES["mistral"].rules
        assert [(mapping.hf, mapping.te) for mapping in map_names(hf, to_te=True, rules=rules)] == [
            ((a,), b) for a, b in zip(hf, te, strict=True)
        ]
        assert map_names(te, to_te=False, rules=rules) == map_names(hf, to_te=True, rules=rules)
        assert [mapping.te for mapping in map_names(te, to_te=True)] == te
        assert [mapping.te for mapping in map_names(hf[:1], to_te=True, rules=rules)] == hf[:1]


class TestConfigurations:
    def test_from_the_content_of_files(self, tiny_llama, tmp_path):
        tiny_llama(eos_token_id=[2, 3]).save_pretrained(tmp_path / "hf")
        content = json.loads((tmp_path / "hf" / "config.json").read_text())
        config_te = te_config(content, attn_input_format="bshd")
        assert type(config_te) is NVLlamaConfig
        assert config_te.architectures == ["NVLlamaForCausalLM"]
        assert (config_te.attn_input_format, config_te.eos_token_id) == ("bshd", [2, 3])
        assert config_te.source_model_type == "llama"
        config_te.save_pretrained(tmp_path / "te")
        content_te = json.loads((tmp_path / "te" / "config.json").read_text())
        assert content_te["hidden_act"].startswith("these weights have the Transformer Engine layout")
        back = hf_config(content_te, use_cache=False)
        assert type(back) is LlamaConfig
        assert (back.architectures, back.pretraining_tp, back.use_cache) == (["LlamaForCausalLM"], 1, False)
        back.use_cache = True
        back.save_pretrained(tmp_path / "back")
        assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()

    def test_the_arguments_are_left_alone(self, tiny_llama):
        content = tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).config.to_dict()
        before = json.dumps(content, sort_keys=True)
        config_te = te_config(content)
        config_te.rope_parameters["factor"] = 9.0
        assert json.dumps(content, sort_keys=True) == before
        content_te = config_te.to_dict()
        before = json.dumps(content_te, sort_keys=True)
        hf_config(content_te).rope_parameters["factor"] = 1.5
        assert json.dumps(content_te, sort_keys=True) == before

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_the_classes_of_every_head_are_mapped_both_ways(self, name):
        architecture = ARCHITECTURES[name]
        content = getattr(transformers, architecture.config_class)(**architecture.only).to_dict()
        for head, hf_name in architecture.classes.items():
            assert isinstance(getattr(transformers, hf_name), type)
            config_te = te_config({**content, "architectures": [hf_name]})
            assert config_te.architectures == [TE_CLASSES[head]]
            assert hf_config(config_te.to_dict()).architectures == [hf_name]
        assert te_config({**content, "architectures": ["Another"]}).architectures == ["Another"]
        assert te_config({**content, "architectures": None}).architectures is None
        assert architecture_of(content) is architecture_of(te_config(content).to_dict()) is architecture

    def test_names_of_old_files_are_understood(self):
        """The files of Llama 2 and Mistral have `rope_theta` and `torch_dtype`, and no head_dim."""
        old = {"hidden_size": 128, "num_attention_heads": 8, "rope_theta": 5e5, "torch_dtype": "bfloat16"}
        for more in ({"model_type": "llama"}, {"model_type": "mistral", "sliding_window": None}):
            config = te_config({**old, **more})
            assert config.rope_parameters["rope_theta"] == 5e5
            assert (config.dtype, config.head_dim) == (torch.bfloat16, 16)
        # Each architecture has its own defaults for missing fields.
        assert te_config({"model_type": "mistral", "sliding_window": None}).num_key_value_heads == 8
        assert te_config({"model_type": "llama"}).num_key_value_heads == 32

    def test_a_checkpoint_from_before_the_field_is_a_llama(self):
        content = NVLlamaConfig(**TINY).to_dict()
        del content["source_model_type"]
        assert architecture_of(content).model_type == "llama"
        assert type(hf_config(content)) is LlamaConfig

    @pytest.mark.parametrize("content", [{"model_type": "qwen2"}, {}, {"model_type": ["llama"]}], ids=str)
    def test_another_architecture_is_named(self, content):
        with pytest.raises(
            CheckpointError, match=r"model_type=.* is not known: only checkpoints of 'llama', 'mistral' convert"
        ):
            te_config(content)

    def test_an_unknown_source_is_named(self):
        content = NVLlamaConfig(**TINY, source_model_type="qwen2").to_dict()
        with pytest.raises(CheckpointError, match=r"source_model_type='qwen2' is not known"):
            hf_config(content)

    def test_a_configuration_of_the_other_layout_is_refused(self):
        with pytest.raises(CheckpointError, match=r"has the Transformer Engine layout already"):
            te_config(NVLlamaConfig(**TINY).to_dict())
        with pytest.raises(CheckpointError, match=r"model_type='llama' does not belong to the Transformer Engine"):
            hf_config(LlamaConfig(**TINY).to_dict())

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("hidden_size", "many", r"hidden_size='many' must be a whole number from 1 to"),
            ("num_attention_heads", 0, r"num_attention_heads=0 must be a whole number from 1 to"),
            ("num_key_value_heads", 3, r"num_key_value_heads=3 must divide"),
            ("hidden_act", "gelu", r"hidden_act='gelu' is not supported"),
            ("quantization_config", {"quant_method": "fp8"}, r"quantized by 'fp8': convert one with ordinary weights"),
            ("layer_precision", ["fp8"], r"layer_precision has 1 entries"),
        ],
    )
    def test_what_is_wrong_is_told(self, field, value, message):
        with pytest.raises(CheckpointError, match=message):
            te_config({"model_type": "llama", **TINY, field: value})
        with pytest.raises(CheckpointError, match=message):
            hf_config({"model_type": "nv_llama", **TINY, field: value})


def test_importing_looks_up_no_model():
    code = (
        "import sys, llama_te_convert.configs.architectures\n"
        "print([name for name in sys.modules if name.endswith(('.modeling_llama', '.modeling_mistral'))])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"


def test_a_folder_converted_from_mistral_loads_by_the_auto_class(tiny_mistral, tmp_path):
    model_hf = tiny_mistral()
    convert_llama_hf_to_te(model_hf).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NVLlamaForCausalLM
    torch.testing.assert_close(loaded(IDS_BS).logits, model_hf(IDS_BS).logits, atol=1e-4, rtol=0)


def test_a_llama_with_mistrals_name_only_is_no_mistral(tiny_llama):
    """The class is compared, not its name: other libraries have classes of the same name."""
    model = tiny_llama()
    model.__class__ = type("MistralForCausalLM", (LlamaForCausalLM,), {})
    with pytest.raises(TypeError, match=r"model_hf is a MistralForCausalLM: .* takes one of LlamaModel"):
        convert_llama_hf_to_te(model)
