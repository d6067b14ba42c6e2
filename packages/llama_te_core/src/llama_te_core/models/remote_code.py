"""The code files of a checkpoint, through which `trust_remote_code=True` finds the classes.

The installed package writes one module that imports the classes from the package. A standalone checkpoint has copies of
all modules that the models need, including this module. A model from such a checkpoint saves the copies again.

transformers looks for code in one folder, so the copies lie side by side: `layers/rope.py` becomes `layers_rope.py`,
and `from ..layers.rope import` in a copy becomes `from .layers_rope import`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..checkpoint_format import IS_INSTALLED, LOADER, LOADER_SOURCE, STANDALONE


def write_remote_code(folder: str | os.PathLike[str]) -> None:
    """Write the module that `checkpoint_format.AUTO_MAP` names into `folder`."""
    if IS_INSTALLED:
        (Path(folder) / f"{LOADER}.py").write_text(LOADER_SOURCE, encoding="utf-8")
    else:
        write_standalone_code(folder)


def write_standalone_code(folder: str | os.PathLike[str]) -> None:
    """Copy the module that `auto_map(STANDALONE)` names, and its imports from this package, into `folder`."""
    here = Path(__file__).resolve().parent
    package = here.parent if IS_INSTALLED else here
    missing, copied = [here / f"{STANDALONE}.py"], set[Path]()
    while missing:
        source = missing.pop()
        if source in copied:
            continue
        copied.add(source)
        text, imported = _side_by_side(source, package)
        (Path(folder) / f"{_flat_name(source, package)}.py").write_text(text, encoding="utf-8")
        missing += imported


_RELATIVE_IMPORT = re.compile(r"^([ \t]*)from (\.+)([\w.]+) import", re.MULTILINE)


def _side_by_side(source: Path, package: Path) -> tuple[str, list[Path]]:
    """Return a module's text with imports from one folder, and its imports from the package."""
    imported = []

    def rewrite(match: re.Match[str]) -> str:
        indent, dots, name = match.groups()
        file = source.parents[len(dots) - 1].joinpath(*name.split(".")).with_suffix(".py")
        imported.append(file)
        return f"{indent}from .{_flat_name(file, package)} import"

    return _RELATIVE_IMPORT.sub(rewrite, source.read_text(encoding="utf-8")), imported


def _flat_name(file: Path, package: Path) -> str:
    """Return the name of a module's copy: its folders and its name, without the folder for modules of `models/`."""
    parts = file.relative_to(package).with_suffix("").parts
    return "_".join(parts[1:] if parts[0] == "models" else parts)
