"""Arguments of a forward pass that transformers' Llama knows: they have its effect, or are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te

IDS_BS = torch.randint(3, 257, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def te(hf: PreTrainedModel) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True: the layers compute attention in fused kernels"),
        ({"is_causal": False}, "is_causal=False: the layers compute causal attention only"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, r"attention_mask has shape \[2, 1, 9, 9\].*4D masks"),
    ],
)
def test_what_the_layers_cannot_do_is_refused(te: PreTrainedModel, arguments: dict[str, Any], message: str) -> None:
    for model in (te, te.model):
        with pytest.raises(ValueError, match=message):
            model(input_ids=IDS_BS, **arguments)


def test_attentions_of_the_configuration_are_refused(te: PreTrainedModel) -> None:
    te.set_attn_implementation("eager")
    te.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        te(input_ids=IDS_BS)
    te(input_ids=IDS_BS, output_attentions=False)


def test_unknown_arguments_warn_once(te: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="attn_mask is not an argument of the model's forward pass"):
        te(input_ids=IDS_BS, attn_mask=torch.ones(2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        te(input_ids=IDS_BS, attn_mask=torch.ones(2, 9))
        te(input_ids=IDS_BS, token_type_ids=IDS_BS, num_items_in_batch=3, cache_position=None, some_option=None)
        assert isinstance(te(input_ids=IDS_BS, return_dict=False), tuple)


@pytest.mark.parametrize("selection", [True, -1, [0, -2], [7]])
def test_some_hidden_states(hf: PreTrainedModel, te: PreTrainedModel, selection: Any) -> None:
    expected, found = (model(input_ids=IDS_BS, output_hidden_states=selection).hidden_states for model in (hf, te))
    assert [state is None for state in found] == [state is None for state in expected]
    for its_state, state in zip(found, expected, strict=True):
        if state is not None:
            torch.testing.assert_close(its_state, state, rtol=0, atol=1e-4)


def test_another_ignored_label(hf: PreTrainedModel, te: PreTrainedModel) -> None:
    labels = IDS_BS.clone()
    labels[:, 3:6] = 7
    losses = [model(input_ids=IDS_BS, labels=labels, ignore_index=7).loss for model in (hf, te)]
    torch.testing.assert_close(losses[1], losses[0])
    assert not torch.isclose(losses[1], te(input_ids=IDS_BS, labels=labels).loss)
