"""Names of tokenizers that its documentation does not promise. Checked against tokenizers 0.23.

Importing this module imports neither tokenizers nor transformers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of the library's Rust code into a `ValueError`.

    Its exception is a `BaseException`, which passes `except Exception` and would end a server or a worker.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer has panicked: {' '.join(str(error).split())[:200]}") from error


def steps_of(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, a pre-tokenizer or a decoder, as `tokenizer.json` describes them.

    Args:
        part: An object of tokenizers, or None for no steps.
    """
    if part is None:
        return []
    waiting, steps = [json.loads(part.__getstate__())], []
    while waiting:
        description = waiting.pop(0)
        inner = [description[name] for name in ("normalizers", "pretokenizers", "decoders") if name in description]
        if inner:
            waiting = [*inner[0], *waiting]
        else:
            steps.append(description)
    return steps
