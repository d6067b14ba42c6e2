"""Generation on Transformer Engine layers.

Two bfloat16 runs of one text may diverge where two tokens are almost equally likely. So a generated token must be the
best, within rounding, for a run over the whole text without a cache.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformer_engine.common import recipe as recipes

from gpu.small_llama import relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaForCausalLM
from llama_te_infer import Engine, InferenceParams, SamplingParams, inference_params_for
from llama_te_infer.generate.inference_params import cache_for_generation
from llama_te_infer.ops import library

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]
NEW = 24


@pytest.fixture(params=["fused steps", "kernels", "TE's own"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of generation: fused steps of one token; layers with our kernels; or layers with TE and PyTorch."""
    assert library.available("cuda"), "the extension's kernels do not run here: see python -m llama_te_infer.info"
    if request.param != "fused steps":
        monkeypatch.setattr("llama_te_infer.generate.inference_params.select_backend", lambda *arguments: (None, ""))
    if request.param == "TE's own":
        monkeypatch.setattr(library, "available", lambda device_type: False)
    return str(request.param)


def prompts(left_padded: bool) -> dict[str, torch.Tensor]:
    ids_BS = torch.randint(3, 8192, (3, 20), generator=torch.Generator().manual_seed(2))
    mask_BS = torch.ones_like(ids_BS)
    if left_padded:
        mask_BS[0, :7] = 0
        mask_BS[2, :1] = 0
    return {"input_ids": ids_BS.masked_fill(mask_BS == 0, 0).cuda(), "attention_mask": mask_BS.cuda()}


def shortfall(model, sequences_BS: torch.Tensor, mask_BS: torch.Tensor, new: int) -> float:
    """Return a whole run's greatest preference for another token, in units of the logits' spread."""
    mask_BS = torch.nn.functional.pad(mask_BS, (0, new), value=1)
    with torch.no_grad():
        logits_BSV = model(sequences_BS, attention_mask=mask_BS, use_cache=False).logits[:, -new - 1 : -1].float()
    chosen_BS = logits_BSV.gather(-1, sequences_BS[:, -new:, None])[..., 0]
    return float(((logits_BSV.amax(-1) - chosen_BS) / logits_BSV.std(-1)).max())


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("left_padded", [False, True], ids=["whole", "left-padded"])
def test_greedy(attn_input_format, is_paged, left_padded, kernels, make_llama, measured, fused_attention):
    te = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16(), attn_input_format=attn_input_format)
    inputs = prompts(left_padded)
    # Two rows more than the batch: a cache is often larger than its batch.
    cache = inference_params_for(te, batch_size=5, max_length=64, is_paged=is_paged, page_size=16)
    with torch.no_grad():
        assert cache.fuses_rope == (kernels != "TE's own")
    ids = te.generate(**inputs, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
    assert (cache._fused is not None) == (kernels == "fused steps")
    assert ids.shape[1] == 20 + NEW
    assert list(cache.sequences.values()) == [int(n) + NEW - 1 for n in inputs["attention_mask"].sum(1)]
    # Tokens need not be equal: two bfloat16 runs diverge for good where two tokens are almost equally likely.
    measured("shortfall of cached tokens", shortfall(te, ids, inputs["attention_mask"], NEW), 0.1)


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
def test_beams(attn_input_format, is_paged, kernels, make_llama, measured, fused_attention):
    """Scores of the returned beams agree with a whole run over their text.

    18 rows, more than the 16 heads: TE's own packed attention over a cache would leave the last two out.
    """
    te = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16(), attn_input_format=attn_input_format)
    inputs = prompts(True)
    cache = inference_params_for(te, batch_size=3, num_beams=6, max_length=64, is_paged=is_paged, page_size=16)
    out = te.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, num_beams=6, num_return_sequences=2,
        past_key_values=cache, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    mask_BS = torch.nn.functional.pad(inputs["attention_mask"].repeat_interleave(2, 0), (0, NEW), value=1)
    with torch.no_grad():
        logits_BSV = te(out.sequences, attention_mask=mask_BS, use_cache=False).logits[:, -NEW - 1 : -1].float()
    chosen_BS = logits_BSV.log_softmax(-1).gather(-1, out.sequences[:, -NEW:, None])[..., 0]
    measured("beam score against a whole run", float((out.sequences_scores - chosen_BS.mean(1)).abs().max()), 0.02)
    greedy = te.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    best_B = torch.stack(greedy.logits, 1).float().log_softmax(-1).amax(-1).mean(1)
    assert float((out.sequences_scores[::2] - best_B).min()) > -0.02, "beams do worse than greedy"


def test_beams_over_a_long_prompt(make_llama, measured, fused_attention):
    """4 beams share the pages of a prompt of 8,192 tokens."""
    prompt = 8192
    hf = make_llama(eos_token_id=None, max_position_embeddings=prompt + NEW, num_hidden_layers=2)
    te = convert_llama_hf_to_te(hf.bfloat16())
    ids = torch.randint(3, 8192, (1, prompt), generator=torch.Generator().manual_seed(2)).cuda()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = {"batch_size": 1, "max_length": prompt + NEW, "is_paged": True}
    one = inference_params_for(te, **sizes)
    four = inference_params_for(te, **sizes, num_beams=4, prompt_length=prompt)
    te.generate(**inputs, max_new_tokens=NEW, do_sample=False, past_key_values=one)
    options = {"num_beams": 4, "return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    out = te.generate(**inputs, max_new_tokens=NEW, past_key_values=four, **options)
    ones = torch.ones_like(out.sequences)
    with torch.no_grad():
        logits_BSV = te(out.sequences, attention_mask=ones, use_cache=False).logits[:, -NEW - 1 : -1].float()
    chosen_BS = logits_BSV.log_softmax(-1).gather(-1, out.sequences[:, -NEW:, None])[..., 0]
    measured("beam score against a whole run", float((out.sequences_scores - chosen_BS.mean(1)).abs().max()), 0.02)
    bytes_of = [sum(x.nbytes for pair in cache.cache_manager.cache.values() for x in pair) for cache in (four, one)]
    measured("memory of 4 beams, in units of one sequence's", bytes_of[0] / bytes_of[1], 1.1)
    used = four.cache_manager.used_pages / one.cache_manager.used_pages
    measured("pages that 4 beams use, likewise", used, 1.1)


def test_several_turns(make_llama, measured, fused_attention):
    """With several new tokens on running sequences, rows advance by the number of their new tokens."""
    te = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    inputs = prompts(True)
    cache = inference_params_for(te, batch_size=3, max_length=128)
    ids = te.generate(**inputs, max_new_tokens=8, do_sample=False, past_key_values=cache)
    question = torch.randint(3, 8192, (3, 9), device="cuda")
    ids = torch.cat((ids, question), 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 17), value=1)
    ids = te.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
    measured("shortfall in the second turn", shortfall(te, ids, mask, NEW), 0.1)


def test_manual_loop(make_llama, measured, fused_attention):
    """`InferenceParams` as Transformer Engine's users write it."""
    te = convert_llama_hf_to_te(make_llama().bfloat16())
    config = te.config
    cache = InferenceParams(
        max_batch_size=3,
        max_sequence_length=64,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=torch.bfloat16,
        qkv_format="thd",
        max_ctx_len=20,
    )
    for layer_number in range(1, config.num_hidden_layers + 1):
        cache.allocate_memory(layer_number)
    ids = prompts(False)["input_ids"]
    with torch.no_grad():
        whole = te(ids).logits
        parts = [te(ids[:, :17], past_key_values=cache).logits]
        parts += [te(ids[:, column : column + 1], past_key_values=cache).logits for column in range(17, 20)]
    together = torch.cat(parts, 1)
    measured("cached logits against a whole run", relative(together, whole), 0.02)


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_loop_of_ones_own(attn_input_format, with_gradients, make_llama, measured, fused_attention):
    """The first pass returns a cache, whether `use_cache` is said or not."""
    te = convert_llama_hf_to_te(make_llama().bfloat16(), attn_input_format=attn_input_format)
    inputs = prompts(True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.set_grad_enabled(with_gradients):
        plain = te(ids, attention_mask=mask, use_cache=False).logits
        for use_cache in (None, True):
            output = te(ids[:, :16], attention_mask=mask[:, :16], use_cache=use_cache)
            parts = []
            for column in range(16, 20):
                seen = mask[:, : column + 1]
                output = te(ids[:, column : column + 1], attention_mask=seen, past_key_values=output.past_key_values)
                parts.append(output.logits)
            measured("cached logits against a whole run", relative(torch.cat(parts, 1), plain[:, 16:]), 0.02)


def test_a_cache_that_grows_between_steps_of_the_kernels(make_llama, measured, fused_attention):
    """The graph is captured again: it must not write to the memory that the cache has left."""
    te = convert_llama_hf_to_te(make_llama().bfloat16())
    ids = torch.randint(3, 8192, (3, 76), generator=torch.Generator().manual_seed(3)).cuda()
    logits = []
    for longest in (64, 128):  # the second cache need not grow, and the same kernels use it
        cache = cache_for_generation(te, batch_size=3, max_length=longest)
        with torch.no_grad():
            te(ids[:, :60], past_key_values=cache)
            parts = [te(ids[:, column : column + 1], past_key_values=cache).logits for column in range(60, 76)]
        assert cache._fused is not None and cache.max_sequence_length > 64
        logits.append(torch.cat(parts, 1))
    measured("logits of a cache that grew against one that did not", relative(*logits), 1e-6)


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("implementation", ["transformer_engine", "reference"])
def test_autocast(attn_input_format, implementation, make_llama, measured, request):
    """float32 weights generate under autocast, with a cache in autocast's dtype; so does the engine."""
    if implementation == "transformer_engine":
        request.getfixturevalue("fused_attention")
    te = convert_llama_hf_to_te(
        make_llama(eos_token_id=None), attn_input_format=attn_input_format, layer_implementation=implementation
    )
    inputs = prompts(True)
    engine = Engine(te, max_batch_size=4, max_sequence_length=64)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = te.generate(**inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
        assert output.past_key_values.dtype == torch.bfloat16
        measured("shortfall of cached tokens", shortfall(te, output.sequences, inputs["attention_mask"], NEW), 0.1)
        prompt = inputs["input_ids"][1]
        [answer] = engine.generate([prompt.tolist()], SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True))
        text = torch.cat((prompt, torch.tensor(answer.outputs[0].token_ids, device="cuda")))[None]
        measured("shortfall of the engine's tokens", shortfall(te, text, torch.ones_like(prompt)[None], NEW), 0.1)


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_fp8_decoding(rows, kernels, make_llama, measured, fused_attention):
    """FP8 products take multiples of 8 tokens, so the model pads packed tokens."""
    hf = make_llama(eos_token_id=None).bfloat16()
    plain = convert_llama_hf_to_te(hf, layer_precision=["fp8"] * 6)
    model = NVLlamaForCausalLM(plain.config, fp8_recipe=recipes.Float8CurrentScaling()).to("cuda", torch.bfloat16)
    model.load_state_dict(plain.state_dict())
    model.eval()
    ids = torch.randint(3, 8192, (rows, 20), generator=torch.Generator().manual_seed(2)).cuda()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    # A step's activations have other scales than a whole run's. FP8 rounds 16 times as coarsely as bfloat16, so the
    # bound is 16 times as large.
    measured("shortfall of cached tokens", shortfall(model, out, torch.ones_like(ids), NEW), 16 * 0.1)


def test_fp8_decoding_of_padded_batches(make_llama):
    """Layers do not extend a padded batch, so they refuse 7 rows. Steps by kernels take any number."""
    plain = convert_llama_hf_to_te(make_llama().bfloat16(), layer_precision=["fp8"] * 6, attn_input_format="bshd")
    model = NVLlamaForCausalLM(plain.config, fp8_recipe=recipes.Float8CurrentScaling()).to("cuda", torch.bfloat16)
    model.eval()
    ids = torch.randint(3, 8192, (7, 8)).cuda()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    layers = inference_params_for(model, batch_size=7, max_length=10, decode_implementation="layers")
    with pytest.raises(ValueError, match="multiples of 8: pad to 8"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, past_key_values=layers)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (7, 10)


def answers(te, exact, tokenizer, inputs, beams: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Generate; return each answer's mean log-probability in the float32 model, its logits, and the chosen tokens.

    Tokens after an answer's end-of-text token are padding, and their logits are 0.
    """
    ids = te.generate(**inputs, max_new_tokens=48, do_sample=False, num_beams=beams)
    new = ids.shape[1] - inputs.input_ids.shape[1]
    print(f"{beams} beams:", *tokenizer.batch_decode(ids[:, -new:], skip_special_tokens=True), sep="\n  ")
    mask = torch.nn.functional.pad(inputs.attention_mask, (0, new), value=1)
    inside = ((ids[:, -new:] == exact.config.eos_token_id).cumsum(1) <= 1).float()
    chosen = ids[:, -new:, None]
    with torch.no_grad():
        logits = exact(ids, attention_mask=mask).logits[:, -new - 1 : -1]
    score = (logits.log_softmax(-1).gather(-1, chosen)[..., 0] * inside).sum(1) / inside.sum(1)
    return score, logits * inside[..., None], ids


@pytest.fixture(scope="module")
def real(smollm2, smollm2_tokenizer):
    """SmolLM2 in float32 and on TE in bfloat16, and a left-padded batch of questions for it."""
    exact = smollm2.cuda()
    texts = [
        smollm2_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in ("Why is the sky blue?", "Name three primary colours.", "What is the capital of France?")
    ]
    inputs = smollm2_tokenizer(texts, return_tensors="pt", padding=True).to("cuda")
    return exact, convert_llama_hf_to_te(exact).bfloat16(), smollm2_tokenizer, inputs


def test_real_model(real, kernels, measured, fused_attention):
    """SmolLM2 on Transformer Engine agrees with transformers in float32 within bfloat16 rounding, text included."""
    exact, te, tokenizer, inputs = real
    hf = copy.deepcopy(exact).bfloat16()
    tokens = inputs.attention_mask.bool()
    with torch.no_grad():
        exact_logits, te_logits, hf_logits = (model(**inputs).logits[tokens] for model in (exact, te, hf))
    bound = 1.25 * relative(hf_logits, exact_logits)
    measured("TE bf16 against float32, bound: transformers bf16", relative(te_logits, exact_logits), bound)

    _, logits, ids = answers(te, exact, tokenizer, inputs, beams=1)
    new = logits.shape[1]
    mask = torch.nn.functional.pad(inputs.attention_mask, (0, new), value=1)
    with torch.no_grad():
        hf_logits = hf(ids, attention_mask=mask).logits[:, -new - 1 : -1]
    inside = (logits != 0).any(-1)
    pair = torch.cat((logits.argmax(-1, True), ids[:, -new:, None]), -1)
    gap = (logits.amax(-1) - logits.gather(-1, pair[..., 1:])[..., 0])[inside]
    # The best token's logit and the chosen token's may both be off by transformers' own bfloat16 error.
    rounding = (hf_logits - logits).gather(-1, pair).abs()[inside]
    measured("greedy tokens' logits below float32's best", float(gap.max()), 2 * float(rounding.max()))


def test_real_model_beams(real, kernels, measured, fused_attention):
    """The float32 model finds beams at least as likely as the greedy text."""
    exact, te, tokenizer, inputs = real
    greedy, *_ = answers(te, exact, tokenizer, inputs, beams=1)
    beams, *_ = answers(te, exact, tokenizer, inputs, beams=4)
    measured("greedy's score over beam search's, in float32", float((greedy - beams).max()), 0.02)
