"""The choice of the decoding backend: the engine and `generate` decide alike, and lose nothing attached to a model.

On the CPU the kernels are PyTorch operations that also take float32 here. So texts are equal token for token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_core.lora import on_weights
from llama_te_infer import Engine, SamplingParams, inference_params_for
from llama_te_infer.decode import backend
from llama_te_infer.decode.fused import FusedDecode
from llama_te_infer.decode.layers import LayersDecode
from llama_te_infer.engine import engine as engine_module

NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0)
DRAWN = SamplingParams(max_tokens=NEW, seed=3)
PROMPT = [5, 77, 31, 200, 8, 41, 9]
SIZES = {  # sizes that the kernels take
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return convert_llama_hf_to_te(tiny_llama(**SIZES, initializer_range=0.2, eos_token_id=None))


@pytest.fixture(autouse=True)
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take any model."""
    monkeypatch.setattr(backend, "takes_fused_decode", lambda *arguments: True)


@pytest.fixture
def kernels_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU "auto" prefers the kernels, as on a GPU."""
    monkeypatch.setattr(backend, "gains_from_kernels", lambda device: True)
    backend._warn_once.cache_clear()


# --- changes of a model: each changes its text, and returns the reason that the error or warning gives ----------------


def hook(model: PreTrainedModel) -> str:
    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 1.5

    model.model.layers[1].register_forward_hook(change)
    return "model.layers.1 has hooks or a forward pass of its own"


def pre_hook(model: PreTrainedModel) -> str:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    return "lm_head has hooks or a forward pass of its own"


def replaced_forward(model: PreTrainedModel) -> str:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden: -forward(hidden)
    return "model.norm has hooks or a forward pass of its own"


def adapter(model: PreTrainedModel) -> str:
    adapted = get_peft_model(model, on_weights(LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.eval()
    return "the model has parameters of its own kind, such as model.layers.0"


class Gate(nn.Module):
    """The final norm with an additional parameter."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.norm = norm
        self.gate = nn.Parameter(torch.linspace(-1, 1, len(norm.weight)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden) * self.gate


def more_parameters(model: PreTrainedModel) -> str:
    model.model.norm = Gate(model.model.norm)
    return "the model has parameters of its own kind, such as model.norm.gate"


def test_a_forward_that_is_put_back_is_no_change(model: PreTrainedModel) -> None:
    model.model.norm.forward = model.model.norm.forward
    assert not backend.has_own_forward(model, model.model.norm)


CHANGES = pytest.mark.parametrize("change", [hook, pre_hook, replaced_forward, adapter, more_parameters])
Change = Callable[[PreTrainedModel], str]


def written(engine: Engine, params: SamplingParams = GREEDY) -> list[int]:
    return engine.generate([PROMPT], params)[0].outputs[0].token_ids


def generated(model: PreTrainedModel, decode_implementation: str = "layers") -> list[int]:
    cache = inference_params_for(model, batch_size=1, max_length=64, decode_implementation=decode_implementation)
    ids = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, past_key_values=cache
    )
    return ids[0, len(PROMPT) :].tolist()


# --- the two backends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, DRAWN, SamplingParams(max_tokens=NEW, num_beams=3)], ids=str)
def test_both_backends_write_the_same_text(model: PreTrainedModel, params: SamplingParams) -> None:
    fused, layers = (Engine(model, decode_implementation=name, page_size=16) for name in ("fused", "layers"))
    assert isinstance(fused._runner.decode, FusedDecode) and isinstance(layers._runner.decode, LayersDecode)
    text = written(layers, params)
    assert written(fused, params) == text
    assert len(set(text)) > NEW // 2, "a degenerate text shows little"
    if params is GREEDY:
        assert text == generated(model, "fused") == generated(model)


@pytest.mark.parametrize("reads", [True, False], ids=["prompts too", "prompts by the layers"])
def test_the_fused_backend_computes_every_decoding_step(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    calls = []
    forward = model.model.layers[0].forward
    if not reads:
        monkeypatch.setattr(backend, "takes_fused_prefill", lambda model, decode: False)
    fused = Engine(model, decode_implementation="fused", page_size=16)
    model.model.layers[0].forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    monkeypatch.setattr(backend, "has_own_forward", lambda *arguments: False)
    written(fused)
    assert len(calls) == (0 if reads else 1), "the layers read the prompt at most, and compute nothing else"


def test_unknown_implementation(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="decode_implementation='quick' is not known: use 'auto', 'fused' or 'layers'"):
        Engine(model, decode_implementation="quick")


def test_automatic_choice_on_a_cpu_is_the_layers(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine(model)
    assert isinstance(engine._runner.decode, LayersDecode)


# --- changed models ---------------------------------------------------------------------------------------------------


@CHANGES
def test_an_engine_writes_what_generate_writes(model: PreTrainedModel, change: Change, kernels_gain: None) -> None:
    before = generated(model)
    reason = change(model)
    expected = generated(model)
    assert expected[1:] != before[1:], "the change shows in later tokens"
    with pytest.warns(UserWarning, match=f"by the model's layers, since {reason}"):
        engine = Engine(model, page_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert written(engine) == expected
        assert generated(model, "auto") == expected
        assert written(engine) == expected


@CHANGES
def test_a_change_between_two_calls_counts(model: PreTrainedModel, change: Change, kernels_gain: None) -> None:
    engine = Engine(model, page_size=16, prefix_caching=False)
    assert isinstance(engine._runner.decode, FusedDecode)
    assert written(engine) == generated(model)
    reason = change(model)
    with pytest.warns(UserWarning, match=reason):
        found = written(engine)
    assert found == generated(model)
    assert isinstance(engine._runner.decode, LayersDecode)


@CHANGES
def test_fused_is_refused(model: PreTrainedModel, change: Change) -> None:
    engine = Engine(model, decode_implementation="fused", page_size=16, prefix_caching=False)
    assert written(engine) == generated(model, "fused")
    reason = change(model)
    message = f"decode_implementation='fused', but {reason}.*Use 'auto' or 'layers'"
    with pytest.raises(RuntimeError, match=message):
        written(engine)
    assert not engine.has_unfinished, "the refused request stays in the queue"
    with pytest.raises(RuntimeError, match=message):
        generated(model, "fused")
    with pytest.raises(RuntimeError, match=message):
        Engine(model, decode_implementation="fused")


def test_a_removed_hook_brings_the_same_kernels_back(model: PreTrainedModel, kernels_gain: None) -> None:
    engine = Engine(model, page_size=16, prefix_caching=False)
    text = written(engine)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: -output)
    with pytest.warns(UserWarning, match="model.layers.0 has hooks"):
        assert written(engine) == generated(model) != text
    handle.remove()
    assert written(engine) == text
    assert isinstance(engine._runner.decode, FusedDecode)


def test_replaced_weights_are_read(model: PreTrainedModel) -> None:
    engine = Engine(model, decode_implementation="fused", page_size=16, prefix_caching=False)
    text = written(engine)
    first = engine._runner.decode
    assert written(engine) == text and engine._runner.decode is first
    mlp = model.model.layers[1].layernorm_mlp
    mlp.fc2_weight = nn.Parameter(-mlp.fc2_weight.detach())
    assert written(engine) == generated(model) != text
    assert engine._runner.decode is not first


def test_a_hook_registered_while_requests_run_counts_with_the_next_request(
    model: PreTrainedModel, kernels_gain: None
) -> None:
    """Both backends use the same rows and pages, so that running requests continue."""
    engine = Engine(model, page_size=16, prefix_caching=False)
    expected = written(engine)
    engine.submit(PROMPT, GREEDY)
    for _ in range(4):
        assert not engine.step()
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *arguments: seen.append(1))
    engine.submit(PROMPT, GREEDY)
    with pytest.warns(UserWarning, match="model.layers.0 has hooks"):
        outputs = engine.step()
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output.outputs[0].token_ids for output in outputs] == [expected] * 2
    assert len(seen) > NEW


def test_a_hook_that_the_engine_does_not_run_is_named(model: PreTrainedModel) -> None:
    engine_module._warn_of_unused_hooks.cache_clear()
    plain = written(Engine(model))
    handle = model.register_forward_hook(lambda module, args, output: output)
    with pytest.warns(UserWarning, match=r"hooks on the NVLlamaForCausalLM itself .* do not run: register them on"):
        engine = Engine(model)
    assert written(engine) == plain
    handle.remove()
