"""Loads tokenizers that somebody else made: no code of theirs runs, and their files are read within limits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..compat.tokenizers import panics_as_errors, steps_of
from ..files.input_files import open_file, read_bytes, read_json

MAX_FILE_BYTES = 256 * 2**20  # of tokenizer.json, which has 9 to 35 MB for the Llama, Qwen and Gemma models
MAX_GROWTH = 100  # of a text by replacements; T5's and Llama 2's at most double one
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


def load_tokenizer(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a tokenizer of transformers from a folder or the hub.

    Args:
        name: The folder, or a hub id.
        options: Of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: The tokenizer needs code of its own, or its files are damaged or not within the limits. The message
            says why on one line.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir():
        for file in (folder / each for each in _SETTINGS + _VOCABULARIES):
            if os.path.lexists(file):
                _check_file(file)
    try:
        if (folder / "tokenizer.json").is_file():
            _check_merges(json.loads(read_bytes(folder / "tokenizer.json", MAX_FILE_BYTES)))
        with panics_as_errors():
            # Without False transformers asks the user whether to run the code.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
            _check_growth(getattr(tokenizer, "backend_tokenizer", None))
    except Exception as error:  # of any type: transformers takes the content of the files as it is
        raise ValueError(f"{' '.join(str(error).split())[:1000] or type(error).__name__}") from error
    return tokenizer


def _check_file(file: Path) -> None:
    try:
        if file.name in _SETTINGS:
            read_json(file)
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{file} is refused: {error}.") from error
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, but at most {MAX_FILE_BYTES:,} are read.")


def _check_merges(content: Any) -> None:
    """Refuse what tokenizers 0.23 ends the process for: it cuts a prefix off tokens that do not have it."""
    model = content.get("model") or {}
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        for merge in model["merges"]:
            _, second = merge.split(" ") if isinstance(merge, str) else merge
            if not second.startswith(prefix):
                raise ValueError(f"tokenizer.json has the prefix {prefix[:40]!r}, but a merge with {second[:40]!r}")


def _check_growth(backend: Any) -> None:
    """Refuse replacements that multiply a text: three of them make 1 GB of one letter."""
    for part in ("normalizer", "decoder"):
        growth = 1
        for step in steps_of(getattr(backend, part, None)):
            if step["type"] == "Replace":
                replaced = len(step["pattern"].get("String", ""))
                content = len(step["content"])
                growth *= max(1, -(-content // replaced)) if replaced else 1 + content
            elif step["type"] == "Prepend":
                growth *= 1 + len(step["prepend"])
        if growth > MAX_GROWTH:
            raise ValueError(
                f"the {part} of tokenizer.json can make a text {growth} times as long; at most {MAX_GROWTH} times is "
                "accepted"
            )
