"""Tokenizers whose tokens are bytes, so that a tiny model can write any text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def tokenizer_of_bytes(*special_tokens: str) -> Tokenizer:
    """Return a tokenizer of 256 bytes, and of special tokens from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the special tokens 256 to 258. It writes BOS before each text, as Llama 3's does."""
    tokenizer = tokenizer_of_bytes("<|bos|>", "<|end|>", "<|pad|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 256)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", pad_token="<|pad|>", chat_template=template
    )
