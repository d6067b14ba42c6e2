"""An engine on a model that is trained: it disturbs no training, sleeps meanwhile, and takes weights from elsewhere."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, SamplingParams, TokenEvent

PROMPTS = [[5, 77, 31, 200, 8, 41, 9, 17, 130, 66, 12], [7, 7, 3]]
GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=0)
IDS = torch.tensor([[5, 9, 31, 77, 2, 14, 8, 3]])


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return convert_llama_hf_to_te(tiny_llama(initializer_range=0.3, num_hidden_layers=2, eos_token_id=None)).train()


def texts_of(engine: Engine) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_as_without_rollouts(model: PreTrainedModel, checkpointing: bool) -> None:
    other = copy.deepcopy(model)
    losses, texts = [], []
    for each in (model, other):
        if checkpointing:
            each.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.02)
        engine = Engine(each, max_batch_size=2, page_size=4) if each is model else None
        own: list[float] = []
        for _ in range(3):
            if engine is not None:
                random_state = torch.get_rng_state()
                texts.append(texts_of(engine))
                assert torch.equal(torch.get_rng_state(), random_state)
                assert all(module.training for module in each.modules())
                assert all(parameter.grad is None for parameter in each.parameters())
            own.append(train(each, optimizer))
        losses.append(own)
    assert losses[0] == losses[1]
    assert texts[0] != texts[1] != texts[2]
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_text_is_that_of_the_weights_of_the_moment(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(3):
        assert texts_of(engine) == texts_of(Engine(copy.deepcopy(model).eval(), max_batch_size=2, page_size=4))
        train(model, optimizer)


def test_gradients_that_wait_are_left_alone(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    loss = model(IDS, labels=IDS).loss  # its graph waits for `backward`
    texts_of(engine)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    texts_of(engine)
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(expected) > 10
    assert all(torch.equal(mine, its) for mine, its in zip(gradients, expected, strict=True))


def test_steps_and_streams_evaluate_a_model_that_trains(model: PreTrainedModel) -> None:
    modes: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    model.model.layers[1].eval()  # a frozen part stays as it is
    engine = Engine(model, max_batch_size=2, page_size=4)
    engine.submit(PROMPTS[0], GREEDY)
    while engine.has_unfinished:
        engine.step()
        assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert len(list(engine.stream(PROMPTS[1], GREEDY))) > 1
    assert model.training and modes and not any(modes)


def test_a_step_that_fails_leaves_the_model_in_training(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            texts_of(engine)
    assert all(module.training for module in model.modules())
    assert texts_of(engine) == texts_of(Engine(model, max_batch_size=2, page_size=4))


# --- sleep ------------------------------------------------------------------------------------------------------------


def cache_tensors() -> list[torch.Tensor]:
    """Tensors of pages: no other tensor here has four dimensions and as many pages."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dim() == 4 and len(each) == 42]


def test_sleep_gives_the_memory_back_until_the_next_request(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4, total_num_pages=41)
    expected = texts_of(engine)
    assert len(cache_tensors()) == 4  # keys and values of two layers
    engine.sleep()
    engine.sleep()
    assert engine.is_asleep and cache_tensors() == []
    assert engine.stats().total_num_pages == 41 and engine.step() == [] and not engine.has_unfinished
    engine.wake()
    engine.wake()
    assert not engine.is_asleep and len(cache_tensors()) == 4
    assert texts_of(engine) == expected
    engine.sleep()
    assert texts_of(engine) == expected and not engine.is_asleep


def test_an_fp8_cache_sleeps_too(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4, kv_cache_dtype="fp8")
    expected, memory = texts_of(engine), engine.cache_bytes
    engine.sleep()
    assert memory > 0 == engine.cache_bytes
    assert texts_of(engine) == expected and engine.cache_bytes == memory


def test_sleep_needs_an_engine_without_requests(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    engine.submit(PROMPTS[0], GREEDY)
    with pytest.raises(ValueError, match="requests are in progress: let step finish them, or cancel them, before sle"):
        engine.sleep()
    while engine.has_unfinished:
        engine.step()
    engine.sleep()


def test_waking_says_what_does_not_fit(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4, total_num_pages=41)
    engine.sleep()
    with monkeypatch.context() as patch:
        patch.setattr("llama_te_infer.engine.limits.free_memory", lambda device: 1000)
        with pytest.raises(ValueError, match="total_num_pages=41"):
            engine.wake()
        with pytest.raises(ValueError, match="total_num_pages=41"):
            texts_of(engine)
    assert engine.is_asleep
    assert len(texts_of(engine)) == 2


def test_cycles_of_sleep_and_training_leave_nothing_and_reuse_nothing(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4, total_num_pages=41)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    texts_of(engine)
    train(model, optimizer)
    engine.sleep()
    gc.collect()
    before = len([each for each in gc.get_objects() if isinstance(each, torch.Tensor)])
    for _ in range(50):
        engine.wake()
        assert texts_of(engine) == texts_of(Engine(model, max_batch_size=2, page_size=4))
        engine.sleep()
        train(model, optimizer)
    gc.collect()
    assert len([each for each in gc.get_objects() if isinstance(each, torch.Tensor)]) == before


def test_a_sleeping_engine_is_freed(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    engine.sleep()
    reference = weakref.ref(engine)
    del engine
    gc.collect()
    assert reference() is None


def test_requests_go_on_after_a_sleep(model: PreTrainedModel) -> None:
    long = list(range(3, 40))
    prompts = [*PROMPTS, long, long[:9]]
    params = [
        SamplingParams(max_tokens=12, temperature=0, logprobs=0),
        SamplingParams(max_tokens=12, temperature=0.9, seed=3, n=3, repetition_penalty=1.3),
        SamplingParams(max_tokens=6, temperature=0),
        SamplingParams(max_tokens=10, temperature=0, num_beams=3),
    ]
    options = {"max_batch_size": 12, "page_size": 4, "prefill_budget": 16}
    expected = [
        [each.token_ids for each in output.outputs] for output in Engine(model, **options).generate(prompts, params)
    ]
    for steps in range(7):  # also while the longest prompt is read
        engine = Engine(model, **options)
        events: list[TokenEvent] = []
        ids = [engine.submit(prompt, each, events.append) for prompt, each in zip(prompts, params, strict=True)]
        outputs = [output for _ in range(steps) for output in engine.step()]
        settled = engine.settle()
        before = len(events)
        engine.sleep(keep_requests=True)
        assert engine.is_asleep and engine.step() == [] and engine.has_unfinished and len(events) == before
        assert engine.stats().num_requests_waiting and not engine.stats().num_pages_used
        outputs += settled
        engine.wake()
        while engine.has_unfinished:
            outputs += engine.step()
        texts = {output.request_id: [each.token_ids for each in output.outputs] for output in outputs}
        assert [texts[request_id] for request_id in ids] == expected
        written = sum(len(tokens) for text in expected for tokens in text)
        assert len(events) == written


def test_a_request_that_ends_asleep(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    first, second = (engine.submit(prompt, GREEDY) for prompt in PROMPTS)
    for _ in range(3):
        engine.step()
    engine.sleep(keep_requests=True)
    assert engine.cancel(first)
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "cancelled" and len(output.outputs[0].token_ids) == 3
    engine.wake()
    outputs = [output for _ in range(12) for output in engine.step()]
    assert [output.request_id for output in outputs] == [second] and len(outputs[0].outputs[0].token_ids) == 8


def test_held_requests_wait_and_wake_nobody(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    first = engine.submit(PROMPTS[0], GREEDY)
    assert engine.hold() == engine.hold() == first + 1
    second = engine.submit(PROMPTS[1], GREEDY)
    outputs = [output for _ in range(20) for output in engine.step()]
    assert [output.request_id for output in outputs] == [first]
    with pytest.raises(RuntimeError, match="hold lets new requests wait: call release before generate"):
        engine.generate(PROMPTS)
    engine.sleep(keep_requests=True)
    third = engine.submit(PROMPTS[1], GREEDY)
    assert engine.is_asleep
    engine.wake()
    assert [output for _ in range(20) for output in engine.step()] == []
    engine.release()
    outputs = [output for _ in range(20) for output in engine.step()]
    assert sorted(output.request_id for output in outputs) == [second, third]


def test_a_failed_step_forgets_no_hold(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    engine.submit(PROMPTS[0], GREEDY)
    engine.hold()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.submit(PROMPTS[1], GREEDY)
    assert [output for _ in range(20) for output in engine.step()] == []
    engine.release()
    assert len([output for _ in range(20) for output in engine.step()]) == 1


def test_a_failure_while_the_last_step_is_read(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    engine.submit(PROMPTS[0], GREEDY)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._pending), "result", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.settle()
    assert not engine.has_unfinished and engine.settle() == []
    assert len(texts_of(engine)) == 2


# --- weights from elsewhere -------------------------------------------------------------------------------------------


def other_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    other = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.arange(parameter.numel(), dtype=dtype).sin().view_as(parameter))
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_come_into_place(model: PreTrainedModel, dtype: torch.dtype) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    before = texts_of(engine)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    other = other_of(model, dtype)
    engine.update_weights(other)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    expected = texts_of(Engine(other.float().eval(), max_batch_size=2, page_size=4))
    assert texts_of(engine) == expected != before


def test_weights_come_one_after_the_other(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    texts_of(engine)
    other = other_of(model, torch.float32)
    alive: list[weakref.ref[torch.Tensor]] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in other.named_parameters():
            assert sum(each() is not None for each in alive) <= 1  # the one before
            copied = parameter.detach().clone()
            alive.append(weakref.ref(copied))
            yield f"_orig_mod.module.{name}", copied

    engine.update_weights(weights())
    assert texts_of(engine) == texts_of(Engine(other.eval(), max_batch_size=2, page_size=4))


def test_a_sleeping_engine_takes_weights(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    engine.sleep()
    other = other_of(model, torch.float32)
    engine.update_weights(other)
    assert engine.is_asleep
    assert texts_of(engine) == texts_of(Engine(other.eval(), max_batch_size=2, page_size=4))


def test_requests_in_progress_go_on_with_new_weights(model: PreTrainedModel) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    request = engine.submit(PROMPTS[0], GREEDY)
    for _ in range(4):
        engine.step()
    engine.update_weights(other_of(model, torch.float32))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output.request_id for output in outputs] == [request]
    assert len(outputs[0].outputs[0].token_ids) == 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lm_head.bias", None, "weights has 'lm_head.bias', which the engine's model does not have: give the names of"),
        ("model.norm.weight", lambda tensor: tensor[:3], "weights has 'model.norm.weight' of shape (3,), but the engi"),
    ],
)
def test_weights_that_do_not_fit(
    model: PreTrainedModel, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, message: str
) -> None:
    engine = Engine(model, max_batch_size=2, page_size=4)
    texts_of(engine)
    parameters = dict(model.named_parameters())
    tensor = torch.zeros(3) if change is None else change(parameters[name].detach())
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.update_weights(
            [("model.embed_tokens.weight", torch.zeros_like(model.model.embed_tokens.weight)), (name, tensor)]
        )
    # What came before is in place, and nothing cached is used again.
    assert texts_of(engine) == texts_of(Engine(copy.deepcopy(model).eval(), max_batch_size=2, page_size=4))


def test_a_model_that_does_not_fit_changes_nothing(
    model: PreTrainedModel, tiny_llama: Callable[..., PreTrainedModel]
) -> None:
    def other(**fields: Any) -> PreTrainedModel:
        own = {"initializer_range": 0.3, "num_hidden_layers": 2, "eos_token_id": None}
        return convert_llama_hf_to_te(tiny_llama(**(own | fields)))

    engine = Engine(model, max_batch_size=2, page_size=4)
    expected = texts_of(engine)
    heads = model.config.num_attention_heads
    for fields, message in (
        ({"num_hidden_layers": 1}, "weights lacks 6 weights of the engine's model, such as 'model.layers.1."),
        ({"num_hidden_layers": 3}, "weights has 'model.layers.2."),
        ({"intermediate_size": 32}, "layernorm_mlp.fc1_weight' of shape"),
        ({"num_attention_heads": heads * 2, "head_dim": model.config.head_dim // 2}, f"={heads * 2}, but the engine's"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            engine.update_weights(other(**fields))
        assert texts_of(engine) == expected


def test_shared_weights(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    def made(tied: bool) -> PreTrainedModel:
        own = {"initializer_range": 0.3, "num_hidden_layers": 1, "eos_token_id": None}
        return convert_llama_hf_to_te(tiny_llama(**own, tie_word_embeddings=tied))

    tied, untied = made(True), made(False)
    engine = Engine(made(False), max_batch_size=2, page_size=4)
    engine.update_weights(tied)
    assert torch.equal(engine.model.lm_head.weight, tied.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="weights has two tensors for .*, which the engine's model shares"):
        Engine(tied, max_batch_size=2, page_size=4).update_weights(untied)
