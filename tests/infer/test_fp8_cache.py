"""The FP8 cache: its format, the engine's texts over it, its memory, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, InferenceParams, SamplingParams
from llama_te_infer.engine import limits
from llama_te_infer.engine.outputs import RequestOutput
from llama_te_infer.kv_cache import engine_cache
from llama_te_infer.kv_cache.cache_format import CacheFormat, as_bytes, quantize, widened
from llama_te_infer.kv_cache.engine_cache import EngineCache
from llama_te_infer.kv_cache.paged import PagedStorage
from llama_te_infer.kv_cache.step import CacheStep
from llama_te_infer.ops import library

from .test_fused_decode import make_model

FP8 = torch.float8_e4m3fn
NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0)

# --- the format -------------------------------------------------------------------------------------------------------


def numbers(dtype: torch.dtype) -> st.SearchStrategy[torch.Tensor]:
    """Heads of 16 numbers: of any size, of sizes that are near each other, or zeros."""
    largest = float(torch.finfo(dtype).max)
    least = float(torch.finfo(dtype).smallest_normal)
    sizes = st.floats(-largest, largest, width=32)
    near = st.tuples(st.floats(-8, 8, width=32), st.integers(-100, 100)).map(lambda pair: math.ldexp(*pair))
    edge = st.sampled_from([0.0, 448.0, 448.0001, 449.0, 224.0, 225.0, 2.0**-120, least, largest, -largest])
    head = st.one_of(*(st.lists(each, min_size=16, max_size=16) for each in (sizes, near, edge)))
    return head.map(lambda values: torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype))


@settings(max_examples=300, deadline=None)
@given(number_D=st.sampled_from([torch.bfloat16, torch.float32]).flatmap(numbers))
def test_each_number_is_the_nearest_that_the_format_has(number_D: torch.Tensor) -> None:
    fp8_D, scale = quantize(number_D)
    assert fp8_D.dtype == FP8 and scale.dtype == torch.uint8
    exact_D, exponent = number_D.double(), int(scale) - 127
    greatest = float(exact_D.abs().max())
    if greatest == 0:
        assert exponent == 0
    else:
        assert exponent == 119 or greatest <= 448 * 2.0**exponent
        assert exponent == -117 or greatest > 448 * 2.0 ** (exponent - 1), "a smaller scale is enough"
    grid = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    grid = grid[grid.isfinite()] * 2.0**exponent
    nearest_D = (grid - exact_D[:, None]).abs().amin(1)
    found_D = widened(fp8_D, scale, torch.float32)
    assert torch.equal((found_D.double() - exact_D).abs(), nearest_D)
    # What attention reads is exact in bfloat16, and stored again it is the same.
    assert torch.equal(widened(fp8_D, scale, torch.bfloat16).float(), found_D)
    assert torch.equal(widened(*quantize(found_D), torch.float32), found_D)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_head_alone(bad: float) -> None:
    number_KD = torch.ones(3, 16)
    number_KD[1, 5] = bad
    fp8_KD, scale_K = quantize(number_KD)
    assert scale_K.tolist() == [119, 255, 119]
    found_KD = widened(fp8_KD, scale_K, torch.bfloat16)
    assert found_KD[1].isnan().all() and (found_KD[[0, 2]] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_are_read_where_they_were_written(dtype: torch.dtype) -> None:
    form = CacheFormat(dtype, is_fp8=True)
    memory = form.allocate((5, 4, 2, 16), 8, torch.device("cpu"))
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in memory] == [
        ((5, 4, 2, 16), FP8),
        ((5, 4, 2, 8), FP8),
        ((5, 2, 4), torch.uint8),
        ((5, 2, 4), torch.uint8),
    ]
    assert sum(tensor.nbytes for tensor in memory) == 5 * 4 * form.token_bytes(2, 16, 8)
    slot_N = torch.tensor([7, 0, 19, 12, 6])
    key_NKD, value_NKD = torch.randn(5, 2, 16, dtype=dtype) * 300, torch.randn(5, 2, 8, dtype=dtype) / 300
    form.write(memory, slot_N, key_NKD, value_NKD)
    for found, new in zip(form.read(memory, torch.arange(5)), (key_NKD, value_NKD), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found.flatten(0, 1)[slot_N], widened(*quantize(new), dtype))
        others = torch.ones(20, dtype=torch.bool).index_fill(0, slot_N, False)
        assert not found.flatten(0, 1)[others].any()


class OneStep(CacheStep):
    """A cache of one row, whose pages lie in no order."""

    def __init__(self, is_compiled: bool) -> None:
        self.is_compiled = is_compiled
        storage = PagedStorage(5, 16, 2, 32, torch.bfloat16, 1, 64, device=torch.device("cpu"), scratch_pages=4)
        storage.page_table[:] = torch.tensor([3, 0, 4, 1])
        sizes: dict[str, Any] = {"max_batch_size": 1, "max_sequence_length": 64, "num_heads_kv": 2}
        device = storage.device
        super().__init__(storage, head_dim_k=32, head_dim_v=32, dtype=torch.bfloat16, device=device, **sizes)

    def _takes_kernels(self) -> bool:
        return self.is_compiled and super()._takes_kernels()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), start=st.integers(0, 30), new=st.integers(1, 30), size=st.integers(-60, 60))
def test_the_operators_store_and_widen_the_same_bits(seed: int, start: int, new: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    qkv_TKGD = (torch.randn(new, 2, 4, 32, generator=generator) * 2.0**size).bfloat16()
    angles = torch.zeros(64, 1, 1, 32)  # a rotation may round otherwise
    memories, read = [], []
    for is_compiled in (False, True):
        cache = OneStep(is_compiled)
        assert cache._takes_kernels() == is_compiled
        cache.open_step([start], [new])
        with pytest.MonkeyPatch.context() as patch:
            if not is_compiled:
                patch.setattr(cache.cache_manager, "_takes_widen_pages", lambda: False)
            cache.append_rope(1, qkv_TKGD, angles, "thd")
            read.append(cache.keys_and_values(1))
        memories.append([as_bytes(tensor) for tensor in cache.caches[1]])
    for found, expected in zip(memories[1] + list(read[1]), memories[0] + list(read[0]), strict=True):
        assert torch.equal(found, expected)
    assert memories[0][0].any()


def test_transformer_engine_gets_widened_rows() -> None:
    """One behind the other, as from a contiguous cache; rows that are filled up have no page of another row."""
    cache = make_cache(4, 30, is_fp8=True)
    assert not cache.is_paged
    table_RP = cache.make_page_table()
    table_RP[0, :3], table_RP[1, :1] = torch.tensor([7, 2, 9]), 5
    stored_KD = [torch.randn(9, 1, 4), torch.randn(2, 1, 4)]
    cache.open_rows(table_RP, [0, 0], [9, 2])
    new_k, new_v = torch.cat(stored_KD), -torch.cat(stored_KD)
    keys, values, cu_new, cu_all, longest, layout = cache.step(1, new_k, new_v, "thd")
    assert keys.shape == values.shape == (2, 16, 1, 4) and longest == 16, "a power of two of pages"
    assert (cu_new.tolist(), cu_all.tolist(), layout) == ([0, 9, 11], [0, 9, 11], "thd_2bshd")
    assert keys.is_contiguous() and values.is_contiguous()
    for row, new_KD in enumerate(stored_KD):
        expected = widened(*quantize(new_KD), torch.float32)
        assert torch.equal(keys[row, : len(new_KD)], expected) and torch.equal(values[row, : len(new_KD)], -expected)
        assert not keys[row, len(new_KD) :].any() and not values[row, len(new_KD) :].any()


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """In float64, where the order of a sum does not decide how a number is rounded to FP8."""
    fields = {"max_position_embeddings": 128, "num_hidden_layers": 2, "initializer_range": 0.3, "eos_token_id": None}
    return tiny_llama(**fields).double()


@pytest.fixture(params=["thd", "bshd"])
def te(request: pytest.FixtureRequest, hf: PreTrainedModel) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf, attn_input_format=request.param)


@pytest.fixture
def thd(hf: PreTrainedModel) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf)


def prompts(*lengths: int, seed: int = 2) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(3, 257, (length,)).tolist() for length in lengths]


def engine(model: PreTrainedModel, **options: Any) -> Engine:
    return Engine(model, kv_cache_dtype="fp8", **options)


def check_equal(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """Texts are equal, and log-probabilities, which are float32, up to the order of sums."""
    for here, there in zip(found, expected, strict=True):
        assert [text.token_ids for text in here.outputs] == [text.token_ids for text in there.outputs]
        for text, wanted in zip(here.outputs, there.outputs, strict=True):
            assert text.score == (wanted.score and pytest.approx(wanted.score, rel=1e-5))
            for step, other in zip(text.logprobs or [], wanted.logprobs or [], strict=True):
                assert step.logprob == pytest.approx(other.logprob, abs=1e-6)
        for step, other in zip(here.prompt_logprobs or [], there.prompt_logprobs or [], strict=True):
            assert (step is None) == (other is None)
            assert step is None or step.logprob == pytest.approx(other.logprob, abs=1e-6)


PARAMS = {
    "greedy": SamplingParams(max_tokens=NEW, temperature=0, logprobs=0),
    "drawn": SamplingParams(max_tokens=NEW, seed=1, n=3, logprobs=0),
    "beams": SamplingParams(max_tokens=NEW, num_beams=3, n=2),
    "scores of the prompt": SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "small pages": {"page_size": 4},
    "prompts in pieces": {"page_size": 8, "prefill_budget": 5},
    "a token at a time": {"page_size": 4, "prefill_budget": 1},
    "few rows": {"page_size": 4, "max_batch_size": 3, "prefix_caching": False},
    "few pages": {"page_size": 4, "total_num_pages": 34},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_texts_are_those_of_each_prompt_alone(
    te: PreTrainedModel, params: SamplingParams, options: dict[str, Any]
) -> None:
    """Also the second time, with prefixes from the cache."""
    texts = prompts(1, 17, 4, 30, 9, 16)
    alone = [engine(te).generate([text], params)[0] for text in texts]
    together = engine(te, **options)
    check_equal(together.generate(texts, params), alone)
    again = together.generate(texts, params)
    check_equal(again, alone)
    reuses = together.scheduler.blocks.prefix_caching and params.prompt_logprobs is None
    assert any(output.num_cached_tokens for output in again) == (reuses and "few pages" not in options)


def test_new_tokens_meet_the_keys_and_values_that_the_cache_holds(thd: PreTrainedModel) -> None:
    """So a prompt's log-probabilities are not those of exact keys and values, and do not depend on its pieces."""
    text, params = prompts(40), SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)

    def logprobs(**options: Any) -> torch.Tensor:
        (output,) = Engine(thd, page_size=4, **options).generate(text, params)
        return torch.tensor([step.logprob for step in output.prompt_logprobs[1:]])

    exact, whole = logprobs(), logprobs(kv_cache_dtype="fp8")
    pieces = logprobs(kv_cache_dtype="fp8", prefill_budget=3)
    assert 1e-3 < float((whole - exact).abs().mean()) < 0.3
    assert float((whole - pieces).abs().max()) < 1e-6


def test_what_does_not_fit_the_scratch_takes_several_passes(
    te: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = prompts(40, 33, 3, 41, 20, 7)
    texts += [[*texts[0], 9], texts[3][:30]]  # they share pages
    expected = engine(te, page_size=4).generate(texts, PARAMS["greedy"])
    monkeypatch.setattr(engine_cache, "SCRATCH_SHARE", 10**6)
    monkeypatch.setattr(engine_cache, "SCRATCH_BUDGETS", 0)
    small = engine(te, page_size=4, max_sequence_length=64)
    assert small._cache.scratch_pages == 16
    counts = []
    te.model.register_forward_pre_hook(lambda *call: counts.append(len(call[2]["input_ids"])), with_kwargs=True)
    for _ in range(2):
        check_equal(small.generate(texts, PARAMS["greedy"]), expected)
    assert 1 in counts and max(counts) < len(texts)


def test_the_kernels_read_and_write_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, from cached prefixes, with little scratch, as beams: near each other, and near what the layers do."""
    model = make_model(max_position_embeddings=128).to(torch.bfloat16)
    texts = prompts(40, 33, 3, 70, 20, 7)
    texts += [[*texts[0], 9], texts[3][:50]]
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    beams = SamplingParams(max_tokens=NEW, num_beams=3, n=2)
    logprobs, scores = {}, {}

    def run(name: str, how: str = "fused", kv_cache_dtype: str = "fp8", **options: Any) -> None:
        options = {"page_size": 16, "max_batch_size": 12, "decode_implementation": how, **options}
        its = Engine(model, kv_cache_dtype=kv_cache_dtype, **options)
        assert (its._runner.prefill.fused is not None) == (how == "fused")
        assert (len(its._cache.parts([len(text) for text in texts])) > 1) == (name in ("little scratch", "pieces"))
        outputs = its.generate(texts, scored)
        steps = [step.logprob for output in outputs for step in output.prompt_logprobs[1:]]
        logprobs[name] = torch.tensor(steps)
        for again in ("", ", again"):
            found = [text.score for output in its.generate(texts, beams) for text in output.outputs]
            scores[name + again] = torch.tensor(found)
        assert its.stats().counters.prefix_cache_hits > 0

    run("fused")
    run("pieces", prefill_budget=17)
    run("layers", "layers")
    run("bfloat16", kv_cache_dtype="auto")
    monkeypatch.setattr(engine_cache, "SCRATCH_SHARE", 10**6)
    monkeypatch.setattr(engine_cache, "SCRATCH_BUDGETS", 0)
    run("little scratch")
    usual = float((logprobs["fused"] - logprobs["bfloat16"]).abs().mean())
    for name in ("pieces", "layers", "little scratch"):
        assert float((logprobs[name] - logprobs["fused"]).abs().mean()) < usual / 2
        for again in ("", ", again"):
            assert float((scores[name + again] - scores["fused"]).abs().mean()) < 0.02


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=24),
    page_size=st.sampled_from([1, 4, 16]),
    total_num_pages=st.integers(1, 400),
    multiple=st.sampled_from([1, 8]),
)
def test_the_parts_of_a_step_fit(lengths: list[int], page_size: int, total_num_pages: int, multiple: int) -> None:
    cache = make_cache(page_size, total_num_pages, is_fp8=True, rows_multiple=multiple)
    lengths = [min(length, page_size * total_num_pages) for length in lengths]  # no row is longer
    parts = cache.parts(lengths)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts:
        rows = lengths[part]
        filled = -(-len(rows) // multiple) * multiple
        assert filled == len(rows) or part.stop == len(lengths)
        longest = cache._widened_pages(max(rows)) * page_size
        assert max(rows) <= longest <= max(64, page_size)
        assert filled * longest <= cache.scratch_pages * page_size
    assert make_cache(page_size, total_num_pages).parts(lengths) == [slice(0, len(lengths))]


@pytest.mark.parametrize(("count", "length"), [(16, 512), (14, 577), (1, 8192), (63, 129), (256, 32)])
def test_new_prompts_of_one_length_take_one_pass(count: int, length: int) -> None:
    """As many as a step of 8,192 tokens reads; with the share of all pages alone they would take several passes."""
    sizes = {"rows": 256, "max_sequence_length": 8200, "prefill_budget": 8192}
    cache = make_cache(64, 300, is_fp8=True, **sizes)
    assert cache.parts([length] * count) == [slice(0, count)]
    # the same memory is never more than all rows or all pages need
    assert make_cache(64, 9, is_fp8=True, **sizes).scratch_pages == 18
    assert make_cache(64, 300, is_fp8=True, **(sizes | {"rows": 2, "max_sequence_length": 128})).scratch_pages == 4


def test_the_engine_reads_equal_prompts_in_one_pass(te: PreTrainedModel) -> None:
    its = engine(te, page_size=4, max_batch_size=16, max_sequence_length=36, prefill_budget=512)
    counts = []
    te.model.register_forward_pre_hook(lambda *call: counts.append(len(call[2]["input_ids"])), with_kwargs=True)
    its.generate(prompts(*[32] * 16), SamplingParams(max_tokens=1, temperature=0))
    assert counts == [16]


def make_cache(page_size: int, total_num_pages: int, **options: Any) -> EngineCache:
    class Config:
        num_key_value_heads, head_dim, num_hidden_layers = 1, 4, 1

    class Model:
        config, device = Config, torch.device("cpu")

        @staticmethod
        def get_input_embeddings() -> Any:
            return torch.nn.Embedding(1, 1)

    sizes = {"page_size": page_size, "total_num_pages": total_num_pages, "rows": 24, "max_sequence_length": 64}
    return EngineCache(Model, **(sizes | options))


def test_a_change_of_autocast_keeps_the_format(thd: PreTrainedModel) -> None:
    its = engine(thd.float(), page_size=4)  # autocast leaves float64 alone
    text = prompts(17)
    (before,) = its.generate(text, GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = its.generate(text, GREEDY)
        (fresh,) = engine(thd, page_size=4).generate(text, GREEDY)
    assert inside.outputs[0].token_ids == fresh.outputs[0].token_ids
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="compute in float16"):
        its.generate(text, GREEDY)
    check_equal(its.generate(text, GREEDY), [before])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nearly_twice_as_many_pages_fit(
    tiny_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert_llama_hf_to_te(tiny_llama(num_hidden_layers=8, head_dim=64)).to(torch.bfloat16)
    memory = 10 * model.get_memory_footprint()
    monkeypatch.setattr(limits, "total_memory", lambda device: memory)
    options: dict[str, Any] = {"page_size": 4, "max_batch_size": 10_000, "gpu_memory_utilization": 0.9}
    options["prefill_budget"] = 64  # it is far less than all pages hold, as it is in an engine on a GPU
    plain, fp8 = Engine(model, **options), engine(model, **options)
    pages, more = (each.stats().total_num_pages for each in (plain, fp8))
    # 65 bytes for 128 of a head's numbers, and the memory of the pages that are widened, 1/8 of one layer's of 8
    assert 1.8 < more / pages < 128 / 65
    left = 0.9 * memory - model.get_memory_footprint()
    page_bytes = limits.CacheSizes(model, CacheFormat(torch.bfloat16, True), 10_000, 1, 64, 4).page_bytes
    assert left - 8 * page_bytes < fp8.cache_bytes < left + 2 * page_bytes


def test_memory_is_counted_as_it_is_allocated(thd: PreTrainedModel) -> None:
    for name, is_fp8 in (("auto", False), ("fp8", True)):
        its = Engine(thd, page_size=4, max_batch_size=3, kv_cache_dtype=name)
        sizes = limits.CacheSizes(thd, CacheFormat(torch.float64, is_fp8), 3, 1, its.max_sequence_length, 4, 2048)
        # The cache has one page more, for rows without a text, and one more to be widened, which stays zeros.
        one_more = sizes.page_bytes + is_fp8 * 4 * 2 * 8 * thd.config.num_key_value_heads * thd.config.head_dim
        assert its.cache_bytes == sizes.cache_bytes(its.stats().total_num_pages) + one_more


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 300),
    multiple=st.sampled_from([1, 16]),
    length=st.integers(1, 5000),
    page_size=st.sampled_from([1, 16, 64]),
    layers=st.integers(1, 80),
    budget=st.sampled_from([0, 100, 8192]),
    memory=st.integers(0, 2**33),
)
def test_as_many_pages_as_fit(
    rows: int, multiple: int, length: int, page_size: int, layers: int, budget: int, memory: int
) -> None:
    class Model:
        class config:  # noqa: N801
            num_hidden_layers, num_key_value_heads, head_dim = layers, 2, 64

    rows = -(-rows // multiple) * multiple
    its_format = CacheFormat(torch.bfloat16, is_fp8=True)
    sizes = limits.CacheSizes(Model, its_format, rows, multiple, length, page_size, budget)
    pages = sizes.fitting_pages(memory)
    if pages > 0:
        assert sizes.cache_bytes(pages) <= memory
        assert sizes.cache_bytes(pages + 1) > memory


def test_too_much_memory_is_refused(thd: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = engine(thd, page_size=4, total_num_pages=500).cache_bytes
    monkeypatch.setattr(limits, "free_memory", lambda device: needed)
    with pytest.raises(ValueError, match="total_num_pages=500: this needs .* GiB"):
        engine(thd, page_size=4, total_num_pages=500)
    engine(thd, page_size=4, total_num_pages=100)


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_other_names(thd: PreTrainedModel) -> None:
    text = prompts(17)
    (expected,) = engine(thd).generate(text, GREEDY)
    check_equal(Engine(thd, kv_cache_dtype="fp8_e4m3").generate(text, GREEDY), [expected])
    assert Engine(thd, kv_cache_dtype="fp8_e4m3").stats().kv_cache_dtype == "fp8_e4m3"
    assert Engine(thd).stats().kv_cache_dtype == "auto"
    thd.to(torch.bfloat16)
    assert Engine(thd, kv_cache_dtype="bfloat16")._cache.caches[1][0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["fp8_e5m2", "fp8_per_token_head", "float16", "", None, 8])
def test_names_without_a_meaning(thd: PreTrainedModel, name: Any) -> None:
    with pytest.raises(ValueError, match="is not known: use one of 'auto', 'bfloat16', 'fp8', 'fp8_e4m3'"):
        Engine(thd, kv_cache_dtype=name)


def test_models_that_compute_otherwise(thd: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype='bfloat16', but the layers compute in float64: load"):
        Engine(thd, kv_cache_dtype="bfloat16")
    thd.half()
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8', but the layers compute in float16, .*: load"):
        engine(thd)


def test_caches_of_generate_are_not_fp8() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.float8_e4m3fn is not possible.*Engine\(model, kv_cache_dtype"):
        InferenceParams(1, 64, 2, 16, FP8, device="cpu")


class OnGpu:
    """What the engine asks of a model on a GPU before it allocates anything."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, group: int = 4) -> None:
        self.config = SimpleNamespace(head_dim=head_dim, num_attention_heads=2 * group, num_key_value_heads=2)
        self._weight = torch.zeros(1, 1, dtype=dtype)

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self._weight)


@pytest.mark.parametrize(
    ("fields", "page_size", "named"),
    [
        ({}, 24, "page_size=24"),
        ({"head_dim": 24}, 64, "heads of 24"),
        ({"group": 64}, 64, "64 query heads for each key"),
        ({"dtype": torch.float32}, 64, "layers in float32"),
    ],
)
def test_on_a_gpu_the_kernels_must_take_it(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], page_size: int, named: str
) -> None:
    monkeypatch.setattr(library, "available", lambda device_type: True)
    assert limits.checked_cache_format(OnGpu(), "fp8", 64) == CacheFormat(torch.bfloat16, is_fp8=True)
    model = OnGpu(**fields)
    assert not limits.checked_cache_format(model, "auto", page_size).is_fp8
    with pytest.raises(ValueError, match=f"kv_cache_dtype='fp8' with .*{named}.*: the kernels take bfloat16, heads of"):
        limits.checked_cache_format(model, "fp8", page_size)


def test_on_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda device_type: False)
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8', but the compiled operators do not run on this GPU"):
        limits.checked_cache_format(OnGpu(), "fp8", 64)
