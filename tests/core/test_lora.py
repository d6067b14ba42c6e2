"""PEFT's LoRA on the weights of the reference layers, and of a fake Transformer Engine's layers.

The oracle is a model whose weights are W + scale·B·A, computed in float64.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.lora.te as peft_te
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer

from conftest import TINY
from core import fake_transformer_engine as fake
from core.trainers import PACKED, history, make_trainer, samples
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.lora import WEIGHTS, on_weights

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 0, 0]])
MASK = (IDS != 0).long()
REAL = MASK.bool()
# Bound for float32 logits between W·x + s·B·A·x and (W + s·B·A)·x. Measured: 1e-5.
BOUND = 1e-4


@pytest.fixture
def base(tiny_llama: Callable[..., PreTrainedModel]) -> NVLlamaForCausalLM:
    return convert_llama_hf_to_te(tiny_llama())


def adapted(base: NVLlamaForCausalLM, **fields: Any) -> PeftModel:
    """Make a model with an adapter that changes its output."""
    model = get_peft_model(base, on_weights(LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits[REAL]


def with_changed_weights(model: PeftModel, tiny_llama: Callable[..., PreTrainedModel]) -> NVLlamaForCausalLM:
    """Make the oracle: a float64 model without an adapter, each weight plus its scale·B·A."""
    exact = convert_llama_hf_to_te(tiny_llama()).double()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "parameter_name"):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            weight = exact.get_parameter(f"{plain}.{module.parameter_name}")
            weight.data += module.scaling["default"] * (b @ a)
    return exact


@pytest.mark.parametrize("names", [None, WEIGHTS[:1], WEIGHTS[2:], ("layers.1.layernorm_mlp.fc1_weight",)])
def test_the_layers_compute_with_the_sum(names, base, tiny_llama) -> None:
    before = logits(base)
    model = adapted(base, target_parameters=None if names is None else list(names))
    expected = logits(with_changed_weights(model, tiny_llama))
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model).double(), expected, rtol=0, atol=BOUND)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_merges_and_unmerges(base) -> None:
    before, weights = logits(base), {name: x.clone() for name, x in base.state_dict().items()}
    model = adapted(base)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=BOUND)
    merged = model.merge_and_unload()
    assert type(merged) is NVLlamaForCausalLM
    assert merged.state_dict().keys() == weights.keys()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=BOUND)
    assert (expected - before).abs().max() > 0.1


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant checkpointing"])
def test_trainer_trains_the_adapter_alone(reentrant: bool | None, tiny_llama, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 12, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 6}
    if reentrant is not None:
        kwargs = {"use_reentrant": reentrant}
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}

    def fresh() -> Trainer:
        torch.manual_seed(0)
        config = on_weights(LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
        model = get_peft_model(convert_llama_hf_to_te(tiny_llama()), config)
        return make_trainer(model, tmp_path, PACKED, samples(4), **options)

    trainer = fresh()
    trainer.train()
    losses = history(trainer)
    assert losses[-1] < losses[0] - 0.5
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(WEIGHTS) * TINY["num_hidden_layers"]
    assert all("lora_" in name for name in trained)

    resumed = fresh()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert history(resumed)[-6:] == losses[-6:]

    changed = trainer.model.unload().state_dict()
    weights = convert_llama_hf_to_te(tiny_llama()).state_dict()
    assert changed.keys() == weights.keys()
    assert all(torch.equal(changed[name], weight) for name, weight in weights.items())


def test_saves_and_loads(base, tiny_llama, tmp_path: Path) -> None:
    model = adapted(base, rank_pattern={"layers.0.self_attention.proj.weight": 2}, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    config = on_weights(LoraConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(convert_llama_hf_to_te(tiny_llama()), tmp_path, config=config)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_generates_with_and_without_a_cache(base, tiny_llama) -> None:
    model = adapted(base)
    left, left_mask = IDS.flip(1), MASK.flip(1)
    arguments = {"input_ids": left, "attention_mask": left_mask, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**arguments)
    assert torch.equal(cached, model.generate(**arguments, use_cache=False))
    assert torch.equal(cached, model.merge_and_unload().generate(**arguments))
    assert not torch.equal(cached, convert_llama_hf_to_te(tiny_llama()).generate(**arguments))


# --- Transformer Engine's modules, for which PEFT has its own adapters ------------------------------------------------


@pytest.fixture
def te_model(monkeypatch: pytest.MonkeyPatch, base) -> NVLlamaForCausalLM:
    """Make a model on the fake Transformer Engine, which PEFT mistakes for the real package."""
    fake.FakeTransformerEngine().install(monkeypatch)
    names = {name: getattr(fake, name) for name in ("LayerNormLinear", "LayerNormMLP", "Linear")}
    monkeypatch.setattr(peft_te, "is_te_pytorch_available", lambda: True)
    monkeypatch.setattr(peft_te, "te", types.SimpleNamespace(pytorch=types.SimpleNamespace(**names)), raising=False)
    model = NVLlamaForCausalLM(NVLlamaConfig(**base.config.to_dict(), layer_implementation="transformer_engine"))
    model.load_state_dict(base.state_dict())
    return model.eval()


def test_weights_of_transformer_engine_are_adapted_alike(te_model, base) -> None:
    model = adapted(te_model)
    attention = model.get_base_model().model.layers[0].self_attention
    projections = attention.layernorm_qkv.base_layer, attention.proj.base_layer
    assert [type(projection) for projection in projections] == [fake.LayerNormLinear, fake.Linear]
    expected = logits(adapted(base))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=BOUND)
    # The projections have received the settings from attention.
    assert projections[0].output_quantizer_role == projections[1].grad_input_quantizer_role == "dpa"
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=BOUND)


def test_what_peft_makes_of_transformer_engines_modules_is_refused(te_model) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["layernorm_qkv"])
    for layer in te_model.model.layers:
        projection = layer.self_attention.layernorm_qkv
        projection.out_features, projection.in_features = projection.weight.shape
    model = get_peft_model(te_model, config)
    with pytest.raises(RuntimeError, match=r"LayerNormLinear has an adapter, TeLinear.*lora\.on_weights"):
        logits(model)


def test_weights_in_a_quantized_format_only_are_refused(te_model) -> None:
    projection = te_model.model.layers[1].self_attention.proj
    projection.weight = torch.nn.Parameter(fake.QuantizedTensor(projection.weight.data, requires_grad=True))
    with pytest.raises(ValueError, match=r"weight of Linear is held in a quantized.*use_quantized_model_init=False"):
        adapted(te_model)


def test_an_initialisation_that_changes_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' is not supported.*'gaussian'"):
        on_weights(LoraConfig(init_lora_weights="pissa"))


def test_dropout_is_refused(base) -> None:
    with pytest.raises(ValueError, match="lora_dropout"):
        adapted(base, lora_dropout=0.1)
