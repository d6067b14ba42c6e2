"""Importing the package is quick: it loads no heavy library, and shows the public names alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llama_te_infer

HEAVY = ("torch", "transformers", "transformer_engine", "llama_te_core", "numpy", "tokenizers")


@pytest.mark.parametrize("statement", ["import llama_te_infer", "from llama_te_infer import SamplingParams"])
def test_importing_loads_no_heavy_library(statement: str) -> None:
    code = f"import sys; {statement}; print(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_dir_shows_the_public_names() -> None:
    assert [name for name in dir(llama_te_infer) if not name.startswith("__")] == sorted(llama_te_infer.__all__)


@pytest.mark.parametrize("name", llama_te_infer.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(llama_te_infer, name).__name__ == name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'llama_te_infer' has no attribute 'Motor'"):
        llama_te_infer.Motor  # noqa: B018
