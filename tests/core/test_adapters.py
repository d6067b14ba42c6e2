"""PEFT's adapters of the projections of a Hugging Face Llama, on the fused weights.

The oracle is PEFT on transformers' Llama with the same adapter.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.lora.te as peft_te
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import PreTrainedModel

from conftest import TINY
from core import fake_transformer_engine as fake
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.layers.projections import PROJECTIONS

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 0, 0]])
MASK = (IDS != 0).long()
REAL = MASK.bool()
# Bound for float32 logits between W·x + s·B·A·x and (W + s·B·A)·x. Measured: 1e-5.
BOUND = 1e-4
Maker = Callable[..., PreTrainedModel]

CONFIGS: dict[str, dict[str, Any]] = {
    "queries and values": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "PEFT's default": {},
    "all": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA on all": {"target_modules": list(PROJECTIONS), "use_dora": True},
    "some layers, other ranks": {
        "target_modules": r".*\.(up_proj|o_proj)",
        "layers_to_transform": None,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 3},
    },
    "and the head": {"target_modules": ["k_proj", "lm_head"]},
}


def fill(model: Any) -> Any:
    """Give an adapter the same weights on both models. DoRA's magnitudes stay near the weights' norms."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):  # the modules' order differs
            if "lora_" in name:
                change = torch.randn_like(parameter) * 0.1
                parameter.copy_(parameter + change if "magnitude" in name else change)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits[REAL]


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=BOUND)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_published_adapter_loads_and_merges(fields: dict[str, Any], tiny_llama: Maker, tmp_path: Path) -> None:
    theirs = fill(get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)))
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    base = convert_llama_hf_to_te(tiny_llama())
    plain, weights = logits(base), {name: weight.clone() for name, weight in base.state_dict().items()}
    assert (expected - plain).abs().max() > 0.1

    model = PeftModel.from_pretrained(base, tmp_path).eval()
    close(logits(model), expected)
    # The names of all parameters of the adapter, and no more.
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(theirs).keys()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == weights.keys()
    close(logits(merged), expected)


def test_an_adapter_loads_by_transformers_own_method(tiny_llama: Maker, tmp_path: Path) -> None:
    theirs = fill(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    theirs.save_pretrained(tmp_path / "lora")
    model = convert_llama_hf_to_te(tiny_llama())
    model.load_adapter(tmp_path / "lora")
    close(logits(model), logits(theirs))
    # transformers 5.17 leaves DoRA's magnitudes as they are, on its own Llama too.
    dora = fill(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*PeftModel\.from_pretrained"):
        convert_llama_hf_to_te(tiny_llama()).load_adapter(tmp_path / "dora")


def test_two_adapters(tiny_llama: Maker) -> None:
    def both(model: PreTrainedModel) -> PeftModel:
        result = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
        result.add_adapter("two", LoraConfig(r=2, target_modules=["v_proj", "q_proj"], use_dora=True))
        return fill(result)

    theirs, ours = both(tiny_llama()), both(convert_llama_hf_to_te(tiny_llama()))
    results = []
    for active in ("one", "two", ["one", "two"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        results.append(logits(ours))
        close(results[-1], logits(theirs))
    assert (results[0] - results[1]).abs().max() > 0.1
    plain = logits(convert_llama_hf_to_te(tiny_llama()))
    for model in (theirs, ours):
        model.merge_adapter(adapter_names=["one", "two"])
    close(logits(ours), logits(theirs))
    ours.unmerge_adapter()
    close(logits(ours), results[-1])
    with ours.disable_adapter():
        close(logits(ours), plain)
    with pytest.raises(RuntimeError, match="adapter_names chooses an adapter for each row"):
        ours(input_ids=IDS, attention_mask=MASK, adapter_names=["one", "two"])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(use_dora: bool, checkpointing: bool, tiny_llama: Maker) -> None:
    gradients, numbers = [], []
    for base in (tiny_llama(), convert_llama_hf_to_te(tiny_llama())):
        model = fill(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora))).train()
        if checkpointing:
            model.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(~REAL, -100)).loss.backward()
        numbers.append(model.get_nb_trainable_parameters())
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert numbers[0] == numbers[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_an_adapter_of_ours_loads_on_transformers_llama(tiny_llama: Maker, tmp_path: Path) -> None:
    ours = fill(get_peft_model(convert_llama_hf_to_te(tiny_llama()), LoraConfig(r=4, target_modules="all-linear")))
    ours.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(ours))
    inputs = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1), "max_new_tokens": 6, "do_sample": False}
    cached = ours.generate(**inputs)
    assert torch.equal(cached, ours.generate(**inputs, use_cache=False))
    assert torch.equal(cached, ours.merge_and_unload().generate(**inputs))


def test_a_deep_copy_has_adapters_of_its_own(tiny_llama: Maker) -> None:
    model = fill(get_peft_model(convert_llama_hf_to_te(tiny_llama()), LoraConfig(r=4, target_modules=["q_proj"])))
    expected = logits(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(logits(copied), expected)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(copied))), expected)


def test_a_model_without_adapters_has_no_projections(tiny_llama: Maker) -> None:
    model = convert_llama_hf_to_te(tiny_llama())
    names = [name for name, _ in model.named_modules()]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1]))
    added = {name for name, _ in adapted.get_base_model().named_modules() if "lora" not in name} - set(names)
    assert {name.rsplit(".", 2)[0] for name in added if name.endswith("base_layer")} == {"model.layers.1.self_attn"}
    assert not any("layers.0" in name or ".mlp" in name for name in added)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], lora_dropout=0.1), r"lora_dropout=0\.1 is not supported in training"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias=True is not supported"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3Config with target_modules.*LoraConfig"),
        (IA3Config(target_modules="all-linear", feedforward_modules=[]), "IA3Config with target_modules='all-linear'"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "AdaLoraConfig makes SVDLinear of a projection"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_the_layers_cannot_compute_is_refused(config: Any, message: str, tiny_llama: Maker) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(convert_llama_hf_to_te(tiny_llama()), config)


def test_other_models_and_other_adapters_are_left_alone(tiny_llama: Maker) -> None:
    hf = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    assert hf.get_nb_trainable_parameters()[0] > 0
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert get_peft_model(convert_llama_hf_to_te(tiny_llama()), prompt).get_nb_trainable_parameters()[0] > 0


def test_transformer_engines_modules(tiny_llama: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's modules have Transformer Engine's classes, for which PEFT has adapters of its own."""
    theirs = fill(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", use_dora=True)))
    theirs.save_pretrained(tmp_path)
    expected, state = logits(theirs), convert_llama_hf_to_te(tiny_llama()).state_dict()
    fake.FakeTransformerEngine().install(monkeypatch)
    monkeypatch.setattr(peft_te, "is_te_pytorch_available", lambda: False)
    model = NVLlamaForCausalLM(NVLlamaConfig(**TINY, layer_implementation="transformer_engine"))
    model.load_state_dict(state)
    adapted = PeftModel.from_pretrained(model.eval(), tmp_path, torch_device="cpu").eval()
    close(logits(adapted), expected)
    close(logits(adapted.merge_and_unload()), expected)
    projection = model.model.layers[1].self_attention.proj
    projection.weight = torch.nn.Parameter(fake.QuantizedTensor(projection.weight.data, requires_grad=True))
    with pytest.raises(ValueError, match=r"weight of Linear is held in a quantized.*use_quantized_model_init=False"):
        get_peft_model(model, LoraConfig(target_modules=["o_proj"]))
