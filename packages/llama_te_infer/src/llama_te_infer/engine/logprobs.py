"""Log-probabilities in outputs: kept as bytes, and made into objects where somebody reads them.

A step of 256 texts with five likely tokens each would make 1,500 objects, which live as long as the texts, so that the
garbage collector visits all of them again and again.

Shapes: B tokens, K most likely tokens that the model reports, T tokens of a text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np

from ..runner.logprobs import Logprobs

_NONE = -1  # instead of a likely token, where there are fewer


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position of a text, under the model's unchanged logits.

    Attributes:
        logprob: Of the chosen token.
        top: Of the most likely tokens, the most likely one first: pairs of a token id and its log-probability.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def records_of(logprobs: Logprobs, count: int, drop_impossible: bool = False) -> list[bytes]:
    """Return a record for each token.

    Args:
        logprobs: On the host.
        count: The number of likely tokens in a record.
        drop_impossible: Leave out likely tokens with the log-probability -inf.
    """
    record_B = np.zeros(len(logprobs.logprob_B), _layout(count))
    record_B["logprob"] = logprobs.logprob_B
    if count:
        assert logprobs.top_logprob_BK is not None and logprobs.top_token_BK is not None
        top_logprob_BK, top_token_BK = logprobs.top_logprob_BK.numpy()[:, :count], logprobs.top_token_BK[:, :count]
        reported = top_logprob_BK.shape[1]
        record_B["top_logprob"][:, :reported] = top_logprob_BK
        record_B["top_token"][:, :reported] = top_token_BK
        record_B["top_token"][:, reported:] = _NONE
        if drop_impossible:
            record_B["top_token"][:, :reported][np.isneginf(top_logprob_BK)] = _NONE
    records: list[bytes] = record_B.view(f"V{record_B.itemsize}").tolist()
    return records


def record_of(logprob: float, top: Sequence[tuple[int, float]], count: int) -> bytes:
    """Return the record of one token.

    Args:
        logprob: Of the token.
        top: Of the most likely tokens; the record has the first `count`.
        count: As of `records_of`.
    """
    pairs = [*top[:count], *[(_NONE, 0.0)] * (count - len(top))]
    return _struct(_layout(count).itemsize).pack(logprob, *(each for _, each in pairs), *(token for token, _ in pairs))


def read_record(record: bytes) -> TokenLogprobs:
    """Return the log-probabilities of a record."""
    values = _struct(len(record)).unpack(record)
    behind = len(values) // 2 + 1  # the log-probabilities
    return TokenLogprobs(values[0], _pairs(values[behind:], values[1:behind]))


class LogprobRecords:
    """The records of consecutive tokens.

    Args:
        count: The number of likely tokens in a record.
        before: Tokens before the first record, which have no log-probabilities, as the first one of a prompt.
    """

    def __init__(self, count: int, before: int = 0) -> None:
        self.count, self.before = count, before
        self._bytes = bytearray()

    def __len__(self) -> int:
        """The number of tokens, with those before the first record."""
        return self.before + len(self._bytes) // _layout(self.count).itemsize

    def append(self, record: bytes) -> None:
        """Add the record of the next token."""
        self._bytes += record

    def write(self, position: int, records: Sequence[bytes]) -> None:
        """Add the records of tokens from a position on; the tokens before them have theirs. Replaces earlier ones."""
        size = _layout(self.count).itemsize
        begin = (position - self.before) * size
        self._bytes[begin : begin + len(records) * size] = b"".join(records)

    def read(self) -> list[TokenLogprobs | None]:
        """Return the log-probabilities of all tokens."""
        record_T = np.frombuffer(bytes(self._bytes), _layout(self.count))
        columns = (record_T[name].tolist() for name in ("logprob", "top_token", "top_logprob"))
        return [
            *[None] * self.before,
            *(TokenLogprobs(logprob, _pairs(*top)) for logprob, *top in zip(*columns, strict=True)),
        ]


@functools.cache
def _layout(count: int) -> np.dtype[Any]:
    """Return how a record lies in memory."""
    return np.dtype([("logprob", "<f4"), ("top_logprob", "<f4", (count,)), ("top_token", "<i4", (count,))])


@functools.cache
def _struct(size: int) -> Struct:
    """Return the same layout for a record of a size; reading one record is quicker so."""
    count = (size - 4) // 8
    return Struct(f"<f{count}f{count}i")


def _pairs(tokens: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[int, float], ...]:
    if tokens and tokens[-1] == _NONE:
        return tuple(pair for pair in zip(tokens, logprobs, strict=True) if pair[0] != _NONE)
    return tuple(zip(tokens, logprobs, strict=True))
