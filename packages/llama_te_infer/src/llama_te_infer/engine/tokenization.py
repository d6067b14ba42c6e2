"""Everything that the engine asks a tokenizer: the tokens of prompts, chats, stop strings and bad words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_te_core.compat.tokenizers import panics_as_errors
from llama_te_core.data.long_texts import PIECE_CHARACTERS, encode_in_pieces

from ..integers import as_integer
from ..sampling_params import SamplingParams, shown

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or a tokenizer's output for one text."""

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 4096  # of all stop strings together
MAX_BAD_WORDS, MAX_BAD_WORD_CHARACTERS = 256, 16_384

_WHAT_TO_PASS = "a text, a list of token ids, or the output of a tokenizer or of apply_chat_template"


# --- prompts ----------------------------------------------------------------------------------------------------------


def tokens_of_prompts(prompts: Any, tokenizer: Any | None, most: int | None = None) -> list[list[int]]:
    """Return the tokens of one prompt or several.

    Args:
        prompts: A text, token ids, a tensor or an array of token ids, a tokenizer's output for one text or several, or
            a list of these.
        tokenizer: A tokenizer of transformers, or `None`.
        most: The engine's `max_sequence_length`. A much longer text is refused before it is tokenized as a whole.

    Raises:
        ValueError: It is something else, or a text is too long.
    """
    if isinstance(prompts, str) or _is_encoding(prompts) or _is_array(prompts):
        return _rows(prompts, tokenizer, most)
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(_refusal("prompts", prompts))
    each = list(prompts)
    if each and all(as_integer(item) is not None for item in each):
        return _rows(each, tokenizer, most)
    return [tokens_of_prompt(prompt, tokenizer, most, f"prompts[{index}]") for index, prompt in enumerate(each)]


def tokens_of_prompt(prompt: Any, tokenizer: Any | None, most: int | None = None, name: str = "prompt") -> list[int]:
    """Return the tokens of one prompt.

    Args:
        prompt: A text, token ids, a tensor or an array of token ids, or a tokenizer's output for one text.
        tokenizer: A tokenizer of transformers, or `None`.
        most: The engine's `max_sequence_length`. A much longer text is refused before it is tokenized as a whole.
        name: The argument's name, for messages.

    Raises:
        ValueError: It is something else, several prompts, or a text that is too long.
    """
    rows = _rows(prompt, tokenizer, most, name)
    if len(rows) != 1:
        raise ValueError(f"{name} holds {len(rows)} prompts: give one, or pass all of them to generate.")
    return rows[0]


def _rows(prompt: Any, tokenizer: Any | None, most: int | None, name: str = "prompts") -> list[list[int]]:
    if isinstance(prompt, str):
        return [tokens_of_text(prompt, tokenizer, most, name)]
    if _is_encoding(prompt):
        rows = _nested(_as_lists(prompt["input_ids"], name, prompt))
        if prompt.get("attention_mask") is not None:
            masks = _nested(_as_lists(prompt["attention_mask"], name, prompt))
            if list(map(len, masks)) != list(map(len, rows)) or not all(
                real in (0, 1) for row in masks for real in row
            ):
                raise ValueError(
                    f"{name} has the attention_mask {shown(prompt['attention_mask'])}: give 1 for each token of "
                    "input_ids, and 0 for each that is padding."
                )
            rows = [
                [token for token, is_real in zip(row, reals, strict=True) if is_real]
                for row, reals in zip(rows, masks, strict=True)
            ]
    elif _is_array(prompt):
        rows = _nested(prompt.tolist())
        if len(rows) > 1:
            raise ValueError(
                f"{name} is a tensor or an array of {len(rows)} rows, in which padding looks like tokens: give the "
                "tokenizer's whole output, with its attention_mask, or a list of lists of token ids."
            )
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        rows = [list(prompt)]
    else:
        raise ValueError(_refusal(name, prompt))
    return [_integers(row, name, prompt) for row in rows]


def _integers(row: list[Any], name: str, prompt: Any) -> list[int]:
    if set(map(type, row)) <= {int}:
        return list(row)  # the caller may change its own list later
    tokens = [token for token in map(as_integer, row) if token is not None]
    if len(tokens) < len(row):
        raise ValueError(_refusal(name, prompt))
    return tokens


def tokens_of_text(
    text: str,
    tokenizer: Any | None,
    most: int | None = None,
    name: str = "prompt",
    add_special_tokens: bool = True,
) -> list[int]:
    """Return the tokens of a text.

    A text that begins with BOS already, such as the text of a chat template, gets no second BOS.

    Args:
        text: The text.
        tokenizer: A tokenizer of transformers, or `None`.
        most: The engine's `max_sequence_length`. A much longer text is refused before it is tokenized as a whole.
        name: The argument's name, for messages.
        add_special_tokens: Whether the tokenizer adds its special tokens.

    Raises:
        ValueError: There is no tokenizer, the tokenizer cannot encode the text, or the text is too long.
    """
    if tokenizer is None:
        raise ValueError(f"{name} is a text, but the engine has no tokenizer: give it one, or give tokens.")
    if not add_special_tokens:
        return _encode(text, tokenizer, most, name, add_special_tokens=False)
    tokens = _encode(text, tokenizer, most, name)
    bos, bos_id = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if bos and bos_id is not None:
        in_text = 0
        while text.startswith(bos, in_text * len(bos)):
            in_text += 1
        leading = next((index for index, token in enumerate(tokens) if token != bos_id), len(tokens))
        if 0 < in_text < leading:
            del tokens[: leading - in_text]
    return tokens


def _encode(text: str, tokenizer: Any, most: int | None, name: str, **options: Any) -> list[int]:
    """Return the tokens of a text, if they can be at most `most`.

    Tokenizers take 100 to 200 times the memory of a text, so a long text is measured first.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate at character {error.start}, which is half of one.") from error
    with panics_as_errors():
        if most is not None and len(text) > PIECE_CHARACTERS:
            longest = max(len(token.encode(errors="replace")) for token in tokenizer.get_vocab())
            if size > most * longest:
                raise ValueError(
                    f"{name} has {size:,} bytes, and a token of this tokenizer has at most {longest}: these are more "
                    f"tokens than max_sequence_length={most}. Shorten it."
                )
            count = 0
            for piece in encode_in_pieces(text, tokenizer):
                count += len(piece)
                if count > most:
                    raise ValueError(
                        f"{name} has {len(text):,} characters and more than {count:,} tokens, but max_sequence_length="
                        f"{most}. Shorten it."
                    )
        return list(tokenizer(text, **options)["input_ids"])


def tokens_of_pair(first: str, second: str, tokenizer: Any, most: int | None = None) -> list[int]:
    """Return the tokens of a pair of texts, as the tokenizer joins them for a classifier.

    Raises:
        ValueError: The tokenizer cannot encode a text, or a text is too long.
    """
    for text, name in ((first, "text_1"), (second, "text_2")):
        _encode(text, tokenizer, most, name)  # refuses what would take too much memory
    return list(tokenizer(first, second)["input_ids"])


def tokens_of_chats(messages: Any, tokenizer: Any | None, most: int | None = None, **options: Any) -> list[list[int]]:
    """Return the tokens of one conversation or several, as the tokenizer's chat template writes them.

    Args:
        messages: A list of messages, each a dict with "role" and "content"; or a list of such lists.
        tokenizer: A tokenizer of transformers with a chat template.
        most: The engine's `max_sequence_length`. A much longer text is refused before it is tokenized as a whole.
        options: Of `apply_chat_template`.

    Raises:
        ValueError: There is no tokenizer, messages are something else or too long, or the chat template fails.
    """
    if tokenizer is None:
        raise ValueError("messages are texts, but the engine has no tokenizer: give it one with a chat template.")
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    chats = messages if is_list and not isinstance(messages[0], Mapping) else [messages]
    for chat in chats:
        if not is_list or isinstance(chat, str) or not all(isinstance(m, Mapping) and "role" in m for m in chat):
            raise ValueError(
                f"messages={shown(messages)} is no conversation: give a list of messages such as "
                '[{"role": "user", "content": "Hello"}], or a list of such lists. Texts go to generate.'
            )
    try:
        texts = [tokenizer.apply_chat_template(list(chat), tokenize=False, **options) for chat in chats]
    except ValueError:
        raise
    except Exception as error:  # a template can fail as any program can
        raise ValueError(f"messages do not fit the chat template: {error or type(error).__name__}") from error
    return [_encode(text, tokenizer, most, "the text of messages", add_special_tokens=False) for text in texts]


def _is_encoding(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and "input_ids" in prompt


def _is_array(prompt: Any) -> bool:
    return hasattr(prompt, "tolist") and hasattr(prompt, "ndim")


def _as_lists(values: Any, name: str, prompt: Any) -> list[Any]:
    if _is_array(values):
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise ValueError(_refusal(name, prompt))
    return [_as_lists(v, name, prompt) if _is_array(v) and v.ndim else v for v in values]


def _nested(values: Any) -> list[list[Any]]:
    """Return the rows of one list, or of a list of lists."""
    if not isinstance(values, list):
        return [[values]]
    return values if values and all(isinstance(row, list) for row in values) else [values]


def _refusal(name: str, prompt: Any) -> str:
    messages = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
    if any(isinstance(message, Mapping) and "role" in message for message in messages):
        return f"{name} has chat messages: pass them to chat, or give {_WHAT_TO_PASS}."
    return f"{name}={shown(prompt)} is no prompt: give {_WHAT_TO_PASS}."


# --- stop strings -----------------------------------------------------------------------------------------------------


def special_tokens_of(tokenizer: Any | None) -> dict[str, int]:
    """Return the special tokens of a tokenizer, which texts decoded with `skip_special_tokens` do not show."""
    special = {
        str(token): token_id
        for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if getattr(token, "special", False)
    }
    named = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=False)
    return special | dict(named)


def special_stops_of(params: SamplingParams, special: Mapping[str, int]) -> dict[str, int]:
    """Return the stop strings that are special tokens, and their ids.

    Args:
        params: A request's parameters.
        special: From `special_tokens_of`.

    Raises:
        ValueError: A stop string can never appear, since the text does not show a special token in it; or the stop
            strings are too long.
    """
    _check_length("stop", params.stop, MAX_STOPS, MAX_STOP_CHARACTERS)
    stops = {}
    for string in params.stop:
        if string in special:
            stops[string] = special[string]
        elif params.skip_special_tokens:
            for token in special:
                if token and token in string:
                    raise ValueError(
                        f"stop={string!r} has the special token {token!r}, which the text does not show: use "
                        f"stop={token!r} or stop_token_ids=[{special[token]}], or give skip_special_tokens=False."
                    )
    return stops


# --- bad words --------------------------------------------------------------------------------------------------------


def tokens_of_bad_words(bad_words: Iterable[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of words that must not appear, at the beginning of a text and behind a space.

    Args:
        bad_words: The words.
        tokenizer: A tokenizer of transformers.

    Raises:
        ValueError: The words are too long.
    """
    bad_words = list(bad_words)
    _check_length("bad_words", bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARACTERS)
    words: list[list[int]] = []
    for word in bad_words:
        stripped = word.lstrip()
        alone = _encode(stripped, tokenizer, None, "bad_words", add_special_tokens=False)
        behind_space = _encode(f" {stripped}", tokenizer, None, "bad_words", add_special_tokens=False)
        words.append(alone)
        # Other tokens for the space than for the word say nothing of the word itself.
        if len(behind_space) == len(alone) and behind_space[:1] != alone[:1]:
            words.append(behind_space)
    return [word for word in words if word]


def _check_length(name: str, strings: Sequence[str], most: int, most_characters: int) -> None:
    """Refuse strings that would slow each step of all requests."""
    length = sum(map(len, strings))
    if len(strings) > most or length > most_characters:
        raise ValueError(
            f"{name} has {len(strings):,} strings with {length:,} characters together, but at most {most} strings with "
            f"{most_characters:,} characters are looked for in each step. Give fewer or shorter ones."
        )
