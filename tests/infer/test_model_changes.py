"""A model that changes between requests: the engine answers as a new engine does, and reuses nothing stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_core.lora import on_weights
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.engine.model_watch import ModelWatch

PROMPT = [5, 77, 31, 200, 8, 41, 9, 17, 130, 66, 12]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    hf = tiny_llama(initializer_range=0.3, num_hidden_layers=2, eos_token_id=None)
    return convert_llama_hf_to_te(hf)


def engine_of(model: PreTrainedModel) -> Engine:
    return Engine(model, max_batch_size=2, page_size=4)


def written(engine: Engine, prompt: list[int] = PROMPT) -> list[int]:
    return engine.generate([prompt], GREEDY)[0].outputs[0].token_ids


def weight_of(model: PreTrainedModel) -> nn.Parameter:
    weight: nn.Parameter = model.model.layers[0].self_attention.layernorm_qkv.weight
    return weight


# --- changes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(model: PreTrainedModel) -> None:
    weight_of(model).mul_(1.7)


@torch.inference_mode()
def in_place_in_inference_mode(model: PreTrainedModel) -> None:
    weight_of(model).mul_(1.7)


def step_of(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        weight = weight_of(model)
        weight.grad = torch.sin(torch.arange(weight.numel(), dtype=torch.float32)).view_as(weight)
        make([weight], lr=0.3, **options).step()

    return change


def other_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(0) if "qkv.weight" in name else tensor for name, tensor in model.state_dict().items()}


def load(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights(model))


def load_by_assignment(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights(model), assign=True)


def replaced_data(model: PreTrainedModel) -> None:
    weight_of(model).data = weight_of(model).detach().flip(0)


def replaced_parameter(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attention.layernorm_qkv.weight = nn.Parameter(weight_of(model).detach().flip(0))


def hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def replaced_forward(model: PreTrainedModel) -> None:
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: -forward(*args, **kwargs)


def adapter(model: PreTrainedModel) -> None:
    adapted = get_peft_model(model, on_weights(LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.eval()


CHANGES = {
    "in place": in_place,
    "inference mode": in_place_in_inference_mode,
    "SGD": step_of(torch.optim.SGD),
    "fused AdamW": step_of(torch.optim.AdamW, fused=True),  # counts no version
    "load": load,
    "load by assignment": load_by_assignment,
    "data": replaced_data,
    "parameter": replaced_parameter,
    "hook": hook,
    "forward": replaced_forward,
    "adapter": adapter,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_next_request_is_answered_as_by_a_new_engine(
    model: PreTrainedModel, change: Callable[[PreTrainedModel], None]
) -> None:
    engine = engine_of(model)
    before = written(engine)
    assert engine.scheduler.blocks.prefixes.remembered
    change(model)
    assert written(engine) == written(engine_of(model)) != before
    assert written(engine) == written(engine_of(model))


def test_an_unchanged_model_keeps_its_prefixes(model: PreTrainedModel) -> None:
    counts: list[int] = []
    adapter(model)
    model.model.register_forward_pre_hook(lambda *call: counts.append(call[2]["input_ids"].numel()), with_kwargs=True)
    engine = engine_of(model)
    other = nn.Linear(2, 2)
    for turn in range(3):
        counts.clear()
        written(engine)
        assert counts[0] == (len(PROMPT) if turn == 0 else len(PROMPT) - 8)
        # Another model's training does not concern the engine.
        other.weight.grad = torch.ones(2, 2)
        torch.optim.AdamW(other.parameters(), fused=True).step()


def test_switching_adapters_is_a_change(model: PreTrainedModel) -> None:
    base = written(engine_of(model))
    adapter(model)
    watch, layers = ModelWatch(model), [m for m in model.modules() if hasattr(m, "merged_adapters")]
    assert layers and not watch.has_changed()
    engine = engine_of(model)
    adapted = written(engine)
    for layer in layers:
        layer.enable_adapters(False)
    assert watch.has_changed() and not watch.has_changed()
    assert written(engine) == base != adapted
    for layer in layers:
        layer.enable_adapters(True)
    assert written(engine) == adapted
    for layer in layers:
        layer.merge()  # writes through `.data`
    assert watch.has_changed()


def test_a_running_request_leaves_nothing_behind_that_mixes_old_and_new_weights(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    engine.submit(PROMPT, GREEDY)
    for _ in range(4):
        assert not engine.step()
    in_place(model)
    other = [9, 8, 7]
    assert written(engine, other) == written(engine_of(model), other)
    outputs = engine.step()
    while engine.has_unfinished:
        outputs += engine.step()
    assert len(outputs[0].outputs[0].token_ids) == 8, "the running request goes on"
    # Its next turn would reuse the pages of the prompt and of the written tokens.
    turn = PROMPT + outputs[0].outputs[0].token_ids
    assert written(engine, turn) == written(engine_of(model), turn)
    assert written(engine) == written(engine_of(model))


def test_a_change_that_torch_does_not_record_needs_a_call(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    written(engine)
    weight_of(model).data.mul_(1.7)
    assert not ModelWatch(model).has_changed()
    engine.reset_prefix_cache()
    assert not engine.scheduler.blocks.prefixes.remembered
    assert written(engine) == written(engine_of(model))
    blocks = engine.scheduler.blocks
    assert blocks.pool.used == len(blocks.prefixes.remembered)


def test_memory_that_is_used_again_is_another_tensor() -> None:
    model, memory = nn.Linear(8, 8), np.ones((8, 8), np.float32)
    model.weight.data = torch.from_numpy(memory)
    address, watch = model.weight.data_ptr(), ModelWatch(model)
    model.weight.data = torch.zeros(8, 8)
    memory[:] = 2
    model.weight.data = torch.from_numpy(memory)
    assert model.weight.data_ptr() == address
    assert watch.has_changed()
    assert not watch.has_changed()


def test_a_model_that_no_longer_fits_the_engine_is_refused(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    text = written(engine)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="has changed from float32 on cpu with 257 tokens to bfloat16 on cpu"):
        written(engine)
    assert not engine.has_unfinished
    model.to(torch.float32)
    assert len(written(engine)) == len(text)
