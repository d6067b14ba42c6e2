"""References to code in a checkpoint's side files.

With `trust_remote_code=True` transformers runs the code that `auto_map` names, in the folder or in any repository of
the hub. Users give this option for the code of the model, which `config.json` names. What llama-te writes must not lead
them to code of another author.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .input_files import MAX_JSON_BYTES, json_object, read_bytes

_CODE = ("auto_map", "custom_pipelines")


def drop_foreign_code(folder: Path) -> list[str]:
    """Remove `auto_map` and `custom_pipelines` from the JSON files in a folder, and return the names of these files.

    `config.json` stays as it is: its writer decides which code belongs to the model.

    Raises:
        OSError: A file cannot be read or written, or is too large.
        ValueError: A file is not a valid JSON object, so nobody knows what others read in it. The message names it.
    """
    changed = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "config.json":
            continue
        is_config = path.name.endswith("config.json")
        content = read_bytes(path, MAX_JSON_BYTES) if is_config else path.read_bytes()
        if not is_config and not any(name.encode() in content for name in _CODE):
            continue
        try:
            value = json_object(content)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if _without_code(value):
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            changed.append(path.name)
    return changed


def _without_code(value: Any) -> bool:
    """Remove the references in a JSON value, at any depth, and return whether there were any."""
    found = False
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for name in _CODE:
                found |= each.pop(name, None) is not None
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return found
