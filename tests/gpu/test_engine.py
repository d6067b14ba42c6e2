"""The engine on Transformer Engine layers, against the model's forward pass without a cache.

Two bfloat16 runs of one text may diverge where two tokens are almost equally likely. So the tests compare
log-probabilities: the engine's, a whole run's over the same text, and a float32 run's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling
from transformer_engine.pytorch.optimizers import FusedAdam

from gpu.small_llama import MODEL
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaForCausalLM
from llama_te_core.lora import on_weights
from llama_te_infer import Engine, SamplingParams, inference_params_for
from llama_te_infer.decode import backend
from llama_te_infer.decode.fused import FusedDecode
from llama_te_infer.decode.layers import LayersDecode
from llama_te_infer.engine.model_watch import ModelWatch
from llama_te_infer.kv_cache import engine_cache
from llama_te_infer.runner.sampler import RowSampling, sample
from llama_te_infer.runner.stopping import StopRule

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]
NEW = 40
Logprobs = list[torch.Tensor]


def prompts(count: int, seed: int = 2) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 8192, (17 + 13 * i % 90,), generator=generator).tolist() for i in range(count)]


def written(outputs: list[Any]) -> tuple[list[list[int]], Logprobs]:
    """Return whole texts, and the engine's log-probabilities of their tokens from the second on."""
    texts, logprobs = [], []
    for output in outputs:
        (completion,) = output.outputs
        texts.append(output.prompt_token_ids + completion.token_ids)
        logprobs.append(torch.tensor([step.logprob for step in output.prompt_logprobs[1:] + completion.logprobs]))
    return texts, logprobs


@torch.no_grad()
def scored(model: NVLlamaForCausalLM, texts: list[list[int]]) -> Logprobs:
    """Return the log-probabilities of a run over the whole texts, as in training."""
    logprobs = []
    for text in texts:
        filled = text + [0] * (-len(text) % 16)  # FP8's multiple; later tokens do not change earlier results
        ids_1S = torch.tensor([filled], device="cuda")
        logprob_SV = model(input_ids=ids_1S, use_cache=False).logits[0].float().log_softmax(-1)
        logprobs.append(logprob_SV[:-1].gather(1, ids_1S[0, 1:, None])[: len(text) - 1, 0].cpu())
    return logprobs


def rms(first: Logprobs, second: Logprobs) -> float:
    return float((torch.cat(first) - torch.cat(second)).square().mean().sqrt())


def check_near(measured: Callable[..., None], what: str, found: Logprobs, trained: Logprobs, exact: Logprobs) -> None:
    """Check the engine's distances from float32 and from training, relative to training's distance from float32."""
    difference = (torch.cat(found) - torch.cat(trained)).abs()
    usual = rms(trained, exact)
    measured(f"{what}: rms distance from float32 ({usual:.3g} in training)", rms(found, exact), 1.25 * usual)
    measured(f"{what}: mean difference from training", float(difference.mean()), 1.5 * usual)
    measured(f"{what}: greatest difference from training", float(difference.max()), 12 * usual)
    measured(f"{what}: share of places that differ in any bit", float((difference > 0).float().mean()), 1.0)


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("rows", [1, 4, 9, 32, 40])
def test_log_probabilities_are_those_of_training(
    rows: int, attn_input_format: str, make_llama: Any, measured: Any, fused_attention: None
) -> None:
    hf = make_llama(eos_token_id=None)
    exact_model = convert_llama_hf_to_te(hf, layer_implementation="reference").eval()
    model = convert_llama_hf_to_te(hf.bfloat16(), attn_input_format=attn_input_format).eval()
    engine = Engine(model, max_batch_size=rows, max_sequence_length=256, page_size=16, prefill_budget=128)
    assert isinstance(engine._runner.decode, FusedDecode)
    params = SamplingParams(max_tokens=NEW, temperature=0.8, seed=1, logprobs=0, prompt_logprobs=0)
    texts, found = written(engine.generate(prompts(rows), params))
    trained, exact = scored(model, texts), scored(exact_model, texts)
    lengths = [len(prompt) - 1 for prompt in prompts(rows)]
    for what, part in (("prefill", slice(0, 1)), ("decode", slice(1, 2))):
        parts = [
            [each.split([length, NEW])[part][0] for each, length in zip(logprobs, lengths, strict=True)]
            for logprobs in (found, trained, exact)
        ]
        check_near(measured, what, *parts)


@pytest.mark.hopper
def test_fp8_weights(make_llama: Any, measured: Any, tmp_path: Path) -> None:
    """Decoding uses FP8 weights and bfloat16 activations, so it is closer to float32 than training in FP8."""
    hf = make_llama(eos_token_id=None)
    exact_model = convert_llama_hf_to_te(hf, layer_implementation="reference").eval()
    plain = convert_llama_hf_to_te(hf.bfloat16())
    plain.save_pretrained(tmp_path)
    model = NVLlamaForCausalLM.from_pretrained(
        tmp_path,
        layer_precision=["fp8"] * 6,
        use_quantized_model_init=True,
        fp8_recipe=Float8CurrentScaling(),
        dtype=torch.bfloat16,
        device_map="cuda",
    ).eval()
    for rows in (1, 3, 40):
        engine = Engine(model, max_batch_size=rows, max_sequence_length=256, page_size=16)
        assert isinstance(engine._runner.decode, FusedDecode)
        assert engine._runner.decode.layers[0].fc1_FE.values.dtype == torch.float8_e4m3fn
        params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, prompt_logprobs=0)
        texts, found = written(engine.generate(prompts(rows), params))
        check_near(measured, f"{rows} rows", found, scored(model, texts), scored(exact_model, texts))


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_an_fp8_cache(rows: int, make_llama: Any, measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log-probabilities are as far from float32's as those of float32 layers over an FP8 cache on the CPU."""
    hf = make_llama(eos_token_id=None)
    exact_model = convert_llama_hf_to_te(hf, layer_implementation="reference").eval()
    model = convert_llama_hf_to_te(hf.bfloat16()).eval()
    options: dict[str, Any] = {"max_batch_size": rows, "max_sequence_length": 256, "kv_cache_dtype": "fp8"}
    params = SamplingParams(max_tokens=NEW, temperature=0.8, seed=1, logprobs=0, prompt_logprobs=0)
    engine = Engine(model, prefill_budget=128, **options)
    assert isinstance(engine._runner.decode, FusedDecode) and engine._runner.prefill.fused is not None
    texts, found = written(engine.generate(prompts(rows), params))
    exact, trained = scored(exact_model, texts), scored(model, texts)
    few = texts[:4]
    slow = Engine(exact_model.cpu(), **options).generate(few, SamplingParams(max_tokens=1, prompt_logprobs=0))
    rounded = [torch.tensor([step.logprob for step in output.prompt_logprobs[1:]]) for output in slow]
    usual = (rms(rounded, exact[:4]) ** 2 + rms(trained, exact) ** 2) ** 0.5
    lengths = [len(prompt) - 1 for prompt in prompts(rows)]
    for what, part in (("prefill", slice(0, 1)), ("decode", slice(1, 2))):
        parts = [
            [each.split([length, NEW])[part][0] for each, length in zip(logprobs, lengths, strict=True)]
            for logprobs in (found, exact)
        ]
        measured(f"{what}: rms distance from float32 (usual {usual:.3g})", rms(*parts), 1.5 * usual)
    assert written(engine.generate(prompts(rows), params))[0] == texts

    monkeypatch.setattr(engine_cache, "SCRATCH_SHARE", 10**9)
    monkeypatch.setattr(engine_cache, "SCRATCH_BUDGETS", 0)
    small = Engine(model, prefix_caching=False, **options)
    assert small._cache.scratch_pages == 4
    one = [len(text) for text in few]
    assert len(few) == 1 or len(small._cache.parts(one)) > 1
    outputs = small.generate(few, SamplingParams(max_tokens=1, prompt_logprobs=0))
    parted = [torch.tensor([step.logprob for step in output.prompt_logprobs[1:]]) for output in outputs]
    measured("rms distance from float32, in parts", rms(parted, exact[:4]), 1.5 * usual)


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_the_layers_over_an_fp8_cache(attn_input_format: str, make_llama: Any, measured: Any) -> None:
    """Transformer Engine's modules attend to widened rows, in prompts and in decoding steps."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16(), attn_input_format=attn_input_format).eval()
    params = SamplingParams(max_tokens=NEW, temperature=0.8, seed=1, logprobs=0, prompt_logprobs=0)
    options: dict[str, Any] = {"max_batch_size": 9, "max_sequence_length": 256, "page_size": 16}
    found = {}
    for kv_cache_dtype, how in (("fp8", "layers"), ("fp8", "fused"), ("auto", "layers")):
        engine = Engine(model, kv_cache_dtype=kv_cache_dtype, decode_implementation=how, **options)
        _, found[kv_cache_dtype, how] = written(engine.generate(prompts(9), params))
    lengths = [len(prompt) - 1 for prompt in prompts(9)]  # texts may differ behind them
    layers, fused, exact = (
        [each[:length] for each, length in zip(logprobs, lengths, strict=True)] for logprobs in found.values()
    )
    measured("rms difference of the layers from the kernels, in FP8's", rms(layers, fused) / rms(fused, exact), 1.0)


def test_the_memory_of_an_fp8_cache(make_llama: Any) -> None:
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    sizes: dict[str, Any] = {"max_batch_size": 512, "max_sequence_length": 2048, "decode_implementation": "layers"}
    total = torch.cuda.get_device_properties(0).total_memory
    pages = []
    for kv_cache_dtype in ("auto", "fp8"):
        before = torch.cuda.memory_allocated()
        share = (before + 2**30) / total
        engine = Engine(model, kv_cache_dtype=kv_cache_dtype, gpu_memory_utilization=share, **sizes)
        used = torch.cuda.memory_allocated() - before
        assert 0 <= used - engine.cache_bytes < 2**28  # tables, and the state of rows
        pages.append(engine.stats().total_num_pages)
        del engine
    assert pages[0] < 512 * 32, "the memory has to be the limit"
    assert 1.8 < pages[1] / pages[0] < 2


def test_what_an_fp8_cache_does_not_take(make_llama: Any) -> None:
    hf = make_llama(eos_token_id=None)
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8' with layers in float32"):
        Engine(convert_llama_hf_to_te(hf).eval(), kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="page_size=8: the kernels take"):
        Engine(convert_llama_hf_to_te(hf.bfloat16()).eval(), kv_cache_dtype="fp8", page_size=8)


def test_greedy_is_the_best_token(make_llama: Any, measured: Any) -> None:
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    engine = Engine(model, max_batch_size=8, max_sequence_length=256)
    outputs = engine.generate(prompts(20), SamplingParams(max_tokens=NEW, temperature=0))
    worst = 0.0
    with torch.no_grad():
        for output in outputs:
            text = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids], device="cuda")
            logits_SV = model(input_ids=text, use_cache=False).logits[0, -NEW - 1 : -1].float()
            chosen_S = logits_SV.gather(1, text[0, -NEW:, None])[:, 0]
            worst = max(worst, float(((logits_SV.amax(-1) - chosen_S) / logits_SV.std(-1)).max()))
    measured("shortfall of greedy tokens", worst, 0.1)


def test_beams(make_llama: Any, measured: Any) -> None:
    """Scores agree with a run over the beams' text, and are no worse than the scores of `generate`."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    engine = Engine(model, max_batch_size=12, max_sequence_length=256, page_size=16)
    texts = prompts(3)
    outputs = engine.generate(texts, SamplingParams(max_tokens=NEW, num_beams=4, n=2))
    for prompt, output in zip(texts, outputs, strict=True):
        for completion in output.outputs:
            (logprob_S,) = scored(model, [prompt + completion.token_ids])
            measured("difference of a score", abs(float(logprob_S[-NEW:].mean()) - completion.score), 0.05)
        ids = torch.tensor([prompt], device="cuda")
        best = model.generate(ids, max_new_tokens=NEW, num_beams=4, do_sample=False)[0].tolist()
        (logprob_S,) = scored(model, [best])
        measured("how much better generate's beam is", float(logprob_S[-NEW:].mean()) - output.outputs[0].score, 0.1)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_many_requests_come_and_go(make_llama: Any, kv_cache_dtype: str) -> None:
    """With few pages, long and short requests, beams and drawn texts all end, and every page is free again."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    sizes: dict[str, Any] = {"max_batch_size": 24, "max_sequence_length": 256, "page_size": 16, "total_num_pages": 120}
    engine = Engine(model, prefill_budget=100, kv_cache_dtype=kv_cache_dtype, **sizes)
    kinds = [
        SamplingParams(max_tokens=50, temperature=0),
        SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, seed=3, n=3),
        SamplingParams(max_tokens=20, num_beams=4),
        SamplingParams(max_tokens=30, temperature=1.0, repetition_penalty=1.2, logprobs=2),
    ]
    params = [kinds[i % 4] for i in range(100)]
    outputs = engine.generate(prompts(100), params)
    for output, asked in zip(outputs, params, strict=True):
        assert len(output.outputs) == asked.n
        assert all(len(completion.token_ids) == asked.max_tokens for completion in output.outputs)
    blocks = engine.scheduler.blocks
    assert not engine.has_unfinished and blocks.pool.used == len(blocks.prefixes.remembered)


def test_after_warming_up_no_graph_is_captured(make_llama: Any) -> None:
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    engine = Engine(model, max_batch_size=24, max_sequence_length=256)
    engine.warm_up()
    assert engine._fused is not None
    graphs = dict(engine._fused._graphs)
    kinds = [SamplingParams(max_tokens=20, temperature=0), SamplingParams(max_tokens=20, temperature=1.0)]
    for params in kinds:
        for count in range(1, 25):
            engine.generate(prompts(count), params)
    assert engine._fused._graphs == graphs


def test_two_engines_at_once(make_llama: Any) -> None:
    """Two engines launch steps in turn on separate streams: both end, each with the texts that it writes alone."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)

    def engine_of(seed: int) -> Engine:
        engine = Engine(model, max_batch_size=4, max_sequence_length=256, prefix_caching=False)
        assert isinstance(engine._runner.decode, FusedDecode)
        for prompt in prompts(8, seed):
            engine.submit(prompt, params)
        return engine

    expected = []
    for seed in (1, 2):
        engine = engine_of(seed)
        tokens: list[list[int]] = []
        while engine.has_unfinished:
            tokens += [output.outputs[0].token_ids for output in engine.step()]
        expected.append(tokens)
    engines, streams = [engine_of(seed) for seed in (1, 2)], [torch.cuda.Stream() for _ in range(2)]
    found: list[list[list[int]]] = [[], []]
    while any(engine.has_unfinished for engine in engines):
        for index, (engine, stream) in enumerate(zip(engines, streams, strict=True)):
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                if engine.has_unfinished:
                    found[index] += [output.outputs[0].token_ids for output in engine.step()]
    assert found == expected


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("decode_implementation", ["fused", "layers"])
@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"seed": 3, "top_p": 0.9}, {"num_beams": 2}], ids=["greedy", "drawn", "beams"]
)
def test_a_row_of_nan_ends_its_own_request(
    make_llama: Any, attn_input_format: str, decode_implementation: str, fields: dict[str, Any], kv_cache_dtype: str
) -> None:
    """Token 5 has NaN as its embedding. Later requests get the pages that had NaN, behind their last tokens too."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16(), attn_input_format=attn_input_format).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
        model.lm_head.weight[5] = 0  # no text has it by itself
    engine = Engine(
        model,
        max_batch_size=12,
        max_sequence_length=256,
        page_size=16,
        total_num_pages=60,
        decode_implementation=decode_implementation,
        kv_cache_dtype=kv_cache_dtype,
    )
    params = SamplingParams(max_tokens=NEW, **fields)
    good = [[token for token in prompt if token != 5] for prompt in prompts(6)]
    for position in (0, 20, 33):
        bad = [*good[4][:position], 5, *good[4][position : position + 7]]
        outputs = engine.generate([good[0], bad, good[1], bad, good[2], good[3]], params)
        for output in (outputs[1], outputs[3]):
            assert isinstance(output.error, FloatingPointError) and "logits are not finite" in str(output.error)
            assert output.outputs[0].finish_reason == "error" and output.outputs[0].token_ids == []
        for output in (outputs[0], outputs[2], outputs[4], outputs[5]):
            assert output.error is None and len(output.outputs[0].token_ids) == NEW
        for tensors in engine._cache.caches.values():
            assert all(bool(tensor.float().isfinite().all()) for tensor in tensors)
    if fields == {"temperature": 0}:
        # It writes the poison itself in the middle of its text, on the path without logits on the host.
        chosen = SamplingParams(max_tokens=NEW, temperature=0, logit_bias={5: 100.0})
        outputs = engine.generate([good[0], good[1], good[2]], [params, chosen, params])
        assert outputs[1].outputs[0].token_ids == [5] and isinstance(outputs[1].error, FloatingPointError)
        worst = 0.0
        with torch.no_grad():
            for output in (outputs[0], outputs[2]):
                text = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids], device="cuda")
                logits_SV = model(input_ids=text, use_cache=False).logits[0, -NEW - 1 : -1].float()
                chosen_S = logits_SV.gather(1, text[0, -NEW:, None])[:, 0]
                worst = max(worst, float(((logits_SV.amax(-1) - chosen_S) / logits_SV.std(-1)).max()))
        # As in test_greedy_is_the_best_token; an FP8 cache chooses tokens that training finds less likely.
        assert worst < (0.1 if kv_cache_dtype == "auto" else 1.0)
    blocks = engine.scheduler.blocks
    assert not engine.has_unfinished and blocks.pool.used == len(blocks.prefixes.remembered)


def test_a_model_that_the_kernels_do_not_take(make_llama: Any) -> None:
    """Float16 uses the model's layers."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).half()).eval()
    engine = Engine(model, max_batch_size=3, max_sequence_length=128)
    assert isinstance(engine._runner.decode, LayersDecode)
    outputs = engine.generate(prompts(5), SamplingParams(max_tokens=8, temperature=0))
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
    assert MODEL["vocab_size"] > max(token for output in outputs for token in output.outputs[0].token_ids)


# --- penalties, biases, bad words, and beams that end at a stop string ------------------------------------------------


def test_changed_logits_give_the_tokens_of_the_cpu() -> None:
    """The tables live on the device; rows start, move and end between steps."""
    requests = [
        (SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.7), []),
        (SamplingParams(temperature=0, logit_bias={3: 2.5, 5: -100}, repetition_penalty=1.3), [[7], [4, 4], [1, 2, 3]]),
        (SamplingParams(temperature=0, allowed_token_ids=list(range(0, 64, 3))), [[6, 6]]),
        (SamplingParams(temperature=0.8, frequency_penalty=-0.5, bad_words="x", min_tokens=3), [[9, 9, 9]]),
    ]
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 64, generator=generator) * 2 for _ in range(12)]
    found = []
    for device in ("cpu", "cuda"):
        sampling = RowSampling(5, 64, device)
        for row, (params, words) in enumerate(requests):
            sampling.set(row, params, row, [1, 2, 3, row], StopRule.of(params, [2]), 4, words)
        tokens = []
        for step, logits_BV in enumerate(steps):
            if step == 6:
                sampling.move(4, 1)
                sampling.move(1, 2)
                sampling.move(2, 4)
                sampling.clear(4)
            position_B = torch.full((4,), 4 + step, dtype=torch.int32, device=device)
            with torch.inference_mode():
                sampled = sample(logits_BV.to(device), sampling, position_B, sampling.needs(range(4)))
            tokens.append(sampled.token_B.tolist())
        found.append(tokens)
    assert found[0] == found[1]


class Letters:
    """Each token is a character of its own."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 0x4E00 for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)


def test_beams_end_at_stop_strings_and_report_log_probabilities(make_llama: Any, measured: Any) -> None:
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    engine = Engine(model, Letters(), max_batch_size=8, max_sequence_length=256, prefix_caching=False)
    prompt = prompts(3)[-1]
    usual = engine.generate(prompt, SamplingParams(max_tokens=12, num_beams=4, n=2))[0].outputs[0]
    stop = Letters().decode(usual.token_ids[4:6])
    params = SamplingParams(max_tokens=12, num_beams=4, n=4, stop=stop, logprobs=3, length_penalty=0.0)
    beams = engine.generate(prompt, params)[0].outputs
    for beam in beams:
        assert (beam.finish_reason == "stop") == (stop in Letters().decode(beam.token_ids))
        assert stop not in beam.text and Letters().decode(beam.token_ids).startswith(beam.text)
        (logprob_S,) = scored(model, [prompt + beam.token_ids])
        assert beam.logprobs is not None
        reported = torch.tensor([position.logprob for position in beam.logprobs])
        difference = (reported - logprob_S[-len(beam.token_ids) :]).abs().max()
        measured("difference of a beam's log-probability", float(difference), 0.3)
        assert all(len(position.top) == 3 for position in beam.logprobs)
    assert any(beam.finish_reason == "stop" for beam in beams)
    assert not engine.has_unfinished


# --- weights that change under an engine ------------------------------------------------------------------------------


def greedy(engine: Engine, prompt: list[int]) -> list[int]:
    return engine.generate([prompt], SamplingParams(max_tokens=NEW, temperature=0))[0].outputs[0].token_ids


def test_changed_weights_are_served_by_the_same_graphs_and_replaced_ones_by_new_graphs(
    make_llama: Any, measured: Any
) -> None:
    """Cached prefixes of the old weights are forgotten in both cases."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    prompt = prompts(6)[-1]
    engine = Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16)
    before, first = greedy(engine, prompt), engine._runner.decode
    assert isinstance(first, FusedDecode) and engine.scheduler.blocks.prefixes.remembered
    weight = model.model.layers[0].self_attention.layernorm_qkv.weight

    with torch.no_grad():
        weight.mul_(1.7)
    changed = greedy(engine, prompt)
    assert engine._runner.decode is first, "the graphs read the weights where they are"
    assert changed == greedy(Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16), prompt) != before
    measured("shortfall after a change in place", shortfall(model, prompt, changed), 0.1)

    weight.data = weight.detach().flip(0).contiguous()
    replaced = greedy(engine, prompt)
    assert engine._runner.decode is not first and isinstance(engine._runner.decode, FusedDecode)
    assert replaced == greedy(Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16), prompt) != changed
    measured("shortfall after a replacement", shortfall(model, prompt, replaced), 0.1)


@pytest.mark.hopper
def test_steps_of_an_optimizer_and_writes_to_fp8_weights_are_seen(make_llama: Any, tmp_path: Path) -> None:
    """TE's kernels write past torch's version counters; a step of an optimizer is seen all the same."""
    plain = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    plain.save_pretrained(tmp_path)
    model = NVLlamaForCausalLM.from_pretrained(
        tmp_path,
        layer_precision=["fp8"] * 6,
        use_quantized_model_init=True,
        fp8_recipe=Float8CurrentScaling(),
        dtype=torch.bfloat16,
        device_map="cuda",
    ).eval()
    engine = Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16)
    watch = ModelWatch(model)
    prompt = prompts(6)[-1]
    before = greedy(engine, prompt)
    assert not watch.has_changed(), "a forward pass changes nothing"
    # With pages of the first run, current scaling would scale fewer tokens together, and round them otherwise.
    engine.reset_prefix_cache()
    assert greedy(engine, prompt) == before and not watch.has_changed()
    weight = model.model.layers[0].layernorm_mlp.fc1_weight
    with torch.no_grad():
        weight.copy_(weight.dequantize().flip(0))
    assert watch.has_changed(), "a copy into an FP8 weight"
    found = greedy(engine, prompt)
    assert found == greedy(Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16), prompt) != before
    norm = model.model.norm.weight
    norm.grad = torch.ones_like(norm)
    FusedAdam([norm], lr=0.5).step()
    assert watch.has_changed(), "a step of TE's FusedAdam"
    last = greedy(engine, prompt)
    assert last == greedy(Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16), prompt) != found


@pytest.mark.parametrize("recipe", [None, DelayedScaling, Float8BlockScaling, Float8CurrentScaling])
def test_a_cached_prefix_changes_nothing_that_the_model_itself_does_not_change(
    recipe: Any, make_llama: Any, tmp_path: Path
) -> None:
    """Current scaling takes one scale from all tokens of a pass, so it rounds the rest of a prompt otherwise."""
    convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).save_pretrained(tmp_path)
    fp8 = {} if recipe is None else {"layer_precision": ["fp8"] * 6, "fp8_recipe": recipe()}
    model = NVLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cuda", **fp8).eval()
    # The kernels that read prompts otherwise round in their own way.
    engine = Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16, decode_implementation="layers")
    prompt = prompts(6)[-1]
    cached = (len(prompt) - 1) // 16 * 16
    ids_1S = torch.tensor([prompt], device="cuda")
    cache = inference_params_for(model, batch_size=1, max_length=256)
    with torch.no_grad():
        whole_V = model(input_ids=ids_1S, past_key_values=cache).logits[0, -1].float().log_softmax(-1)
        cache.crop(cached - len(prompt))
        rest_V = model(input_ids=ids_1S[:, cached:], past_key_values=cache).logits[0, -1].float().log_softmax(-1)
    for expected_V in (whole_V, rest_V):
        (output,) = engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0, logprobs=1))
        (completion,) = output.outputs
        assert completion.token_ids == [int(expected_V.argmax())]
        assert completion.logprobs[0].logprob == pytest.approx(float(expected_V.max()), abs=1e-5)
    assert torch.equal(whole_V, rest_V) == (recipe is not Float8CurrentScaling)


# --- models that have more than the kernels compute -------------------------------------------------------------------


def hook(model: NVLlamaForCausalLM) -> str:
    model.model.layers[3].register_forward_hook(lambda module, args, output: -output)
    return "model.layers.3 has hooks or a forward pass of its own"


def replaced_forward(model: NVLlamaForCausalLM) -> str:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden: -forward(hidden)
    return "model.norm has hooks or a forward pass of its own"


def adapter(model: NVLlamaForCausalLM) -> str:
    adapted = get_peft_model(model, on_weights(LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.eval()
    return "the model has parameters of its own kind, such as model.layers.0"


class Gate(torch.nn.Module):
    """The final norm with an additional parameter."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.norm = norm
        gate_E = torch.linspace(-1, 1, len(norm.weight), device=norm.weight.device, dtype=norm.weight.dtype)
        self.gate = torch.nn.Parameter(gate_E)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden) * self.gate


def more_parameters(model: NVLlamaForCausalLM) -> str:
    model.model.norm = Gate(model.model.norm)
    return "the model has parameters of its own kind, such as model.norm.gate"


def shortfall(model: NVLlamaForCausalLM, prompt: list[int], token_ids: list[int]) -> float:
    """Return the whole run's greatest preference for another token, in units of the logits' spread."""
    text = torch.tensor([prompt + token_ids], device="cuda")
    with torch.no_grad():
        logits_SV = model(input_ids=text, use_cache=False).logits[0, -len(token_ids) - 1 : -1].float()
    chosen_S = logits_SV.gather(1, text[0, -len(token_ids) :, None])[:, 0]
    return float(((logits_SV.amax(-1) - chosen_S) / logits_SV.std(-1)).max())


@pytest.mark.parametrize("change", [hook, replaced_forward, adapter, more_parameters])
def test_a_changed_model_is_computed_as_generate_computes_it(
    change: Callable[[NVLlamaForCausalLM], str], make_llama: Any, measured: Any
) -> None:
    """Kernels compute the unchanged model. The next request after the change uses the layers, with one warning."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    params = SamplingParams(max_tokens=NEW, temperature=0)
    (prompt,) = prompts(1)
    engine = Engine(model, max_batch_size=4, max_sequence_length=256, page_size=16, prefix_caching=False)
    fused = Engine(model, max_sequence_length=256, decode_implementation="fused", prefix_caching=False)
    assert isinstance(engine._runner.decode, FusedDecode)
    clean = engine.generate([prompt], params)[0].outputs[0].token_ids
    measured("shortfall of the clean model's tokens", shortfall(model, prompt, clean), 0.1)

    reason = change(model)
    backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"by the model's layers, since {reason}"):
        changed = engine.generate([prompt], params)[0].outputs[0].token_ids
    assert isinstance(engine._runner.decode, LayersDecode)
    measured("shortfall of the changed model's tokens", shortfall(model, prompt, changed), 0.1)
    assert shortfall(model, prompt, clean) > 1, "the change shows in the text"
    cache = inference_params_for(model, batch_size=1, max_length=256)
    ids = model.generate(
        torch.tensor([prompt], device="cuda"),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        past_key_values=cache,
    )
    measured("shortfall of generate's tokens", shortfall(model, prompt, ids[0, len(prompt) :].tolist()), 0.1)
    with pytest.raises(RuntimeError, match=f"decode_implementation='fused', but {reason}"):
        fused.generate([prompt], params)


def test_a_hook_sees_every_decoding_step_and_its_removal_brings_the_kernels_back(make_llama: Any) -> None:
    """Running requests switch from graphs to layers and back: both use the same rows and pages."""
    model = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16()).eval()
    params = SamplingParams(max_tokens=NEW, temperature=0)
    engine = Engine(model, max_batch_size=8, max_sequence_length=256, page_size=16, prefix_caching=False)
    fused = engine._runner.decode
    expected = [output.outputs[0].token_ids for output in engine.generate(prompts(2), params)]
    ids = [engine.submit(prompts(2)[0], params)]
    for _ in range(5):
        engine.step()
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *arguments: seen.append(1))
    ids.append(engine.submit(prompts(2)[1], params))
    backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="model.layers.0 has hooks"):
        outputs = engine.step()
    while engine.has_unfinished:
        outputs += engine.step()
    assert len(seen) >= NEW
    by_id = {output.request_id: output.outputs[0].token_ids for output in outputs}
    assert all(len(by_id[request_id]) == NEW for request_id in ids)
    handle.remove()
    found = [output.outputs[0].token_ids for output in engine.generate(prompts(2), params)]
    assert engine._runner.decode is not fused and isinstance(engine._runner.decode, FusedDecode)
    assert found == expected
