"""The device and the dtype that a model on Transformer Engine's layers is built with.

A fake stands for Transformer Engine. The meta device stands for the GPU, which this machine lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from conftest import TINY
from core.fake_transformer_engine import FakeTransformerEngine, Float8CurrentScaling
from llama_te_core import (
    NVLlamaConfig,
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
    NVLlamaPreTrainedModel,
)
from llama_te_core.layers.te import TransformerEngineBackend

GPU, CPU = torch.device("meta"), torch.device("cpu")
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> FakeTransformerEngine:
    fake = FakeTransformerEngine().install(monkeypatch)
    monkeypatch.setattr(TransformerEngineBackend, "device", GPU)
    return fake


def config_of(**fields: Any) -> NVLlamaConfig:
    return NVLlamaConfig(**{**TINY, "dtype": BF16, **fields})


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def kinds(model: torch.nn.Module) -> set[tuple[torch.device, torch.dtype]]:
    """Return the devices and dtypes of all parameters, embeddings, norms and heads included."""
    return {(parameter.device, parameter.dtype) for parameter in model.parameters()}


@pytest.mark.parametrize(
    "cls",
    [
        NVLlamaModel,
        NVLlamaForCausalLM,
        NVLlamaForSequenceClassification,
        NVLlamaForTokenClassification,
        NVLlamaForQuestionAnswering,
    ],
)
def test_the_gpu_and_the_configurations_dtype(te: FakeTransformerEngine, cls: type[NVLlamaPreTrainedModel]) -> None:
    assert kinds(cls(config_of())) == {(GPU, BF16)}
    assert torch.get_default_dtype() == FP32
    assert torch.empty(1).device == CPU
    # Transformer Engine's layers get both by name.
    assert {(x.arguments["device"], x.arguments["params_dtype"]) for x in te.layers} == {(str(GPU), BF16)}


@pytest.mark.parametrize(
    ("context", "dtype", "expected"),
    [
        (torch.device("cpu"), BF16, (CPU, BF16)),
        (default_device("cpu"), BF16, (CPU, BF16)),
        (default_dtype(FP16), BF16, (GPU, FP16)),
        (contextlib.nullcontext(), None, (GPU, FP32)),
        (contextlib.nullcontext(), FP32, (GPU, FP32)),
        (contextlib.nullcontext(), "bfloat16", (GPU, BF16)),
    ],
    ids=["device", "default device", "dtype", "none in the configuration", "float32", "a name"],
)
def test_a_context_says_otherwise(te, context: Any, dtype: Any, expected: tuple[torch.device, torch.dtype]) -> None:
    config = config_of()
    config.dtype = dtype
    with context:
        assert kinds(NVLlamaForCausalLM(config)) == {expected}


def test_the_meta_device_and_then_memory(te, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerEngineBackend, "device", CPU)
    with torch.device("meta"):
        model = NVLlamaForCausalLM(config_of())
    assert kinds(model) == {(torch.device("meta"), BF16)}
    model.init_empty_weights("cpu")
    assert kinds(model) == {(CPU, BF16)}


def test_a_users_own_class_with_a_head(te) -> None:
    class WithHead(NVLlamaPreTrainedModel):
        def __init__(self, config: NVLlamaConfig) -> None:
            super().__init__(config)
            self.model = NVLlamaModel(config)
            self.head = torch.nn.Linear(config.hidden_size, 3)
            self.post_init()

    assert kinds(WithHead(config=config_of())) == {(GPU, BF16)}


def test_loading_and_from_config_keep_their_contexts(te, tmp_path: Path) -> None:
    with torch.device("cpu"):
        NVLlamaForCausalLM(config_of()).save_pretrained(tmp_path)
    for loaded, dtype in (
        (NVLlamaForCausalLM.from_pretrained(tmp_path), BF16),
        (NVLlamaForCausalLM.from_pretrained(tmp_path, dtype=FP32), FP32),
        (AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float16"), FP16),
    ):
        assert kinds(loaded) == {(CPU, dtype)}  # as transformers' own classes: device_map="cuda" loads to the GPU
    assert kinds(AutoModel.from_config(config_of())) == {(GPU, BF16)}
    assert kinds(AutoModelForCausalLM.from_config(config_of(), dtype=FP32)) == {(GPU, FP32)}


def test_reference_layers_are_built_as_transformers_llama() -> None:
    assert kinds(NVLlamaModel(config_of(layer_implementation="reference"))) == {(CPU, FP32)}


def test_quantized_weights_need_no_context(te) -> None:
    model = NVLlamaModel(config_of(layer_precision=["fp8"] * 3, use_quantized_model_init=True))
    assert kinds(model) == {(GPU, BF16)}
    assert all(layer.init_context == (True, None) for layer in te.layers)


def test_a_users_quantized_model_init_on_the_cpu_is_refused(te) -> None:
    with te.quantized_model_init(recipe=Float8CurrentScaling()):
        assert kinds(NVLlamaModel(config_of())) == {(GPU, BF16)}
        with (
            torch.device("cpu"),
            pytest.raises(RuntimeError, match=r"te\.quantized_model_init needs the model to be built on a GPU.*is cpu"),
        ):
            NVLlamaForCausalLM(config_of())
    with te.quantized_model_init(enabled=False), torch.device("cpu"):
        assert kinds(NVLlamaModel(config_of())) == {(CPU, BF16)}


def test_weights_loaded_into_a_users_quantized_model_init_are_quantized_on_a_gpu_alone(te, tmp_path: Path) -> None:
    with torch.device("cpu"):
        NVLlamaForCausalLM(config_of()).save_pretrained(tmp_path)
        model = NVLlamaForCausalLM(config_of())
    model.model.layers[0].layernorm_mlp.primary_weights_in_fp8 = True  # as TE's modules say within that context
    with pytest.raises(RuntimeError, match=r"layer_norm_weight is on cpu.*device_map='cuda'"):
        model.quantize_loaded_weights()


def test_an_input_elsewhere_than_the_weights_is_refused(te) -> None:
    with torch.device("cpu"):
        model = NVLlamaModel(config_of())
    hidden = torch.zeros(1, 4, TINY["hidden_size"], device=GPU, dtype=BF16)
    with pytest.raises(RuntimeError, match=r"weights are on cpu, but its input is on meta.*model\.to"):
        model.layers[0](hidden)
