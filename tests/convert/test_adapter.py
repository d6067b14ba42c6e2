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
from llama_te_convert import (
    CheckpointError,
    convert_adapter,
    convert_llama_hf_to_te,
    convert_llama_te_to_hf,
    export_te_checkpoint,
)
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
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle file"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is not a safetensors file"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base))
    with pytest.raises(CheckpointError, match=r"\./no-such/model/there does not exist, and is not the id of"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base="./no-such/model/there")
    with pytest.raises(CheckpointError, match=r"not a local path, and cannot be downloaded from the hub"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base="no-such/model")


# --- to the Transformer Engine layout ---------------------------------------------------------------------------------


def publish(hf: PreTrainedModel, folder: Path, **fields: Any) -> PeftModel:
    """The model of transformers with an adapter that changes its logits. The adapter is saved to `folder`."""
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "lora_dropout": 0.1, **fields}
    model = get_peft_model(hf, LoraConfig(**fields))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        ({"target_modules": ATTENTION + MLP}, list(WEIGHTS)),
        ({"target_modules": ["q_proj", "v_proj"]}, WEIGHTS[:1]),
        ({"target_modules": ["up_proj"], "use_rslora": True}, WEIGHTS[2:3]),
        ({"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]}, None),
        (
            {
                "target_modules": ATTENTION + MLP,
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
                "alpha_pattern": {"v_proj": 9},
            },
            list(WEIGHTS),
        ),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, WEIGHTS[:1]),
    ],
)
def test_a_published_adapter_computes_the_same_on_fused_weights(fields, targets, tiny_llama, tmp_path: Path) -> None:
    hf = tiny_llama()
    te = convert_llama_hf_to_te(hf)
    te.save_pretrained(tmp_path / "te")
    before = logits(hf)
    model = publish(hf, tmp_path / "adapter", **fields)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1

    convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(tmp_path / "te"), to_te=True)
    loaded = PeftModel.from_pretrained(te, tmp_path / "converted").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=BOUND)
    config = loaded.peft_config["default"]
    assert config.base_model_name_or_path == str(tmp_path / "te")
    if targets is not None:
        assert sorted(config.target_parameters) == sorted(targets)
    # And back: each projection has the whole rank of the fused weight.
    convert_adapter(tmp_path / "converted", tmp_path / "back", base=str(tmp_path / "te"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=BOUND)


def test_stacking_is_exact(tiny_llama, tmp_path: Path) -> None:
    hf = tiny_llama(num_hidden_layers=1)
    hf.save_pretrained(tmp_path / "hf")
    publish(
        hf,
        tmp_path / "adapter",
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 3},
    )
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(tmp_path / "hf"), to_te=True)
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    separate = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    fused = "base_model.model.model.layers.0.self_attention.layernorm_qkv.lora_{}.weight"
    a_RE, b_FR = ours[fused.format("A")], ours[fused.format("B")]
    assert torch.equal(a_RE, torch.cat([theirs[separate.format(part, "A")] for part in "qv"]))
    # For each of 2 key/value heads of size 16: 2 query heads, the key, the value.
    b_KGDR = b_FR.view(2, 4, 16, 6)
    assert torch.equal(b_KGDR[:, :2, :, :4].reshape(64, 4), theirs[separate.format("q", "B")])
    assert torch.equal(b_KGDR[:, 3, :, 4:].reshape(32, 2), theirs[separate.format("v", "B")])
    assert not b_KGDR[:, 2].any() and not b_KGDR[:, :2, :, 4:].any() and not b_KGDR[:, 3, :, :4].any()
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    weight = "model.layers.0.self_attention.layernorm_qkv.weight"
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({weight: 6}, {weight: 9})  # 9 / 6 = 6 / 4 = 3 / 2


def test_dora_keeps_its_projections(tiny_llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tiny_llama()
    te = convert_llama_hf_to_te(hf)
    te.save_pretrained(tmp_path / "te")
    expected = logits(publish(hf, tmp_path / "adapter", target_modules=ATTENTION + MLP, use_dora=True))
    arguments = ["adapter-to-te", tmp_path / "adapter", tmp_path / "converted", "--base", tmp_path / "te"]
    assert main([str(each) for each in arguments]) == 0
    assert "an adapter of 21 weights, of rank 4" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(te, tmp_path / "converted").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=BOUND)


def test_a_model_with_adapters_names_merge_and_unload(tiny_llama, tmp_path: Path) -> None:
    hf = tiny_llama()
    te = convert_llama_hf_to_te(hf)
    adapted = publish(hf, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(TypeError, match=r"model_hf is a PeftModelForCausalLM of PEFT: .*merge_and_unload"):
        convert_llama_hf_to_te(adapted)
    with pytest.raises(ValueError, match=r"has adapters of PEFT, such as .*merge_and_unload"):
        convert_llama_hf_to_te(adapted.base_model.model)
    with pytest.raises(TypeError, match=r"model_te is a PeftModel of PEFT: .*merge_and_unload"):
        convert_llama_te_to_hf(get_peft_model(te, LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(TypeError, match=r"merge_and_unload"):
        export_te_checkpoint(adapted, tmp_path / "standalone")


def test_adapters_that_are_not_for_the_other_direction(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapts no projections, such as q_proj, so it has the Transformer Eng"):
        convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=str(base), to_te=True)
