"""Writes what a checkpoint carries so that `trust_remote_code=True` finds the classes.

Of the installed package: a module that imports them from there. A standalone checkpoint has copies of the modules that
the models need, this one among them, and what is saved from such copies is a standalone checkpoint again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .checkpoint_format import IS_INSTALLED, LOADER, LOADER_SOURCE, STANDALONE


def write_remote_code(folder: str | os.PathLike[str]) -> None:
    """Write what `checkpoint_format.AUTO_MAP` names into `folder`."""
    if IS_INSTALLED:
        (Path(folder) / f"{LOADER}.py").write_text(LOADER_SOURCE, encoding="utf-8")
    else:
        write_standalone_code(folder)


def write_standalone_code(folder: str | os.PathLike[str]) -> None:
    """Copy what `auto_map(STANDALONE)` names, and all that it imports of this package, into `folder`."""
    entry = Path(__file__).with_name(f"{STANDALONE}.py")
    for file in {str(entry), *get_relative_import_files(entry)}:  # what transformers takes along too
        shutil.copyfile(file, Path(folder) / Path(file).name)
