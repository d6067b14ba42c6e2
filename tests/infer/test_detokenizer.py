"""Text that comes token by token is the text of all tokens, cut where a stop string begins."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.decoders import Metaspace
from transformers import PreTrainedTokenizerFast

from llama_te_infer.engine.detokenizer import Detokenizer

SETTINGS = settings(max_examples=300, deadline=None, database=None, derandomize=True)
TEXTS = st.text(st.sampled_from("abé€😀"), max_size=12)


class ByteTokenizer:
    """A token is a byte; 256 is special, and reads "<end>"."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if not skip_special_tokens and 256 in ids:
            assert ids == [256], "special tokens are pieces of their own"
            return "<end>"
        return bytes(token for token in ids if token < 256).decode(errors="replace")


@SETTINGS
@given(text=TEXTS, special=st.integers(0, 40))
def test_characters_of_several_tokens_come_whole(text: str, special: int) -> None:
    detokenizer, taken = Detokenizer(ByteTokenizer()), ""
    tokens = list(text.encode())
    tokens.insert(special, 256)
    for token in tokens:
        detokenizer.add(token)
        taken += detokenizer.take(False)
        assert text.startswith(taken)
        assert "\N{REPLACEMENT CHARACTER}" not in taken
    detokenizer.end()
    assert taken == detokenizer.text == text


@SETTINGS
@given(data=st.binary(max_size=10))
def test_bytes_that_are_no_text_come_at_the_end(data: bytes) -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    for token in data:
        detokenizer.add(token)
    detokenizer.end()
    assert detokenizer.take(True) == detokenizer.text == data.decode(errors="replace")


def test_bytes_that_are_never_text_are_decoded_once() -> None:
    tokenizer, decoded = ByteTokenizer(), 0

    class Counting(ByteTokenizer):
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal decoded
            decoded += len(ids)
            return super().decode(ids, skip_special_tokens)

    data = [0x80] * 1000 + list("é".encode())
    detokenizer, taken = Detokenizer(Counting()), ""
    for token in data:
        detokenizer.add(token)
        taken += detokenizer.take(False)
    assert taken == detokenizer.text == tokenizer.decode(data, True)
    assert decoded < 40 * len(data)


@SETTINGS
@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("abé€😀"), min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_a_text_before_them(text: str, stop: list[str]) -> None:
    detokenizer, taken, read = Detokenizer(ByteTokenizer(), stop), "", b""
    for token in text.encode():
        detokenizer.add(token)
        read += bytes([token])
        if detokenizer.stopped_by is not None:
            break
        taken += detokenizer.take(False)
    detokenizer.end()
    taken += detokenizer.take(True)
    # The first token that completes a stop string decides; if it completes several, the one that begins first.
    ends = [end for end in range(len(text) + 1) if any(string in text[:end] for string in stop)]
    if not ends:
        assert detokenizer.stopped_by is None
        assert taken == text
        return
    seen = text[: ends[0]]
    assert read.decode() == seen
    assert detokenizer.stopped_by in stop
    assert taken == detokenizer.text == seen[: min(seen.find(string) for string in stop if string in seen)]
    assert seen == taken + seen[seen.index(str(detokenizer.stopped_by)) :]


@SETTINGS
@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("abé€😀"), min_size=1, max_size=4), max_size=3))
def test_texts_with_their_stop_string(text: str, stop: list[str]) -> None:
    without, included = Detokenizer(ByteTokenizer(), stop), Detokenizer(ByteTokenizer(), stop, include_stop=True)
    taken = ""
    for token in text.encode():
        without.add(token)
        included.add(token)
        taken += included.take(False)
        if without.stopped_by is not None:
            break
    assert included.stopped_by == without.stopped_by
    included.end()
    taken += included.take(True)
    assert taken == included.text == without.text + (without.stopped_by or "") or without.stopped_by is None


def test_a_stop_string_counts_only_when_the_text_may_end() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ["ab", "cd"])
    for token in b"xab":
        detokenizer.add(token, may_stop=False)
    for token in b"cd":
        detokenizer.add(token)
    assert detokenizer.text == "xab"
    assert detokenizer.stopped_by == "cd"


def test_spaces_between_words_stay() -> None:
    """Such tokenizers write no space before the first token of a text."""
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    words.decoder = Metaspace()
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=words))
    pieces = []
    for token in (0, 1, 2, 1):
        detokenizer.add(token)
        pieces.append(detokenizer.take(False))
    assert pieces == ["one", " two", "s", " two"]


@pytest.mark.parametrize("is_whole", [False, True])
def test_without_a_tokenizer_there_is_no_text(is_whole: bool) -> None:
    detokenizer = Detokenizer()
    detokenizer.add(1)
    detokenizer.end()
    assert detokenizer.take(is_whole) == ""
