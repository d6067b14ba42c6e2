"""Beam search in two parts finds the same sequences and scores as transformers.

Shapes: G groups (prompts), B beams, V vocabulary, E end tokens, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llama_te_infer.runner.beam_search import BeamHistory, BeamStep, Hypothesis, first_scores, select_beams
from llama_te_infer.runner.stopping import StopRule

SETTINGS = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
EARLY_STOPPING = [True, False, "never"]


@pytest.fixture(scope="module", autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


class TableConfig(PretrainedConfig):
    model_type = "table"


class TableModel(PreTrainedModel, GenerationMixin):
    """Looks up the logits of the next token by the last two."""

    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, vocab_size: int, seed: int, scale: float) -> None:
        super().__init__(TableConfig(vocab_size=vocab_size, is_encoder_decoder=False))
        generator = torch.Generator().manual_seed(seed)
        self.logits_VVV = torch.randn(vocab_size, vocab_size, vocab_size, generator=generator) * scale
        self.parameter = torch.nn.Parameter(torch.zeros(1))  # where transformers reads the device and the dtype from

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits_VVV[input_ids[:, -2], input_ids[:, -1]][:, None])


@dataclass(frozen=True)
class Search:
    """One group's settings."""

    prompt: list[int]
    eos: list[int]
    num_beams: int = 3
    max_tokens: int = 12
    min_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    n: int = field(default=1)


def stop_rule(search: Search) -> StopRule:
    return StopRule(frozenset(search.eos), (), search.min_tokens, search.max_tokens)


def transformers_finds(model: PreTrainedModel, search: Search, **options: Any) -> list[Hypothesis]:
    output = model.generate(
        torch.tensor([search.prompt]),
        do_sample=False,
        num_beams=search.num_beams,
        num_return_sequences=search.n,
        max_new_tokens=search.max_tokens,
        min_new_tokens=search.min_tokens,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        eos_token_id=search.eos or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    written = output.sequences[:, len(search.prompt) :].tolist()
    lengths = (output.beam_indices >= 0).sum(dim=1).tolist()  # padding follows an end
    return [
        Hypothesis(tuple(tokens[:length]), score)
        for tokens, length, score in zip(written, lengths, output.sequences_scores.tolist(), strict=True)
    ]


def record(step: BeamStep, histories: Sequence[BeamHistory]) -> None:
    numbers = zip(*(tensor.tolist() for tensor in step[3:6]), strict=True)
    for history, (tokens, sources, scores) in zip(histories, numbers, strict=True):
        history.add(tokens, sources, scores)


def we_find(
    logits_of: Callable[[list[list[int]]], torch.Tensor], searches: Sequence[Search], late: int = 0
) -> list[list[Hypothesis]]:
    """Run searches of equal width as groups of one batch; the host reads each step `late` steps later."""
    groups, num_beams = len(searches), searches[0].num_beams
    histories = [
        BeamHistory(num_beams, stop_rule(search), search.length_penalty, search.early_stopping) for search in searches
    ]
    most = max(len(search.eos) for search in searches)
    ending_GE = torch.tensor([search.eos + [-1] * (most - len(search.eos)) for search in searches]).long()
    score_GB = first_scores(groups, num_beams, "cpu")
    texts = [[list(search.prompt) for _ in range(num_beams)] for search in searches]
    unread: list[BeamStep] = []
    for written in range(max(search.max_tokens for search in searches) + late):
        logits_GBV = logits_of([text for beams in texts for text in beams]).unflatten(0, (groups, num_beams))
        may_not_end_G = torch.tensor([not stop_rule(search).may_end(written) for search in searches])
        step = select_beams(logits_GBV, score_GB, ending_GE, may_not_end_G)
        score_GB = step.score_GB
        texts = [
            [[*beams[source], token] for token, source in zip(tokens, sources, strict=True)]
            for beams, tokens, sources in zip(texts, step.token_GB.tolist(), step.source_GB.tolist(), strict=True)
        ]
        unread.append(step)
        if len(unread) > late:
            record(unread.pop(0), histories)
    assert all(history.done for history in histories)
    return [history.best(search.n) for history, search in zip(histories, searches, strict=True)]


def table_logits(model: TableModel) -> Callable[[list[list[int]]], torch.Tensor]:
    return lambda texts: model.logits_VVV[[text[-2] for text in texts], [text[-1] for text in texts]]


@st.composite
def table_searches(draw: st.DrawFn) -> tuple[TableModel, list[Search], int]:
    vocab_size, num_beams = draw(st.integers(16, 24)), draw(st.integers(2, 4))
    model = TableModel(vocab_size, draw(st.integers(0, 2**20)), draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])))
    token = st.integers(0, vocab_size - 1)
    search = st.builds(
        Search,
        prompt=st.lists(token, min_size=2, max_size=5),
        eos=st.one_of(
            st.lists(token, max_size=3, unique=True),
            st.integers(1, vocab_size - 1).map(lambda count: list(range(count))),  # almost all of the vocabulary
        ),
        num_beams=st.just(num_beams),
        max_tokens=st.integers(1, 14),
        length_penalty=st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0]),
        early_stopping=st.sampled_from(EARLY_STOPPING),
        n=st.integers(1, num_beams),
    )
    return model, draw(st.lists(search, min_size=1, max_size=3)), draw(st.integers(0, 3))


@SETTINGS
@given(case=table_searches())
def test_any_search_finds_what_transformers_finds(case: tuple[TableModel, list[Search], int]) -> None:
    """Scores are equal to the last bit, for any other searches in the batch."""
    model, searches, late = case
    expected = [transformers_finds(model, search, use_cache=False) for search in searches]
    assert we_find(table_logits(model), searches, late) == expected


@pytest.mark.parametrize(("ends", "min_tokens"), [(15, 0), (15, 1), (16, 0)])
def test_beams_that_nearly_every_token_ends(ends: int, min_tokens: int) -> None:
    """Transformers refuses a search in which every token ends. Its result is the best tokens."""
    for seed in range(5):
        model = TableModel(16, seed, 2.0)
        search = Search([3, 4], list(range(ends)), 4, 6, min_tokens, n=4)
        small = Search([5, 6], [1], 4, 6, n=4)  # has candidates as many as the other one needs
        found, other = we_find(table_logits(model), [search, small], late=1)
        assert other == transformers_finds(model, small, use_cache=False)
        if ends < 16:
            assert found == transformers_finds(model, search, use_cache=False)
        else:
            logprobs, tokens = model.logits_VVV[3, 4].log_softmax(0).sort(descending=True)
            assert found == [Hypothesis((int(t),), float(p)) for t, p in zip(tokens[:4], logprobs[:4], strict=True)]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_beam_without_finite_logits_ends_its_search_alone(bad: float) -> None:
    """One NaN in the last beam of the first group. -inf is everywhere in it."""
    torch.manual_seed(4)
    logits_GBV = torch.randn(2, 3, 11)
    score_GB = torch.randn(2, 3)
    no_end_GE = torch.empty(2, 0, dtype=torch.int64)
    alone = select_beams(logits_GBV, score_GB, no_end_GE)
    logits_GBV[0, 2] = torch.where(torch.arange(11) == 5, bad, -torch.inf if bad == -math.inf else 1.0)
    step = select_beams(logits_GBV, score_GB, no_end_GE)
    assert bool(step.candidate_score_GC[0].isnan().all())
    for name in ("token_GB", "candidate_token_GC"):
        assert 0 <= int(getattr(step, name).min()) <= int(getattr(step, name).max()) < 11, "the next step reads them"
    for one, other in zip(alone[:6], step[:6], strict=True):
        assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one[1], other[1])
    histories = [BeamHistory(3, StopRule(frozenset(), (), 0, 5)) for _ in range(2)]
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        record(step, histories)
    again = select_beams(logits_GBV.nan_to_num(), step.score_GB, no_end_GE)
    assert bool(again.candidate_score_GC[0].isnan().all()), "the device may be one step ahead"


def test_many_end_tokens_need_little_memory() -> None:
    """A comparison of each candidate with each end token would need 16 GB."""
    vocab_size = 2**16
    ending_GE = torch.arange(vocab_size - 1)[None]
    step = select_beams(torch.randn(1, 4, vocab_size), first_scores(1, 4, "cpu"), ending_GE, torch.tensor([True]))
    assert step.token_GB[0, 0] == vocab_size - 1 and step.candidate_token_GC.shape == (1, 4 * vocab_size)


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.7])
@pytest.mark.parametrize("min_tokens", [0, 3, 20])
def test_each_way_to_stop(early_stopping: bool | Literal["never"], length_penalty: float, min_tokens: int) -> None:
    lengths = set()
    for seed in range(12):
        model = TableModel(20, seed, 2.0)
        search = Search([3, 4], [5, 6, 7], 4, 20, min_tokens, length_penalty, early_stopping, n=4)
        expected = transformers_finds(model, search, use_cache=False)
        assert we_find(table_logits(model), [search]) == [expected]
        lengths |= {len(hypothesis.token_ids) for hypothesis in expected}
    assert min(lengths) >= max(min_tokens, 1)
    assert (len(lengths) > 1) == (min_tokens < 20)  # they did not all end at the limit


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("eos", [[], [2], [2, 9, 100]], ids=str)
def test_a_llama(
    tiny_llama: Callable[..., PreTrainedModel], early_stopping: bool | Literal["never"], eos: list[int]
) -> None:
    model = tiny_llama(initializer_range=0.3)
    searches = [
        Search(prompt, eos, num_beams=4, max_tokens=16, early_stopping=early_stopping, n=3)
        for prompt in ([5, 77, 31], [200, 8, 8, 41, 9])
    ]

    def logits_of(texts: list[list[int]]) -> torch.Tensor:
        return torch.cat([model(torch.tensor([text])).logits[:, -1] for text in texts])

    for search, found in zip(searches, we_find(logits_of, searches), strict=True):
        expected = transformers_finds(model, search)
        assert [hypothesis.token_ids for hypothesis in found] == [hypothesis.token_ids for hypothesis in expected]
        # transformers computes with a cache: sums of float32 in another order, 16 times.
        assert [hypothesis.score for hypothesis in found] == pytest.approx(
            [hypothesis.score for hypothesis in expected], rel=1e-5
        )


# --- the device's part ----------------------------------------------------------------------------------------------


def test_a_step() -> None:
    """Two beams; the best candidate of all ends."""
    logits_GBV = torch.tensor([[[5.0, 9.0, 8.0, 0.0], [0.0, 0.0, 0.0, 9.0]]])
    score_GB = torch.tensor([[-1.0, -2.0]])
    step = select_beams(logits_GBV, score_GB, torch.tensor([[1]]))
    log_sums = logits_GBV.double().logsumexp(dim=2)[0].tolist()
    expected = [9 - log_sums[0] - 1, 8 - log_sums[0] - 1, 9 - log_sums[1] - 2, 5 - log_sums[0] - 1]
    candidates = sorted(zip(expected, [1, 2, 3, 0], [0, 0, 1, 0], strict=True), reverse=True)
    assert step.candidate_token_GC.tolist() == [[token for _, token, _ in candidates]]
    assert step.candidate_source_GC.tolist() == [[source for _, _, source in candidates]]
    assert step.candidate_score_GC[0].tolist() == pytest.approx([score for score, _, _ in candidates], rel=1e-6)
    assert step.token_GB.tolist() == [[3, 2]] and step.source_GB.tolist() == [[1, 0]]
    assert torch.equal(step.score_GB, step.candidate_score_GC[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_candidates_come_in_order_of_beam_and_token(dtype: torch.dtype) -> None:
    logits_GBV = torch.zeros(3, 2, 10, dtype=dtype)
    logits_GBV[1, 1, 7] = 1
    score_GB = torch.zeros(3, 2)
    ending_GE = torch.tensor([[0], [0], [-1]])
    step = select_beams(logits_GBV, score_GB, ending_GE)
    assert step.candidate_token_GC.tolist() == [[0, 1, 2, 3], [7, 0, 1, 2], [0, 1, 2, 3]]
    assert step.candidate_source_GC.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert step.token_GB.tolist() == [[1, 2], [7, 1], [0, 1]]
    banned = select_beams(logits_GBV, score_GB, ending_GE, torch.tensor([True, True, True]))
    assert banned.candidate_token_GC.tolist() == [[1, 2, 3, 4], [7, 1, 2, 3], [0, 1, 2, 3]]


def test_only_one_beam_counts_at_first() -> None:
    logits_GBV = torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(1)).expand(2, 3, 30)
    step = select_beams(logits_GBV, first_scores(2, 3, "cpu"), torch.zeros(2, 0, dtype=torch.int64))
    assert step.candidate_source_GC.tolist() == [[0] * 6] * 2
    best_GC = logits_GBV[:, 0].topk(6)
    assert torch.equal(step.candidate_token_GC, best_GC.indices)
    assert step.score_GB.dtype == torch.float32 and step.token_GB.dtype == torch.int64


def test_logits_are_left_as_they_are() -> None:
    logits_GBV = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(1))
    before = logits_GBV.clone()
    select_beams(logits_GBV, first_scores(2, 3, "cpu"), torch.tensor([[3], [4]]), torch.tensor([True, False]))
    assert torch.equal(logits_GBV, before)


def test_nothing_depends_on_what_is_in_the_tensors() -> None:
    """On the meta device tensors hold nothing, so a shape or a branch that needs their values is an error."""
    logits_GBV = torch.empty(2, 3, 50, dtype=torch.bfloat16, device="meta")
    ending_GE = torch.empty(2, 2, dtype=torch.int64, device="meta")
    may_not_end_G = torch.empty(2, dtype=torch.bool, device="meta")
    step = select_beams(logits_GBV, first_scores(2, 3, "meta"), ending_GE, may_not_end_G)
    assert [None if tensor is None else tuple(tensor.shape) for tensor in step] == [
        *[(2, 3)] * 3,
        *[(2, 9)] * 3,
        *[None] * (len(step) - 6),
    ]


# --- the host's part ------------------------------------------------------------------------------------------------


def test_a_history_by_hand() -> None:
    history = BeamHistory(2, StopRule(frozenset({9}), (), 0, 3))
    history.add([1, 9, 2, 3], [0, 0, 0, 0], [-1.0, -2.0, -3.0, -4.0])
    assert history.best(2) == [Hypothesis((9,), -2.0)] and not history.done
    # An end behind the first two candidates does not count.
    history.add([5, 6, 9, 9], [1, 0, 0, 1], [-3.25, -3.5, -3.75, -5.0])
    assert history.best(2) == [Hypothesis((9,), -2.0)] and not history.done
    # The limit ends the running beams: token 4 behind token 5 of beam 1, which was token 2.
    history.add([4, 7, 9, 8], [0, 1, 1, 0], [-4.5, -5.25, -5.5, -6.0])
    assert history.done
    assert history.best(2) == [Hypothesis((2, 5, 4), -1.5), Hypothesis((1, 6, 7), -1.75)]
    history.add([9, 9, 1, 1], [0, 1, 0, 1], [0.0, 0.0, 0.0, 0.0])  # a surplus step of the device
    assert history.best(2) == [Hypothesis((2, 5, 4), -1.5), Hypothesis((1, 6, 7), -1.75)]
    assert history.best(1) == [Hypothesis((2, 5, 4), -1.5)]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "done_after"), [(True, 1.0, 1), (False, 1.0, 2), ("never", 1.0, 3)]
)
def test_when_a_history_is_done(
    early_stopping: bool | Literal["never"], length_penalty: float, done_after: int
) -> None:
    """Two ends of score -1 and -1.5; the best beam then has -1.25, -3.5 (-1.75 a token) and -200 over 100 tokens."""
    history = BeamHistory(2, StopRule(frozenset({9}), (), 0, 100), length_penalty, early_stopping)
    steps = [([9, 9, 1, 2], [-1.0, -1.5, -1.25, -4.0]), ([1, 2, 3, 4], [-3.5, -5.0, -6.0, -7.0])]
    steps.append(([1, 2, 3, 4], [-200.0, -201.0, -202.0, -203.0]))
    after = 0
    while not history.done:
        tokens, scores = steps[after]
        history.add(tokens, [0, 0, 0, 0], scores)
        after += 1
    assert after == done_after
    assert history.best(2) == [Hypothesis((9,), -1.0), Hypothesis((9,), -1.5)]


def test_scores_are_rounded_as_in_float32() -> None:
    history = BeamHistory(1, StopRule(frozenset({9}), (), 0, 10), length_penalty=0.3)
    history.add([1, 2], [0, 0], [-1.0, -2.0])
    history.add([9, 1], [0, 0], [-1.1, -2.0])
    score = history.best(1)[0].score
    assert score == (torch.tensor([-1.1]) / 2**0.3).item()
    assert score != -1.1 / 2**0.3 and math.isclose(score, -1.1 / 2**0.3, rel_tol=1e-6)
