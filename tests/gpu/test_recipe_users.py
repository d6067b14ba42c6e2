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
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.compat.transformer_engine import is_quantized, make_recipe, transformer_engine
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


# --- Models that are built without a device ---------------------------------------------------------------------------


def config_of(**fields: Any) -> NVLlamaConfig:
    return NVLlamaConfig(**{**MODEL, "num_hidden_layers": 2, "dtype": torch.bfloat16, **fields})


def check_a_step(model: NVLlamaForCausalLM) -> None:
    ids = torch.randint(3, MODEL["vocab_size"], (2, 64), device="cuda")
    loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.cuda.synchronize()  # an illegal memory access would show here


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_a_model_is_built_on_the_gpu_in_the_configurations_dtype(attn_input_format: str) -> None:
    model = NVLlamaForCausalLM(config_of(attn_input_format=attn_input_format))
    assert {(x.device.type, x.dtype) for x in model.parameters()} == {("cuda", torch.bfloat16)}
    assert float(model.model.embed_tokens.weight.float().std()) == pytest.approx(MODEL["initializer_range"], rel=0.02)
    check_a_step(model)


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_weights_by_the_configuration(name: str, tied: bool) -> None:
    config = config_of(layer_precision=["fp8"] * 2, use_quantized_model_init=True, tie_word_embeddings=tied)
    model = NVLlamaForCausalLM(config, fp8_recipe=make_recipe(name)).to("cuda")
    assert is_quantized(model.model.layers[1].layernorm_mlp.fc1_weight)
    check_a_step(model)


@pytest.mark.parametrize("on_meta", [False, True], ids=["built there", "meta"])
def test_quantized_weights_by_the_users_context(on_meta: bool, tmp_path) -> None:
    te, recipe = transformer_engine(), make_recipe("Float8CurrentScaling")
    with te.quantized_model_init(enabled=True, recipe=recipe):
        if on_meta:
            with torch.device("meta"):
                model = NVLlamaForCausalLM(config_of())
        else:
            model = NVLlamaForCausalLM(config_of())
    if on_meta:
        model.init_empty_weights()
    model.to("cuda")
    assert is_quantized(model.model.layers[1].layernorm_mlp.fc1_weight)
    with te.autocast(enabled=True, recipe=recipe):
        check_a_step(model)
    # It saves and loads as ordinary weights, and quantizes them again within that context.
    model.save_pretrained(tmp_path)
    dense = NVLlamaForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    weight = model.model.layers[1].layernorm_mlp.fc1_weight
    assert torch.equal(dense.model.layers[1].layernorm_mlp.fc1_weight, weight.dequantize())
    with te.quantized_model_init(enabled=True, recipe=recipe):
        again = NVLlamaForCausalLM.from_pretrained(tmp_path, device_map="cuda")
        with pytest.raises(RuntimeError, match="is on cpu"):
            NVLlamaForCausalLM.from_pretrained(tmp_path)
    assert is_quantized(again.model.layers[1].layernorm_mlp.fc1_weight)
    assert torch.equal(again.model.layers[1].layernorm_mlp.fc1_weight.dequantize(), weight.dequantize())


def test_a_build_on_the_cpu_within_the_users_context_is_refused_before_any_kernel() -> None:
    with (
        transformer_engine().quantized_model_init(enabled=True, recipe=make_recipe("Float8CurrentScaling")),
        torch.device("cpu"),
        pytest.raises(RuntimeError, match="needs the model to be built on a GPU"),
    ):
        NVLlamaForCausalLM(config_of())
    torch.cuda.synchronize()
    check_a_step(NVLlamaForCausalLM(config_of()))


def test_weights_on_the_host_and_an_input_on_the_gpu_are_refused() -> None:
    with torch.device("cpu"):
        model = NVLlamaForCausalLM(config_of())
    hidden = torch.zeros(1, 16, MODEL["hidden_size"], device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="weights are on cpu, but its input is on cuda"):
        model(inputs_embeds=hidden, attention_mask=torch.ones(1, 16, device="cuda", dtype=torch.long))
    torch.cuda.synchronize()
    check_a_step(model.to("cuda"))
