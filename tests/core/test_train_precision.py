"""The training command's precision, on a stand-in for Transformer Engine: which layer gets which recipe."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from core import fake_transformer_engine
from core.fake_transformer_engine import FakeTransformerEngine
from core.training_runs import docstrings, write
from llama_te_core.train.batch_stream import BatchStream
from llama_te_core.train.byte_tokenizer import byte_tokenizer
from llama_te_core.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    ShapeConfig,
    TrainConfig,
    check_machine,
)
from llama_te_core.train.models import build_model, random_weights

SHAPE = ShapeConfig(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformer Engine, as far as a machine without a GPU can have it."""
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("transformer_engine.common"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", fake_transformer_engine)
    return FakeTransformerEngine().install(monkeypatch, capability=(10, 0))


def config(source: Path | str = "x", activations: Any = "none", **precision: Any) -> TrainConfig:
    return TrainConfig(
        DataConfig(str(source), tokens_per_batch=256, workers=0),
        ModelConfig(shape=SHAPE),
        activation_checkpointing=activations,
        checkpoint=CheckpointConfig(interval=None),
        precision=PrecisionConfig(**{"weights": "bf16", **precision}),
    )


@pytest.mark.parametrize(
    ("precision", "layer", "recipe"),
    [
        ({"compute": "fp8", "fp8_recipe": "delayed"}, "fp8", "DelayedScaling"),
        ({"compute": "fp8", "fp8_recipe": "current"}, "fp8", "Float8CurrentScaling"),
        ({"compute": "fp8", "fp8_recipe": "block"}, "fp8", "Float8BlockScaling"),
        ({"compute": "mxfp8"}, "fp8", "MXFP8BlockScaling"),
        ({"compute": "nvfp4"}, "fp4", "NVFP4BlockScaling"),
    ],
    ids=str,
)
def test_layers_compute_in_the_format_asked_for(
    engine: Any, tmp_path: Path, precision: dict[str, Any], layer: str, recipe: str
) -> None:
    source = write(tmp_path, docstrings(150)[:3])
    run = config(source, **precision, bf16_first_layers=1, bf16_last_layers=2)
    check_machine(run, 1)
    model_config = run.model_config()
    assert model_config.layer_precision == [None, layer, None, None]
    model, called = build_model(run, model_config, random_weights(0, model_config), None, torch.device("cpu"))
    assert model.dtype == torch.bfloat16
    data = run.data.text_data(byte_tokenizer(), 0, run.precision.token_multiple, 1)
    batch = BatchStream(data, None, torch.device("cpu"), workers=0).next()
    assert batch.arguments["input_ids"].shape[1] % run.precision.token_multiple == 0
    loss = called(**batch.arguments)
    loss.backward()
    assert loss.item() == pytest.approx(5.56, abs=0.1)
    states = [each.calls[0]["autocast"][-1] for each in engine.layers]
    assert [enabled for enabled, _ in states] == [False, True, False, False]
    assert type(states[1][1]).__name__ == recipe


def test_quantized_weights_are_asked_for(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(compute="fp8", quantized_weights=True, bf16_first_layers=1)
    check_machine(run, 1)
    assert run.model_config().use_quantized_model_init
    with pytest.raises(ValueError, match="precision.quantized_weights=True with 2 processes: it is for one"):
        check_machine(run, 2)


@pytest.mark.parametrize(("activations", "layers"), [("none", 0), ("selective", 2), ("full", 4)])
def test_activations_of_its_layers_are_left_to_transformer_engine(engine: Any, activations: str, layers: int) -> None:
    run = config(activations=activations, compute="bf16")
    model_config = run.model_config()
    model, called = build_model(run, model_config, random_weights(0, model_config), None, torch.device("cpu"))
    ids_BS = torch.arange(16)[None]
    called(input_ids=ids_BS, shift_labels=ids_BS, num_items_in_batch=torch.tensor(16)).backward()
    assert engine.events.count(("checkpoint", False)) == layers
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_offloaded_activations_are_left_to_transformer_engine(engine: Any) -> None:
    run = dataclasses.replace(config(compute="bf16"), activation_offload_layers=2)
    model_config = run.model_config()
    model, called = build_model(run, model_config, random_weights(0, model_config), None, torch.device("cpu"))
    assert engine.events[-1] == ("offload", 2, len(model.model.layers))
    ids_BS = torch.arange(16)[None]
    # Each layer is counted, whether its activations are offloaded or not, in each forward pass anew.
    forward = [(kind, layer) for layer in range(4) for kind in ("enter offload", "layer", "exit offload")]
    for _ in range(2):
        engine.events.clear()
        loss = called(input_ids=ids_BS, shift_labels=ids_BS, num_items_in_batch=torch.tensor(16))
        loss.backward()
        seen = [(kind, what[0]) for kind, *what in engine.events if "autocast" not in kind]
        seen = [(kind, number - 1 if kind == "layer" else number) for kind, number in seen]
        assert seen == [*forward, *(("backward", layer) for layer in (3, 2, 1, 0))]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_offloaded_without_gradients(engine: Any) -> None:
    run = dataclasses.replace(config(compute="bf16"), activation_offload_layers=2)
    model_config = run.model_config()
    _, called = build_model(run, model_config, random_weights(0, model_config), None, torch.device("cpu"))
    ids_BS = torch.arange(16)[None]
    with torch.no_grad():
        called(input_ids=ids_BS, shift_labels=ids_BS, num_items_in_batch=torch.tensor(16))
    assert not [event for event in engine.events if "enter offload" in event]


@pytest.mark.parametrize(("compute", "multiple"), [("bf16", 2), ("fp8", 32), ("mxfp8", 64)])
def test_each_tensor_rank_has_tokens_that_its_layers_take(compute: str, multiple: int) -> None:
    run = dataclasses.replace(config(compute=compute), parallel=ParallelConfig(tensor=2))
    assert run.token_multiple == multiple


def test_fp8_and_reference_layers_are_refused_together(engine: Any) -> None:
    run = TrainConfig(
        DataConfig("x", tokens_per_batch=256),
        ModelConfig(shape=SHAPE, layer_implementation="reference"),
        precision=PrecisionConfig(compute="fp8"),
    )
    with pytest.raises(RuntimeError, match="but model.layer_implementation is 'reference'"):
        check_machine(run, 1)
