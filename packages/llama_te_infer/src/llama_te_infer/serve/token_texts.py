"""The text and the bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..engine.logprobs import TokenLogprobs


class TokenTexts:
    """Decodes single tokens.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        # A tokenizer with byte-level tokens writes each byte as one character.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = backend is not None and "ByteLevel" in str(type(backend.decoder)) + repr(backend.decoder)
        self.bytes_of = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    def text_of(self, token_id: int) -> str:
        """Return a token's text; bytes that are no whole character become replacement characters."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def name_of(self, token_id: int, as_token_id: bool | None = None) -> str:
        """Return a token's name in log-probabilities: its text, or "token_id:42", which no two tokens share."""
        return f"token_id:{token_id}" if as_token_id else self.text_of(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""  # the model's vocabulary is larger than the tokenizer's
        if token_id in self._special or token_id in self._tokenizer.added_tokens_decoder:
            return str(token).encode()
        if self._is_byte_level:
            byte_of = _byte_of_character()
            if all(character in byte_of for character in token):
                return bytes(byte_of[character] for character in token)
            return str(token).encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE: GPT-2 writes bytes that cannot be shown from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def prompt_logprobs_of(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], count: int
) -> list[dict[str, dict[str, Any]] | None]:
    """Return the log-probabilities of a prompt as vLLM's server does: for each token a dict by token id.

    Args:
        texts: The texts of tokens.
        token_ids: The prompt.
        logprobs: Of its tokens; `None` for the first one.
        count: The number of most likely tokens; the prompt's own token comes in addition.
    """
    positions: list[dict[str, dict[str, Any]] | None] = []
    for token_id, here in zip(token_ids, logprobs, strict=True):
        pairs = () if here is None else ((token_id, here.logprob), *here.top[:count])
        positions.append(
            {str(token): {"logprob": logprob, "decoded_token": texts.text_of(token)} for token, logprob in pairs}
            or None
        )
    return positions
