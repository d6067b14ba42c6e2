"""`generate` with fused steps of one token, on the CPU, where the kernels are PyTorch operations.

A fixture lets them take float32 too: in float32 the text must be equal to transformers' text, token for token.
"""

from __future__ import annotations

import functools
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from call_counts import Calls
from core.fake_transformer_engine import FakeTransformerEngine
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core.layers.reference import ReferenceLayer
from llama_te_infer import InferenceParams, inference_params_for
from llama_te_infer.decode import backend
from llama_te_infer.decode.backend import decode_problem, select_backend
from llama_te_infer.decode.fused import FusedDecode
from llama_te_infer.ops import library

NEW, COLUMNS, PAGE = 12, 9, 16
LAYOUTS = pytest.mark.parametrize(
    ("attn_input_format", "is_paged"), [("thd", False), ("thd", True), ("bshd", False), ("bshd", True)]
)


SIZES = {  # sizes that the kernels take
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama(**SIZES, initializer_range=0.2)  # its texts have few repetitions


@pytest.fixture
def attn_input_format() -> str:
    """The format of tests that are not parametrized over it."""
    return "thd"


@pytest.fixture
def te(hf: PreTrainedModel, attn_input_format: str) -> PreTrainedModel:
    """The same model, converted."""
    return convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take any model."""
    assert library.available("cpu"), "the extension is not built: install the package"
    monkeypatch.setattr(backend, "takes_fused_decode", lambda *arguments: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts of steps, layer calls and captures."""
    counted = Calls()
    counted.watch(monkeypatch, FusedDecode, "__call__", "steps")
    counted.watch(monkeypatch, FusedDecode, "__init__", "made")
    counted.watch(monkeypatch, ReferenceLayer, "forward", "layers")
    return counted


def prompts(rows: int, columns: int = COLUMNS, seed: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch; a single row has no padding, the next have 3, 6, 0, 3, ... columns."""
    torch.manual_seed(seed)
    input_ids = torch.randint(3, 257, (rows, columns))
    padding_B1 = torch.tensor([[3 * row % 9] for row in range(rows)])
    mask_BS = (torch.arange(columns) >= padding_B1).long()
    return {"input_ids": input_ids * mask_BS, "attention_mask": mask_BS}


def cache_for(model: PreTrainedModel, rows: int, is_paged: bool = False, **arguments: Any) -> InferenceParams:
    arguments = {"max_length": 64, "page_size": PAGE, "decode_implementation": "fused", **arguments}
    return inference_params_for(model, batch_size=rows, is_paged=is_paged, **arguments)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any = None, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **inputs, **options}
    return model.generate(**options, **({} if cache is None else {"past_key_values": cache}))


# --- texts and logits -------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.3},
    "4 beams, 3 returned": {"num_beams": 4, "num_return_sequences": 3},
    "sampling, 3 returned": {"do_sample": True, "num_return_sequences": 3},
    "beams sampled": {"num_beams": 3, "do_sample": True},
    "a chunk at a time": {"prefill_chunk_size": 5},
}


@LAYOUTS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_texts_and_logits_are_those_of_transformers(
    hf: PreTrainedModel,
    te: PreTrainedModel,
    any_dtype: None,
    calls: Calls,
    is_paged: bool,
    rows: int,
    options: dict[str, Any],
) -> None:
    inputs = prompts(rows)
    options = {"return_dict_in_generate": True, "output_logits": True, **options}
    torch.manual_seed(5)
    expected = generate(hf, inputs, **options)
    counts = {name: options[name] for name in ("num_beams", "num_return_sequences") if name in options}
    cache = cache_for(te, rows + 2, is_paged, **counts)  # two rows stay empty
    torch.manual_seed(5)
    result = generate(te, inputs, cache, **options)
    assert result.sequences.tolist() == expected.sequences.tolist()
    assert all(len(set(row[COLUMNS:])) > NEW // 2 for row in expected.sequences.tolist()), "degenerate texts"
    for logits, wanted in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    chunks = 2 if "prefill_chunk_size" in options else 1
    assert calls.layers == chunks * te.config.num_hidden_layers, "the layers compute the prompt, and nothing else"
    assert (calls.steps, calls.made) == (NEW - 1, 1)  # the last token is never read
    tokens_B = inputs["attention_mask"].sum(1).repeat_interleave(cache.batch_size // rows)
    assert list(cache.sequences.values()) == (tokens_B + NEW - 1).tolist()


@LAYOUTS
def test_a_column_at_a_time(hf: PreTrainedModel, te: PreTrainedModel, any_dtype: None, calls: Calls, is_paged) -> None:
    """While a row may still have padding, the layers compute the prompt's columns; then the kernels take over."""
    inputs = prompts(3)
    expected = generate(hf, inputs)
    assert generate(te, inputs, cache_for(te, 3, is_paged), prefill_chunk_size=1).tolist() == expected.tolist()
    assert calls.layers == 7 * te.config.num_hidden_layers  # a row has 6 columns of padding
    assert calls.steps == COLUMNS - 7 + NEW - 1


@LAYOUTS
def test_beams_that_end(hf: PreTrainedModel, te: PreTrainedModel, any_dtype: None, calls: Calls, is_paged) -> None:
    inputs = prompts(3)
    options = {"num_beams": 4, "num_return_sequences": 2, "pad_token_id": 0, "eos_token_id": list(range(3, 257, 4))}
    expected = generate(hf, inputs, **options)
    result = generate(te, inputs, cache_for(te, 3, is_paged, num_beams=4), **options)
    assert result.tolist() == expected.tolist()
    assert calls.steps > 0


@LAYOUTS
def test_drafts_from_the_prompt(
    hf: PreTrainedModel, te: PreTrainedModel, any_dtype: None, calls: Calls, is_paged: bool
) -> None:
    """The layers compute drafts, and the cache removes rejected ones; the kernels compute single tokens in between."""
    torch.manual_seed(2)
    input_ids = torch.randint(3, 257, (1, 5)).repeat(1, 4)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    expected = generate(hf, inputs, max_new_tokens=30)
    cache = cache_for(te, 1, is_paged)
    result = generate(te, inputs, cache, max_new_tokens=30, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
    assert result.tolist() == expected.tolist()
    assert calls.layers > te.config.num_hidden_layers and calls.steps > 0
    assert cache.get_seq_length() == 20 + 30 - 1


@LAYOUTS
@pytest.mark.parametrize("more", [1, 5])
def test_three_turns(
    hf: PreTrainedModel, te: PreTrainedModel, any_dtype: None, calls: Calls, is_paged: bool, more: int
) -> None:
    """The cache excludes padding after finished rows, with either backend."""
    inputs = prompts(3)
    eos = generate(hf, inputs)[0, COLUMNS + 4].item()
    cache = cache_for(te, 3, is_paged, max_length=80)
    for turn in range(3):
        expected = generate(hf, inputs, eos_token_id=eos, pad_token_id=0)
        result = generate(te, inputs, cache, eos_token_id=eos, pad_token_id=0)
        assert result.tolist() == expected.tolist(), turn
        columns = inputs["input_ids"].shape[1]
        is_eos_BC = (expected[:, columns:] == eos).long()
        mask_BC = torch.cat((inputs["attention_mask"], (is_eos_BC.cumsum(1) - is_eos_BC == 0).long()), dim=1)
        torch.manual_seed(11)
        new_BS = torch.randint(3, 257, (3, more))
        inputs = {
            "input_ids": torch.cat((expected, new_BS), dim=1),
            "attention_mask": torch.cat((mask_BC, torch.ones_like(new_BS)), dim=1),
        }
    assert calls.made == 1, "rows and weights were the same all the time"
    assert (inputs["attention_mask"][0] == 0).any()


@LAYOUTS
def test_bfloat16_logits(
    tiny_llama: Callable[..., PreTrainedModel], calls: Calls, attn_input_format: str, is_paged: bool
) -> None:
    """The kernels' logits are about as close to float32 as the layers' logits. The kernels take the model unchanged."""
    exact_model = convert_llama_hf_to_te(tiny_llama(**SIZES, initializer_range=0.1))
    model = convert_llama_hf_to_te(tiny_llama(**SIZES, initializer_range=0.1), attn_input_format=attn_input_format)
    model = model.to(torch.bfloat16)
    inputs = prompts(3)
    text_BC = generate(exact_model, inputs, cache_for(exact_model, 3, decode_implementation="layers"))

    def forced(model: PreTrainedModel, decode_implementation: str) -> torch.Tensor:
        """Return the logits of steps that read the text one token at a time."""
        cache = cache_for(model, 3, is_paged, decode_implementation=decode_implementation)
        logits = []
        with torch.no_grad():
            model(text_BC[:, :COLUMNS], attention_mask=inputs["attention_mask"], past_key_values=cache)
            for column in range(COLUMNS, COLUMNS + NEW):
                logits.append(model(text_BC[:, column : column + 1], past_key_values=cache).logits.float())
        return torch.cat(logits, dim=1)

    exact = forced(exact_model, "layers")
    layers, fused = forced(model, "layers"), forced(model, "fused")
    assert calls.steps == NEW

    def distance(logits: torch.Tensor) -> torch.Tensor:
        return ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).median()

    # Measured: 0.0157 and 0.0163 to 0.0175.
    assert distance(fused) < 1.1 * distance(layers) < 0.02


# --- steps by the layers ----------------------------------------------------------------------------------


def test_layers_compute_what_is_more_than_logits(te: PreTrainedModel, any_dtype: None, calls: Calls) -> None:
    inputs = prompts(3)
    token_B1 = torch.full((3, 1), 7)

    def last_logits(grad: bool = False, **arguments: Any) -> torch.Tensor:
        cache = cache_for(te, 3)
        with torch.no_grad():
            te(**inputs, past_key_values=cache)
        with torch.set_grad_enabled(grad):
            return te(**{"input_ids": token_B1, **arguments}, past_key_values=cache).logits.detach()

    expected = last_logits(output_hidden_states=True)
    embedded_B1E = te.get_input_embeddings()(token_B1).detach()
    others: list[dict[str, Any]] = [
        {"grad": True},
        {"labels": token_B1},
        {"shift_labels": token_B1},
        {"input_ids": None, "inputs_embeds": embedded_B1E},
        {"logits_to_keep": torch.tensor([0])},
    ]
    for arguments in others:
        torch.testing.assert_close(last_logits(**arguments), expected, atol=1e-5, rtol=1e-5)
    te.config.output_hidden_states = True
    last_logits()
    te.config.output_hidden_states = False
    te.train()
    last_logits()
    te.eval()
    assert calls.steps == 0
    torch.testing.assert_close(last_logits(logits_to_keep=1), expected, atol=1e-4, rtol=1e-4)
    assert calls.steps == 1
    states = generate(te, inputs, cache_for(te, 3), output_hidden_states=True, return_dict_in_generate=True)
    assert len(states.hidden_states) == NEW and calls.steps == 1


def test_without_a_cache_or_with_a_loop_of_transformer_engine(te: PreTrainedModel, any_dtype: None, calls) -> None:
    """Users who call layers themselves call `pre_step`. The cache then knows nothing about columns."""
    generate(te, prompts(2), cache_for(te, 2), use_cache=False)
    cache = cache_for(te, 2)
    cache.pre_step({0: 3, 1: 2})
    assert cache.decode(te, torch.zeros(2, 1, dtype=torch.int64), None) is None
    assert list(cache.sequences.values()) == [3, 2]
    assert calls.steps == 0


def test_automatic_choice_on_a_cpu_is_the_layers(te: PreTrainedModel, any_dtype: None, calls: Calls) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        automatic = generate(te, prompts(2), cache_for(te, 2, decode_implementation="auto"))
        layers = generate(te, prompts(2), cache_for(te, 2, decode_implementation="layers"))
    assert calls.steps == 0
    assert automatic.tolist() == layers.tolist()


def test_automatic_choice_on_a_gpu_warns_once_where_it_is_the_layers(te: PreTrainedModel) -> None:
    backend._warn_once.cache_clear()
    cache = cache_for(te, 2, decode_implementation="auto")
    cache.device = torch.device("cuda")  # the check of the device comes first, then the check of the dtype
    with pytest.warns(UserWarning, match="one token are computed by the model's layers, since there are no kernels"):
        assert select_backend(te, cache, 2)[0] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend(te, cache, 2)[0] is None
    backend._warn_once.cache_clear()


def test_unknown_implementation(te: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="decode_implementation='quick' is not known: use 'auto', 'fused' or 'layers'"):
        cache_for(te, 1, decode_implementation="quick")


@pytest.mark.parametrize("what", ["float32", "a small head", "an odd page"])
def test_kernels_that_there_are_not(tiny_llama: Callable[..., PreTrainedModel], te: PreTrainedModel, what: str) -> None:
    page = 12 if what == "an odd page" else PAGE
    model = te if what == "float32" else te.to(torch.bfloat16)
    if what == "a small head":
        model = convert_llama_hf_to_te(tiny_llama().to(torch.bfloat16))
    cache = cache_for(model, 1, what == "an odd page", page_size=page, max_length=60)
    sizes = {
        "float32": "float32, heads of 64",
        "a small head": "bfloat16, heads of 16",
        "an odd page": "bfloat16, heads of 64, pages of 12 tokens",
    }
    message = rf"decode_implementation='fused', but there are no kernels for this model \({sizes[what]}; .*Use 'auto'"
    with pytest.raises(RuntimeError, match=message):
        generate(model, prompts(1), cache)
    assert cache.get_seq_length() == COLUMNS, "the prompt is in the cache, and nothing else"


def test_models_that_have_more_than_the_kernels_compute(te: PreTrainedModel, any_dtype: None) -> None:
    cache = cache_for(te, 2)
    assert decode_problem(te, cache, 2)[0] is None

    def check(message: str) -> None:
        problem, _ = decode_problem(te, cache, 2)
        assert problem is not None and re.search(message, problem), problem

    hook = te.model.layers[1].register_forward_hook(lambda *arguments: None)
    check("model.layers.1 has hooks or a forward pass of its own")
    hook.remove()
    hook = te.lm_head.register_forward_pre_hook(lambda *arguments: None)
    check("lm_head has hooks")
    hook.remove()
    te.model.norm.forward = functools.partial(te.model.norm.forward)
    check("model.norm has hooks or a forward pass of its own")
    del te.model.norm.forward
    te.model.layers[0].self_attention.proj.lora_A = torch.nn.Linear(2, 2, bias=False)  # what adapters do
    check("parameters of its own kind, such as model.layers.0.self_attention.proj.lora_A.weight")
    del te.model.layers[0].self_attention.proj.lora_A
    te.model.layers[2].to("meta")
    check("model.layers.2.self_attention.layernorm_qkv.layer_norm_weight is on meta and the cache on cpu")


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTransformerEngine().install(monkeypatch)


@pytest.mark.usefixtures("transformer_engine")
def test_hooks_that_transformer_engine_layers_have(tiny_llama: Callable[..., PreTrainedModel], any_dtype: None) -> None:
    """These hooks serve the cache. The kernels do the same work themselves."""
    model = convert_llama_hf_to_te(tiny_llama(**SIZES))
    assert model.model.layers[0]._forward_pre_hooks
    assert decode_problem(model, cache_for(model, 2), 2)[0] is None
    model.model.layers[0].register_forward_hook(lambda *arguments: None)
    assert "model.layers.0 has hooks" in str(decode_problem(model, cache_for(model, 2), 2)[0])


def test_hooks_on_the_model_itself_run(te: PreTrainedModel, any_dtype: None, calls: Calls) -> None:
    seen = []
    te.register_forward_hook(lambda model, args, output: seen.append(output.logits.shape))
    generate(te, prompts(2), cache_for(te, 2))
    assert len(seen) == NEW and calls.steps == NEW - 1


def test_more_rows_than_the_kernels_take(te: PreTrainedModel, any_dtype: None) -> None:
    cache = cache_for(te, 257, max_length=4)
    cache.begin_step(None, 257, 2)
    assert decode_problem(te, cache, 257)[0] == "the batch has 257 rows, and the kernels take 256"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length(
    tiny_llama: Callable[..., PreTrainedModel], any_dtype: None, calls: Calls, rope_type: str
) -> None:
    """Within the trained length angles are fixed and the text equals transformers'; beyond it kernels use one table."""
    rope: dict[str, Any] = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
        rope |= {**factors, "original_max_position_embeddings": 32}
    trained = 64 if rope_type == "longrope" else 32
    hf = tiny_llama(max_position_embeddings=trained, rope_parameters=rope, head_dim=64)
    te = convert_llama_hf_to_te(hf)
    inputs = prompts(2)
    assert generate(te, inputs, cache_for(te, 2, max_length=32)).tolist() == generate(hf, inputs).tolist()
    assert calls.steps == NEW - 1
    with pytest.raises(RuntimeError, match=f"with rope_type='{rope_type}' angles change within max_sequence_length=33"):
        generate(te, inputs, cache_for(te, 2, max_length=33))


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_angles_of_other_kinds(
    tiny_llama: Callable[..., PreTrainedModel], any_dtype: None, calls: Calls, rope_type: str
) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 16}
    hf = tiny_llama(max_position_embeddings=32, rope_parameters=rope, head_dim=64)
    te = convert_llama_hf_to_te(hf)
    assert generate(te, prompts(2), cache_for(te, 2)).tolist() == generate(hf, prompts(2)).tolist()
    assert calls.steps == NEW - 1


# --- weights, memory and the rows that change ----------------------------------------------------------------------


@pytest.mark.parametrize("is_paged", [False, True])
def test_weights_may_change(te: PreTrainedModel, any_dtype: None, calls: Calls, is_paged: bool) -> None:
    inputs = prompts(2)
    cache = cache_for(te, 2, is_paged)

    def both() -> list[list[int]]:
        cache.reset()
        texts = generate(te, inputs, cache).tolist()
        assert texts == generate(te, inputs, cache_for(te, 2, is_paged, decode_implementation="layers")).tolist()
        return texts

    first = both()
    assert both() == first
    assert calls.made == 1, "captured once for all prompts"
    fc2_EF = te.model.layers[1].layernorm_mlp.fc2_weight
    with torch.no_grad():
        fc2_EF.mul_(-1)
    second = both()
    assert second != first
    assert calls.made == 1, "written to in place: read where they were"
    te.model.layers[1].layernorm_mlp.fc2_weight = torch.nn.Parameter(-fc2_EF.detach())
    assert both() == first
    assert calls.made == 2, "replaced: to be read elsewhere"
    for layer in range(te.config.num_hidden_layers):
        cache.allocate_memory(layer + 1)
    assert both() == first
    assert calls.made == 3, "so is the memory"


def test_weights_may_change_between_turns(te: PreTrainedModel, any_dtype: None, calls: Calls) -> None:
    fused, layers = cache_for(te, 1), cache_for(te, 1, decode_implementation="layers")

    @torch.no_grad()
    def turn(columns: int) -> list[torch.Tensor]:
        """Return the logits of a step after `columns` new columns."""
        logits = []
        for cache in (fused, layers):
            te(torch.arange(3, 3 + columns)[None], past_key_values=cache)
            logits.append(te(torch.tensor([[5]]), past_key_values=cache).logits)
        return logits

    torch.testing.assert_close(*turn(4), atol=1e-4, rtol=1e-4)
    mlp = te.model.layers[1].layernorm_mlp
    for made, columns in ((2, 2), (3, 1)):
        if columns == 1:  # a single column is a prompt only after a reset
            fused.reset()
            layers.reset()
        mlp.fc2_weight = torch.nn.Parameter(-mlp.fc2_weight.detach())
        torch.testing.assert_close(*turn(columns), atol=1e-4, rtol=1e-4)
        assert calls.made == made


def test_another_number_of_rows(te: PreTrainedModel, any_dtype: None, calls: Calls) -> None:
    cache = cache_for(te, 6)
    layers = cache_for(te, 6, decode_implementation="layers")
    for rows in (2, 3):
        cache.reset()
        layers.reset()
        assert generate(te, prompts(rows), cache).tolist() == generate(te, prompts(rows), layers).tolist()
    assert calls.made == 2
    with torch.no_grad():
        for each in (cache, layers):
            each.repeat_rows(2)
        token_B1 = torch.arange(3, 9)[:, None]
        found, expected = (te(token_B1, past_key_values=each).logits for each in (cache, layers))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert calls.made == 3


def test_logits_stay(te: PreTrainedModel, any_dtype: None) -> None:
    """Each step returns its own tensor of logits."""
    cache = cache_for(te, 1)
    with torch.no_grad():
        te(**prompts(1), past_key_values=cache)
        first = te(torch.tensor([[5]]), past_key_values=cache).logits
        kept = first.clone()
        te(torch.tensor([[6]]), past_key_values=cache)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_cache_is_freed_without_the_garbage_collector(te: PreTrainedModel, any_dtype: None, is_paged: bool) -> None:
    cache = cache_for(te, 2, is_paged)
    generate(te, prompts(2), cache)
    assert isinstance(cache._fused, FusedDecode)
    cache_ref, memory_ref = weakref.ref(cache), weakref.ref(cache.cache_manager.cache[1][0])
    gc.disable()
    try:
        del cache
        assert cache_ref() is None and memory_ref() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("is_paged", [False, True])
def test_inference_mode_and_then_without(te: PreTrainedModel, any_dtype: None, calls: Calls, is_paged: bool) -> None:
    cache = cache_for(te, 2, is_paged)
    generate(te, prompts(2), cache, max_new_tokens=1)  # the cache allocates its memory outside inference mode
    for mode in (torch.inference_mode, torch.no_grad):
        cache.reset()
        with mode():
            generate(te, prompts(2), cache)
    assert (calls.steps, calls.made) == (2 * (NEW - 1), 1)
    loss = te(**prompts(2), labels=prompts(2)["input_ids"]).loss
    loss.backward()  # training can use the tables


def test_errors_of_a_step_change_nothing(te: PreTrainedModel, any_dtype: None, calls: Calls) -> None:
    cache = cache_for(te, 2, max_length=COLUMNS + 1)
    inputs = prompts(2)
    token_B1 = torch.full((2, 1), 7)
    with torch.no_grad():
        te(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1, 1, 10\]"):
            te(token_B1, attention_mask=torch.ones(2, 1, 1, 10), past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask has 12 columns, but the cache has seen 9 and 1 are new"):
            te(token_B1, attention_mask=torch.ones(2, 12), past_key_values=cache)
        with pytest.raises(ValueError, match="the cache holds a batch of 2 rows, but 1 rows come"):
            te(token_B1[:1], past_key_values=cache)
        assert (calls.steps, cache.get_seq_length()) == (0, COLUMNS)
        te(token_B1, past_key_values=cache)
        with pytest.raises(ValueError, match=f"max_sequence_length={COLUMNS + 1}: make the cache longer"):
            te(token_B1, past_key_values=cache)
    assert (calls.steps, cache.get_seq_length()) == (1, COLUMNS + 1)
