"""Tests each layer's recipe in the training command, on a fake Transformer Engine."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from core import fake_transformer_engine
from core.fake_transformer_engine import FakeTransformerEngine
from core.training_runs import docstrings, write
from llama_te_core.train.checkpoint.checkpoints import Checkpoints, TrainingCheckpointError
from llama_te_core.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ShapeConfig,
    TrainConfig,
)
from llama_te_core.train.config.machine import check_machine
from llama_te_core.train.data.batch_stream import BatchStream
from llama_te_core.train.data.byte_tokenizer import byte_tokenizer
from llama_te_core.train.export import export_te
from llama_te_core.train.finite_updates import FiniteUpdates
from llama_te_core.train.optimizers import make_optimizer
from llama_te_core.train.setup import build_model, random_weights

SHAPE = ShapeConfig(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a fake Transformer Engine on a machine without a GPU."""
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


class FusedAdam(torch.optim.Optimizer):
    """Imitates Transformer Engine's FusedAdam without its kernels: it keeps quantized weights in FP32 too."""

    def __init__(self, groups: Any, lr: float, betas: Any, eps: float, weight_decay: float = 0, **options: Any) -> None:
        assert options == {"master_weights": True}
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def initialize_state(self, parameter: torch.Tensor, store_param_remainders: bool) -> None:
        value = parameter.detach().as_subclass(torch.Tensor).float()
        self.state[parameter] = {"exp_avg": value * 0, "exp_avg_sq": value * 0, "master_param": value.clone()}

    def set_scaled_state(self, parameter: torch.Tensor, name: str, value: torch.Tensor) -> None:
        assert value.dtype == torch.float32
        self.state[parameter].setdefault(name, torch.empty_like(value)).copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            self.state[parameter] = {}
            for key, value in state_dict["state"][name].items():
                self.set_scaled_state(parameter, key, value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"].lerp_(parameter.grad.float(), 0.1)
                weight = state.get("master_param", parameter)
                weight.sub_(group["lr"] * state["exp_avg"].sign())
                if weight is not parameter:
                    parameter.copy_(weight)


def to_fp8(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float8_e4m3fn).to(value.dtype)


@pytest.fixture
def quantizing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make quantized weights round copied values, and install the optimizer for them."""

    def copy_(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.Tensor.copy_(weight, to_fp8(value.as_subclass(torch.Tensor)))

    monkeypatch.setattr(fake_transformer_engine.QuantizedTensor, "copy_", copy_, raising=False)
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))  # layers name this device
    optimizers = types.SimpleNamespace(FusedAdam=FusedAdam)
    monkeypatch.setattr(sys.modules["transformer_engine.pytorch"], "optimizers", optimizers, raising=False)
    return engine


QUANTIZED = {"compute": "fp8", "weights": "fp32", "quantized_weights": True}


class Training:
    """A run with quantized weights in all layers but the first."""

    def __init__(self, seed: int = 0, **precision: Any) -> None:
        self.config = config(**QUANTIZED | {"bf16_first_layers": 1} | precision)
        model_config = self.config.model_config()
        weights = random_weights(seed, model_config)
        self.model, self.called = build_model(self.config, model_config, weights, None, torch.device("cpu"))
        self.begin = {name: weights(name, parameter) for name, parameter in self.model.named_parameters()}
        self.optimizer = make_optimizer(self.model, OptimizerConfig(learning_rate=1e-4))

    def step(self) -> None:
        ids_BS = torch.arange(16)[None]
        self.called(input_ids=ids_BS, shift_labels=ids_BS, num_items_in_batch=torch.tensor(16)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def quantized(self) -> dict[str, torch.Tensor]:
        """The quantized weights, which the layers compute with."""
        return {
            name: parameter.detach().as_subclass(torch.Tensor).clone()
            for name, parameter in self.model.named_parameters()
            if isinstance(parameter, fake_transformer_engine.QuantizedTensor)
        }

    @property
    def state(self) -> dict[str, torch.Tensor]:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        assert {type(value) for value in state.values()} == {torch.Tensor}
        return state


def test_the_optimizer_has_quantized_weights_in_fp32_too(quantizing: Any) -> None:
    run = Training()
    check_machine(run.config, 2)
    assert isinstance(run.optimizer, FusedAdam)
    decays = [group["weight_decay"] for group in run.optimizer.param_groups]
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [18, 9]
    assert decays == [OptimizerConfig().weight_decay, 0]
    assert len(run.quantized) == 3 * 4
    for name, parameter in run.model.named_parameters():
        assert ("master_param" in run.optimizer.state[parameter]) == (name in run.quantized)
        assert not hasattr(parameter, "value_before_rounding")
    # The FP32 weights begin with the values before rounding.
    torch.testing.assert_close(run.state, run.begin, rtol=0, atol=0)
    for name, weight in run.quantized.items():
        torch.testing.assert_close(weight, to_fp8(run.begin[name]), rtol=0, atol=0)
    assert not torch.equal(run.quantized[name], run.begin[name])


def test_small_steps_are_not_lost_in_rounding(quantizing: Any) -> None:
    run = Training()
    for _ in range(3):
        run.step()
    state = run.state
    for name, weight in run.quantized.items():
        # Each step is far smaller than the distance of two FP8 numbers, but the FP32 weights have every step.
        assert 2e-4 < (state[name] - run.begin[name]).abs().max() < 4e-4
        torch.testing.assert_close(weight, to_fp8(state[name]), rtol=0, atol=0)


def test_checkpoints_hold_what_the_optimizer_has(quantizing: Any, tmp_path: Path) -> None:
    run = Training()
    run.step()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer)
    checkpoints.wait()
    saved = FileSystemReader(tmp_path / "step-00000001").read_metadata()
    assert not any("master_param" in path for path in saved.planner_data.values())

    other = Training(seed=1)
    other.step()
    checkpoints.load(1, other.model, other.optimizer)
    for _ in range(2):
        torch.testing.assert_close(other.state, run.state, rtol=0, atol=0)
        torch.testing.assert_close(other.quantized, run.quantized, rtol=0, atol=0)
        run.step()
        other.step()
    assert [group["step"] for group in other.optimizer.param_groups] == [3, 3]

    ordinary = Training(quantized_weights=False)
    assert isinstance(ordinary.optimizer, torch.optim.AdamW)
    with pytest.raises(TrainingCheckpointError, match=r"cannot be loaded: RuntimeError: Missing key .*step"):
        checkpoints.load(1, ordinary.model, ordinary.optimizer)
    checkpoints.load(1, ordinary.model)  # the weights alone
    ordinary.step()
    checkpoints.save(2, ordinary.model, ordinary.optimizer)
    with pytest.raises(
        TrainingCheckpointError, match=r"the checkpoint's optimizer kept .*'step'.*same precision.quantized_weights"
    ):
        checkpoints.load(2, run.model, run.optimizer)


def test_what_is_exported_was_not_rounded(quantizing: Any, tmp_path: Path) -> None:
    run = Training()
    run.step()
    export_te(run.model, None, tmp_path / "te")
    exported = load_file(tmp_path / "te" / "model.safetensors")
    torch.testing.assert_close(exported, run.state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "others", "message"),
    [
        ({"compute": "mxfp8"}, {}, "compute='mxfp8', fp8_recipe='current' and weights='fp32': it needs compute='fp8'"),
        ({"fp8_recipe": "block"}, {}, "fp8_recipe='block' and weights='fp32': it needs .* 'current' or 'delayed'"),
        ({"weights": "bf16"}, {}, "weights='bf16': it needs .* weights='fp32' for the optimizer"),
        ({}, {"parallel": ParallelConfig(tensor=2)}, "parallel.tensor=2: tensor ranks cannot share .* Use shard"),
        ({}, {"activation_checkpointing": "full"}, "activation_checkpointing='full': .* Use .*'none', or"),
        ({}, {"activation_offload_layers": 1}, "activation_offload_layers=1: .* Use 0, or"),
    ],
    ids=str,
)
def test_what_does_not_go_with_quantized_weights_is_refused(
    precision: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"precision.quantized_weights=True.*{message}"):
        dataclasses.replace(config(**QUANTIZED | precision), **others)


def test_parts_of_different_sizes_are_refused(quantizing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(**QUANTIZED)
    model_config = run.model_config()
    monkeypatch.setattr("llama_te_core.train.setup.return_loss_alone", lambda *args, **options: None)
    mesh: Any = types.SimpleNamespace(shape=(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"parallel.shard x context=3 does not divide the 64 rows of layers.0.*qkv"):
        build_model(run, model_config, random_weights(0, model_config), mesh, torch.device("cpu"))


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
    # Each forward pass counts every layer again, with or without offloaded activations.
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


def test_a_step_that_is_not_finite_leaves_quantized_weights_and_their_state(quantizing: Any) -> None:
    run = Training()
    run.step()
    updates = FiniteUpdates(run.optimizer, torch.device("cpu"))
    before, quantized = run.state, run.quantized
    moments = [{name: value.clone() for name, value in state.items()} for state in run.optimizer.state.values()]
    for loss in (float("nan"), 1.0):
        for parameter in run.model.parameters():
            parameter.grad = torch.ones(parameter.shape)
        updates.step(torch.tensor(loss), torch.tensor(1.0))
    torch.testing.assert_close(run.state, before, rtol=0, atol=0)
    torch.testing.assert_close(run.quantized, quantized, rtol=0, atol=0)
    for state, values in zip(run.optimizer.state.values(), moments, strict=True):
        torch.testing.assert_close(dict(state), values, rtol=0, atol=0)
    assert {group["step"] for group in run.optimizer.param_groups} == {1}
