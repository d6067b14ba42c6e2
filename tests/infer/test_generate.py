"""`generate` of a converted model writes the same text as transformers' own model, token by token."""

from __future__ import annotations

import dataclasses
import tomllib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast

import llama_te_core.compat.entry_points
import llama_te_core.layers.kv_cache
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, InferenceParams, inference_params_for

# The installed transformers' name of the cache, as an argument of `generate` and in outputs.
FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in FIELDS else "past_key_values"
NEW = 12
PAGE = 16

LAYOUTS = pytest.mark.parametrize(
    ("attn_input_format", "is_paged"), [("thd", False), ("thd", True), ("bshd", False), ("bshd", True)]
)


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama(max_position_embeddings=128, initializer_range=0.3)  # these weights write few repetitions


@pytest.fixture
def attn_input_format() -> str:
    """The format of tests that are not parametrized over it."""
    return "thd"


@pytest.fixture
def te(hf: PreTrainedModel, attn_input_format: str) -> PreTrainedModel:
    """The same model, converted."""
    return convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)


def prompts(rows: int, columns: int = 9, seed: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch; a single row has no padding, the next have 3, 6, 0, 3, ... columns."""
    torch.manual_seed(seed)
    input_ids = torch.randint(3, 257, (rows, columns))
    padding_B1 = torch.tensor([[3 * row % 9] for row in range(rows)])
    mask_BS = (torch.arange(columns) >= padding_B1).long()
    return {"input_ids": input_ids * mask_BS, "attention_mask": mask_BS}


def cache_for(model: PreTrainedModel, rows: int, is_paged: bool = False, **arguments: Any) -> InferenceParams:
    arguments = {"max_length": 64, "page_size": PAGE, **arguments}
    return inference_params_for(model, batch_size=rows, is_paged=is_paged, **arguments)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any = None, **options: Any) -> Any:
    """`generate` with defaults that keep tests short; None passes no cache at all."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **inputs, **options}
    if cache is not None:
        options[CACHE] = cache
    return model.generate(**options)


def check_not_degenerate(ids_BC: torch.Tensor, prompt_columns: int) -> None:
    for row in ids_BC[:, prompt_columns:]:
        assert len(row.unique()) > min(len(row), NEW) // 2, f"a degenerate text shows nothing: {row.tolist()}"


def some_eos(model: PreTrainedModel, inputs: dict[str, torch.Tensor], place: int = 4, **options: Any) -> int:
    """A token that the first row writes as its new token number `place`, and not before."""
    text = generate(model, inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    assert text[place] not in text[:place]
    return text[place]


# --- one call -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.3},
    "2 beams": {"num_beams": 2},
    "4 beams": {"num_beams": 4},
    "4 beams, 3 returned": {"num_beams": 4, "num_return_sequences": 3},
    "sampling, 3 returned": {"do_sample": True, "num_return_sequences": 3},
    "beams sampled": {"num_beams": 3, "do_sample": True},
    "a chunk at a time": {"prefill_chunk_size": 4},
    "a column at a time": {"prefill_chunk_size": 1},
}


@LAYOUTS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_ids_equal_those_of_transformers(
    hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool, rows: int, options: dict[str, Any]
) -> None:
    inputs = prompts(rows)
    torch.manual_seed(5)
    expected = generate(hf, inputs, **options)
    counts = {name: options[name] for name in ("num_beams", "num_return_sequences") if name in options}
    cache = cache_for(te, rows, is_paged, **counts)
    torch.manual_seed(5)
    result = generate(te, inputs, cache, **options)
    assert result.tolist() == expected.tolist()
    check_not_degenerate(expected, 9)
    # The last token is never read.
    assert cache.get_seq_length() == 9 + NEW - 1


BEAM_OPTIONS: dict[str, dict[str, Any]] = {
    "short texts": {"length_penalty": -2.0},
    "long texts": {"length_penalty": 2.0},
    "stop at once": {"early_stopping": True},
    "never stop early": {"early_stopping": "never", "length_penalty": 1.5},
}


@LAYOUTS
@pytest.mark.parametrize("options", BEAM_OPTIONS.values(), ids=BEAM_OPTIONS)
def test_beams_that_end_equal_those_of_transformers(
    hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool, options: dict[str, Any]
) -> None:
    inputs = prompts(3)
    options = {"num_beams": 4, "num_return_sequences": 2, "pad_token_id": 0, **options}
    unending = generate(hf, inputs, **options)
    options["eos_token_id"] = list(range(3, 257, 4))
    expected = generate(hf, inputs, **options)
    result = generate(te, inputs, cache_for(te, 3, is_paged, num_beams=4), **options)
    assert result.tolist() == expected.tolist()
    assert result.tolist() != unending.tolist(), "no beam ended early"


@LAYOUTS
def test_rows_that_end_early(hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool) -> None:
    inputs = prompts(3)
    eos = some_eos(hf, inputs)
    expected = generate(hf, inputs, eos_token_id=eos, pad_token_id=0)
    result = generate(te, inputs, cache_for(te, 3, is_paged), eos_token_id=eos, pad_token_id=0)
    assert result.tolist() == expected.tolist()
    assert expected[0, 9 + 4 :].tolist() == [eos] + [0] * (NEW - 5)
    assert expected[1:, -1].ne(0).any(), "all rows ended: nothing ran on behind the padding"


def test_stop_strings(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    inputs = prompts(1)
    text = generate(hf, inputs)[0, 9:].tolist()
    # A token is one letter. transformers reads the text after "abcdef" to find the text of a token.
    letters = [chr(0x4E00 + token) for token in range(257)]
    letters[0] = "abcdef"
    words = Tokenizer(WordLevel({letter: token for token, letter in enumerate(letters)}, unk_token="abcdef"))
    words.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    stop = {"stop_strings": letters[text[3]] + letters[text[4]], "tokenizer": tokenizer}
    expected = generate(hf, inputs, **stop)
    assert expected[0, 9:].tolist() == text[:5]
    assert generate(te, inputs, cache_for(te, 1), **stop).tolist() == expected.tolist()


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_without_a_cache(hf: PreTrainedModel, te: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs = prompts(3)
    expected = generate(hf, inputs, **options)
    result = generate(te, inputs, use_cache=False, return_dict_in_generate=True, **options)
    assert result.sequences.tolist() == expected.tolist()
    assert result.get(CACHE) is None
    given = cache_for(te, 3, num_beams=3)
    assert generate(te, inputs, given, use_cache=False, **options).tolist() == expected.tolist()
    assert given.get_seq_length() == 0, "use_cache=False leaves a given cache alone"


@LAYOUTS
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_prompts_as_embeddings(
    hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool, options: dict[str, Any]
) -> None:
    inputs = prompts(3)
    embedded = {
        "inputs_embeds": hf.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    expected = generate(hf, embedded, **options)
    assert expected.tolist() == generate(hf, inputs, **options)[:, 9:].tolist()
    assert generate(te, embedded, cache_for(te, 3, is_paged, num_beams=2), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_scores_equal_those_of_transformers(hf: PreTrainedModel, te: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs = prompts(3)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **options}
    options["output_hidden_states"] = True
    expected = generate(hf, inputs, **options)
    cache = cache_for(te, 3, num_beams=2)
    result = generate(te, inputs, cache, **options)
    assert result.sequences.tolist() == expected.sequences.tolist()
    assert result[CACHE] is cache
    for name in ("scores", "logits"):
        assert len(result[name]) == len(expected[name]) == NEW
        for scores, wanted in zip(result[name], expected[name], strict=True):
            torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    if "num_beams" in options:
        torch.testing.assert_close(result.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)
    for step, (states, wanted) in enumerate(zip(result.hidden_states, expected.hidden_states, strict=True)):
        assert len(states) == len(wanted) == 4
        torch.testing.assert_close(states[-1][:, -1], wanted[-1][:, -1], atol=1e-4, rtol=1e-4, msg=f"step {step}")


# --- drafts that are taken back ---------------------------------------------------------------------------------------


def repetitive_prompt() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    input_ids = torch.randint(3, 257, (1, 5)).repeat(1, 4)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def counted_forward(model: PreTrainedModel) -> list[int]:
    """Notes how many columns each call of the model's forward brings."""
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    return widths


@LAYOUTS
def test_drafts_from_the_prompt(hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool) -> None:
    inputs = repetitive_prompt()
    expected = generate(hf, inputs, max_new_tokens=30)
    cache = cache_for(te, 1, is_paged)
    widths = counted_forward(te)
    result = generate(te, inputs, cache, max_new_tokens=30, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
    assert result.tolist() == expected.tolist()
    assert max(widths[1:]) > 1, "no draft was ever tried"
    assert cache.get_seq_length() == 20 + 30 - 1


def use_installed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an installed llama_te_infer: use the entry point that its pyproject.toml registers."""
    project = Path(__file__).parents[2] / "packages" / "llama_te_infer" / "pyproject.toml"
    points = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]
    found = [EntryPoint(name, value, group) for group, entries in points.items() for name, value in entries.items()]
    monkeypatch.setattr(
        llama_te_core.compat.entry_points,
        "entry_points",
        lambda *, group: [each for each in found if each.group == group],
    )


@pytest.fixture
def forgotten_factory() -> Iterator[None]:
    llama_te_core.layers.kv_cache.default_cache_factory.cache_clear()
    yield
    llama_te_core.layers.kv_cache.default_cache_factory.cache_clear()


@pytest.fixture
def installed_cache(monkeypatch: pytest.MonkeyPatch, forgotten_factory: None) -> None:
    use_installed_cache(monkeypatch)


@pytest.mark.usefixtures("installed_cache")
@pytest.mark.parametrize(("attn_input_format", "is_paged"), [("thd", True), ("bshd", False)])
@pytest.mark.parametrize("seed", [0, 7], ids=["drafts are good", "drafts are bad"])
def test_drafts_from_an_assistant(
    tiny_llama: Callable[..., PreTrainedModel], hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool, seed: int
) -> None:
    """The text equals the greedy text for all proposals of the assistant, and the assistant's cache grows with it."""
    assistant = convert_llama_hf_to_te(
        tiny_llama(max_position_embeddings=128, initializer_range=0.3, seed=seed),
        attn_input_format=te.config.attn_input_format,
    )
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    inputs = prompts(1)
    # transformers mistakes a written token 0 for padding when it passes the text to the assistant.
    options = {"max_new_tokens": 60, "suppress_tokens": [0]}
    expected = generate(hf, inputs, **options)
    cache = cache_for(te, 1, is_paged, max_length=80)
    widths = counted_forward(te)
    assert generate(te, inputs, cache, assistant_model=assistant, **options).tolist() == expected.tolist()
    assert (len(widths) < 15) == (seed == 0), "the same model's drafts are right, another one's are not"
    assert cache.get_seq_length() == 9 + 60 - 1


# --- several turns ----------------------------------------------------------------------------------------------------


def next_turn(inputs: dict[str, torch.Tensor], text_BC: torch.Tensor, eos: int | None, more: int) -> dict[str, Any]:
    """Return the text so far and `more` new tokens; tokens after a row's eos are padding."""
    text_mask_BC = torch.ones_like(text_BC)
    columns = inputs["input_ids"].shape[1]
    text_mask_BC[:, :columns] = inputs["attention_mask"]
    if eos is not None:
        is_eos_BC = (text_BC[:, columns:] == eos).long()
        text_mask_BC[:, columns:] = is_eos_BC.cumsum(1) - is_eos_BC == 0
    torch.manual_seed(11)
    new_BS = torch.randint(3, 257, (len(text_BC), more))
    return {
        "input_ids": torch.cat((text_BC, new_BS), dim=1),
        "attention_mask": torch.cat((text_mask_BC, torch.ones_like(new_BS)), dim=1),
    }


@LAYOUTS
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ends_early", [False, True])
@pytest.mark.parametrize("more", [1, 5])
def test_three_turns(
    hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool, rows: int, ends_early: bool, more: int
) -> None:
    inputs = prompts(rows)
    eos = some_eos(hf, inputs) if ends_early else None
    options = {"eos_token_id": eos, "pad_token_id": 0}
    cache_hf, cache_te = DynamicCache(config=hf.config), cache_for(te, rows, is_paged)
    for turn in range(3):
        expected = generate(hf, inputs, cache_hf, **options)
        result = generate(te, inputs, cache_te, **options)
        assert result.tolist() == expected.tolist(), turn
        assert generate(te, inputs, use_cache=False, **options).tolist() == expected.tolist(), turn
        assert cache_te.get_seq_length() == cache_hf.get_seq_length() == expected.shape[1] - 1
        inputs = next_turn(inputs, expected, eos, more)
    padding = (inputs["attention_mask"][:, 9:] == 0).any(1)
    assert bool(padding.any()) == (ends_early and rows > 1), "padding behind finished rows is what this is about"
    # Rows hold tokens only: padding takes no space.
    tokens_B = inputs["attention_mask"][:, :-more].sum(1)
    assert all(
        cached >= tokens - 1 for cached, tokens in zip(cache_te.sequences.values(), tokens_B.tolist(), strict=True)
    )


def test_a_turn_with_beams_after_a_turn_with_beams(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    """The best beam's row holds its own text: a cache of returned beams can go on with the forward pass."""
    inputs = prompts(1)
    cache = cache_for(te, 1, num_beams=4)
    text_BC = generate(te, inputs, cache, num_beams=4, num_return_sequences=4)
    assert text_BC.tolist() == generate(hf, inputs, num_beams=4, num_return_sequences=4).tolist()
    cache.crop(9 - cache.get_seq_length())
    assert cache.get_seq_length() == 9
    again = generate(te, {**inputs}, None, use_cache=False, num_beams=4, num_return_sequences=4)
    assert again.tolist() == text_BC.tolist()
    new_BS = text_BC[:, 9:]
    with torch.no_grad():
        continued = te(input_ids=new_BS, past_key_values=cache).logits
        fresh = hf(input_ids=text_BC).logits[:, 9:]
    torch.testing.assert_close(continued, fresh, atol=1e-4, rtol=1e-4)


# --- the cache that generate makes ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed_cache")
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate_makes_a_cache_and_returns_it(
    hf: PreTrainedModel, te: PreTrainedModel, options: dict[str, Any]
) -> None:
    inputs = prompts(3)
    widths = counted_forward(te)
    result = generate(te, inputs, return_dict_in_generate=True, **options)
    assert result.sequences.tolist() == generate(hf, inputs, **options).tolist()
    assert widths == [9] + [1] * (NEW - 1)
    cache = result[CACHE]
    assert isinstance(cache, InferenceParams)
    assert (cache.max_batch_size, cache.max_sequence_length) == (3 * options.get("num_beams", 1), 64)
    if not options:
        inputs = next_turn(inputs, result.sequences, None, 4)
        expected = generate(hf, inputs)
        assert generate(te, inputs, cache).tolist() == expected.tolist()
        assert widths[NEW] == 5, "the second turn read the whole text again"


@pytest.mark.usefixtures("installed_cache")
def test_the_cache_that_generate_makes_is_just_long_enough(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    inputs = prompts(1)
    result = generate(te, inputs, max_new_tokens=56, return_dict_in_generate=True)
    assert result.sequences.tolist() == generate(hf, inputs, max_new_tokens=56).tolist()
    assert list(result[CACHE].sequences.values()) == [64] == [result[CACHE].max_sequence_length]


@pytest.mark.usefixtures("installed_cache")
def test_weights_that_accelerate_keeps_elsewhere(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    inputs, options = prompts(2), {"max_new_tokens": NEW, "do_sample": False}
    offloaded = accelerate.cpu_offload(te, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert torch.equal(offloaded.generate(**inputs, **options), hf.generate(**inputs, **options))
    with pytest.raises(ValueError, match=r"weights of the model are not in memory.*model\.generate works"):
        Engine(offloaded, max_batch_size=1)


def test_layers_on_several_devices_are_refused(te: PreTrainedModel) -> None:
    te.model.layers[1].to("meta")  # stands for another GPU
    with pytest.raises(ValueError, match=r"the layers compute on cpu and meta, but a cache is on one.*use_cache"):
        inference_params_for(te, batch_size=1, max_length=8)


@pytest.mark.usefixtures("forgotten_factory")
def test_without_llama_te_infer_generate_warns_once(
    hf: PreTrainedModel, te: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_te_core.compat.entry_points, "entry_points", lambda *, group: [])
    inputs = prompts(3)
    expected = generate(hf, inputs)
    with pytest.warns(UserWarning, match=r"without a key/value cache.*pip install llama-te-infer"):
        result = generate(te, inputs, return_dict_in_generate=True)
    assert result.sequences.tolist() == expected.tolist()
    assert result.get(CACHE) is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert generate(te, inputs).tolist() == expected.tolist()
    assert not [each for each in caught if "key/value cache" in str(each.message)]


# --- rows of one prompt ----------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_return_sequences": 3, "do_sample": True}])
def test_prompts_are_computed_once(hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool, options: Any) -> None:
    """Beams and returned sequences share the computation of their prompt, and each of its full pages."""
    columns = 2 * PAGE + 5
    inputs = prompts(2, columns)
    torch.manual_seed(5)
    expected = generate(hf, inputs, output_hidden_states=True, return_dict_in_generate=True, **options)
    tokens = []
    te.model.layers[0].register_forward_pre_hook(lambda layer, args: tokens.append(args[0].flatten(0, -2).shape[0]))
    rows = options.get("num_beams", 3)
    cache = cache_for(te, 2, is_paged, num_beams=rows)
    torch.manual_seed(5)
    result = generate(te, inputs, cache, output_hidden_states=True, return_dict_in_generate=True, **options)
    assert result.sequences.tolist() == expected.sequences.tolist()
    prompt = 2 * columns if te.config.attn_input_format == "bshd" else int(inputs["attention_mask"].sum())
    assert tokens == [prompt] + [2 * rows] * (NEW - 1)
    states = "decoder_hidden_states" if "decoder_hidden_states" in expected else "hidden_states"
    for ours, theirs in zip(result[states][0], expected[states][0], strict=True):
        inside = inputs["attention_mask"].repeat_interleave(rows, 0).bool()
        torch.testing.assert_close(ours[inside], theirs[inside], atol=1e-4, rtol=1e-4)
    if is_paged:
        pages = cache.cache_manager.pages
        for first in (0, rows):
            assert all(row[:2] == pages[first][:2] for row in pages[first : first + rows])


def test_beams_over_a_long_prompt_take_little_more_memory_than_one_sequence(tiny_llama) -> None:
    """4 beams, 8,192 tokens of prompt and 64 new ones: less than 1.1 times what one sequence takes."""
    prompt, new = 8192, 64
    hf = tiny_llama(max_position_embeddings=prompt + new, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    te = convert_llama_hf_to_te(hf)
    inputs = prompts(1, prompt)

    def sized(**arguments: Any) -> InferenceParams:
        return inference_params_for(te, batch_size=1, max_length=prompt + new, is_paged=True, **arguments)

    def memory(cache: InferenceParams) -> int:
        return sum(tensor.nbytes for pair in cache.cache_manager.cache.values() for tensor in pair)

    one, four = sized(), sized(num_beams=4, prompt_length=prompt)
    generate(te, inputs, one, max_new_tokens=new)
    ids = generate(te, inputs, four, max_new_tokens=new, num_beams=4)
    assert list(four.sequences.values()) == [prompt + new - 1] * 4
    assert 1 < memory(four) / memory(one) < 1.1
    assert one.cache_manager.used_pages < four.cache_manager.used_pages < 1.1 * one.cache_manager.used_pages
    assert ids.tolist() == generate(te, inputs, sized(num_beams=4), max_new_tokens=new, num_beams=4).tolist()


@pytest.mark.parametrize("columns", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 1, 3 * PAGE])
def test_pages_for_a_prompt_are_enough(te: PreTrainedModel, columns: int) -> None:
    """Shorter prompts share fewer pages."""
    inputs = prompts(3, columns + 6)
    cache = cache_for(te, 3, True, num_beams=4, max_length=columns + 6 + NEW, prompt_length=columns + 6)
    result = generate(te, inputs, cache, num_beams=4)
    assert result.tolist() == generate(te, inputs, num_beams=4).tolist()


def test_too_few_pages_are_told_and_nothing_is_lost(te: PreTrainedModel) -> None:
    inputs = prompts(2, 2 * PAGE - 1)
    generous = cache_for(te, 8, True)
    expected = generate(te, inputs, generous, num_beams=4)
    config = te.config
    cache = InferenceParams(
        8, 64, config.num_key_value_heads, config.head_dim, torch.float32, is_paged=True, page_size=PAGE,
        total_num_pages=11, qkv_format="thd", max_ctx_len=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the cache's 11 pages of 16 tokens are not enough: 4 more.*and 3 are free"):
        generate(te, inputs, cache, num_beams=4)
    manager = cache.cache_manager
    assert manager.used_pages <= 2 + 8  # of each prompt: one that all beams may share, and one for each beam
    assert len(cache.sequences) == 8
    cache.reset()
    assert manager.used_pages == 0
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    assert generate(te, one, cache, num_beams=4).tolist() == expected[:1].tolist()


# --- without generate -------------------------------------------------------------------------------------------------


@LAYOUTS
def test_a_loop_as_users_of_transformer_engine_write_it(
    hf: PreTrainedModel, te: PreTrainedModel, is_paged: bool
) -> None:
    inputs = prompts(3)
    config = te.config
    pages = {"page_size": PAGE, "total_num_pages": 3 * 32 // PAGE} if is_paged else {}
    cache = InferenceParams(
        max_batch_size=3,
        max_sequence_length=32,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=torch.float32,
        qkv_format=config.attn_input_format,
        max_ctx_len=9,
        is_paged=is_paged,
        **pages,
    )
    for layer_number in range(1, config.num_hidden_layers + 1):
        cache.allocate_memory(layer_number)
    memory = {layer: pair[0].data_ptr() for layer, pair in cache.cache_manager.cache.items()}
    tokens = []
    with torch.no_grad():
        logits_BSV = te(**inputs, past_key_values=cache).logits
        for _ in range(NEW):
            tokens.append(logits_BSV[:, -1].argmax(-1, keepdim=True))
            logits_BSV = te(input_ids=tokens[-1], past_key_values=cache).logits
    assert torch.cat(tokens, dim=1).tolist() == generate(hf, inputs)[:, 9:].tolist()
    assert {layer: pair[0].data_ptr() for layer, pair in cache.cache_manager.cache.items()} == memory
    assert list(cache.sequences.values()) == [9 + NEW, 6 + NEW, 3 + NEW]


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_both_names_of_the_cache_argument(te: PreTrainedModel) -> None:
    inputs = prompts(2)
    with torch.no_grad():
        for name in ("past_key_values", "cache"):
            cache = cache_for(te, 2)
            output = te(**inputs, **{name: cache})
            assert output[CACHE] is cache
            assert cache.get_seq_length() == 9
            with pytest.raises(ValueError, match=r"past_key_values has content, but use_cache=False"):
                te(**inputs, **{name: cache}, use_cache=False)
            assert cache.get_seq_length() == 9
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            te(**inputs, past_key_values=cache, cache=cache_for(te, 2))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_generate_takes_both_names_without_a_warning(hf: PreTrainedModel, te: PreTrainedModel, name: str) -> None:
    inputs = prompts(2)
    for options in ({}, {"num_beams": 2}):
        cache = cache_for(te, 2, num_beams=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            result = te.generate(**inputs, **{name: cache}, max_new_tokens=5, do_sample=False, **options)
        assert result.tolist() == hf.generate(**inputs, max_new_tokens=5, do_sample=False, **options).tolist()
        assert cache.get_seq_length() == result.shape[1] - 1


def test_the_helper_sizes_the_cache_from_model_and_request(te: PreTrainedModel) -> None:
    cache = inference_params_for(te, batch_size=2, max_length=50, num_beams=3, num_return_sequences=2)
    assert (cache.max_batch_size, cache.max_sequence_length, cache.is_paged) == (6, 50, False)
    assert (cache.num_heads_kv, cache.head_dim_k, cache.dtype, cache.device.type) == (2, 16, torch.float32, "cpu")
    assert inference_params_for(te, batch_size=2, max_length=50, num_return_sequences=5).max_batch_size == 10
    paged = inference_params_for(te, batch_size=2, max_length=50, is_paged=True, page_size=16)
    assert (paged.max_sequence_length, paged.page_size, paged.total_num_pages) == (64, 16, 8)
    shared = {"batch_size": 2, "max_length": 50, "num_beams": 4, "is_paged": True, "page_size": 16}
    # Of 4 pages, 2 are full of the prompt's 34 tokens, and 16 more lie on 2.
    assert inference_params_for(te, **shared, prompt_length=34).total_num_pages == 2 * (2 + 4 * 2)
    assert inference_params_for(te, **shared, prompt_length=0).total_num_pages == 2 * 4 * 4
    for wrong, message in (
        (-1, "is not possible: give an integer of at least 0"),
        (51, "must be between 0 and max_length=50"),
    ):
        with pytest.raises(ValueError, match=f"prompt_length={wrong} {message}"):
            inference_params_for(te, **shared, prompt_length=wrong)
    half = inference_params_for(te.to(torch.bfloat16), batch_size=1, max_length=8)
    assert half.dtype == torch.bfloat16
