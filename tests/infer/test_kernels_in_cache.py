"""A cache with the compiled operators against the same cache in plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import InferenceParams, inference_params_for
from llama_te_infer.ops import library

ROWS, LENGTH, KV_HEADS, GROUP, DIM = 4, 48, 2, 3, 32


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Iterator[None]]:
    def switch_off() -> None:
        monkeypatch.setattr(library, "available", lambda device_type: False)

    return switch_off


def make_cache(dtype: torch.dtype, is_paged: bool) -> InferenceParams:
    pages = {"is_paged": True, "page_size": 16, "total_num_pages": ROWS * LENGTH // 16} if is_paged else {}
    return InferenceParams(ROWS, LENGTH, KV_HEADS, DIM, dtype, device="cpu", **pages)


def angles() -> torch.Tensor:
    half_PD = torch.outer(torch.arange(64.0), torch.logspace(0, -3, DIM // 2))
    return torch.cat((half_PD, half_PD), -1)[:, None, None]


def steps(cache: InferenceParams, qkv_format: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Run prompts of different lengths, single tokens and a reorder; return all results."""
    generator = torch.Generator().manual_seed(4)
    table = angles()
    results = []
    for lengths in ([7, 1, 20], [1, 1, 1], [2, 0, 5], [1, 1, 1]):
        width = max(lengths)
        tokens = sum(lengths) if qkv_format == "thd" else 3 * width
        shape = (tokens,) if qkv_format == "thd" else (3, width)
        qkv = torch.randn(*shape, KV_HEADS, GROUP + 2, DIM, generator=generator).to(dtype)
        cache.pre_step(OrderedDict(enumerate(lengths)))
        for layer in (1, 2):
            query = cache.append_rope(layer, qkv * layer, table, qkv_format)
            if qkv_format == "bshd":  # values at padding are unspecified
                place = torch.arange(width) < torch.tensor(lengths)[:, None]
                query = query[place]
            results.append(query)
        cache.reorder_cache(torch.tensor([2, 0, 2]))
        for layer in (1, 2):
            for tensor in cache.keys_and_values(layer):
                results += [tensor[row, :length] for row, length in enumerate(cache.sequences.values())]
    return results


@pytest.mark.parametrize("is_paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("qkv_format", ["thd", "bshd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_plain_pytorch_agree(dtype, qkv_format, is_paged, without_kernels) -> None:
    assert library.available("cpu"), "the extension is not built: install the package"
    compiled = steps(make_cache(dtype, is_paged), qkv_format, dtype)
    without_kernels()
    plain = steps(make_cache(dtype, is_paged), qkv_format, dtype)
    # bfloat16: plain PyTorch rounds the cosine, the sine and each product, 2^-8 of a number of size 4 or so each.
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for x, y in zip(compiled, plain, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance / 4)


def test_heads_that_the_kernels_do_not_take(without_kernels) -> None:
    cache = InferenceParams(2, 8, 1, 8, torch.float32, device="cpu")
    cache.pre_step(OrderedDict([(0, 3)]))
    qkv = torch.randn(3, 1, 3, 8)
    query = cache.append_rope(1, qkv, torch.zeros(8, 1, 1, 8), "thd")
    assert torch.equal(query, qkv[:, :, 0])
    assert torch.equal(cache.keys_and_values(1)[0][0], qkv[:, :, 1])


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["rows", "pages"])
def test_generate_is_the_same_without_kernels(attn_input_format, is_paged, tiny_llama, without_kernels) -> None:
    hf: PreTrainedModel = tiny_llama()
    te = convert_llama_hf_to_te(hf, attn_input_format=attn_input_format)
    torch.manual_seed(0)
    ids = torch.randint(3, 257, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": 3}

    def text() -> list[list[int]]:
        cache = inference_params_for(te, batch_size=2, max_length=32, num_beams=3, is_paged=is_paged, page_size=8)
        return te.generate(ids, past_key_values=cache, **options).tolist()

    wanted = hf.generate(ids, **options).tolist()
    assert text() == wanted
    without_kernels()
    assert text() == wanted
