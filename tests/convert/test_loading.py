"""`from_pretrained` of checkpoints that are converted while loading, compared with transformers' models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from conftest import TINY
from convert.test_gguf import Q8_0, tiny_tensors, write
from llama_te_convert import CheckpointError, convert_llama_hf_to_te
from llama_te_convert.loading import load_converted
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, NVLlamaForSequenceClassification, NVLlamaModel

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def assert_same(model: Any, oracle: PreTrainedModel) -> None:
    """The tensors of the conversion in memory, and the logits of transformers."""
    wanted = convert_llama_hf_to_te(oracle)
    assert type(model) is type(wanted)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-5)


@pytest.fixture
def folder(tiny_llama, tmp_path: Path) -> Path:
    model = tiny_llama(num_hidden_layers=2)
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=7)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    return tmp_path / "hf"


def test_tensors_are_converted_in_host_memory_whatever_the_default_device_is(folder: Path) -> None:
    with torch.device("meta"):
        loaded = load_converted(folder)
    for name, tensor in convert_llama_hf_to_te(LlamaForCausalLM.from_pretrained(folder)).state_dict().items():
        assert torch.equal(loaded.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("tied", "head"), [(False, "causal"), (True, "causal"), (False, "classes"), (False, "mistral")]
)
def test_a_folder(tied: bool, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {**TINY, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    oracle, model_class = {
        "causal": lambda: (LlamaForCausalLM(LlamaConfig(**fields)), NVLlamaForCausalLM),
        "classes": lambda: (
            LlamaForSequenceClassification(LlamaConfig(**fields, num_labels=3)),
            NVLlamaForSequenceClassification,
        ),
        "mistral": lambda: (MistralForCausalLM(MistralConfig(**fields, sliding_window=None)), NVLlamaForCausalLM),
    }[head]()
    oracle.eval().save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_same(model, oracle)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.architectures == [model_class.__name__]
    assert (model.config.source_model_type, model.name_or_path) == (oracle.config.model_type, str(tmp_path))
    if head == "causal":
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_arguments_keep_their_meaning(folder: Path) -> None:
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    model = NVLlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", attn_input_format="bshd", layer_precision=["fp8", None],
        attn_implementation="eager",
    )  # fmt: skip
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.config.attn_input_format, model.config.layer_precision) == ("bshd", ["fp8", None])
    assert getattr(model, "hf_device_map", None) == getattr(oracle, "hf_device_map", None)
    assert not model.training
    assert torch.equal(model.lm_head.weight, oracle.lm_head.weight)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.5, 7)
    given = NVLlamaForCausalLM.from_pretrained(folder, generation_config=GenerationConfig(temperature=0.25))
    assert given.generation_config.temperature == 0.25
    assert next(given.parameters()).dtype == LlamaForCausalLM.from_pretrained(folder).dtype
    for config_class in (NVLlamaConfig, LlamaConfig):
        config = config_class.from_pretrained(folder, use_cache=False)
        assert NVLlamaForCausalLM.from_pretrained(folder, config=config).config.use_cache is False
    decoder = NVLlamaModel.from_pretrained(folder)
    assert torch.equal(decoder.norm.weight.bfloat16(), oracle.model.norm.weight)


def test_subfolders_variants_and_other_files(folder: Path, tiny_llama, tmp_path: Path) -> None:
    other = tiny_llama(num_hidden_layers=2, seed=1)
    other.save_pretrained(folder / "inner", variant="fp16")
    options = {"subfolder": "inner", "variant": "fp16"}
    assert_same(
        NVLlamaForCausalLM.from_pretrained(folder, **options), LlamaForCausalLM.from_pretrained(folder, **options)
    )
    other.config.save_pretrained(tmp_path / "bin")
    torch.save(other.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_same(NVLlamaForCausalLM.from_pretrained(tmp_path / "bin"), other)
    with pytest.raises(CheckpointError, match="pickle"):
        NVLlamaForCausalLM.from_pretrained(tmp_path / "bin", use_safetensors=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_folder": "x"}, r"offload_folder='x' has no effect while a checkpoint is converted"),
        ({"key_mapping": {"a": "b"}}, r"key_mapping=.* has no effect"),
        ({"weights_only": False}, r"weights_only=False has no effect"),
        ({"use_safetensors": False}, r"use_safetensors=False has no effect"),
        ({"device_map": {"": "disk"}}, r"device_map=.* has no effect"),
        ({"revision": "v1"}, r"revision='v1' has no effect: .* is a local path"),
        ({"variant": "fp16"}, r"has no tensors: looked for model.fp16.safetensors"),
        ({"attn_input_format": "sbhd"}, r"attn_input_format='sbhd' is not known"),
    ],
    ids=str,
)
def test_arguments_without_effect_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NVLlamaForCausalLM.from_pretrained(folder, **options)


def test_a_repository_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(*arguments: Any, **options: Any) -> str:
        calls.append((arguments, options))
        return str(folder)

    oracle = LlamaForCausalLM.from_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        "transformers.PreTrainedConfig.get_config_dict",
        classmethod(lambda cls, name, **options: (dict(content), options)),
    )
    model = NVLlamaForCausalLM.from_pretrained("owner/name", revision="v1", cache_dir="/cache", token="secret")
    assert_same(model, oracle)
    ((arguments, options),) = calls
    assert arguments == ("owner/name",)
    assert {"revision": "v1", "cache_dir": "/cache", "token": "secret"}.items() <= options.items()


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", tiny_tensors(Q8_0))
    oracle = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert_same(NVLlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name), oracle)
    assert_same(NVLlamaForCausalLM.from_pretrained(path), oracle)
    half = NVLlamaForCausalLM.from_pretrained(path, dtype="bfloat16")
    assert torch.equal(half.model.norm.weight, oracle.model.norm.weight.bfloat16())
    with pytest.raises(CheckpointError, match=r"has no file 'other.gguf'"):
        NVLlamaForCausalLM.from_pretrained(tmp_path, gguf_file="other.gguf")


def test_other_code_with_this_layout(folder: Path, tmp_path: Path) -> None:
    """Its `config.json` has the model_type of a plain Llama, and classes named as ours."""
    oracle = LlamaForCausalLM.from_pretrained(folder)
    te = tmp_path / "te"
    convert_llama_hf_to_te(oracle).save_pretrained(te)
    shutil.rmtree(te / "__pycache__", ignore_errors=True)
    config = json.loads((te / "config.json").read_text())
    (te / "config.json").write_text(json.dumps({**config, "model_type": "llama", "hidden_act": "silu"}))
    assert_same(NVLlamaForCausalLM.from_pretrained(te), oracle)
    from llama_te_convert import convert_checkpoint

    convert_checkpoint(str(te), tmp_path / "back", to_te=False)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "back")), logits(oracle))
