"""A cache refuses input that does not fit before it writes anything, with a message that says how to fix it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import InferenceParams, inference_params_for
from llama_te_infer.decode import backend


@pytest.fixture(params=["thd", "bshd"])
def te(tiny_llama: Callable[..., PreTrainedModel], request: pytest.FixtureRequest) -> PreTrainedModel:
    return convert_llama_hf_to_te(tiny_llama(num_hidden_layers=2), attn_input_format=request.param)


@pytest.fixture(params=[False, True], ids=["rows", "pages"])
def is_paged(request: pytest.FixtureRequest) -> bool:
    return request.param


def input_ids(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(3, 257, (rows, columns))


def make_cache(model: PreTrainedModel, rows: int = 2, length: int = 16, is_paged: bool = False) -> InferenceParams:
    return inference_params_for(model, batch_size=rows, max_length=length, is_paged=is_paged, page_size=8)


def refuse(model: PreTrainedModel, cache: Any, error: type[Exception], message: str, **inputs: Any) -> None:
    """Both the forward pass and `generate` refuse, and the cache stays as it was."""
    before = cache.get_seq_length()
    with torch.no_grad(), pytest.raises(error, match=message):
        model(past_key_values=cache, **inputs)
    with pytest.raises(error, match=message):
        model.generate(past_key_values=cache, max_new_tokens=2, do_sample=False, **inputs)
    assert cache.get_seq_length() == before


def test_a_prompt_longer_than_the_cache(te: PreTrainedModel, is_paged: bool) -> None:
    message = "sequence 0 has 0 tokens in the cache and gets 17 more, but max_sequence_length=16: make the cache longer"
    refuse(te, make_cache(te, is_paged=is_paged), ValueError, message, input_ids=input_ids(2, 17))


def test_padding_takes_no_room(te: PreTrainedModel, is_paged: bool) -> None:
    cache = make_cache(te, is_paged=is_paged)
    mask_BS = torch.ones(2, 20, dtype=torch.long)
    mask_BS[:, :5] = 0
    te.generate(input_ids(2, 20), attention_mask=mask_BS, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert list(cache.sequences.values()) == [16, 16]


def test_generation_that_runs_over_the_end(te: PreTrainedModel, is_paged: bool) -> None:
    prompt = input_ids(1, 12)
    cache = make_cache(te, is_paged=is_paged)
    message = "sequence 0 has 16 tokens in the cache and gets 1 more, but max_sequence_length=16: make the cache longer"
    with pytest.raises(ValueError, match=message):
        te.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert list(cache.sequences.values()) == [16]
    # The last token is never read, so one more than the cache holds can be written.
    cache.reset()
    text = te.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 17)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "num_beams", "num_return_sequences", "page_size"])
def test_sizes_that_are_no_sizes(te: PreTrainedModel, name: str) -> None:
    for value in (0, -1, 2.5, 8.0, "8", True):
        with pytest.raises(ValueError, match=f"^{name}=.* is not possible: give an integer of at least 1"):
            inference_params_for(te, **{"batch_size": 1, "max_length": 8, "is_paged": True, name: value})
    with pytest.raises(ValueError, match="prompt_length=1.5 is not possible"):
        inference_params_for(te, batch_size=1, max_length=8, prompt_length=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_size": 10**9},
        {"max_length": 10**10},
        {"num_beams": 10**9},
        {"batch_size": 10**5, "num_return_sequences": 10**5, "prompt_length": 8},
        {"page_size": 10**10},
    ],
    ids=str,
)
def test_caches_larger_than_the_memory(te: PreTrainedModel, is_paged: bool, sizes: dict[str, int]) -> None:
    if "page_size" in sizes and not is_paged:
        sizes = {"max_length": 10**12}
    arguments = {"batch_size": 1, "max_length": 64, "is_paged": is_paged, **sizes}
    with pytest.raises(
        ValueError, match=r"rows of .* tokens.*: this needs [\d,.]+ GiB, and cpu has [\d,.]+ GiB for it"
    ):
        inference_params_for(te, **arguments)


def test_a_cache_made_by_hand_larger_than_the_memory() -> None:
    arguments: dict[str, Any] = {"num_heads_kv": 2, "head_dim_k": 16, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ValueError, match=r"1000000000 rows of 64 tokens: this needs [\d,.]+ GiB"):
        InferenceParams(10**9, 64, **arguments)
    with pytest.raises(ValueError, match=r"1000000000000 rows of 64 tokens, 1 pages of 64 tokens: this needs"):
        InferenceParams(10**12, 64, **arguments, is_paged=True, page_size=64, total_num_pages=1)
    for name, value in (
        ("max_batch_size", 1.5),
        ("max_sequence_length", "8"),
        ("num_heads_kv", 0),
        ("head_dim_k", True),
    ):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not possible"):
            InferenceParams(**{"max_batch_size": 1, "max_sequence_length": 8, **arguments, name: value})


def test_generation_longer_than_the_memory(te: PreTrainedModel) -> None:
    with pytest.raises(
        ValueError, match=r"1 rows of 1000000\d* tokens: this needs [\d,.]+ GiB, and cpu has [\d,.]+ GiB"
    ):
        te.generate(input_ids(1, 4), max_new_tokens=10**9, do_sample=False)


@pytest.mark.parametrize("decode_implementation", ["layers", "fused"])
@pytest.mark.parametrize("token", [-1, 257, 2**40])
def test_tokens_outside_the_vocabulary(
    te: PreTrainedModel, decode_implementation: str, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prompt, and in a step of one token."""
    monkeypatch.setattr(backend, "takes_fused_decode", lambda *_: True)
    cache = inference_params_for(te, batch_size=1, max_length=16, decode_implementation=decode_implementation)
    with torch.no_grad():
        with pytest.raises(IndexError):
            te(input_ids=torch.tensor([[3, token]]), past_key_values=cache)
        cache.reset()
        te(input_ids=torch.tensor([[3, 4]]), past_key_values=cache)
        with pytest.raises(IndexError):
            te(input_ids=torch.tensor([[token]]), past_key_values=cache)


def test_a_batch_larger_than_the_cache(te: PreTrainedModel, is_paged: bool) -> None:
    message = r"a batch of 3 rows \(beams and returned sequences are rows too\) does not fit .* max_batch_size=2: make"
    refuse(te, make_cache(te, is_paged=is_paged), ValueError, message, input_ids=input_ids(3, 4))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_more_beams_or_returned_sequences_than_rows(te: PreTrainedModel, options: dict[str, Any]) -> None:
    cache = make_cache(te)
    with pytest.raises(ValueError, match=r"a batch of 3 rows .* max_batch_size=2"):
        te.generate(input_ids(1, 4), past_key_values=cache, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match=r"a batch of 6 rows .* max_batch_size=2"):
        te.generate(input_ids(2, 4), past_key_values=cache, max_new_tokens=2, **options)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_kv": 4}, r"num_heads_kv=4 and head_dim_k=16, but the model has 2 key/value heads of size 16"),
        ({"head_dim_k": 32}, r"num_heads_kv=2 and head_dim_k=32, but the model has 2 key/value heads of size 16"),
        ({"dtype": torch.bfloat16}, r"dtype=torch.bfloat16, but the layers compute in torch.float32: use the same"),
    ],
)
def test_a_cache_for_another_model(te: PreTrainedModel, changes: dict[str, Any], message: str) -> None:
    arguments = {"num_heads_kv": 2, "head_dim_k": 16, "dtype": torch.float32, "device": "cpu", **changes}
    cache = InferenceParams(2, 16, **arguments)
    refuse(te, cache, ValueError, message, input_ids=input_ids(2, 4))
    assert cache.cache_manager.cache == {}


def test_a_cache_of_another_kind(te: PreTrainedModel) -> None:
    cache = DynamicCache(config=te.config)
    message = r"past_key_values is a DynamicCache: the layers need llama_te_infer.InferenceParams"
    refuse(te, cache, TypeError, message, input_ids=input_ids(2, 4))


@pytest.mark.parametrize("columns", [2, 5, 8])
def test_a_mask_of_another_width(te: PreTrainedModel, columns: int) -> None:
    cache = make_cache(te)
    with torch.no_grad():
        te(input_ids=input_ids(2, 4), past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask has "):
            te(input_ids=input_ids(2, 3), attention_mask=torch.ones(2, columns), past_key_values=cache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("shape", [(1, 4), (2, 1, 4, 4)])
def test_a_mask_of_another_shape(te: PreTrainedModel, shape: tuple[int, ...]) -> None:
    cache = make_cache(te)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask has shape .*: it must be \[2, 4, or the"):
        te(input_ids=input_ids(2, 4), attention_mask=torch.ones(shape), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_packed_sequences_with_a_cache(te: PreTrainedModel) -> None:
    cache = make_cache(te)
    packed = {"input_ids": input_ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32)}
    packed |= {"max_length_q": 4}
    message = {
        "thd": "cu_seq_lens_q and past_key_values are given: packed sequences take no cache",
        "bshd": "cu_seq_lens_q is given, but attn_input_format='bshd': packed sequences need 'thd'",
    }[te.config.attn_input_format]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        te(**packed, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_another_batch_without_a_reset(te: PreTrainedModel) -> None:
    cache = make_cache(te)
    with torch.no_grad():
        te(input_ids=input_ids(2, 4), past_key_values=cache)
    message = r"holds a batch of 2 rows, but 1 rows come: call reset\(\)"
    refuse(te, cache, ValueError, message, input_ids=input_ids(1, 5))


def test_transformers_own_cache_implementations(te: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"cache_implementation='static'.*InferenceParams"):
        te.generate(input_ids(1, 4), cache_implementation="static", max_new_tokens=2)
