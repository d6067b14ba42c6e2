"""No code of the packages, the examples and the benchmarks loads what could run code: see SECURITY.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FILES = [
    *(path for folder in ("packages", "examples", "benchmarks") for path in sorted((TOP / folder).rglob("*.py"))),
    TOP / "noxfile.py",
]
# Modules that unpickle, and those whose objects do when they are loaded.
UNPICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "_pickle"}
# Options that let a function run foreign code, with the values that do not.
OPTIONS = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True}


def dangers(source: str) -> list[str]:
    """Calls in a source text that could run code in a file."""
    return [f"line {node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _of(node)]  # type: ignore[attr-defined]


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        yield from (f"imports {name}" for name in names if name.split(".")[0] in UNPICKLING)
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        given = {each.arg: each.value for each in node.keywords}
        if called in ("torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"):
            yield f"calls {called}"  # files.torch_archive reads such files
        if called in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"):
            yield f"calls {called}"
        for name, harmless in OPTIONS.items():
            # `allow_pickle=allow_pickle` hands over an option of llama-te-convert, which has its own reader.
            if name in given and not _is(given[name], harmless) and ast.unparse(given[name]) not in _HANDED_OVER:
                yield f"calls {called} with {name}={ast.unparse(given[name])}"
        if "shell" in given and not _is(given["shell"], False):
            yield f"calls {called} with a shell"
        if called.endswith("DCP.load") or called.endswith("FileSystemReader"):
            yield f"calls {called}, which unpickles"


_HANDED_OVER = ("allow_pickle", "options.allow_pickle", "not arguments.get('use_safetensors')")


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TOP)))
def test_nothing_loads_code(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=True, mmap=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=chosen)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "load_dataset(path, trust_remote_code=True)",
        "torch.serialization.load(path, weights_only=False)",
        "FileSystemReader(path)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_it_finds(source: str) -> None:
    assert dangers(source)


def test_it_accepts() -> None:
    assert not dangers("np.load(p, allow_pickle=False)\nyaml.safe_load(t)\nmodel.eval()\nsubprocess.run(['a'])")
