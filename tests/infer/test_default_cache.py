"""The cache that a forward pass returns: decoding loops of one's own, against transformers' Llama and its cache."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Cache, DynamicCache, LlamaForSequenceClassification, PreTrainedModel, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import llama_te_core.compat.entry_points
import llama_te_core.layers.kv_cache
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, InferenceParams, SamplingParams, inference_params_for
from llama_te_infer.generate.inference_params import cache_for_generation

CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"
NEAR = {"rtol": 0, "atol": 2e-4}
MASK_BS = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
FORMATS = pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama(max_position_embeddings=128, initializer_range=0.3)


@pytest.fixture
def attn_input_format() -> str:
    return "thd"


@pytest.fixture
def te(hf: PreTrainedModel, attn_input_format: str) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)


def ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 257, (rows, columns), generator=torch.Generator().manual_seed(seed))


def loop(model: PreTrainedModel, mask_BS: torch.Tensor | None, widths: list[int], **options: Any) -> torch.Tensor:
    """Return the logits of the new columns of several passes, each continuing the one before."""
    past, result = None, []
    rows = 2 if mask_BS is None else len(mask_BS)
    for number, width in enumerate([9, *widths]):
        if mask_BS is not None and number > 0:
            mask_BS = torch.cat((mask_BS, mask_BS.new_ones(rows, width)), dim=1)
        arguments = {"input_ids": ids(rows, width, number), "attention_mask": mask_BS, CACHE: past}
        output = model(**arguments, **options)
        past = output[CACHE]
        result.append(output.logits if number > 0 else output.logits[:, -6:])
    assert past.get_seq_length() == 9 + sum(widths)
    return torch.cat(result, dim=1).detach()


@FORMATS
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("options", [{"use_cache": True}, {}], ids=["use_cache", "not said"])
def test_a_loop_of_ones_own(
    hf: PreTrainedModel, te: PreTrainedModel, options: dict[str, Any], with_gradients: bool
) -> None:
    for mask_BS in (None, MASK_BS):
        with torch.set_grad_enabled(with_gradients):
            found, expected = (loop(model, mask_BS, [1, 3, 1, 2], **options) for model in (te, hf))
        torch.testing.assert_close(found, expected, **NEAR)


def test_the_decoder_alone_and_embeddings_continue(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    for first in ("input_ids", "inputs_embeds"):
        results = []
        for model in (hf, te):
            embed = model.get_input_embeddings()
            start = {"input_ids": ids(2, 9)} if first == "input_ids" else {"inputs_embeds": embed(ids(2, 9))}
            past = model.model(**start)[CACHE]
            results.append(model.model(inputs_embeds=embed(ids(2, 4, 1)), **{CACHE: past}).last_hidden_state)
        torch.testing.assert_close(results[1], results[0], **NEAR)


def test_a_classifier_returns_the_cache(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    hf = tiny_llama(LlamaForSequenceClassification)
    te = convert_llama_hf_to_te(hf)
    results = []
    for model in (hf, te):
        past = model(input_ids=ids(2, 9))[CACHE]
        results.append(model(input_ids=ids(2, 3, 1), **{CACHE: past}).logits)
    torch.testing.assert_close(results[1], results[0], **NEAR)


def test_a_pass_that_may_be_continued_costs_nothing(te: PreTrainedModel) -> None:
    with torch.no_grad():
        plain = te(input_ids=ids(2, 9), attention_mask=MASK_BS, use_cache=False)
        output = te(input_ids=ids(2, 9), attention_mask=MASK_BS)
    assert plain.get(CACHE) is None
    assert torch.equal(output.logits, plain.logits)
    assert isinstance(output[CACHE], Cache) and output[CACHE] and len(output[CACHE]) == 0, "no layer has memory"
    te.config.use_cache = False
    assert te(input_ids=ids(2, 9)).get(CACHE) is None


def test_training_makes_no_cache_and_its_gradients_are_right(te: PreTrainedModel) -> None:
    te.train()
    assert te(input_ids=ids(2, 9)).get(CACHE) is None
    gradients = []
    for use_cache in (False, True):
        te.zero_grad()
        output = te(input_ids=ids(2, 9), labels=ids(2, 9), use_cache=use_cache)
        output.loss.backward()
        gradients.append(te.model.layers[0].self_attention.layernorm_qkv.weight.grad)
    assert torch.equal(*gradients)
    continued = te(input_ids=ids(2, 3, 1), labels=ids(2, 3, 1), **{CACHE: output[CACHE]})
    with pytest.raises(RuntimeError, match="a pass with past_key_values has no gradients"):
        continued.loss.backward()


def test_the_inputs_may_be_overwritten(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    results = []
    for model in (hf, te):
        input_ids = ids(2, 9)
        past = model(input_ids=input_ids)[CACHE]
        input_ids.zero_()
        results.append(model(input_ids=ids(2, 1, 1), **{CACHE: past}).logits)
    torch.testing.assert_close(results[1], results[0], **NEAR)


@pytest.mark.parametrize("implementation", ["layers", "fused"])
def test_the_cache_grows(hf: PreTrainedModel, te: PreTrainedModel, implementation: str) -> None:
    cache = cache_for_generation(te, batch_size=2, max_length=10)
    assert cache.max_sequence_length == 64 and cache.get_max_length() == -1
    cache.decode_implementation = "layers"
    expected = hf(input_ids=ids(2, 75)).logits[:, 62:]
    with torch.inference_mode():
        te(input_ids=ids(2, 75)[:, :62], past_key_values=cache)
    with torch.no_grad():  # the memory was allocated in inference mode
        widths = [1] * 13 if implementation == "layers" else [5, 8]
        found, start = [], 62
        for width in widths:
            found.append(te(input_ids=ids(2, 75)[:, start : start + width], past_key_values=cache).logits)
            start += width
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **NEAR)
    assert cache.max_sequence_length > 64
    cache.reset()
    with torch.no_grad():
        te(input_ids=ids(3, 5), past_key_values=None, use_cache=True)


# --- the cache as a transformers.Cache -------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Any], None]] = {
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("use_cache", [True, None], ids=["read", "unread"])
def test_operations_of_transformers(hf: PreTrainedModel, te: PreTrainedModel, name: str, use_cache: bool) -> None:
    results = []
    for model in (hf, te):
        with torch.no_grad():
            original = model(input_ids=ids(2, 9), use_cache=use_cache)[CACHE]
            cache = copy.deepcopy(original)
            OPERATIONS[name](cache)
            rows = {"repeat": 4, "select": 1}.get(name, 2)
            for width in (1, 2):
                logits = model(input_ids=ids(rows, width, 1), **{CACHE: cache}).logits
            assert original.get_seq_length() == 9
            assert cache.get_seq_length() == cache.get_mask_sizes(0, 0)[0] == (10 if name == "crop" else 12)
        results.append(logits)
    torch.testing.assert_close(results[1], results[0], **NEAR)


def test_what_transformers_and_accelerate_look_at(te: PreTrainedModel) -> None:
    with torch.no_grad():
        cache = te(input_ids=ids(2, 9), use_cache=True)[CACHE]
    assert isinstance(cache, Cache) and isinstance(cache, InferenceParams)
    assert (cache.is_initialized, cache.is_compileable, cache.is_croppable, len(cache)) == (True, False, True, 3)
    assert not any((*cache.is_sliding, *cache.is_linear, *cache.is_dummy))
    assert cache.max_cache_len == cache.get_max_length() == -1 and cache.batch_size == 2
    with pytest.raises(TypeError, match=r"GrowingCache.update: .* transformers.DynamicCache"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


# --- caches of others -------------------------------------------------------------------------------------------------


def test_a_filled_dynamic_cache_is_continued(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    with torch.no_grad():
        given = hf(input_ids=ids(2, 9))[CACHE]
        assert isinstance(given, DynamicCache)
        first = te(input_ids=ids(2, 2, 1), **{CACHE: copy.deepcopy(given)})
        second = te(input_ids=ids(2, 1, 2), **{CACHE: first[CACHE]})
        for found, seed, width in ((first, 1, 2), (second, 2, 1)):
            torch.testing.assert_close(found.logits, hf(input_ids=ids(2, width, seed), **{CACHE: given}).logits, **NEAR)
        te(input_ids=ids(2, 1), **{CACHE: given})
        with pytest.raises(ValueError, match="that an earlier pass has copied"):
            te(input_ids=ids(2, 1), **{CACHE: given})


def test_caches_that_cannot_be_continued_are_refused(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    static = StaticCache(config=hf.config, max_cache_len=32)
    for cache in (DynamicCache(), static):
        with pytest.raises(TypeError, match=r"llama_te_infer.inference_params_for\(model, \.\.\.\)"):
            te(input_ids=ids(2, 9), **{CACHE: cache})
        with pytest.raises(TypeError, match=type(cache).__name__):
            te.generate(ids(2, 9), max_new_tokens=2, **{CACHE: cache})
    other = DynamicCache()
    other.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16), 0)
    with pytest.raises(
        ValueError, match=r"\[layers, heads, head size\] = \[1, 2, 16\], but the model has \[3, 2, 16\]"
    ):
        te(input_ids=ids(2, 9), **{CACHE: other})


def expected_with_prompt(hf: PreTrainedModel, adapted: PeftModel, mask_BS: torch.Tensor, new: int) -> torch.Tensor:
    """Write text by transformers' Llama without a cache, from the adapter's prompt and positions without padding."""
    text = ids(2, 9)
    virtual_B5 = torch.ones(2, 5, dtype=torch.long)
    is_prefix = adapted.active_peft_config.peft_type == "PREFIX_TUNING"
    for _ in range(new):
        whole_BS = torch.cat((virtual_B5, mask_BS), dim=1)
        position_BS = (whole_BS.cumsum(1) - 1).clamp(min=0)
        arguments: dict[str, Any] = {"attention_mask": whole_BS, "position_ids": position_BS}
        if is_prefix:
            arguments |= {"input_ids": text, "position_ids": position_BS[:, 5:], CACHE: adapted.get_prompt(2)}
        else:
            embedded = hf.get_input_embeddings()(text)
            arguments["inputs_embeds"] = torch.cat((adapted.get_prompt(2), embedded), dim=1)
        text = torch.cat((text, hf(**arguments).logits[:, -1:].argmax(-1)), dim=1)
        mask_BS = torch.cat((mask_BS, mask_BS.new_ones(2, 1)), dim=1)
    return text


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_of_peft(hf: PreTrainedModel, te: PreTrainedModel, config_class: Any) -> None:
    adapted = get_peft_model(te, config_class(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    widths = []

    def count(model: Any, args: Any, given: dict[str, Any]) -> None:
        inputs = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        widths.append(inputs.shape[1])

    te.register_forward_pre_hook(count, with_kwargs=True)
    for mask_BS in (torch.ones_like(MASK_BS), MASK_BS):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = adapted.generate(
                input_ids=ids(2, 9), attention_mask=mask_BS, max_new_tokens=8, do_sample=False, eos_token_id=None
            )
            assert found.tolist() == expected_with_prompt(hf, adapted, mask_BS, 8).tolist()
    assert widths[1:8] == [1] * 7, "the text was read again"


def test_continuous_batching_of_transformers_is_refused(te: PreTrainedModel) -> None:
    for call in (
        lambda: te.init_continuous_batching(),
        lambda: te.generate(ids(2, 9), max_new_tokens=2, cache_implementation="paged"),
    ):
        with pytest.raises(NotImplementedError, match="Use model.generate_batch, or llama_te_infer.Engine"):
            call()


def test_classifier_free_guidance(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    options = {"max_new_tokens": 8, "guidance_scale": 1.5, "do_sample": False, "eos_token_id": None}
    assert te.generate(ids(2, 9), **options).tolist() == hf.generate(ids(2, 9), **options).tolist()


# --- autocast and mixed precision -------------------------------------------------------------------------------------

# Two bfloat16 runs part for good where two tokens are almost equally likely; these prompts meet no such place.
PROMPTS = torch.randint(3, 257, (2, 9), generator=torch.Generator().manual_seed(4))
GREEDY = {"attention_mask": MASK_BS, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@FORMATS
def test_autocast(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    before = Engine(te)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = hf.generate(PROMPTS, **GREEDY)
        found = te.generate(PROMPTS, **GREEDY, return_dict_in_generate=True)
        assert found.sequences.tolist() == expected.tolist()
        assert found[CACHE].dtype == torch.bfloat16
        loops = [loop(model, None, [1, 2, 1]) for model in (te, hf)]
        torch.testing.assert_close(*loops, rtol=0, atol=0.02)
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        for engine in (before, Engine(te)):
            [output] = engine.generate([PROMPTS[0].tolist()], params)
            assert output.outputs[0].token_ids == expected[0, 9:].tolist()
    [output] = before.generate([PROMPTS[0].tolist()], params)
    assert output.outputs[0].token_ids == hf.generate(PROMPTS, **GREEDY)[0, 9:].tolist(), "autocast has ended"


def test_autocast_around_forward_alone(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    """Accelerate wraps `model.forward` in autocast, so `generate` makes the cache outside it."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast:
        beams = te.generate(PROMPTS, **GREEDY, num_beams=2)
    for model in (hf, te):
        model.forward = autocast(model.forward)
    assert te.generate(PROMPTS, **GREEDY).tolist() == hf.generate(PROMPTS, **GREEDY).tolist()
    assert te.generate(PROMPTS, **GREEDY, num_beams=2).tolist() == beams.tolist()


def test_steps_of_the_kernels_under_autocast(te: PreTrainedModel) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = inference_params_for(te, batch_size=2, max_length=32, decode_implementation="fused")
        with pytest.raises(RuntimeError, match="under autocast the layers compute in bfloat16 from weights in float32"):
            te.generate(PROMPTS, **GREEDY, past_key_values=cache)


@FORMATS
def test_outputs_that_accelerate_converts(te: PreTrainedModel) -> None:
    te.bfloat16()
    expected = te.generate(PROMPTS, **GREEDY)
    te.forward = convert_outputs_to_fp32(te.forward)
    output = te.generate(PROMPTS, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert output.sequences.tolist() == expected.tolist()
    assert output.logits[0].dtype == torch.float32 and output[CACHE].dtype == torch.bfloat16
    assert loop(te, None, [1, 2]).dtype == torch.float32


# --- without llama_te_infer -------------------------------------------------------------------------------------------


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(llama_te_core.compat.entry_points, "entry_points", lambda *, group: [])
    llama_te_core.layers.kv_cache.default_cache_factory.cache_clear()
    yield
    llama_te_core.layers.kv_cache.default_cache_factory.cache_clear()


@pytest.mark.usefixtures("no_caches")
def test_without_llama_te_infer_a_pass_warns_once(te: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="past_key_values of outputs are None: pip install llama-te-infer"):
        assert te(input_ids=ids(2, 9)).get(CACHE) is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert te(input_ids=ids(2, 9), use_cache=True).get(CACHE) is None
    assert not [each for each in caught if "llama-te-infer" in str(each.message)]
