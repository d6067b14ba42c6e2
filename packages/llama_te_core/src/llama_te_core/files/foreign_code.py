"""References to code in a checkpoint's side files.

With `trust_remote_code=True` transformers runs the code that `auto_map` names, in the folder or in any repository of
the hub. Users give this option for the code of the model, which `config.json` names. What llama-te writes must not lead
them to code of another author.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .input_files import read_json

_CODE = ("auto_map", "custom_pipelines")


def drop_foreign_code(folder: Path) -> list[str]:
    """Remove `auto_map` and `custom_pipelines` from a folder's configurations, and return the names of those.

    `config.json` stays as it is: its writer decides which code belongs to the model.

    Raises:
        OSError: A file cannot be read or written, or is too large.
        ValueError: A file is not a valid JSON object.
    """
    changed = []
    for path in sorted(folder.glob("*_config.json")):
        value = read_json(path)
        if without_code(value):
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            changed.append(path.name)
    return changed


def without_code(value: Any) -> bool:
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
