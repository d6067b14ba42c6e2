"""Tests statistics with the real nvdlfw-inspect, and a fake Transformer Engine with features of the same names."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvdlfw_inspect.api as inspect_api
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core import fake_transformer_engine
from core.fake_transformer_engine import FakeTransformerEngine
from core.training_runs import docstrings, options, write
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.train import loop
from llama_te_core.train.command import main
from llama_te_core.train.tensor_statistics import TensorStatistics

EXAMPLE = Path(__file__).parents[2] / "examples" / "inspect.yaml"

# A stand-in for Transformer Engine's folder of features: statistics go to the logger when a step ends.
FEATURES = """
from nvdlfw_inspect.base import BaseConfigAPIMapper, BaseNamespaceAPI
from nvdlfw_inspect.logging import MetricLogger
from nvdlfw_inspect.registry import Registry, api_method
import torch

fed = {}

class Statistics(BaseConfigAPIMapper):
    def parse_config_and_api(self, config, **kwargs):
        config = self._process_tensor_config(dict(config), kwargs["tensor_name"])
        return bool(config), config

    @api_method
    def inspect_tensor(self, config, layer_name, tensor_name, iteration, tensor):
        if iteration % config["freq"] == 0:
            for stat in config["stats"]:
                fed[f"{layer_name}_{tensor_name}_{stat}"] = (tensor.abs().max(), iteration)

@Registry.register_feature(namespace="transformer_engine")
class LogTensorStats(Statistics):
    pass

@Registry.register_feature(namespace="transformer_engine")
class LogFp8TensorStats(Statistics):
    pass

@Registry.register_namespace_api(namespace="transformer_engine")
class TransformerEngineAPI(BaseNamespaceAPI):
    def input_assertions_hook(self, api_name, **kwargs): pass
    def output_assertions_hook(self, api_name, ret, **kwargs): pass
    def is_multiple_feature_invocation_allowed(self, api_name): return True
    def routing_condition(self, api_name, config, _, feature, **kwargs):
        return feature.parse_config_and_api(config, **kwargs)
    def step(self):
        for name, (value, iteration) in fed.items():
            MetricLogger.log_scalar(name, value, iteration)
        fed.clear()
"""


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Install a fake Transformer Engine whose projections show their input, on a machine without a GPU."""
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("transformer_engine.common"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", fake_transformer_engine)
    FakeTransformerEngine().install(monkeypatch)
    installed = tmp_path / "transformer_engine"
    (installed / "debug" / "features").mkdir(parents=True)
    (installed / "debug" / "features" / "api.py").write_text(FEATURES)
    pytorch = sys.modules["transformer_engine.pytorch"]
    pytorch.__file__ = str(installed / "pytorch" / "__init__.py")

    def show(module: Any, args: tuple[torch.Tensor]) -> None:
        inspect_api.transformer_engine.inspect_tensor(
            layer_name=module.name,
            tensor_name="activation",
            tensor=args[0].detach(),
            iteration=inspect_api.DEBUG_MANAGER._trainer_iteration_count,
        )

    class Layer(pytorch.TransformerLayer):  # type: ignore[name-defined, misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            if inspect_api.DEBUG_MANAGER is not None:  # asked once, when a layer is built, as Transformer Engine does
                self.self_attention.proj.register_forward_pre_hook(show)

    monkeypatch.setattr(pytorch, "TransformerLayer", Layer)
    monkeypatch.setattr(loop, "_processes", lambda config: contextlib.nullcontext((None, torch.device("cpu"))))
    yield
    inspect_api.end_debug()


def quantized_run(folder: Path, **changes: Any) -> list[str]:
    source = write(folder, docstrings(150)[:2])
    settings = {
        "precision__compute": "fp8",
        "precision__weights": "bf16",
        "data__tokens_per_batch": 256,
        "checkpoint__interval": None,
        "steps": 4,
    }
    return options(folder / "run", source, **settings | changes)


def features(folder: Path, text: str) -> Path:
    file = folder / "features.yaml"
    file.write_text(text)
    return file


def statistics(folder: Path) -> list[dict[str, float]]:
    text = (folder / "inspect" / "statistics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_example_tells_of_each_layer(tmp_path: Path) -> None:
    file = features(tmp_path, EXAMPLE.read_text(encoding="utf-8").replace("freq: 100", "freq: 2"))
    assert main(quantized_run(tmp_path, log__inspect=file, data__batches_per_step=2)) == 0
    rows = statistics(tmp_path / "run")
    assert [row.pop("step") for row in rows] == [2, 4]
    names = {
        f"model.layers.{layer}.self_attention.proj_activation_{stat}"
        for layer in (1, 2, 3, 4)
        for stat in ("cur_amax", "underflows%", "mse", "scale_inv_min", "scale_inv_max")
    }
    for row in rows:
        assert row.keys() == names
        assert all(math.isfinite(value) and value > 0 for value in row.values())
    assert rows[0] != rows[1]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "inspect"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == names
    name = "model.layers.1.self_attention.proj_activation_mse"
    shown = [(event.step, event.value) for event in events.Scalars(name)]
    assert shown == [(2, pytest.approx(rows[0][name])), (4, pytest.approx(rows[1][name]))]
    assert inspect_api.DEBUG_MANAGER is None


def test_a_run_that_goes_on_drops_what_it_computes_anew(tmp_path: Path) -> None:
    (tmp_path / "inspect").mkdir()
    lines = "".join(json.dumps({"step": step, "old": 0.5}) + "\n" for step in (2, 4, 6))
    (tmp_path / "inspect" / "statistics.jsonl").write_text(lines)
    text = EXAMPLE.read_text(encoding="utf-8").replace("freq: 100", "freq: 3")
    with TensorStatistics(str(features(tmp_path, text)), tmp_path) as inspection:
        config = NVLlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        model = NVLlamaForCausalLM(config)
        inspection.begin(model, step=4)
        for _ in range(2):  # steps 5 and 6
            model(input_ids=torch.arange(8)[None])
            inspection.end_step()
    assert [row["step"] for row in statistics(tmp_path)] == [2, 4, 6]
    assert "old" not in statistics(tmp_path)[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {enabled: true, layers: {layer_types: [proj]}, transformer_engine: {Nonsense: {}}}", "feature 'Nonsense'"),
        ("a: {enabled: true, transformer_engine: {LogTensorStats: {}}}", "Provide layers field"),
        ("a: {layers: {layer_types: [proj]}}", "Missing required config field `enabled`"),
        ("a: [", "nvdlfw-inspect does not take it"),
        ("nonsense", "nvdlfw-inspect does not take it"),
        ("", "nvdlfw-inspect does not take it"),
    ],
)
def test_a_file_that_is_none_of_features_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.setattr(loop, "build_model", None)
    file = features(tmp_path, text)
    assert main(quantized_run(tmp_path, log__inspect=file)) == 1
    said = capsys.readouterr().err
    assert f"log.inspect={str(file)!r}" in said and message in said
    assert inspect_api.DEBUG_MANAGER is None


def test_what_cannot_be_inspected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "build_model", None)
    assert main(quantized_run(tmp_path, log__inspect="./nowhere.yaml")) == 1
    assert "log.inspect='./nowhere.yaml' is no file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nvdlfw_inspect", None)
    assert main(quantized_run(tmp_path, log__inspect=EXAMPLE)) == 1
    assert "needs the package nvdlfw-inspect: pip install nvdlfw-inspect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
