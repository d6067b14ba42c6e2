"""A fault of one request ends this request alone: the others write the same tokens, and all pages become free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.decode import backend
from llama_te_infer.engine.outputs import RequestOutput, TokenEvent
from llama_te_infer.runner.model_runner import ModelRunner
from llama_te_infer.runner.state import DecodeState

NEW = 10
GREEDY = SamplingParams(max_tokens=NEW, temperature=0)
POISON = 200  # a token whose embedding is NaN
KINDS = {
    "greedy": {"temperature": 0},
    "drawn": {"seed": 3},
    "filtered": {"seed": 3, "top_p": 0.9, "top_k": 20},
    "counted": {"temperature": 0, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 2},
    "several": {"seed": 3, "n": 2},
    "beams": {"num_beams": 3, "n": 2},
}


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama(max_position_embeddings=128, initializer_range=0.3, num_hidden_layers=2, eos_token_id=None)


@pytest.fixture(params=["thd", "bshd"])
def model(hf: PreTrainedModel, request: pytest.FixtureRequest) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf, attn_input_format=request.param)


@pytest.fixture
def thd(hf: PreTrainedModel) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf)


class FailingTokenizer:
    """Token i + 1 is byte i. It cannot decode certain tokens."""

    eos_token_id = None

    def __init__(self) -> None:
        self.unreadable: set[int] = set()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [byte + 1 for byte in text.encode()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        if self.unreadable.intersection(ids):
            raise KeyError(f"no piece for one of {ids}")
        return bytes(token - 1 for token in ids if 0 < token <= 256).decode(errors="replace")


def run(engine: Engine) -> dict[int, RequestOutput]:
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


def written(output: RequestOutput) -> list[tuple[list[int], str]]:
    return [(completion.token_ids, completion.finish_reason) for completion in output.outputs]


def check_empty(engine: Engine) -> None:
    """Nothing runs, and every page is free or remembered."""
    blocks = engine.scheduler.blocks
    assert not engine.has_unfinished
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.scheduler.rows
    held = {0: len(blocks.pool.free), 1: len(blocks.prefixes.remembered)}
    assert Counter(blocks.pool.holders) == Counter({count: pages for count, pages in held.items() if pages})


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, POISON, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- logits that are not finite ---------------------------------------------------------------------------------------


def poison(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[POISON] = 0  # no text has it by itself
        model.model.embed_tokens.weight[POISON] = torch.nan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["prompt", "text"])
def test_logits_of_one_request_that_are_not_finite(model: PreTrainedModel, kind: str, place: str) -> None:
    """The poison is in the prompt, or it is the first token of the text; the other requests begin before and after."""
    poison(model)
    params = SamplingParams(max_tokens=NEW, **KINDS[kind])
    # Beam search takes no logit_bias; its poison is the token that all beams begin with.
    prompt = prompt_of(9, 1) + ([POISON] if place == "prompt" or kind == "beams" else [])
    bad = params
    if place == "text" and kind != "beams":
        bad = SamplingParams(max_tokens=NEW, **KINDS[kind], logit_bias={POISON: 100.0})
    others = [prompt_of(length, seed) for seed, length in enumerate((5, 9, 13, 6), 2)]

    def engine() -> Engine:
        return Engine(model, page_size=4, total_num_pages=40, max_batch_size=8)

    expected = [written(engine().generate([other], params)[0]) for other in others]
    shared = engine()
    events: list[TokenEvent] = []
    ids = [shared.submit(others[0], params)]
    shared.step()
    shared.step()
    ids.append(shared.submit(others[1], params))
    failing = shared.submit(prompt, bad, events.append)
    ids.append(shared.submit(others[2], params))
    outputs = run(shared)
    ids.append(shared.submit(others[3], params))  # gets pages that had NaN
    outputs |= run(shared)
    assert [written(outputs[request_id]) for request_id in ids] == expected
    assert all(outputs[request_id].error is None for request_id in ids)
    error = outputs[failing].error
    assert isinstance(error, FloatingPointError) and "logits are not finite" in str(error)
    assert {completion.finish_reason for completion in outputs[failing].outputs} == {"error"}
    assert all(POISON not in c.token_ids[1:] for c in outputs[failing].outputs)
    assert events[-1].finish_reason == "error" and events[-1].error is error and events[-1].token_id is None
    check_empty(shared)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_pages_with_nan_are_clear_before_others_get_them(thd: PreTrainedModel, kv_cache_dtype: str) -> None:
    """Also those that the prefix cache remembers, and those of a request that waits for pages."""
    poison(thd)
    engine = Engine(thd, page_size=4, total_num_pages=12, max_batch_size=4, kv_cache_dtype=kv_cache_dtype)
    texts = [prompt_of(8, seed) for seed in range(3)]
    expected = [written(output) for output in engine.generate(texts, GREEDY)]
    for position in range(8):
        bad = prompt_of(8, 9)
        bad[position] = POISON
        outputs = engine.generate([texts[0], bad, texts[1], bad, texts[2]], GREEDY)
        assert [written(output) for output in outputs[::2]] == expected
        assert all(isinstance(output.error, FloatingPointError) for output in outputs[1::2])
        for caches in engine._cache.caches.values():
            assert all(bool(tensor.float().isfinite().all()) for tensor in caches)
    check_empty(engine)


def test_steps_of_the_kernels(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the kernels are PyTorch operations, and take any dtype."""
    monkeypatch.setattr(backend, "takes_fused_decode", lambda *_: True)
    poison(thd)
    engine = Engine(thd, page_size=16, max_batch_size=4, decode_implementation="fused")
    bad = SamplingParams(max_tokens=NEW, temperature=0, logit_bias={POISON: 100.0})
    texts = [prompt_of(5, 1), prompt_of(5, 2)]
    expected = [written(engine.generate([text], GREEDY)[0]) for text in texts]
    outputs = engine.generate([texts[0], prompt_of(6, 3), texts[1]], [GREEDY, bad, GREEDY])
    assert [written(outputs[0]), written(outputs[2])] == expected
    assert written(outputs[1]) == [([POISON], "error")]


def test_a_stream_ends_with_the_error(thd: PreTrainedModel) -> None:
    poison(thd)
    events = list(Engine(thd).stream([[3, POISON], [3, 4]], GREEDY))
    assert [str(event.error)[:22] for event in events if event.request_id == 0] == ["logits are not finite:"]
    assert len([event for event in events if event.request_id == 1]) == NEW


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), "zz"], ids=["no stop string", "stop string"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_raises(thd: PreTrainedModel, kind: str, stop: Any) -> None:
    """It cannot decode a token in the middle of one text, which the others do not have. Beams are decoded in a step."""
    tokenizer = FailingTokenizer()
    params = SamplingParams(max_tokens=NEW, stop=stop, **KINDS[kind])
    texts = [prompt_of(9, seed) for seed in range(4)]

    def engine() -> Engine:
        return Engine(thd, tokenizer, page_size=4, total_num_pages=60, max_batch_size=12)

    whole = [engine().generate([text], params)[0] for text in texts]
    mine = {token for c in whole[1].outputs for token in c.token_ids[2:]}
    others = {token for output in (whole[0], *whole[2:]) for c in output.outputs for token in c.token_ids}
    if kind == "beams" and stop:  # beams that are not among the results are decoded too
        others = set(range(257)) - mine
    assert mine - others
    tokenizer.unreadable = mine - others
    if kind == "beams" and stop:
        keep = [written(output) for output in whole]
        outputs = engine().generate(texts, params)
        kept = [index for index, output in enumerate(outputs) if output.error is None]
        assert 1 not in kept and [written(outputs[index]) for index in kept] == [keep[index] for index in kept]
        failed = outputs[1]
    else:
        shared = engine()
        outputs = shared.generate(texts, params)
        failed = outputs.pop(1)
        assert [written(output) for output in outputs] == [written(output) for output in (whole[0], *whole[2:])]
        assert all(output.error is None for output in outputs)
        check_empty(shared)
    assert isinstance(failed.error, KeyError) and "no piece for one of" in str(failed.error)
    assert "error" in {completion.finish_reason for completion in failed.outputs}


def test_beams_with_texts_that_cannot_be_read_end_alone(thd: PreTrainedModel) -> None:
    """The texts of beams are read while a step is launched."""
    tokenizer = FailingTokenizer()
    params = SamplingParams(max_tokens=NEW, num_beams=3, n=2, stop="zz")
    engine = Engine(thd, tokenizer, page_size=4, total_num_pages=60, max_batch_size=12)
    text = prompt_of(9, 5)
    expected = written(engine.generate([text], GREEDY)[0])
    kept = engine.submit(text, GREEDY)
    failing = engine.submit(prompt_of(9, 6), params)
    tokenizer.unreadable = set(range(257)) - set(expected[0][0])
    outputs = run(engine)
    assert written(outputs[kept]) == expected
    assert isinstance(outputs[failing].error, KeyError)
    assert [c.finish_reason for c in outputs[failing].outputs] == ["error", "error"]
    check_empty(engine)


def test_cancelling_a_text_that_cannot_be_decoded(thd: PreTrainedModel) -> None:
    """The caller of `cancel` gets no exception, and the output is there."""
    tokenizer = FailingTokenizer()
    engine = Engine(thd, tokenizer, page_size=4)
    request = engine.submit([3, 4, 5], GREEDY)
    for _ in range(3):
        assert engine.step() == []
    tokenizer.unreadable = set(range(257))
    assert engine.cancel(request)
    (output,) = engine.step()
    assert isinstance(output.error, KeyError)
    assert len(output.outputs[0].token_ids) == 2 and output.outputs[0].finish_reason == "error"
    check_empty(engine)


# --- beams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [4, 255, 256, 257])
def test_beams_with_any_number_of_ending_tokens(hf: PreTrainedModel, thd: PreTrainedModel, ends: int) -> None:
    """They are as those of transformers, which refuses searches that all tokens end. Others run at the same time."""
    engine, text, other = Engine(thd, page_size=4), prompt_of(7, 1), prompt_of(9, 2)
    params = SamplingParams(max_tokens=6, num_beams=3, n=3, stop_token_ids=range(ends))
    beams, greedy = engine.generate([text, other], [params, GREEDY])
    assert written(greedy) == written(engine.generate([other], GREEDY)[0])
    assert beams.error is None
    if ends == 257:
        with torch.no_grad():
            logprob_V = hf(torch.tensor([text])).logits[0, -1].log_softmax(0)
        assert [c.token_ids for c in beams.outputs] == [[token] for token in logprob_V.topk(3).indices.tolist()]
        return
    expected = hf.generate(
        torch.tensor([text]),
        max_new_tokens=6,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        eos_token_id=list(range(ends)),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for beam, ids, score in zip(beams.outputs, expected.sequences, expected.sequences_scores, strict=True):
        padded = [*beam.token_ids, *[0] * (ids.shape[0] - len(text) - len(beam.token_ids))]
        assert padded == ids[len(text) :].tolist()
        assert beam.score == pytest.approx(score.item(), rel=1e-5)  # sums of float32 in another order


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"temperature": 0}])
def test_parameters_that_forbid_every_token_together(thd: PreTrainedModel, way: dict[str, Any]) -> None:
    """All tokens end a text, and none may end it yet."""
    params = SamplingParams(max_tokens=6, min_tokens=2, stop_token_ids=range(257), **way)
    engine = Engine(thd)
    with pytest.raises(ValueError, match="allowed_token_ids=None leaves no token that min_tokens=2 and bad_words="):
        engine.submit(prompt_of(7, 1), params)
    assert not engine.has_unfinished


# --- steps that fail --------------------------------------------------------------------------------------------------


def test_every_stream_learns_of_a_step_that_failed(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(thd)
    one, other = engine.stream([3, 4], GREEDY), engine.stream([5, 6], GREEDY)
    next(one)
    with monkeypatch.context() as patched:
        patched.setattr(ModelRunner, "launch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError):
            list(one)
    events = iter(other)
    assert next(events).request_id == 1  # a token from before
    with pytest.raises(RuntimeError, match=r"lost in a step that failed \(OutOfMemoryError: no memory\)"):
        list(events)
    assert len(list(engine.stream([3, 4], GREEDY))) == NEW, "the engine can be used again"
    check_empty(engine)


def test_an_engine_that_cannot_start_over_says_so(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a CUDA error every call of CUDA fails, those for a new state too."""
    engine = Engine(thd)
    engine.submit([3, 4], GREEDY)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ModelRunner, "launch", fail)
    monkeypatch.setattr(DecodeState, "__init__", fail)
    with pytest.raises(RuntimeError, match="^CUDA error"):
        engine.step()
    assert not engine.has_unfinished
    for call in (engine.step, lambda: engine.generate([3]), lambda: engine.stream([3]), lambda: engine.submit([3])):
        with pytest.raises(RuntimeError, match="cannot be used any more: a step failed, and .* CUDA error: an illegal"):
            call()
