"""The module `llama_te_core.checkpoint_format`, by itself.

Importing its package imports torch and transformers, which takes longer than converting a small checkpoint. That module
needs neither.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING

_PACKAGE = "llama_te_core"


def _without_its_package(name: str) -> ModuleType:
    package = find_spec(_PACKAGE)
    assert package is not None  # a dependency
    spec = PathFinder.find_spec(f"{_PACKAGE}.{name}", package.submodule_search_locations)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from llama_te_core import checkpoint_format as checkpoint_format
else:
    checkpoint_format = _without_its_package("checkpoint_format")
