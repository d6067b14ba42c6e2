"""The real model: SmolLM2-135M-Instruct in the TE layout writes the same text as in transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_infer import inference_params_for

QUESTIONS = ["Why is the sky blue?", "Name three fruits.", "What is the capital of France, and what is it known for?"]
NEW = 24
OPTIONS = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def inputs(smollm2: PreTrainedModel, smollm2_tokenizer: Any) -> dict[str, torch.Tensor]:
    """Three questions as chats, left-padded."""
    if smollm2_tokenizer.pad_token is None:  # older transformers do not read it from a GGUF file
        smollm2_tokenizer.pad_token = smollm2_tokenizer.decode(smollm2.generation_config.eos_token_id)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encoded = smollm2_tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert (encoded["attention_mask"][:, 0] == 0).any(), "no row is padded"
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def models_te(smollm2: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The models in both formats."""
    thd = convert_llama_hf_to_te(smollm2)
    bshd = convert_llama_hf_to_te(smollm2, attn_input_format="bshd")
    assert (thd.config.attn_input_format, bshd.config.attn_input_format) == ("thd", "bshd")
    return {"thd": thd, "bshd": bshd}


@pytest.fixture(scope="module")
def greedy(smollm2: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return smollm2.generate(**inputs, **OPTIONS)


@pytest.fixture(scope="module")
def beams(smollm2: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return smollm2.generate(**inputs, **OPTIONS, num_beams=4)


@pytest.fixture(scope="module")
def second_turn(
    smollm2: PreTrainedModel, smollm2_tokenizer: Any, inputs: dict[str, torch.Tensor], greedy: torch.Tensor
) -> dict[str, Any]:
    """The chats so far, one row with padding behind its end, and another question; with transformers' text."""
    ends = "<|im_end|>\n<|im_start|>user\nSay it in other words.<|im_end|>\n<|im_start|>assistant\n"
    new_S = smollm2_tokenizer(ends, return_tensors="pt")["input_ids"][0]
    columns = inputs["input_ids"].shape[1]
    is_end_BC = (greedy[:, columns:] == smollm2.generation_config.eos_token_id).long()
    text_mask_BC = (is_end_BC.cumsum(1) - is_end_BC == 0).long()
    assert (text_mask_BC == 0).any(), "no chat has padding behind its end"
    turn = {
        "input_ids": torch.cat((greedy, new_S.expand(3, -1)), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], text_mask_BC, torch.ones(3, len(new_S)).long()), dim=1),
        "max_new_tokens": 12,
        "do_sample": False,
    }
    return {"turn": turn, "width": len(new_S) + 1, "expected": smollm2.generate(**turn)}


def test_the_round_trip_is_bitwise_equal(smollm2: PreTrainedModel, models_te: dict[str, PreTrainedModel]) -> None:
    back = convert_llama_te_to_hf(models_te["thd"])
    expected, result = smollm2.state_dict(), back.state_dict()
    assert list(result) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(result[name].view(torch.int32), tensor.view(torch.int32)), name
    assert back.lm_head.weight is back.model.embed_tokens.weight


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_logits(
    smollm2: PreTrainedModel,
    models_te: dict[str, PreTrainedModel],
    inputs: dict[str, torch.Tensor],
    attn_input_format: str,
) -> None:
    """As near to float64 as transformers.

    How far both are apart depends on the CPU: on most the largest difference is less than 1e-4, on one it is 1.4e-4.
    """
    with torch.no_grad():
        exact_BSV = copy.deepcopy(smollm2).double()(**inputs).logits
        logits = {
            name: model(**inputs).logits
            for name, model in (("theirs", smollm2), ("ours", models_te[attn_input_format]))
        }
    is_text_BS = inputs["attention_mask"].bool()
    distances = {name: (logits_BSV - exact_BSV)[is_text_BS].norm().item() for name, logits_BSV in logits.items()}
    assert 0 < distances["ours"] < 1.5 * distances["theirs"] < 1e-5 * exact_BSV[is_text_BS].norm().item(), distances
    assert exact_BSV.abs().max() > 1


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_greedy_text(
    models_te: dict[str, PreTrainedModel],
    smollm2_tokenizer: Any,
    inputs: dict[str, torch.Tensor],
    greedy: torch.Tensor,
    attn_input_format: str,
    is_paged: bool,
) -> None:
    model = models_te[attn_input_format]
    cache = inference_params_for(model, batch_size=3, max_length=128, is_paged=is_paged)
    result = model.generate(**inputs, **OPTIONS, past_key_values=cache)
    assert smollm2_tokenizer.batch_decode(result) == smollm2_tokenizer.batch_decode(greedy)
    assert result.tolist() == greedy.tolist()
    assert "Paris" in smollm2_tokenizer.decode(result[2])


@pytest.mark.parametrize(("attn_input_format", "is_paged"), [("thd", True), ("bshd", False)])
def test_beam_search_text(
    models_te: dict[str, PreTrainedModel],
    inputs: dict[str, torch.Tensor],
    greedy: torch.Tensor,
    beams: torch.Tensor,
    attn_input_format: str,
    is_paged: bool,
) -> None:
    model = models_te[attn_input_format]
    cache = inference_params_for(model, batch_size=3, max_length=128, num_beams=4, is_paged=is_paged)
    result = model.generate(**inputs, **OPTIONS, num_beams=4, past_key_values=cache)
    assert result.tolist() == beams.tolist()
    assert result.tolist() != greedy.tolist(), "beams found nothing else, so this shows little"


@pytest.mark.parametrize(("attn_input_format", "is_paged"), [("thd", False), ("bshd", True)])
def test_a_second_turn_continues_the_cache(
    models_te: dict[str, PreTrainedModel],
    inputs: dict[str, torch.Tensor],
    second_turn: dict[str, Any],
    attn_input_format: str,
    is_paged: bool,
) -> None:
    model = models_te[attn_input_format]
    cache = inference_params_for(model, batch_size=3, max_length=192, is_paged=is_paged)
    model.generate(**inputs, **OPTIONS, past_key_values=cache)
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    result = model.generate(**second_turn["turn"], past_key_values=cache)
    hook.remove()
    assert widths[0] == second_turn["width"], "the second turn read the whole text again"
    assert result.tolist() == second_turn["expected"].tolist()
