"""A checkpoint with `tie_word_embeddings=true` and a head of its own: its logits are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from llama_te_convert import convert_checkpoint, convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_convert.cli import main
from llama_te_core import NVLlamaForCausalLM

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def folder(tiny_llama, tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1))
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "hf"


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def test_on_disk_and_in_memory(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oracle = LlamaForCausalLM.from_pretrained(folder)
    wanted = logits(oracle)
    tied = wanted - oracle.model(IDS).last_hidden_state @ oracle.model.embed_tokens.weight.T
    assert tied.abs().max() > 1  # the embeddings would give other logits

    convert_checkpoint(str(folder), tmp_path / "te", to_te=True)
    convert_checkpoint(str(tmp_path / "te"), tmp_path / "back", to_te=False)
    in_memory = convert_llama_hf_to_te(oracle)
    in_memory.save_pretrained(tmp_path / "saved")
    models = [NVLlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("te", "saved")]
    for model in (in_memory, *models):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
        assert model.config.tie_word_embeddings is False
    for model in (convert_llama_te_to_hf(in_memory), LlamaForCausalLM.from_pretrained(tmp_path / "back")):
        assert torch.equal(logits(model), wanted)
        assert model.config.tie_word_embeddings is False
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("te", "saved"))
    assert one == other
    assert main(["verify", str(folder), str(tmp_path / "te")]) == 0
    assert "set tie_word_embeddings to false there" in capsys.readouterr().out


def test_a_head_with_the_values_of_the_embeddings_stays_tied(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(str(folder), tmp_path / "te", to_te=True)
    model = NVLlamaForCausalLM.from_pretrained(tmp_path / "te")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
