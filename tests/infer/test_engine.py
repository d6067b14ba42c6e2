"""The engine writes the same text as `generate` for each prompt alone, and has the functions that a server needs."""

from __future__ import annotations

import gc
import io
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer.decode import layers as decode_layers
from llama_te_infer.engine import engine as engine_module
from llama_te_infer.engine.engine import Engine
from llama_te_infer.engine.outputs import RequestOutput, TokenEvent
from llama_te_infer.engine.scheduler import Scheduler
from llama_te_infer.runner import model_runner, prefill
from llama_te_infer.runner.model_runner import ModelRunner
from llama_te_infer.runner.results import Pending
from llama_te_infer.runner.sampler import SamplingNeeds
from llama_te_infer.runner.state import DecodeState
from llama_te_infer.sampling_params import SamplingParams

NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0)


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    # Without an EOS token, tests choose where texts end. These weights write few repetitions.
    return tiny_llama(max_position_embeddings=128, initializer_range=0.3, num_hidden_layers=2, eos_token_id=None)


@pytest.fixture(params=["thd", "bshd"])
def attn_input_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def te(hf: PreTrainedModel, attn_input_format: str) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)


@pytest.fixture
def thd(hf: PreTrainedModel) -> PreTrainedModel:
    """A model for tests that do not depend on the format."""
    return convert_llama_hf_to_te(hf)


def prompts(*lengths: int, seed: int = 2) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(3, 257, (length,)).tolist() for length in lengths]


def generated(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[list[int]]:
    """The new tokens that `generate` writes."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(torch.tensor([prompt]), **options)[:, len(prompt) :].tolist()


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def check_empty(engine: Engine) -> None:
    """Nothing runs, and every page is free or remembered."""
    blocks = engine.scheduler.blocks
    assert not engine.has_unfinished
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.scheduler.rows
    assert blocks.pool.used == len(blocks.prefixes.remembered)
    held = {0: len(blocks.pool.free), 1: len(blocks.prefixes.remembered)}
    assert Counter(blocks.pool.holders) == Counter(held)


class ByteTokenizer:
    """Token i + 1 is byte i."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [byte + 1 for byte in text.encode()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token - 1 for token in ids if token > 0).decode(errors="replace")


# --- the same tokens as generate --------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small pages": {"page_size": 4},
    "prompts in pieces": {"page_size": 8, "prefill_budget": 5},
    "a token at a time": {"page_size": 4, "prefill_budget": 1},
    "few rows": {"page_size": 4, "max_batch_size": 2, "prefix_caching": False},
    "few pages": {"page_size": 4, "total_num_pages": 13},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_greedy_equals_generate(hf: PreTrainedModel, te: PreTrainedModel, settings: dict[str, Any]) -> None:
    texts = prompts(1, 17, 4, 30, 9, 16, 3, 8)
    engine = Engine(te, **settings)
    outputs = engine.generate(texts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == texts
    for text, output in zip(texts, outputs, strict=True):
        assert tokens(output) == generated(hf, text)
        assert output.outputs[0].finish_reason == "length"
        assert len(set(output.outputs[0].token_ids)) > NEW // 2, "a degenerate text shows little"
    check_empty(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "n": 3},
        {"num_beams": 3, "n": 3, "length_penalty": -1.0},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    ],
)
@pytest.mark.parametrize("settings", [{}, {"page_size": 4, "prefill_budget": 5, "total_num_pages": 36}])
def test_beams_equal_those_of_generate(
    hf: PreTrainedModel, te: PreTrainedModel, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    texts = prompts(17, 4, 9, 12)
    ends = [generated(hf, texts[0])[0][5], generated(hf, texts[1])[0][2]]
    engine = Engine(te, **settings)
    engine.eos_token_ids = tuple(ends)
    outputs = engine.generate(texts, SamplingParams(max_tokens=NEW, **options))
    for text, output in zip(texts, outputs, strict=True):
        theirs = {{"n": "num_return_sequences"}.get(name, name): value for name, value in options.items()}
        expected = hf.generate(
            torch.tensor([text]),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=ends,
            return_dict_in_generate=True,
            output_scores=True,
            **theirs,
        )
        for completion, ids, score in zip(output.outputs, expected.sequences, expected.sequences_scores, strict=True):
            written = ids[len(text) :].tolist()
            assert completion.token_ids == written[: len(completion.token_ids)]
            assert set(written[len(completion.token_ids) :]) <= {1}
            assert completion.score == pytest.approx(score.item(), rel=1e-5)  # float32; 8e-7 was seen
            ended = completion.token_ids[-1] in ends
            assert completion.finish_reason == ("stop" if ended else "length")
            assert completion.stop_reason == (completion.token_ids[-1] if ended else None)
    check_empty(engine)


def test_all_kinds_of_requests_run_together(te: PreTrainedModel) -> None:
    texts = prompts(11, 5, 18, 2, 9, 21)
    params = [
        GREEDY,
        SamplingParams(max_tokens=7, seed=1, n=3),
        SamplingParams(max_tokens=9, num_beams=3, n=2),
        SamplingParams(max_tokens=12, seed=2, top_k=20, top_p=0.9, repetition_penalty=1.4, logprobs=2),
        SamplingParams(max_tokens=5, num_beams=2),
        SamplingParams(max_tokens=12, seed=3, temperature=0.7, min_p=0.05, prompt_logprobs=0),
    ]
    together = Engine(te, page_size=4, prefill_budget=12, max_batch_size=8)
    outputs = together.generate(texts, params)
    check_empty(together)
    for text, its_params, output in zip(texts, params, outputs, strict=True):
        alone = Engine(te).generate([text], its_params)[0]
        assert tokens(output) == tokens(alone)


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sent_away(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of requests that had to give their pages back."""
    ids: list[int] = []
    preempt = Scheduler._preempt

    def counting(self: Scheduler) -> None:
        ids.append(self.running[-1].request.id)
        preempt(self)

    monkeypatch.setattr(Scheduler, "_preempt", counting)
    return ids


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_running_out_of_pages_changes_nothing(
    hf: PreTrainedModel, te: PreTrainedModel, sent_away: list[int], prefix_caching: bool
) -> None:
    texts = prompts(6, 7, 5, 6)
    engine = Engine(te, page_size=2, total_num_pages=14, prefix_caching=prefix_caching)
    params = [GREEDY, SamplingParams(max_tokens=NEW, seed=3, n=2), GREEDY, GREEDY]
    outputs = engine.generate(texts, params)
    assert len(set(sent_away)) > 1
    check_empty(engine)
    for text, its_params, output in zip(texts, params, outputs, strict=True):
        assert tokens(output) == tokens(Engine(te).generate([text], its_params)[0])


def test_beams_that_run_out_of_pages_start_over(te: PreTrainedModel, sent_away: list[int]) -> None:
    texts, params = prompts(3, 3, 3, 3), SamplingParams(max_tokens=NEW, num_beams=3, n=3)
    engine = Engine(te, page_size=2, total_num_pages=20)
    outputs = engine.generate(texts, params)
    assert sent_away
    check_empty(engine)
    for text, output in zip(texts, outputs, strict=True):
        alone = Engine(te).generate([text], params)[0]
        assert tokens(output) == tokens(alone)


def test_the_tokens_of_a_known_prefix_are_not_computed_again(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    counts: list[int] = []
    te.model.register_forward_pre_hook(lambda *call: counts.append(call[2]["input_ids"].numel()), with_kwargs=True)
    engine = Engine(te, page_size=4)
    text = prompts(22)[0]
    first = engine.generate([text], GREEDY)[0]
    assert counts[0] == 22
    counts.clear()
    assert tokens(engine.generate([text], GREEDY)[0]) == tokens(first) == generated(hf, text)
    assert counts[0] == 22 - 20
    counts.clear()
    # The prefix cache also remembers written tokens: a second turn reads its new tokens only.
    turn = text + tokens(first)[0] + prompts(3, seed=9)[0]
    assert tokens(engine.generate([turn], GREEDY)[0]) == generated(hf, turn)
    assert counts[0] == len(turn) - 32
    check_empty(engine)


def test_pages_by_default_are_enough_for_all_rows(te: PreTrainedModel) -> None:
    engine = Engine(te, max_batch_size=3, max_sequence_length=100, page_size=16)
    assert engine.scheduler.blocks.pool.total_num_pages == 3 * 7


@pytest.mark.parametrize("multiple", [1, 8])
def test_rows_that_do_not_run_hold_nothing(
    hf: PreTrainedModel, te: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, multiple: int
) -> None:
    """A step may compute more rows than run, for quantized products or for a graph of fixed size."""
    for module in (engine_module, decode_layers, prefill):
        monkeypatch.setattr(module, "padded_multiple", lambda model: multiple)
    engine = Engine(te, page_size=4, max_batch_size=6)
    decode, counts = engine._runner.decode, set()

    def check(state: DecodeState, rows: int) -> None:
        counts.add(rows)
        assert state.length_R.tolist() == [*state.lengths, *[0] * (len(state.length_R) - rows)]
        assert not state.token_R[rows:].any()
        assert (state.page_table_RP[rows:] == engine._cache.padding_page).all()
        assert all((row != engine._cache.padding_page).any() for row in state.page_table_RP[:rows])

    class Checked:
        def __call__(self, state: DecodeState, rows: int) -> torch.Tensor:
            check(state, rows)
            return decode(state, rows)

        def advance(self, state: DecodeState, rows: int) -> None:
            check(state, rows)
            decode.advance(state, rows)

    monkeypatch.setattr(engine, "_select_backend", Checked)
    texts = prompts(9, 4, 17, 3, 6, 12, 5)
    params = [SamplingParams(max_tokens=1 + 2 * i, temperature=0) for i in range(7)]
    for text, its_params, output in zip(texts, params, engine.generate(texts, params), strict=True):
        assert tokens(output)[0] == generated(hf, text, max_new_tokens=its_params.max_tokens)[0]
    assert len(counts) > 3


# --- sampling parameters ----------------------------------------------------------------------------------------------


def test_drawn_tokens_depend_on_the_seed_alone(thd: PreTrainedModel) -> None:
    texts, params = prompts(7, 9, 5), SamplingParams(max_tokens=NEW, seed=11)
    together = [tokens(output) for output in Engine(thd).generate(texts, params)]
    assert together == [tokens(Engine(thd, page_size=4).generate([text], params)[0]) for text in texts]
    other = SamplingParams(max_tokens=NEW, seed=12)
    assert tokens(Engine(thd).generate(texts[:1], other)[0]) != together[0]


def test_without_a_seed_torchs_generator_decides(thd: PreTrainedModel) -> None:
    engine, params = Engine(thd), SamplingParams(max_tokens=NEW)

    def draw() -> list[list[int]]:
        return [tokens(output)[0] for output in engine.generate([[5, 6]] * 2, params)]

    torch.manual_seed(3)
    first = draw()
    assert first[0] != first[1]
    assert draw() != first
    torch.manual_seed(3)
    assert draw() == first


def test_greedy_steps_do_nothing_but_take_the_best(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[SamplingNeeds] = []
    sample = model_runner.sample
    monkeypatch.setattr(model_runner, "sample", lambda *args: needs.append(args[3]) or sample(*args))
    engine = Engine(thd)
    engine.generate(prompts(4, 5), SamplingParams(max_tokens=3, top_p=0.5, logprobs=2, repetition_penalty=1.2, n=2))
    assert all(need.random and need.filtered and need.masked and need.top_logprobs for need in needs)
    needs.clear()
    engine.generate(prompts(4, 5), [SamplingParams(max_tokens=3, num_beams=3), GREEDY])
    assert set(needs) == {SamplingNeeds()}


def test_several_texts_of_a_prompt_differ(thd: PreTrainedModel) -> None:
    output = Engine(thd, page_size=4).generate([prompts(7)[0]], SamplingParams(max_tokens=NEW, n=5, seed=4))[0]
    assert [completion.index for completion in output.outputs] == list(range(5))
    assert len(set(map(tuple, tokens(output)))) == 5


@pytest.mark.parametrize("prefill_budget", [3, 100])
def test_logprobs_are_those_of_the_model(te: PreTrainedModel, prefill_budget: int) -> None:
    text = prompts(9)[0]
    engine = Engine(te, page_size=4, prefill_budget=prefill_budget)
    engine.generate([text], GREEDY)  # so that prefix caching would leave some of the prompt's out
    params = SamplingParams(max_tokens=5, seed=1, temperature=1.5, logprobs=3, prompt_logprobs=2)
    output = engine.generate([text], params)[0]
    written = output.outputs[0].token_ids
    with torch.no_grad():
        logprob_SV = te(torch.tensor([text + written])).logits[0].double().log_softmax(-1)
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    assert output.prompt_logprobs[0] is None
    expected = [logprob_SV[position - 1, text[position]].item() for position in range(1, len(text))]
    assert [found.logprob for found in output.prompt_logprobs[1:]] == pytest.approx(expected, abs=1e-4)
    for position, found in enumerate(output.prompt_logprobs[1:], 1):
        best = logprob_SV[position - 1].topk(2)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(output.outputs[0].logprobs) == 5
    for position, (token, found) in enumerate(zip(written, output.outputs[0].logprobs, strict=True), len(text)):
        assert found.logprob == pytest.approx(logprob_SV[position - 1, token].item(), abs=1e-4)
        best = logprob_SV[position - 1].topk(3)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert engine.generate([text], GREEDY)[0].prompt_logprobs is None


def test_stop_tokens_end_a_text(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    text = prompts(6)[0]
    expected = generated(hf, text)[0]
    assert expected[4] not in expected[:4]
    engine = Engine(te)
    stopping = SamplingParams(max_tokens=NEW, temperature=0, stop_token_ids=[expected[4]])
    completion = engine.generate([text], stopping)[0].outputs[0]
    assert completion.token_ids == expected[:5]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", expected[4])
    engine.eos_token_ids = (expected[4],)
    assert tokens(engine.generate([text], GREEDY)[0]) == [expected[:5]]
    for_all = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    assert tokens(engine.generate([text], for_all)[0]) == [expected]
    least = SamplingParams(max_tokens=NEW, temperature=0, min_tokens=7)
    longer = tokens(engine.generate([text], least)[0])[0]
    assert longer == generated(hf, text, eos_token_id=expected[4], min_new_tokens=7)[0]
    assert len(longer) >= 7
    check_empty(engine)


def test_eos_tokens_come_from_the_generation_configuration(hf: PreTrainedModel, thd: PreTrainedModel) -> None:
    assert Engine(thd).eos_token_ids == ()
    thd.config.eos_token_id = 7
    assert Engine(thd).eos_token_ids == (7,)
    thd.generation_config.eos_token_id = [8, 9, 100_000]
    assert Engine(thd).eos_token_ids == (8, 9)


def test_a_stop_string_ends_a_text_before_it(thd: PreTrainedModel) -> None:
    engine = Engine(thd, ByteTokenizer())
    text = prompts(6)[0]
    whole = engine.generate([text], GREEDY)[0].outputs[0]
    assert whole.text == ByteTokenizer().decode(whole.token_ids)
    stop = whole.text[3:5]
    position = whole.text.index(stop)
    events: list[TokenEvent] = []
    params = SamplingParams(max_tokens=NEW, temperature=0, stop=["not in it", stop])
    engine.submit(text, params, events.append)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    completion = outputs[0].outputs[0]
    assert completion.text == whole.text[:position] == "".join(event.text for event in events)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert stop in ByteTokenizer().decode(completion.token_ids)
    assert stop not in ByteTokenizer().decode(completion.token_ids[:-1])
    least = SamplingParams(max_tokens=NEW, temperature=0, stop=stop, min_tokens=NEW)
    assert engine.generate([text], least)[0].outputs[0].text == whole.text


def test_texts_go_in_and_out(thd: PreTrainedModel) -> None:
    engine = Engine(thd, ByteTokenizer())
    output = engine.generate(["grüße"], GREEDY)[0]
    assert output.prompt_token_ids == ByteTokenizer()("grüße")["input_ids"]
    assert output.outputs[0].text == ByteTokenizer().decode(output.outputs[0].token_ids)
    beams = engine.generate(["grüße"], SamplingParams(max_tokens=NEW, num_beams=2, n=2))[0]
    assert [beam.text for beam in beams.outputs] == [ByteTokenizer().decode(beam.token_ids) for beam in beams.outputs]


# --- streams, callbacks, cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(max_tokens=7, n=2, seed=1), SamplingParams(max_tokens=7, num_beams=3, n=2)]
)
def test_a_stream_has_every_token_and_all_text(thd: PreTrainedModel, params: SamplingParams) -> None:
    engine, text = Engine(thd, ByteTokenizer()), prompts(6)[0]
    expected = engine.generate([text], params)[0].outputs
    events = list(engine.stream(text, params))
    for completion in expected:
        own = [event for event in events if event.index == completion.index]
        assert [event.token_id for event in own] == completion.token_ids
        assert "".join(event.text for event in own) == completion.text
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + [completion.finish_reason]
    assert len(events) == sum(len(completion.token_ids) for completion in expected)
    assert not engine.has_unfinished, "the stream left an output behind"


def test_a_stream_of_several_prompts_and_leaving_it(thd: PreTrainedModel) -> None:
    engine = Engine(thd)
    ids = {event.request_id for event in engine.stream(prompts(3, 4), [GREEDY, SamplingParams(max_tokens=3, seed=1)])}
    assert len(ids) == 2
    stream = engine.stream(prompts(3, 4), GREEDY)
    next(stream)
    stream.close()
    assert not engine.has_unfinished
    check_empty(engine)


def test_cancelling_at_any_time(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    text, other = prompts(9, 8)
    for steps in range(NEW + 3):
        engine = Engine(te, page_size=4, prefill_budget=4)
        beams = engine.submit(other, SamplingParams(max_tokens=NEW, num_beams=2))
        cancelled, kept = engine.submit(text, GREEDY), engine.submit(other, GREEDY)
        outputs = {output.request_id: output for _ in range(steps) for output in engine.step()}
        assert engine.cancel(cancelled) == (cancelled not in outputs)
        assert engine.cancel(beams) == (beams not in outputs)
        assert not engine.cancel(cancelled)
        while engine.has_unfinished:
            outputs |= {output.request_id: output for output in engine.step()}
        assert tokens(outputs[kept]) == generated(hf, other)
        found = outputs[cancelled].outputs[0]
        assert found.token_ids == generated(hf, text)[0][: len(found.token_ids)]
        assert found.finish_reason == ("cancelled" if len(found.token_ids) < NEW else "length")
        assert len(outputs[beams].outputs) == 1
        check_empty(engine)
    assert not engine.cancel(12345)


def test_a_callback_may_cancel_and_submit(hf: PreTrainedModel, thd: PreTrainedModel) -> None:
    engine, (text, other) = Engine(thd), prompts(9, 8)
    events: list[TokenEvent] = []

    def on_token(event: TokenEvent) -> None:
        events.append(event)
        if len(events) == 3:
            assert engine.cancel(event.request_id)
            engine.submit(other, GREEDY)

    engine.submit(text, GREEDY, on_token)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output.outputs[0].finish_reason for output in outputs] == ["cancelled", "length"]
    assert tokens(outputs[0]) == [generated(hf, text)[0][:3]]
    assert tokens(outputs[1]) == generated(hf, other)
    assert [event.token_id for event in events] == [*tokens(outputs[0])[0], None]
    assert events[-1].finish_reason == "cancelled"


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=NEW, num_beams=2, n=2)])
def test_a_callback_that_raises_ends_its_own_request(
    hf: PreTrainedModel, thd: PreTrainedModel, params: SamplingParams
) -> None:
    engine, (text, other) = Engine(thd, page_size=4), prompts(9, 8)
    calls = []

    def on_token(event: TokenEvent) -> None:
        calls.append(event)
        if len(calls) == 3:
            raise RuntimeError("the client has gone")

    failing, kept = engine.submit(text, params, on_token), engine.submit(other, GREEDY)
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    assert str(outputs[failing].error) == "the client has gone"
    assert {completion.finish_reason for completion in outputs[failing].outputs} == {"error"}
    assert outputs[failing].outputs[0].token_ids == [event.token_id for event in calls]
    assert len(calls) == 3
    assert outputs[kept].error is None
    assert tokens(outputs[kept]) == generated(hf, other)
    check_empty(engine)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_step_is_launched_before_the_last_one_is_read(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    launch, result = ModelRunner.launch, Pending.result
    monkeypatch.setattr(ModelRunner, "launch", lambda self, *plans: log.append("launch") or launch(self, *plans))
    monkeypatch.setattr(Pending, "result", lambda self: log.append("read") or result(self))
    Engine(thd).generate(prompts(5), SamplingParams(max_tokens=4, temperature=0))
    assert log == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


def test_a_callback_that_steps_is_told_not_to(thd: PreTrainedModel) -> None:
    engine = Engine(thd)
    engine.submit([3], GREEDY, lambda event: engine.step() and None)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert isinstance(outputs[0].error, RuntimeError)
    assert "a callback has called step, generate or stream" in str(outputs[0].error)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stderr", [Terminal(), io.StringIO()])
def test_progress_shows_on_a_terminal_only(
    thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO
) -> None:
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(engine_module, "SECONDS_BEFORE_PROGRESS", 0)
    Engine(thd).generate(prompts(3, 4), GREEDY)
    assert ("2/2" in stderr.getvalue()) == stderr.isatty()


def test_outputs_of_others_wait_until_they_are_fetched(hf: PreTrainedModel, thd: PreTrainedModel) -> None:
    engine, (text, other) = Engine(thd), prompts(5, 6)
    first = engine.submit(text, SamplingParams(max_tokens=2, temperature=0))
    assert tokens(engine.generate([other], GREEDY)[0]) == generated(hf, other)
    assert engine.has_unfinished
    assert [output.request_id for output in engine.step()] == [first]
    assert not engine.has_unfinished


def test_an_engine_goes_on_after_a_step_that_failed(
    hf: PreTrainedModel, thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, texts = Engine(thd, page_size=4), prompts(5, 6)
    calls = itertools.count()
    forward = thd.model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(thd.model, "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(texts, GREEDY)
    check_empty(engine)
    assert [tokens(output)[0] for output in engine.generate(texts, GREEDY)] == [generated(hf, t)[0] for t in texts]


def test_the_model_can_be_trained_after_it_was_served(thd: PreTrainedModel) -> None:
    Engine(thd).generate(prompts(5), GREEDY)
    thd.train()
    ids = torch.tensor(prompts(9))
    thd(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in thd.parameters())


def test_warming_up_runs_all_sizes_and_leaves_nothing(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(thd, max_batch_size=5, page_size=8, prefill_budget=32)
    steps: list[tuple[int, int, bool]] = []
    launch = engine._runner.launch

    def note(plan: Any, previous: Any) -> Pending:
        steps.append((len(plan.running), sum(len(c.tokens) for c in plan.chunks), engine._runner._is_plain(plan)))
        return launch(plan, previous)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", note)
        engine.warm_up()
    assert torch.equal(torch.get_rng_state(), state)
    assert {(rows, is_plain) for rows, read, is_plain in steps if not read} == {
        (rows, is_plain) for rows in (1, 2, 4, 5) for is_plain in (False, True)
    }
    assert {1, 2, 4, 8, 16, 32} <= {read for _, read, _ in steps}
    assert engine.stats() == Engine(thd, max_batch_size=5, page_size=8).stats()
    prompt, params = list(range(20)), SamplingParams(max_tokens=4, temperature=0.0)
    (output,) = engine.generate(prompt, params)
    assert output.num_cached_tokens == 0 and not engine.has_unfinished
    engine.submit(prompt, params)
    with pytest.raises(ValueError, match="no request is in progress"):
        engine.warm_up()


@pytest.mark.parametrize(
    "sizes", [{"max_sequence_length": 3}, {"max_sequence_length": 4}, {"total_num_pages": 1}, {"prefill_budget": 1}]
)
def test_warming_up_small_engines(thd: PreTrainedModel, sizes: dict[str, int]) -> None:
    engine = Engine(thd, **{"max_batch_size": 3, "page_size": 8, **sizes})  # type: ignore[arg-type]
    engine.warm_up()
    assert engine.stats().counters == Engine(thd, max_batch_size=3, page_size=8).stats().counters


def test_many_requests_leave_nothing_behind(thd: PreTrainedModel) -> None:
    engine = Engine(thd, page_size=4, total_num_pages=60, max_batch_size=8)
    params = [SamplingParams(max_tokens=2, temperature=0), SamplingParams(max_tokens=2, n=2, seed=1)]
    params += [SamplingParams(max_tokens=2, num_beams=2), SamplingParams(max_tokens=1, seed=1, logprobs=1)]

    def run(count: int) -> int:
        for start in range(0, count, 20):
            engine.generate(prompts(*[3 + i % 7 for i in range(20)], seed=start), params * 5)
        gc.collect()
        return len(gc.get_objects())

    run(200)  # until pages are all remembered or in use
    before = run(200)
    after = run(400)
    assert abs(after - before) < 200, "objects stay behind: more than one for every second request"
    check_empty(engine)


# --- refused requests and engines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt has no tokens: give at least one"),
        ([3, 257], {}, "prompt has the tokens 3 to 257, but the model knows 0 to 256"),
        ([3], {"stop_token_ids": [300]}, "stop_token_ids has the tokens 300 to 300"),
        ("text", {}, r"prompt(s\[1\])? is a text, but the engine has no tokenizer"),
        ([3], {"stop": "x", "max_tokens": 4}, r"stop=\('x',\) needs text, but the engine has no tokenizer"),
        ([3] * 30, {"max_tokens": 11}, "prompt has 30 tokens and max_tokens=11, but max_sequence_length=40"),
        ([3] * 30, {"max_tokens": 10, "n": 5}, "n=5 sequences do not fit max_batch_size=4"),
        ([3] * 30, {"max_tokens": 10, "num_beams": 5}, "num_beams=5 sequences do not fit max_batch_size=4"),
        ([3] * 30, {"max_tokens": 10}, r"needs 10 pages of 4 tokens, but total_num_pages=9: make it larger"),
        ([3] * 5, {"max_tokens": 10, "num_beams": 4}, r"4 sequence\(s\) needs 13 pages of 4 tokens"),
    ],
)
def test_requests_that_never_fit_are_refused(
    thd: PreTrainedModel, prompt: Any, params: dict[str, Any], message: str
) -> None:
    engine = Engine(thd, max_batch_size=4, max_sequence_length=40, page_size=4, total_num_pages=9)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams(**params))
    with pytest.raises(ValueError, match=message):
        engine.generate([[3], prompt], [SamplingParams(max_tokens=1), SamplingParams(**params)])
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_batch_size": 10**9},
        {"total_num_pages": 10**10},
        {"page_size": 10**10},
        {"max_batch_size": 10**9, "total_num_pages": 1},
        {"max_batch_size": 10**30, "page_size": 10**30, "total_num_pages": 10**30},
    ],
    ids=str,
)
def test_sizes_that_need_more_memory_than_there_is(thd: PreTrainedModel, sizes: dict[str, int]) -> None:
    """They are refused before anything is allocated."""
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"max_batch_size=.* this needs [\d,.]+ GiB, and cpu has [\d,.]+ GiB for it"):
        Engine(thd, **sizes)
    assert time.perf_counter() - began < 1  # measured: 0.01 s


@pytest.mark.parametrize("params", [{"n": 10**9}, {"num_beams": 10**9}], ids=str)
def test_more_sequences_than_fit_are_refused_before_they_are_made(thd: PreTrainedModel, params: dict[str, int]) -> None:
    engine, began = Engine(thd), time.perf_counter()
    with pytest.raises(ValueError, match="=1000000000 sequences do not fit max_batch_size=32"):
        engine.submit([3], SamplingParams(**params))
    assert time.perf_counter() - began < 1  # measured: 0.001 s


def test_eos_tokens_outside_the_vocabulary_are_left_out(thd: PreTrainedModel) -> None:
    thd.generation_config.eos_token_id = [5, 257, -1]
    with pytest.warns(UserWarning, match="EOS token") as warned:
        engines = [Engine(thd), Engine(thd)]
    assert [engine.eos_token_ids for engine in engines] == [(5,), (5,)]
    said = [str(warning.message) for warning in warned if "EOS" in str(warning.message)]
    assert said == [
        f"GenerationConfig has the EOS token {token}, and the model knows 0 to 256: the engine leaves it out."
        for token in (257, -1)
    ]
    # With `min_tokens` the sampler marks the tokens that end a text.
    Engine(thd).generate([3], SamplingParams(max_tokens=4, min_tokens=2, temperature=0))
    for wrong in (1.9, "5", True, [5, "6"]):
        thd.generation_config.eos_token_id = wrong
        with pytest.raises(
            ValueError, match="GenerationConfig has eos_token_id=.*: give a token id, a list of them, or"
        ):
            Engine(thd)


def test_engines_that_make_no_sense_are_refused(
    hf: PreTrainedModel, thd: PreTrainedModel, tiny_llama: Callable[..., PreTrainedModel]
) -> None:
    for name in ("max_batch_size", "max_sequence_length", "page_size", "total_num_pages", "prefill_budget"):
        with pytest.raises(ValueError, match=f"{name}=0 is not possible: give an integer of at least 1"):
            Engine(thd, **{name: 0})
        for value in (-1, 2.5, 2.0, "2", True, torch.tensor(2.0), [2]):
            with pytest.raises(ValueError, match=f"^{name}=.* is not possible: give an integer of at least 1"):
                Engine(thd, **{name: value})
    assert Engine(thd, max_batch_size=torch.tensor(3)).scheduler.max_rows == 3
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM: give a llama_te_core.NVLlamaForCausalLM"):
        Engine(hf)
    dynamic = tiny_llama(
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    model = convert_llama_hf_to_te(dynamic)
    assert Engine(model).max_sequence_length == 64
    with pytest.raises(
        ValueError, match="max_sequence_length=65, but with rope_type='dynamic' angles change beyond 64"
    ):
        Engine(model, max_sequence_length=65)
    with pytest.raises(ValueError, match="max_sequence_length=1000000, but the model's max_position_embeddings is 128"):
        Engine(thd.eval(), max_sequence_length=10**6)
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        Engine(model).generate([[3], [4]], [GREEDY])
