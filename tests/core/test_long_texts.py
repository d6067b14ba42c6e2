"""The pieces of a long text have the tokens of the whole text, and tokenizers that promise none get the whole text."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fuzzing
from llama_te_core.data import long_texts
from llama_te_core.data.long_texts import encode_in_pieces
from llama_te_core.train.data.byte_tokenizer import byte_tokenizer

pytestmark = pytest.mark.fuzz

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
LLAMA_4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "a", "B", "the", "don't", "I'LL", "x'", "é", "e\u0301", "\u0301", "中文", "字", "。", "，", "がば", "\u3099", "ſ",
    "𐐷", "🙂", "👩\u200d👧", "1", "12345", "३", ".", "...", "/", "-", "\u2581", "\u00a0", "\u3000", "\0", "\ufffd",
    "\r\n", "\r", "\n", "\n\n\n", "\t", " ", "  ", " " * 9, "<s>", "</s>", "<|im_end|>", "<|", "|>",
]  # fmt: skip
AT_CUTS = ["a b", "in the", " of the end", "a\nb", "中 文", "文。字，", "a </s>", "a  b", "a 1", "a\r\nb", "a 'll"]
TEXTS = st.lists(
    st.sampled_from(WORDS) | st.sampled_from(AT_CUTS) | st.sampled_from(AT_CUTS) | st.text(max_size=6),
    min_size=10,
    max_size=60,
).map("".join)
# Real words make tokens that are longer than a byte.
CORPUS = [line for module in (json, functools) for line in (module.__doc__ or "").splitlines()] + WORDS + AT_CUTS


def trained(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(
        CORPUS * 2, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], **options)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def of_bytes(*before: Any, normalizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False} | options)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    return trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def split(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def of_spaces(normalizer: Any, division: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer such as Llama 2's: "▁" for spaces, and bytes for characters that it does not know."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # tokens begin with ▁, or have none
    backend.train_from_iterator(
        CORPUS * 2, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"])
    )
    state = json.loads(backend.to_str())["model"]
    vocab = state["vocab"] | {f"<0x{byte:02X}>": len(state["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in state["merges"]]
    known = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **options)
    backend = Tokenizer(known)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, division, decoders.ByteFallback()
    backend.add_special_tokens([AddedToken(each, normalized=False) for each in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def writes_spaces() -> Any:
    return normalizers.Replace(" ", "\u2581")


def prepends_space() -> Any:
    return normalizers.Sequence([normalizers.Prepend("\u2581"), writes_spaces()])


CUT: dict[str, Any] = {
    "GPT-2": lambda: of_bytes(use_regex=True),
    "digits": lambda: of_bytes(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "prefix": lambda: of_bytes(use_regex=True, add_prefix_space=True),
    "Llama 3": lambda: of_bytes(split(LLAMA_3)),
    "Qwen 2": lambda: of_bytes(split(QWEN_2), normalizer=normalizers.NFC()),
    "Llama 4": lambda: of_bytes(split(LLAMA_4)),
    "Llama 2": lambda: of_spaces(prepends_space(), None),
    "spaces": lambda: of_spaces(writes_spaces(), None),
    "Metaspace, first": lambda: of_spaces(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Metaspace, always": lambda: of_spaces(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
}


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 5)


@functools.cache
def cut(name: str) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = CUT[name]()
    return made


def whole(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens


def check(tokenizer: Any, text: str) -> int:
    pieces = list(encode_in_pieces(text, tokenizer))
    assert [token for piece in pieces for token in piece] == whole(tokenizer, text)
    return len(pieces)


@pytest.mark.parametrize("name", CUT)
def test_pieces_have_the_tokens_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch, counts: Any) -> None:
    """Without the comparison at each cut, which would hide a cut that changes tokens."""
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 5)
    monkeypatch.setattr(long_texts, "_is_confirmed", lambda *_: True)
    pieces = []

    @settings(max_examples=200 * fuzzing.ROUNDS, deadline=None)
    @given(text=TEXTS)
    def run(text: str) -> None:
        pieces.append(check(cut(name), text))

    run()
    check(cut(name), "in the end of a long text there is a cut")
    assert sum(pieces) > 2 * len(pieces)
    counts(f"{name}: {len(pieces)} texts in {sum(pieces)} pieces with the tokens of the whole")


def test_pieces_of_smollm2(smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, counts: Any) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 5)
    monkeypatch.setattr(long_texts, "_is_confirmed", lambda *_: True)
    pieces = []

    @settings(max_examples=300 * fuzzing.ROUNDS, deadline=None)
    @given(text=TEXTS)
    def run(text: str) -> None:
        pieces.append(check(smollm2_tokenizer, text))

    run()
    assert sum(pieces) > 2 * len(pieces)
    counts(f"SmolLM2: {len(pieces)} texts in {sum(pieces)} pieces with the tokens of the whole")


WHOLE: dict[str, Any] = {
    "bytes": byte_tokenizer,
    "another expression": lambda: of_bytes(split(r"\p{L}+ \p{L}+")),
    "an expression behind bytes": lambda: of_bytes(pre_tokenizers.ByteLevel(use_regex=False), split(LLAMA_3)),
    "another normalizer": lambda: of_bytes(use_regex=True, normalizer=normalizers.Prepend("a")),
    "whole words of the vocabulary": lambda: of_spaces(prepends_space(), None, ignore_merges=True),
    "an end of words": lambda: of_spaces(prepends_space(), None, end_of_word_suffix="</w>"),
    "dropout": lambda: of_spaces(prepends_space(), None, dropout=0.5),
    "no space": lambda: of_spaces(None, None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tokenizers_whose_tokens_could_change_get_the_whole_text(name: str, short_pieces: None) -> None:
    text = "in the end of a long text there is no cut"
    assert len(list(encode_in_pieces(text, WHOLE[name]()))) == 1


ADDED = {
    "a space": AddedToken("the end"),
    "a word": AddedToken("end"),
    "a first letter": AddedToken("end)"),
    "a last letter": AddedToken("(end"),
    "a normal letter": AddedToken("\u212a)"),
    "a single word": AddedToken("(", single_word=True),
    "a written space": AddedToken("\u2581("),
    "one space": AddedToken(" "),
}


@pytest.mark.parametrize("token", ADDED.values(), ids=ADDED)
@pytest.mark.parametrize("name", ["GPT-2", "Llama 2"])
def test_an_added_token_that_could_lie_at_a_cut_keeps_texts_whole(
    name: str, token: AddedToken, short_pieces: None
) -> None:
    tokenizer = CUT[name]()
    text = "in the end of a long text there is no cut"
    assert len(list(encode_in_pieces(text, tokenizer))) > 3
    tokenizer.add_tokens([token])
    assert len(list(encode_in_pieces(text, tokenizer))) == 1


def test_a_token_across_words_keeps_texts_whole(short_pieces: None) -> None:
    tokenizer = cut("Llama 2")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["e\u2581"] = len(vocab)
    state["model"]["merges"].insert(0, ["e", "\u2581"])
    across = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    text = "in the end the text is whole"
    assert len(list(encode_in_pieces(text, tokenizer))) > 1
    assert list(encode_in_pieces(text, across)) == [whole(across, text)]


def test_a_tokenizer_with_its_own_encode_is_compared_at_each_cut(short_pieces: None) -> None:
    class Reversing(PreTrainedTokenizerFast):
        def encode(self, text: Any, *args: Any, **kwargs: Any) -> list[int]:
            return super().encode(text[::-1], *args, **kwargs)

    tokenizer = Reversing(tokenizer_object=cut("GPT-2").backend_tokenizer)
    text = "in the end of a long text there is no cut"
    assert list(encode_in_pieces(text, tokenizer)) == [whole(tokenizer, text)]


def test_a_saved_tokenizer_is_cut_as_before(tmp_path: Any, short_pieces: None) -> None:
    cut("Llama 3").save_pretrained(tmp_path)
    assert check(AutoTokenizer.from_pretrained(tmp_path), "in the end of a long text there is a cut") > 3
