"""Call sequences of NVIDIA's Llama 3 recipe: caches of Transformer Engine's class, and models built without a device.

A text with TE's cache must equal the text with a cache of our own, token for token: both run the same kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_engine.pytorch.attention import InferenceParams as TEInferenceParams

from gpu.small_llama import MODEL
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import InferenceParams, inference_params_for

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]
NEW = 16


class OwnParams(TEInferenceParams):
    """As the recipe derives its class."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.sequences.values(), default=0)


@pytest.mark.parametrize("cls", [TEInferenceParams, OwnParams])
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("beams", [1, 3])
def test_transformer_engines_own_cache_in_generate(cls, is_paged: bool, beams: int, make_llama) -> None:
    te = convert_llama_hf_to_te(make_llama(eos_token_id=None).bfloat16())
    config = te.config
    pages = {"is_paged": True, "page_size": 16, "total_num_pages": 2 * beams * 16} if is_paged else {}
    params = cls(
        max_batch_size=2 * beams,
        max_sequence_length=256,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.hidden_size // config.num_attention_heads,
        dtype=torch.bfloat16,
        qkv_format="thd",
        max_ctx_len=256,
        **pages,
    )
    for layer_number in range(1, config.num_hidden_layers + 1):
        params.allocate_memory(layer_number)
    ids_BS = torch.randint(3, MODEL["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(2)).cuda()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :7] = 0
    options: dict[str, Any] = {
        "input_ids": ids_BS.masked_fill(mask_BS == 0, 0),
        "attention_mask": mask_BS,
        "max_new_tokens": NEW,
        "num_beams": beams,
        "do_sample": False,
    }
    ours = inference_params_for(te, batch_size=2, num_beams=beams, max_length=256, is_paged=is_paged, page_size=16)
    expected = te.generate(**options, past_key_values=ours)
    for _ in range(2):
        output = te.generate(**options, past_key_values=params, return_dict_in_generate=True)
        assert output.past_key_values is params
        assert isinstance(params, InferenceParams) and isinstance(params, cls)
        assert torch.equal(output.sequences, expected)
        params.reset()
