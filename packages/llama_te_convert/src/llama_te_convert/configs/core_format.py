"""Loads `llama_te_core.models.checkpoint_format` without its package.

Importing the package imports torch and transformers, which takes longer than converting a small checkpoint. The module
itself needs neither.
"""

from __future__ import annotations

import os
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING

_PACKAGE = "llama_te_core"


def _without_its_package(folder: str, name: str) -> ModuleType:
    package = find_spec(_PACKAGE)
    assert package is not None and package.submodule_search_locations is not None  # a dependency
    places = [os.path.join(place, folder) for place in package.submodule_search_locations]
    spec = PathFinder.find_spec(f"{_PACKAGE}.{folder}.{name}", places)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from llama_te_core.models import checkpoint_format as checkpoint_format
else:
    checkpoint_format = _without_its_package("models", "checkpoint_format")
