"""Tokenizing a long text in pieces, where the pieces certainly have the tokens of the whole text.

For each token of a text, tokenizers keep its string, its place in the text and more: 100 to 200 times the memory of the
text. So a long text is cut into pieces. A cut lies where the tokenizer itself separates two words, whatever is before
and behind. This module knows two kinds of tokenizers with such places:

- Byte-level BPE, such as Llama 3's: a regular expression divides the text into words from left to right. The known
  expressions never go on from a letter to a space, a line feed or a full stop, and look behind at nothing.
- BPE of texts with "▁" for spaces, such as Llama 2's: it does not divide the text, or divides it in front of each "▁".
  Merges cannot cross from a letter to "▁" where no token of the vocabulary has "▁" behind another character.

Texts for other tokenizers stay whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..compat.tokenizers import steps_of

PIECE_CHARACTERS = 2**18
_SPACE = "\u2581"
_WINDOW = 64  # characters before and behind a cut whose tokens confirm it

# Latin letters and ideographs that every version of Unicode counts as letters, and no normalization changes.
_LETTER = "A-Za-z\u4e00-\u9fa5"
_BEFORE_WORD = re.compile(f"(?<=[{_LETTER}])[ \n\u3002\uff0c]")
_BEFORE_SPACE = re.compile(f"(?<=[{_LETTER}]) ")
_AT_SPACE = re.compile(f"(?<=[{_LETTER}]) (?=[{_LETTER}])")
# An added token that takes part in a cut, or makes one of its neighbours.
_IN_ADDED_TOKEN = re.compile(f"^[{_LETTER}\\s\u2581\u3002\uff0c]|[{_LETTER}]$|[{_LETTER}][\\s\u2581\u3002\uff0c]")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_EXPRESSIONS = frozenset(
    {
        # Llama 3, and with single digits Qwen 2
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
        # Llama 4
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        rf"{_CONTRACTIONS}?" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)


class _Cuts(NamedTuple):
    """Where a tokenizer's texts can be cut.

    Attributes:
        place: Matches behind the letter before a cut. The next piece begins with the match.
        drops_space: The next piece begins behind the space, since the tokenizer puts a space before each text.
    """

    place: re.Pattern[str]
    drops_space: bool = False


def encode_in_pieces(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens of a text, without those that a tokenizer adds at both ends, in lists of limited length.

    Args:
        text: The text.
        tokenizer: A tokenizer of transformers, or an object with its method `encode`. It yields one list for a text
            with at most `PIECE_CHARACTERS`, for a text without a place to cut, and where tokens could change at a cut.
    """
    cuts = _cuts_of(tokenizer) if len(text) > PIECE_CHARACTERS else None
    begin = 0
    while cuts is not None:
        match = cuts.place.search(text, begin + PIECE_CHARACTERS)
        while match is not None and not _is_confirmed(tokenizer, text, match.start(), cuts.drops_space):
            match = cuts.place.search(text, match.end())
        if match is None:
            break
        yield _encode(tokenizer, text[begin : match.start()])
        begin = match.start() + cuts.drops_space
    yield _encode(tokenizer, text[begin:])


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens


def _is_confirmed(tokenizer: Any, text: str, cut: int, drops_space: bool) -> bool:
    """Compare the tokens around a cut.

    They are equal for all tokenizers of `_cuts_of`, but a subclass may have another `encode`.
    """
    begin, end = max(0, cut - _WINDOW), cut + _WINDOW
    parts = (text[begin:cut], text[cut + drops_space : end])
    before, behind = (_encode(tokenizer, part) for part in parts)
    return before + behind == _encode(tokenizer, text[begin:end])


def _cuts_of(tokenizer: Any) -> _Cuts | None:
    """Return where texts can be cut for this tokenizer; None where its tokens could change at a cut."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or type(getattr(backend, "model", None)).__name__ != "BPE":
        return None
    if backend.model.dropout or not all(map(_is_apart, backend.get_added_tokens_decoder().values())):
        return None
    changes = [step for step in steps_of(backend.normalizer) if step["type"] != "NFC"]
    divisions = steps_of(backend.pre_tokenizer)
    if _divides_by_expression(divisions):
        has_prefix = any(step.get("add_prefix_space") for step in divisions)
        return None if changes else _Cuts(_BEFORE_SPACE if has_prefix else _BEFORE_WORD)
    writes_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends_space = {"type": "Prepend", "prepend": _SPACE}
    match divisions:
        case [{"type": "Metaspace", "replacement": "\u2581", "split": divides}] if not changes:
            return _Cuts(_AT_SPACE) if divides or _words_are_apart(backend) else None
        case [] if changes == [writes_spaces] and _words_are_apart(backend):
            return _Cuts(_AT_SPACE)
        case [] if changes == [prepends_space, writes_spaces] and _words_are_apart(backend):
            return _Cuts(_AT_SPACE, drops_space=True)
    return None


def _divides_by_expression(divisions: list[dict[str, Any]]) -> bool:
    """Whether a pre-tokenizer divides texts by a known expression, and the words into bytes last."""
    known = 0
    for step in divisions[:-1]:
        match step:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                if expression not in _EXPRESSIONS:
                    return False
                known += 1
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return bool(divisions) and divisions[-1]["type"] == "ByteLevel" and (known > 0 or divisions[-1]["use_regex"])


def _words_are_apart(backend: Any) -> bool:
    """Whether no token can begin before a space and end behind it, though the whole text is one word for BPE."""
    model = backend.model
    if model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return _SPACE in vocabulary and not any(_SPACE in token.lstrip(_SPACE) for token in vocabulary)


def _is_apart(token: Any) -> bool:
    """Whether an added token is found or not found at a cut as it is in the whole text."""
    contents = (token.content, unicodedata.normalize("NFC", token.content))
    return not token.single_word and not any(map(_IN_ADDED_TOKEN.search, contents))
