"""LoRA adapters: PEFT computes the same on our model and, after the conversion, on transformers' own.

The bound is for float32 logits, since fused and separate weights round differently. Measured: at most 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from conftest import TINY
from llama_te_convert import CheckpointError, convert_adapter, convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_convert.cli import main
from llama_te_core.lora import WEIGHTS, on_weights

BOUND = 1e-4
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])
MLP, ATTENTION = ["down_proj", "gate_proj", "up_proj"], ["k_proj", "o_proj", "q_proj", "v_proj"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapt(hf: PreTrainedModel, folder: Path, **fields: Any) -> PeftModel:
    """The model in our layout with an adapter that changes its logits. The adapter is saved to `folder`."""
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(convert_llama_hf_to_te(hf), on_weights(LoraConfig(**fields)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def base(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """The folder of a Hugging Face model. Beside it, `te` has the model in our layout, and `adapter` an adapter."""
    hf = tiny_llama()
    hf.save_pretrained(tmp_path / "hf")
    convert_llama_hf_to_te(hf).save_pretrained(tmp_path / "te")
    adapt(hf, tmp_path / "adapter")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("fields", "target_modules"),
    [
        ({}, ATTENTION + MLP),
        ({"use_rslora": True}, ATTENTION + MLP),
        ({"target_parameters": list(WEIGHTS[:2])}, ATTENTION),
        ({"target_parameters": [WEIGHTS[3]]}, MLP[:1]),
        ({"target_parameters": [WEIGHTS[2]]}, MLP[1:]),
        ({"target_parameters": ["layers.1.self_attention.proj.weight"]}, ["model.layers.1.self_attn.o_proj"]),
        ({"target_modules": ["proj"]}, ["o_proj"]),  # a linear layer on the reference
        ({"target_modules": ["proj"], "alpha_pattern": {"proj": 9}}, ["o_proj"]),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, ATTENTION + MLP),
        (
            {
                "rank_pattern": {"layers.0.self_attention.layernorm_qkv.weight": 2, "fc2_weight": 5},
                "alpha_pattern": {"fc1_weight": 3},
            },
            ATTENTION + MLP,
        ),
    ],
)
def test_it_computes_the_same(fields: dict[str, Any], target_modules: list[str], tiny_llama, tmp_path: Path) -> None:
    hf = tiny_llama()
    hf.save_pretrained(tmp_path / "hf")
    model = adapt(hf, tmp_path / "adapter", **fields)
    before, expected = logits(hf), logits(model)
    assert (expected - before).abs().max() > 0.1
    merged = convert_llama_te_to_hf(model.merge_and_unload())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=BOUND)

    adapted = convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(tmp_path / "hf"))
    loaded = PeftModel.from_pretrained(hf, tmp_path / "converted").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=BOUND)
    config = loaded.peft_config["default"]
    assert sorted(config.target_modules) == sorted(target_modules)
    assert not config.target_parameters
    assert config.base_model_name_or_path == str(tmp_path / "hf")
    layers = TINY["num_hidden_layers"]
    assert len(adapted) == (1 if "." in target_modules[0] else layers * len(target_modules))


@settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
@given(groups=st.integers(1, 3), per_group=st.integers(1, 3), half=st.integers(2, 8), rank=st.integers(1, 5))
def test_any_sizes(groups: int, per_group: int, half: int, rank: int, tiny_llama, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    heads = groups * per_group
    hf = tiny_llama(
        hidden_size=6 * heads, num_attention_heads=heads, num_key_value_heads=groups, head_dim=2 * half,
        intermediate_size=3 * heads, num_hidden_layers=1,
    )  # fmt: skip
    hf.save_pretrained(folder / "hf")
    expected = logits(adapt(hf, folder / "adapter", r=rank))
    convert_adapter(folder / "adapter", folder / "converted", base=str(folder / "hf"))
    loaded = PeftModel.from_pretrained(hf, folder / "converted").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=BOUND)


def test_no_number_is_changed(base: Path, tmp_path: Path) -> None:
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base))
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    qkv = "base_model.model.model.layers.2.self_attention.layernorm_qkv.lora_{}.weight"
    separate = "base_model.model.model.layers.2.self_attn.{}_proj.lora_{}.weight"
    for part in "qkv":
        assert torch.equal(theirs[separate.format(part, "A")], ours[qkv.format("A")])
    # For each of 2 key/value heads of size 16: 2 query heads, the key, the value.
    b_KGDR = ours[qkv.format("B")].view(2, 4, 16, 4)
    assert torch.equal(theirs[separate.format("q", "B")], b_KGDR[:, :2].reshape(64, 4))
    assert torch.equal(theirs[separate.format("k", "B")], b_KGDR[:, 2].reshape(32, 4))
    assert torch.equal(theirs[separate.format("v", "B")], b_KGDR[:, 3].reshape(32, 4))


def test_mistral(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf = MistralForCausalLM(MistralConfig(**TINY, sliding_window=None)).eval()
    expected = logits(adapt(hf, tmp_path / "adapter"))
    hf.save_pretrained(tmp_path / "hf")
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(tmp_path / "hf"))
    loaded = PeftModel.from_pretrained(hf, tmp_path / "converted").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=BOUND)


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = str(tmp_path / "adapter"), str(tmp_path / "converted")
    assert main(["adapter-to-hf", source, folder, "--base", str(base)]) == 0
    assert capsys.readouterr().out == f"{folder}: an adapter of 21 weights, of rank 4.\n"
    assert main(["adapter-to-hf", source, folder, "--base", str(base)]) == 1
    assert "exists already: name a new folder, or an empty one." in capsys.readouterr().err


def test_the_base_that_the_adapter_names(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    with pytest.raises(CheckpointError, match=r"does not name the adapter's model.*name it with --base"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted")
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "te")}))
    convert_adapter(tmp_path / "adapter", tmp_path / "converted")
    made = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert made["base_model_name_or_path"] is None, "our model does not fit the new adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"has peft_type='IA3': adapters with 'LORA' can be converted\. Merge this one"),
        ({"init_lora_weights": "pissa"}, r"has init_lora_weights='pissa': adapters with True or False or 'gaussian'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"has layer_replication=\[\[0, 2\], \[1, 3\]\]"),
        ({"r": None}, r"has r=None, which is not a number"),
        ({"target_parameters": None, "target_modules": ["layernorm_qkv"]}, r"adapted as a whole module"),
    ],
)
def test_a_configuration_that_does_not_convert(changes: dict[str, Any], message: str, base: Path, tmp_path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base))
    assert not (tmp_path / "converted").exists()


QKV = "base_model.model.model.layers.0.self_attention.layernorm_qkv"
FC2 = "base_model.model.model.layers.0.layernorm_mlp"


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({f"{QKV}.lora_B.weight": None}, r"layernorm_qkv\.lora_A\.weight has no B"),
        ({f"{QKV}.lora_A.weight": None}, r"No rule for: .*layernorm_qkv\.lora_B\.weight"),
        ({f"{QKV}.lora_A.weight": f"{QKV}.lora_magnitude_vector"}, r"No rule for: .*lora_magnitude_vector"),
        ({f"{FC2}.lora_A.weight": f"{QKV}.lora_A.weight"}, r"layernorm_mlp\.lora_B\.weight"),
        ({f"{QKV}.lora_B.weight": f"{FC2}.lora_B.weight"}, r"is for a weight of \[128, 96\], but the model, with"),
        (
            {f"{QKV}.lora_B.weight": "base_model.model.model.layers.0.layernorm_mlp.fc1_weight"},
            r"has no B",
        ),
    ],
)
def test_tensors_that_are_no_adapter(rename: dict[str, str | None], message: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, new in rename.items():
        tensor = tensors.pop(name)
        if new is not None:
            tensors[new] = tensor
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base))


def test_norms_saved_whole_are_refused(tiny_llama, tmp_path: Path) -> None:
    hf = tiny_llama()
    hf.save_pretrained(tmp_path / "hf")
    name = "base_model.model.model.layers.0.layernorm_mlp.layer_norm_weight"
    adapt(hf, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {name: torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match=r"saved whole \(modules_to_save\), but is .*post_attention_layernorm"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(tmp_path / "hf"))


def test_files_that_are_not_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read: No such file"):
        convert_adapter(tmp_path / "hf", tmp_path / "converted", base=str(base))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base))
    with pytest.raises(CheckpointError, match=r"\./no-such/model/there does not exist, and is not the id of"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base="./no-such/model/there")
    with pytest.raises(CheckpointError, match=r"not a local path, and cannot be downloaded from the hub"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base="no-such/model")
