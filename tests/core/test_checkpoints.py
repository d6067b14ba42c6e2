"""Tests that models save, load, initialise and resize like every model of transformers."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
)

from conftest import TINY
from llama_te_core import (
    NVLlamaConfig,
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
)

MODELS = {
    NVLlamaModel: AutoModel,
    NVLlamaForCausalLM: AutoModelForCausalLM,
    NVLlamaForSequenceClassification: AutoModelForSequenceClassification,
    NVLlamaForTokenClassification: AutoModelForTokenClassification,
    NVLlamaForQuestionAnswering: AutoModelForQuestionAnswering,
}
BOTH_TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
IDS_BS = torch.arange(3, 13).view(2, 5)


def make(model_class=NVLlamaForCausalLM, seed=0, **fields):
    torch.manual_seed(seed)
    return model_class(NVLlamaConfig(**{**TINY, **fields})).eval()


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def change_tensors(folder, change):
    """Rewrite the folder's single file of tensors with what `change` makes of the dictionary."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestSaveAndLoad:
    @pytest.mark.parametrize("model_class", MODELS, ids=lambda each: each.__name__)
    def test_round_trip_through_its_class_and_the_auto_classes(self, tmp_path, model_class):
        model = make(model_class)
        model.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is NVLlamaConfig
        for loader in (model_class, MODELS[model_class]):
            loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
            assert type(loaded) is model_class
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert_same_weights(loaded, model)
            assert not loaded.training

    def test_names_are_those_of_the_layout(self, tmp_path):
        make(num_hidden_layers=1).save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "model.safetensors")) == {
            "model.embed_tokens.weight",
            "model.layers.0.self_attention.layernorm_qkv.layer_norm_weight",
            "model.layers.0.self_attention.layernorm_qkv.weight",
            "model.layers.0.self_attention.proj.weight",
            "model.layers.0.layernorm_mlp.layer_norm_weight",
            "model.layers.0.layernorm_mlp.fc1_weight",
            "model.layers.0.layernorm_mlp.fc2_weight",
            "model.norm.weight",
            "lm_head.weight",
        }

    @BOTH_TIES
    def test_shards(self, tmp_path, tied):
        model = make(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert (tmp_path / "model.safetensors.index.json").is_file()
        assert_same_weights(NVLlamaForCausalLM.from_pretrained(tmp_path), model)

    @BOTH_TIES
    @pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, "auto"], ids=str)
    def test_dtypes_and_device_maps(self, tmp_path, tied, device_map):
        model = make(tie_word_embeddings=tied).to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        for dtype, expected in (
            ("auto", torch.bfloat16),
            (None, torch.bfloat16),
            (torch.float32, torch.float32),
            (torch.float16, torch.float16),
        ):
            extra = {} if dtype is None else {"dtype": dtype}
            loaded = NVLlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map, **extra)
            assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
            assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
            assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
            assert torch.isfinite(loaded(IDS_BS).logits).all()
            assert_same_weights(loaded, copy.deepcopy(model).to(expected))

    def test_a_task_model_takes_the_decoder_and_makes_a_new_head(self, tmp_path):
        model = make()
        model.save_pretrained(tmp_path)
        loaded, info = NVLlamaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {"score.weight"}
        assert_same_weights(loaded.model, model.model)
        assert torch.isfinite(loaded.score.weight).all()
        assert_same_weights(NVLlamaModel.from_pretrained(tmp_path), model.model)

    def test_a_decoder_gets_a_language_model_head(self, tmp_path):
        model = make(NVLlamaModel)
        model.save_pretrained(tmp_path)
        assert_same_weights(NVLlamaForCausalLM.from_pretrained(tmp_path).model, model)

    def test_generation_config(self, tmp_path):
        model = make()
        model.generation_config.top_k = 7
        model.generation_config.do_sample = True
        model.save_pretrained(tmp_path)
        loaded = NVLlamaForCausalLM.from_pretrained(tmp_path).generation_config
        assert (loaded.top_k, loaded.do_sample) == (7, True)
        assert loaded.eos_token_id == TINY["eos_token_id"]

    def test_configuration_arguments(self, tmp_path):
        make().save_pretrained(tmp_path)
        loaded = NVLlamaForCausalLM.from_pretrained(
            tmp_path, attn_input_format="bshd", layer_precision=["fp8", None, None], layer_implementation="reference"
        )
        assert loaded.config.attn_input_format == "bshd"
        assert loaded.model.precision.layers == ["fp8", None, None]
        with pytest.raises(ValueError, match=r"layer_precision\[2\]='int8'"):
            NVLlamaForCausalLM.from_pretrained(tmp_path, layer_precision=["fp8", None, "int8"])


class TestMeta:
    @BOTH_TIES
    @pytest.mark.parametrize("model_class", [NVLlamaModel, NVLlamaForCausalLM, NVLlamaForTokenClassification])
    def test_construction_followed_by_init_empty_weights(self, model_class, tied):
        with torch.device("meta"):
            model = make(model_class, tie_word_embeddings=tied, initializer_range=0.05, hidden_size=128)
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.manual_seed(1)
        model.init_empty_weights()
        for name, parameter in model.named_parameters():
            assert parameter.device.type == "cpu", name
            if name.endswith(("layer_norm_weight", "norm.weight")):
                assert (parameter == 1).all(), name
            elif name.endswith("bias"):
                assert (parameter == 0).all(), name
            else:
                assert 0.04 < parameter.std() < 0.06, name
                assert parameter.mean().abs() < 0.01, name
        if model_class is NVLlamaForCausalLM:
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        decoder = model if model_class is NVLlamaModel else model.model
        assert (decoder.embed_tokens.weight[TINY["pad_token_id"]] == 0).all()
        assert torch.isfinite(model(IDS_BS)[0]).all()

    def test_initialisation_is_that_of_a_model_built_in_memory(self):
        """Every tensor has the same spread in both, so a run from scratch does not depend on the way it started."""
        with torch.device("meta"):
            model = make(hidden_size=128)
        model.init_empty_weights("cpu")
        for (name, actual), expected in zip(model.named_parameters(), make(hidden_size=128).parameters(), strict=True):
            assert actual.std().item() == pytest.approx(expected.std().item(), rel=0.1), name

    def test_weights_in_memory_are_left_alone(self):
        model = make()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.init_empty_weights()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_angles_are_computed_and_not_loaded(self):
        with torch.device("meta"):
            model = make()
        model.init_empty_weights("cpu")
        expected = make()
        model.load_state_dict(expected.state_dict())
        torch.testing.assert_close(model(IDS_BS).logits, expected(IDS_BS).logits)


class TestTrainingTools:
    @pytest.mark.parametrize("format", ["thd", "bshd"])
    @pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
    def test_gradient_checkpointing_gives_equal_gradients(self, format, options):
        labels_BS = IDS_BS.clone()
        mask_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        gradients = []
        for checkpointing in (False, True):
            model = make(attn_input_format=format).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
                calls = []
                model.model.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            model(IDS_BS, attention_mask=mask_BS, labels=labels_BS).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert len(calls) == 2  # forward, and again in the backward pass
        for plain, checkpointed in zip(*gradients, strict=True):
            assert torch.equal(plain, checkpointed)
        model.gradient_checkpointing_disable()
        calls.clear()
        model(IDS_BS, labels=labels_BS).loss.backward()
        assert len(calls) == 1

    @BOTH_TIES
    @pytest.mark.parametrize("size", [300, 200])
    def test_resize_token_embeddings(self, tmp_path, tied, size):
        model = make(tie_word_embeddings=tied)
        with torch.no_grad():
            before_BSV = model(IDS_BS).logits
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size
        assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size, 64)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        kept = min(size, TINY["vocab_size"])
        after = model(IDS_BS, labels=IDS_BS)
        assert after.logits.shape[-1] == size
        torch.testing.assert_close(after.logits[..., :kept], before_BSV[..., :kept])
        after.loss.backward()
        assert model.lm_head.weight.grad.shape == (size, 64)
        model.save_pretrained(tmp_path)
        assert_same_weights(NVLlamaForCausalLM.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("model_class", MODELS, ids=lambda each: each.__name__)
    def test_input_embeddings(self, model_class):
        model = make(model_class)
        replacement = torch.nn.Embedding(257, 64)
        assert model.get_input_embeddings().weight.shape == (257, 64)
        model.set_input_embeddings(replacement)
        assert model.get_input_embeddings() is replacement


class TestWrongCheckpoints:
    @pytest.fixture
    def te_folder(self, tmp_path):
        make().save_pretrained(tmp_path / "te")
        return tmp_path / "te"

    @pytest.fixture
    def hf_folder(self, tmp_path):
        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    @pytest.mark.parametrize("model_class", [NVLlamaForCausalLM, NVLlamaModel, NVLlamaForSequenceClassification])
    def test_a_hugging_face_llama_is_refused_without_the_converter(self, hf_folder, model_class, monkeypatch):
        monkeypatch.setattr("llama_te_core.models.conversion.entry_points", lambda group: [])
        with pytest.raises(RuntimeError, match=r"the Hugging Face layout, needs .*: pip install llama-te-convert$"):
            model_class.from_pretrained(hf_folder)
        # Without the names of classes only the tensors tell.
        config = json.loads((hf_folder / "config.json").read_text())
        (hf_folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
        with pytest.raises(ValueError, match="lacks 18 tensors of the decoder") as caught:
            model_class.from_pretrained(hf_folder)
        assert "layers.0.layernorm_mlp.fc1_weight" in str(caught.value)
        assert "layers.0.input_layernorm.weight'" in str(caught.value)
        (hf_folder / "model.gguf").write_bytes(b"GGUF")
        for source, options in ((hf_folder, {"gguf_file": "model.gguf"}), (hf_folder / "model.gguf", {})):
            with pytest.raises(RuntimeError, match=r"loading the GGUF file .*: pip install llama-te-convert$"):
                model_class.from_pretrained(source, **options)

    @pytest.mark.parametrize("model_class", [NVLlamaForCausalLM, NVLlamaModel])
    def test_tensors_of_this_layout_under_the_name_of_a_plain_llama(self, te_folder, model_class):
        config = json.loads((te_folder / "config.json").read_text())
        plain = {**config, "model_type": "llama", "hidden_act": "silu", "architectures": None, "auto_map": None}
        (te_folder / "config.json").write_text(json.dumps(plain))
        model = model_class.from_pretrained(te_folder)
        assert_same_weights(model, make(model_class))

    @pytest.mark.parametrize(
        "loader",
        [LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification, MistralForCausalLM],
        ids=lambda each: each.__name__,
    )
    def test_a_plain_llama_refuses_this_layout(self, te_folder, loader):
        with pytest.raises(Exception, match=r"Transformer Engine layout: load them with llama_te_core\.NVLlamaForCaus"):
            loader.from_pretrained(te_folder)

    @pytest.mark.parametrize(
        "name",
        ["model.layers.1.self_attention.proj.weight", "model.embed_tokens.weight", "model.norm.weight"],
    )
    def test_a_missing_tensor_of_the_decoder_is_an_error_that_names_it(self, te_folder, name):
        change_tensors(te_folder, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=rf"lacks 1 tensors of the decoder, such as '{name}'"):
            NVLlamaForCausalLM.from_pretrained(te_folder)
        with pytest.raises(ValueError, match=rf"such as '{name.removeprefix('model.')}'"):
            NVLlamaModel.from_pretrained(te_folder)

    def test_a_missing_head_is_made_anew_and_reported(self, te_folder):
        change_tensors(te_folder, lambda tensors: tensors.pop("lm_head.weight"))
        _, info = NVLlamaForCausalLM.from_pretrained(te_folder, output_loading_info=True)
        assert set(info["missing_keys"]) == {"lm_head.weight"}

    def test_an_unexpected_tensor_is_reported(self, te_folder):
        change_tensors(te_folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(2)}))
        _, info = NVLlamaForCausalLM.from_pretrained(te_folder, output_loading_info=True)
        assert set(info["unexpected_keys"]) == {"model.layers.0.extra.weight"}

    def test_a_tensor_of_a_wrong_shape_is_an_error(self, te_folder):
        name = "model.layers.0.self_attention.proj.weight"
        change_tensors(te_folder, lambda tensors: tensors.update({name: torch.ones(64, 60)}))
        with pytest.raises(RuntimeError, match=r"(?s)self_attention\.proj|size mismatch|mismatch"):
            NVLlamaForCausalLM.from_pretrained(te_folder)


class TestRemoteCode:
    """These processes have the package installed, but have not imported it."""

    @pytest.fixture
    def folder(self, tmp_path):
        make().save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    @staticmethod
    def run(tmp_path, code, *arguments):
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", "import sys\n" + code, *map(str, arguments)]
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def test_trust_remote_code_and_saving_again(self, tmp_path, folder):
        code = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
assert "llama_te_core" not in sys.modules
folder, again = sys.argv[1:]
print(type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__)
for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    print(type(model).__module__, type(model).__name__)
model.save_pretrained(again)
"""
        run = self.run(tmp_path, code, folder, tmp_path / "again")
        assert run.returncode == 0, run.stderr
        assert run.stdout.split("\n")[:-1] == [
            "llama_te_core.models.configuration_nvllama",
            "llama_te_core.models.decoder NVLlamaModel",
            "llama_te_core.models.heads NVLlamaForSequenceClassification",
            "llama_te_core.models.causal_lm NVLlamaForCausalLM",
        ]
        files = {path.name for path in (tmp_path / "again").iterdir()}
        assert files == {"config.json", "generation_config.json", "llama_te.py", "model.safetensors"}
        one, two = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again"))
        assert one == two
        assert (tmp_path / "again" / "llama_te.py").read_text() == (folder / "llama_te.py").read_text()
        assert_same_weights(
            NVLlamaForCausalLM.from_pretrained(tmp_path / "again"), NVLlamaForCausalLM.from_pretrained(folder)
        )

    def test_without_it_loading_fails_with_a_message(self, tmp_path, folder):
        code = """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for loader, options in ((AutoModelForCausalLM, {"trust_remote_code": False}), (LlamaForCausalLM, {})):
    try:
        print(loader.from_pretrained(sys.argv[1], **options))
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
assert "llama_te_core" not in sys.modules
"""
        run = self.run(tmp_path, code, folder)
        assert run.returncode == 0, run.stderr
        auto, plain = run.stdout.splitlines()
        assert auto.startswith("ValueError")
        assert "trust_remote_code=True" in auto
        assert "Error" in plain.split()[0]
        assert "Transformer Engine layout: load them with llama_te_core.NVLlamaForCausalLM" in plain
