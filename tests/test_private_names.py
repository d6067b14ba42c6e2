"""Private names of transformers, Transformer Engine, torch, PEFT and torchdata are reached in `compat/` alone.

A name with one leading underscore may go with any release of the library that owns it. Each such name has one place,
`llama_te_core/compat/`, and a contract test there. This file finds the names that are used elsewhere.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
LIBRARIES = {
    "accelerate",
    "peft",
    "torch",
    "torchdata",
    "transformer_engine",
    "transformer_engine_torch",
    "transformers",
}
# What the standard library documents in spite of its underscore, and the hook that transformers documents for models.
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace", "_init_weights"}
ATTRIBUTE_FUNCTIONS = {"delattr", "getattr", "hasattr", "setattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_names(tree: ast.AST) -> set[str]:
    """Return the names that a file gives to something itself: classes, functions, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def imported_names(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that an import statement takes from one of the libraries."""
    match node:
        case ast.Import(names=names):
            found = [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            found = [f"{module}.{alias.name}" for alias in names]
        case _:
            found = []
    yield from (name for name in found if name.split(".")[0] in LIBRARIES)


def foreign_private_names(source: str, inherited: frozenset[str] = frozenset()) -> list[tuple[int, str]]:
    """Return line and text of each private name that a file uses and does not define.

    A private attribute of `super()` belongs to the base class, even where the file defines the name again.

    Args:
        source: The text of the file.
        inherited: Names that `self` and `cls` may have from base classes in other files of ours.
    """
    tree = ast.parse(source)
    own = defined_names(tree) | PUBLIC
    found = []
    for node in ast.walk(tree):
        found += [
            (node.lineno, name) for name in imported_names(node) if any(is_private(part) for part in name.split("."))
        ]
        match node:
            case ast.Attribute(value=value, attr=name) if is_private(name):
                match value:
                    case ast.Call(func=ast.Name(id="super")):
                        allowed = PUBLIC
                    case ast.Name(id="self" | "cls"):
                        allowed = own | inherited
                    case _:
                        allowed = own
                if name not in allowed:
                    found.append((node.lineno, ast.unparse(node)))
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]):
                if function in ATTRIBUTE_FUNCTIONS and is_private(name) and name not in own:
                    found.append((node.lineno, ast.unparse(node)))
    return sorted(found)


def test_private_names_of_libraries_are_used_in_compat_alone() -> None:
    sources = {file: file.read_text(encoding="utf-8") for file in sorted(PACKAGES.glob("*/src/**/*.py"))}
    assert len(sources) > 50
    inherited = frozenset[str]().union(*(defined_names(ast.parse(source)) for source in sources.values()))
    used = [
        f"{file.relative_to(PACKAGES)}:{line}: {text}"
        for file, source in sources.items()
        if file.parent.name != "compat"
        for line, text in foreign_private_names(source, inherited)
    ]
    assert not used, "move these into llama_te_core/compat/:\n" + "\n".join(used)


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils import _pytree",
        "from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
        "import torch.distributed._functional_collectives as collectives",
        "model.config._attn_implementation = 'eager'",
        "def step(iterator):\n    iterator._shutdown_workers()",
        "hasattr(model, '_orig_mod')",
        "class Model(Base):\n    def _prefill(self):\n        return super()._prefill()",
    ],
)
def test_a_private_name_of_a_library_is_found(source: str) -> None:
    assert len(foreign_private_names(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from ._decoding import step",
        "from torch import nn, __version__",
        "class Rows:\n    _rows = 1\n    def rows(self, other):\n        return self._rows + other._rows",
        "class Model(Base):\n    def _init_weights(self, module):\n        super()._init_weights(module)",
        "size = size._replace(rows=1)",
        "for _ in range(2):\n    getattr(hook, '__module__', None)",
    ],
)
def test_names_of_our_own_are_left_alone(source: str) -> None:
    assert foreign_private_names(source) == []
