"""Comparison of the logits that two checkpoints compute."""

import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.errors import CheckpointError
from llama_te_convert.verify import logits
from llama_te_convert.verify.logits import compare_logits

WORDS = ["<unk>", "a", "cat", "sat", "on", "the", "mat"]


@pytest.fixture
def folders(tiny_llama, tmp_path):
    """A model in both layouts; the first folder has a tokenizer."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "hf")
    convert_llama_hf_to_te(model).save_pretrained(tmp_path / "te")
    save_tokenizer(tmp_path / "hf", WORDS)
    return tmp_path / "hf", tmp_path / "te"


def save_tokenizer(folder, words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def test_logits_of_both_layouts_are_the_same(folders):
    hf, te = folders
    for a, b in ((hf, te), (te, hf)):
        result = compare_logits(a, b, "the cat sat on a mat")
        assert (result.tokens, result.device, result.a_dtype, result.b_dtype) == (6, "cpu", "float32", "float32")
        assert result.same and result.same_tokens == 6
        assert result.largest < 2e-5  # logits of up to about 10 in float32; 2e-6 was measured
        (line,) = result.lines()
        assert "logits of 6 tokens, in float32 on cpu: largest difference " in line
        assert line.endswith("most likely token the same at all 6 positions")
    again = compare_logits(hf, hf, "the cat")
    assert (again.largest, again.position, again.same_tokens) == (0.0, 0, 2)
    assert json.loads(json.dumps(again.to_dict()))["same"] is True


def test_logits_that_differ_from_a_position_on(folders):
    """Only the last word's embedding is changed, so no earlier position can differ."""
    hf, te = folders
    tensors = load_file(te / "model.safetensors")
    tensors["model.embed_tokens.weight"][WORDS.index("mat")] *= -1
    save_file(tensors, te / "model.safetensors", metadata={"format": "pt"})
    result = compare_logits(hf, te, "the cat sat on a mat")
    assert (result.same, result.same_tokens, result.first_other, result.position) == (False, 5, 5, 5)
    assert result.largest > 1
    assert "the same at 5 of 6 positions, first another one at 5" in result.lines()[0]


def test_logits_that_are_no_numbers(folders):
    hf, te = folders
    tensors = load_file(te / "model.safetensors")
    tensors["lm_head.weight"][3] = math.nan
    save_file(tensors, te / "model.safetensors", metadata={"format": "pt"})
    result = compare_logits(hf, te, "the cat")
    assert result.largest == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["largest"] == "inf"
    save_tokenizer(te, WORDS)
    assert compare_logits(te, te, "the cat").largest == 0


def test_models_run_in_their_own_dtype_and_one_at_a_time(folders, tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama().to(torch.bfloat16)
    convert_llama_hf_to_te(model, layer_precision=["fp8"] * 3).save_pretrained(tmp_path / "half")
    load, loaded = logits._model, []

    def watched(path):
        assert all(reference() is None for reference in loaded)
        model = load(path)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(logits, "_model", watched)
    result = compare_logits(tmp_path / "half", folders[0], "the cat sat")
    assert (result.a_dtype, result.b_dtype) == ("bfloat16", "float32")
    assert len(loaded) == 2
    assert "in bfloat16 and float32 on cpu" in result.lines()[0]
    assert 0 < result.largest < 0.5  # bfloat16 has 8 bits, the logits are about 10; 0.1 was measured


def test_logits_without_a_tokenizer_or_a_text_are_an_error(folders):
    hf, te = folders
    with pytest.raises(CheckpointError, match=r"neither .*/te nor .*/te has a tokenizer: copy .*tokenizer.json"):
        compare_logits(te, te, "the cat")
    with pytest.raises(CheckpointError, match=r"the text '' has no tokens: give a longer one"):
        compare_logits(hf, te, "")
    (hf / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .*/hf cannot be used: "):
        compare_logits(hf, te, "the cat")


def test_models_that_do_not_go_together_are_an_error(folders, tiny_llama, tmp_path):
    hf, te = folders
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"has logits for 257 tokens, but .*/small for 100"):
        compare_logits(hf, tmp_path / "small", "the cat")
    save_tokenizer(hf, [*(f"w{i}" for i in range(300)), "<unk>", "cat"])
    with pytest.raises(CheckpointError, match=r"the text has the token 301, but .*/hf has 257 tokens"):
        compare_logits(hf, te, "cat")


def test_what_cannot_be_loaded_as_a_language_model_is_an_error(folders, tiny_llama, tmp_path):
    hf, te = folders
    tiny_llama(LlamaModel).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"/base lacks lm_head.weight \(and 0 more\): logits need a complete"):
        compare_logits(hf, tmp_path / "base", "the cat")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"/gpt2 has the model_type 'gpt2': give one of llama, "):
        compare_logits(hf, tmp_path / "gpt2", "the cat")
    (te / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"/te cannot be loaded as a model: "):
        compare_logits(hf, te, "the cat")


def test_a_model_that_does_not_fit_into_memory_is_an_error(folders, monkeypatch):
    class TooLarge(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 TiB.\nmore")

    monkeypatch.setattr(logits, "_model", lambda path: TooLarge(LlamaConfig(**TINY)))
    with pytest.raises(CheckpointError, match=r"/hf cannot be run on cpu: out of memory. Tried to allocate 1 TiB.$"):
        compare_logits(*folders, "the cat")


def test_a_real_checkpoint(smollm2, smollm2_file, smollm2_te, monkeypatch):
    # The GGUF file has the tokenizer. Its weights are in memory already, and would take a quarter of a minute to read.
    load = logits._model
    monkeypatch.setattr(logits, "_model", lambda path: smollm2 if path == smollm2_file else load(path))
    result = compare_logits(smollm2_file, smollm2_te, "The capital of France is Paris.")
    assert result.same and result.tokens == 7
    assert result.largest < 1e-3  # logits of up to 30 in float32; 7e-5 was measured
