"""What a saved checkpoint carries so that `trust_remote_code=True` finds the classes of the installed package."""

from __future__ import annotations

import os
from pathlib import Path

_MODULE = "llama_te"

AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.NVLlamaConfig",
    "AutoModel": f"{_MODULE}.NVLlamaModel",
    "AutoModelForCausalLM": f"{_MODULE}.NVLlamaForCausalLM",
    "AutoModelForSequenceClassification": f"{_MODULE}.NVLlamaForSequenceClassification",
    "AutoModelForTokenClassification": f"{_MODULE}.NVLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": f"{_MODULE}.NVLlamaForQuestionAnswering",
}

_SOURCE = '''"""Loads this checkpoint's classes from the installed package: pip install llama-te-core."""

from llama_te_core import (
    NVLlamaConfig,
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
)
'''


def write_remote_code(folder: str | os.PathLike[str]) -> None:
    """Write the module that `AUTO_MAP` names into `folder`."""
    (Path(folder) / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
