"""Names of NVIDIA's Llama 3 recipe, and what transformers would do to a model by the names of its own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from conftest import TINY
from core.fake_transformer_engine import DelayedScaling, FakeTransformerEngine
from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, NVLlamaModel

Maker = Callable[..., PreTrainedModel]
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_frequencies_equal_those_of_transformers(tiny_llama: Maker) -> None:
    hf = tiny_llama(rope_parameters=LLAMA_3, max_position_embeddings=128)
    model = convert_llama_hf_to_te(hf)
    assert torch.equal(model.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq)
    model.model.rotary_emb.inv_freq = hf.model.rotary_emb.inv_freq.clone()  # as the recipe's conversion does
    with pytest.raises(ValueError, match=r"change rope_parameters in the configuration"):
        model.model.rotary_emb.inv_freq = 2 * hf.model.rotary_emb.inv_freq


def test_a_recipe_alone_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    te = FakeTransformerEngine().install(monkeypatch)
    recipe = DelayedScaling()
    config = NVLlamaConfig(**TINY)
    with pytest.warns(UserWarning, match="every layer runs in FP8"):
        model = NVLlamaForCausalLM(config, fp8_recipe=recipe)
    assert config.layer_precision == model.config.layer_precision == ["fp8"] * 3
    model.save_pretrained(tmp_path)
    assert NVLlamaConfig.from_pretrained(tmp_path).layer_precision == ["fp8"] * 3
    decoder = model.model
    with decoder.get_autocast_context(None, outer=True), decoder.get_autocast_context(1):
        assert te.autocasts == [(True, recipe)] * 2
    with decoder.get_autocast_context(1, init=True):
        assert te.inits == []
    config.use_quantized_model_init = True
    with decoder.get_autocast_context(1, init=True):
        assert te.inits == [(True, recipe)]
    with pytest.raises(ValueError, match="layer_number=None has a context with outer=True alone"):
        decoder.get_autocast_context(None)
    assert NVLlamaModel(NVLlamaConfig(**TINY)).config.layer_precision is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp_plan": "auto"}, r"tp_plan='auto' is not supported.*parallelize\(model, mesh\)"),
        ({"tp_size": 2}, "tp_size=2 is not supported"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantization_config=.*layer_precision"),
        ({"load_in_4bit": True}, "load_in_4bit=True is not supported.*use_quantized_model_init"),
    ],
)
def test_changes_by_the_names_of_transformers_modules_are_refused(
    arguments: dict[str, Any], message: str, tiny_llama: Maker, tmp_path: Path
) -> None:
    convert_llama_hf_to_te(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        NVLlamaForCausalLM.from_pretrained(tmp_path, **arguments)


def test_the_configuration_has_no_plan_of_other_modules(tiny_llama: Maker) -> None:
    model = convert_llama_hf_to_te(tiny_llama())
    assert model.config.base_model_tp_plan is model.config.base_model_pp_plan is None
    assert convert_llama_te_to_hf(model).config.base_model_tp_plan == LlamaConfig().base_model_tp_plan


class Int8Tensor(torch.Tensor):
    """A weight as torchao's `quantize_` sets it on each `nn.Linear`."""

    __module__ = "torchao.quantization"


def quantize_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Int8Tensor), requires_grad=False)


def test_quantizers_of_linear_modules_are_refused(tiny_llama: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_llama_hf_to_te(tiny_llama())
    with pytest.raises(TypeError, match=r"Int8Tensor for an output projection alone.*layer_precision=\['fp8'\]"):
        quantize_(model)
    # Transformer Engine's layers have no such module: the head alone would be quantized.
    FakeTransformerEngine().install(monkeypatch)
    model = NVLlamaForCausalLM(NVLlamaConfig(**TINY, layer_implementation="transformer_engine"))
    with pytest.warns(UserWarning, match=r"Int8Tensor quantizes the head alone, and the decoder layers stay"):
        quantize_(model.lm_head)
