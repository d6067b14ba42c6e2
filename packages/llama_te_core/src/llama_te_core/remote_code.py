"""What a checkpoint carries so that `trust_remote_code=True` finds the classes.

Of the installed package: a module that imports them from there. A standalone checkpoint has copies of the modules that
the models need, this one among them, and what is saved from such copies is a standalone checkpoint again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

LOADER = "llama_te"
STANDALONE = "modeling_nvllama"  # reaches all the others
_IS_INSTALLED = __package__ == "llama_te_core"


def auto_map(module: str) -> dict[str, str]:
    """The entry of `config.json` that says that a module beside it has the classes.

    One module has them all: transformers imports each that is named here, and what it imports, as modules of its own.
    """
    return {
        "AutoConfig": f"{module}.NVLlamaConfig",
        "AutoModel": f"{module}.NVLlamaModel",
        "AutoModelForCausalLM": f"{module}.NVLlamaForCausalLM",
        "AutoModelForSequenceClassification": f"{module}.NVLlamaForSequenceClassification",
        "AutoModelForTokenClassification": f"{module}.NVLlamaForTokenClassification",
        "AutoModelForQuestionAnswering": f"{module}.NVLlamaForQuestionAnswering",
    }


AUTO_MAP = auto_map(LOADER if _IS_INSTALLED else STANDALONE)

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
    """Write what `AUTO_MAP` names into `folder`."""
    if _IS_INSTALLED:
        (Path(folder) / f"{LOADER}.py").write_text(_SOURCE, encoding="utf-8")
    else:
        write_standalone_code(folder)


def write_standalone_code(folder: str | os.PathLike[str]) -> None:
    """Copy what `auto_map(STANDALONE)` names, and all that it imports of this package, into `folder`."""
    entry = Path(__file__).with_name(f"{STANDALONE}.py")
    for file in {str(entry), *get_relative_import_files(entry)}:  # what transformers takes along too
        shutil.copyfile(file, Path(folder) / Path(file).name)
