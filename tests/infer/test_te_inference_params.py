"""Transformer Engine's own `InferenceParams`, built by hand, as the cache of `generate` and of forward passes.

The oracle is transformers' own model. A stand-in has the arguments and the attributes of TE 2.20's class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llama_te_core.compat.entry_points
import llama_te_core.layers.kv_cache
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import HFInferenceParams, InferenceParams

NEW = 10


class Manager:
    def __init__(self) -> None:
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class NonPagedKVCacheManager(Manager):
    pass


class PagedKVCacheManager(Manager):
    pass


class TEInferenceParams:
    """The stand-in. Its methods fail, since the models must not use them."""

    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        num_heads_kv: int,
        head_dim_k: int,
        dtype: torch.dtype,
        head_dim_v: int | None = None,
        is_paged: bool = False,
        total_num_pages: int | None = None,
        page_size: int | None = None,
        max_ctx_len: int | None = None,
        qkv_format: str = "bshd",
        custom_cache_manager: type[Manager] | None = None,
    ) -> None:
        self.max_batch_size, self.max_sequence_length = max_batch_size, max_sequence_length
        self.num_heads_kv, self.head_dim_k, self.dtype = num_heads_kv, head_dim_k, dtype
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.is_paged = is_paged
        self.cache_manager = (custom_cache_manager or (PagedKVCacheManager if is_paged else NonPagedKVCacheManager))()
        if is_paged:
            self.page_size, self.total_num_pages = page_size, total_num_pages
        if qkv_format == "thd":
            self.max_ctx_len = max_ctx_len
        self.input_qkv_format, self.cache_qkv_format = qkv_format, "bshd"
        self.sequences: OrderedDict[int, int] = OrderedDict()
        self.batch_size = 0
        self.cu_seqlens_q = torch.zeros(max_batch_size + 1, dtype=torch.int32)

    def allocate_memory(self, layer_number: int) -> None:
        shape = self.max_batch_size, self.max_sequence_length, self.num_heads_kv, self.head_dim_k
        self.cache_manager.cache[layer_number] = torch.zeros(shape), torch.zeros(shape)

    def pre_step(self, step_dict: OrderedDict[int, int]) -> None:
        raise AssertionError("the model calls Transformer Engine's own cache")

    reset = step = pre_step


TEInferenceParams.__name__ = "InferenceParams"
TEInferenceParams.__module__ = "transformer_engine.pytorch.attention.inference"


class OwnParams(TEInferenceParams):
    """A user's class that adds what `generate` needs, as the recipe's does."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise AssertionError("the model calls Transformer Engine's own cache")


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama(max_position_embeddings=128, initializer_range=0.3)


def params_for(model: PreTrainedModel, cls: type[Any], rows: int, **fields: Any) -> Any:
    params = cls(
        max_batch_size=rows,
        max_sequence_length=64,
        num_heads_kv=model.config.num_key_value_heads,
        head_dim_k=model.config.head_dim,
        dtype=model.dtype,
        **fields,
    )
    for number in range(1, model.config.num_hidden_layers + 1):
        params.allocate_memory(number)
    return params


def prompts() -> dict[str, torch.Tensor]:
    ids_BS = torch.randint(3, 257, (2, 9), generator=torch.Generator().manual_seed(2))
    mask_BS = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    return {"input_ids": ids_BS * mask_BS, "attention_mask": mask_BS}


@pytest.mark.parametrize("cls", [TEInferenceParams, OwnParams, HFInferenceParams])
@pytest.mark.parametrize(
    ("attn_input_format", "fields"),
    [
        ("thd", {"qkv_format": "thd", "max_ctx_len": 64}),
        ("bshd", {}),
        ("thd", {"qkv_format": "thd", "max_ctx_len": 64, "is_paged": True, "page_size": 16, "total_num_pages": 24}),
    ],
    ids=["thd", "bshd", "paged"],
)
def test_generate_writes_the_text_of_transformers(
    hf, cls: type[Any], attn_input_format: str, fields: dict[str, Any]
) -> None:
    model = convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)
    params = params_for(model, cls, 6, **fields)
    for options in ({}, {"num_beams": 3}):
        options = {**prompts(), "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
        result = model.generate(**options, past_key_values=params, use_cache=True, return_dict_in_generate=True)
        assert result.sequences.tolist() == hf.generate(**options).tolist()
        # The outputs have the object that was passed, with its content.
        assert result.past_key_values is params
        assert isinstance(params, cls) and isinstance(params, InferenceParams)
        assert params.get_seq_length() == 9 + NEW - 1
        assert params.is_paged == fields.get("is_paged", False)
        params.reset()
        assert params.get_seq_length() == 0


def test_a_loop_of_forward_passes(hf) -> None:
    model = convert_llama_hf_to_te(hf)
    params = params_for(model, TEInferenceParams, 2, qkv_format="thd", max_ctx_len=64)
    ids_BS = prompts()["input_ids"].clamp(min=3)
    with torch.no_grad():
        first = model(ids_BS[:, :6], past_key_values=params)
        assert first.past_key_values is params
        second = model(ids_BS[:, 6:], past_key_values=first.past_key_values)
        expected = hf(ids_BS).logits
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), expected, rtol=0, atol=1e-4)


def test_objects_that_the_model_cannot_take_over(hf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_llama_hf_to_te(hf)
    ids = prompts()["input_ids"]
    used = params_for(model, TEInferenceParams, 2)
    used.sequences[0] = 5
    with pytest.raises(ValueError, match=r"with 1 sequences from other layers: call its reset\(\)"):
        model(ids, past_key_values=used)
    custom = params_for(model, TEInferenceParams, 2, custom_cache_manager=Manager)
    with pytest.raises(ValueError, match="custom_cache_manager=Manager"):
        model(ids, past_key_values=custom)
    small = params_for(model, TEInferenceParams, 1)
    with pytest.raises(ValueError, match="does not fit the cache with max_batch_size=1"):
        model(ids, past_key_values=small)
    monkeypatch.setattr(llama_te_core.compat.entry_points, "entry_points", lambda *, group: [])
    with pytest.raises(TypeError, match="pip install llama-te-infer"):
        model(ids, past_key_values=params_for(model, TEInferenceParams, 2))
