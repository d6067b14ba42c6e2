"""Fixtures of the GPU tests: a check of TE's choice of attention, and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu.small_llama import MODEL


@pytest.fixture
def fused_attention() -> Iterator[None]:
    """Fail unless TE ran its fused (cuDNN) attention: with a fallback the test would check something else."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = dot_product_attention._attention_backends
    chosen["attention_params"] = None  # TE chooses afresh
    chosen["use_fused_attention"] = None
    yield
    assert chosen["use_fused_attention"], f"TE chose {chosen}"
    assert not chosen["use_flash_attention"], f"TE chose {chosen}"


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a transformers Llama in float32 on the GPU."""

    def make(**fields: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**{**MODEL, **fields}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model.eval()

    return make
