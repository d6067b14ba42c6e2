"""Embeddings of prompts that share a pass, on Transformer Engine layers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel

from gpu.small_llama import LENGTHS, relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer.engine.pooling import PoolingEngine

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

NO_WORSE = 1.25  # than transformers in bfloat16


def embeddings_of(model: LlamaModel, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        last = [model(torch.tensor([row], device="cuda")).last_hidden_state[0, -1] for row in rows]
    return torch.stack(last).float().cpu()


def test_embeddings_are_as_close_as_those_of_transformers(
    make_llama: Callable[..., LlamaForCausalLM], fused_attention: None
) -> None:
    oracle = make_llama()
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 8192, (length,), generator=generator).tolist() for length in LENGTHS]
    exact = embeddings_of(oracle.model, rows)
    rounded = copy.deepcopy(oracle).bfloat16()
    theirs = embeddings_of(rounded.model, rows)
    engine = PoolingEngine(convert_llama_hf_to_te(rounded).model.eval(), None)
    ours = asyncio.run(engine.pool(rows))
    engine.close()
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert relative(mine, true) <= NO_WORSE * relative(other, true)
