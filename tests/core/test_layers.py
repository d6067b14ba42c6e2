"""Tests the choice of the layer implementation, and its warnings and errors."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from conftest import TINY
from core.fake_transformer_engine import FakeTransformerEngine
from llama_te_core import NVLlamaConfig, NVLlamaModel
from llama_te_core.layers import selection as layers
from llama_te_core.layers.reference import ReferenceLayer

# Broken installations: the code of transformer_engine/pytorch.py, and the reason that the message shows.
BROKEN = {
    "import_error": (
        "raise ImportError('libcudnn.so.9: cannot open shared object file\\nmore')",
        r"does not import: ImportError: libcudnn\.so\.9: cannot open shared object file",
    ),
    "os_error": (
        "raise OSError('libnvrtc.so: undefined symbol')",
        r"does not import: OSError: libnvrtc\.so: undefined",
    ),
    "runtime_error": (
        "raise RuntimeError('install it with [pytorch]')",
        r"does not import: RuntimeError: install it with",
    ),
    "assertion": ("assert False", r"does not import: AssertionError: no message"),
    "missing_dependency": (
        "import no_such_module_of_te",
        r"does not import: ModuleNotFoundError: No module named 'no_such",
    ),
    "without_its_layer": ("", r"does not import: AttributeError: .*TransformerLayer"),
}


@pytest.fixture(autouse=True)
def _forget():
    """Let each test check anew whether Transformer Engine works, and get its warnings anew."""
    layers.transformer_engine_problem.cache_clear()
    layers._warn_once.cache_clear()
    yield
    layers._warn_once.cache_clear()


@pytest.fixture
def hide_transformer_engine(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def config_of(**fields):
    return NVLlamaConfig(**{**TINY, **fields})


def warnings_of(build):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build()
    return model, [str(each.message) for each in caught]


def test_without_a_gpu_auto_is_the_reference_and_says_so_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, messages = warnings_of(lambda: [NVLlamaModel(config_of()) for _ in range(3)][-1])
    assert messages == ["Layers run in plain PyTorch, since torch finds no CUDA GPU."]
    assert all(isinstance(layer, ReferenceLayer) for layer in model.layers)


def test_without_transformer_engine_auto_is_the_reference_and_says_how_to_install_it(
    monkeypatch, hide_transformer_engine
):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not os.path.isdir(f"{path}/transformer_engine")])
    model, messages = warnings_of(lambda: [NVLlamaModel(config_of()) for _ in range(2)][-1])
    (message,) = messages
    assert "since Transformer Engine is not installed (pip install 'llama-te-core[cu13]'" in message
    assert isinstance(model.layers[0], ReferenceLayer)


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_transformer_engine_is_one_warning_and_no_crash(
    monkeypatch, tmp_path, hide_transformer_engine, code, reason
):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model, messages = warnings_of(lambda: [NVLlamaModel(config_of()) for _ in range(2)][-1])
    (message,) = messages
    assert re.fullmatch(rf"Layers run in plain PyTorch, since the installed Transformer Engine {reason}.*", message)
    assert model(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 4, 64)
    layers.transformer_engine_problem.cache_clear()
    with pytest.raises(RuntimeError, match=f"layer_implementation='transformer_engine', but.*{reason}"):
        NVLlamaModel(config_of(layer_implementation="transformer_engine"))


def test_asking_for_transformer_engine_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"'transformer_engine', but torch finds no CUDA GPU.*Use 'auto' or 'reference'"
    ):
        NVLlamaModel(config_of(layer_implementation="transformer_engine"))


def test_asking_for_the_reference_warns_of_nothing_and_imports_nothing(hide_transformer_engine):
    model, messages = warnings_of(lambda: NVLlamaModel(config_of(layer_implementation="reference")))
    assert messages == []
    assert isinstance(model.layers[0], ReferenceLayer)
    assert layers.transformer_engine_problem.cache_info().currsize == 0


@pytest.mark.parametrize("implementation", ["auto", "transformer_engine"])
def test_transformer_engine_is_taken_where_it_works(monkeypatch, implementation):
    te = FakeTransformerEngine().install(monkeypatch)
    model, messages = warnings_of(lambda: NVLlamaModel(config_of(layer_implementation=implementation)))
    assert list(model.layers) == te.layers
    assert all(layers.is_transformer_engine(layer) for layer in model.layers)
    assert messages == []


def test_importing_needs_no_transformer_engine_and_nothing_heavy():
    """The import loads neither Transformer Engine nor modules for training, other frameworks or notebooks."""
    code = (
        "import sys, torch, transformers; from transformers import LlamaForCausalLM, GenerationMixin\n"
        "before = set(sys.modules); import llama_te_core\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))\n"
        "print(*(n for n in ('transformer_engine', 'llama_te_infer', 'llama_te_convert', 'triton', 'torch._inductor')"
        " if n in sys.modules and n not in before))\n"
        "print(torch.cuda.is_initialized())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, unwanted, initialized = run.stdout.split("\n")[:3]
    assert set(new.split()) <= {"llama_te_core", "transformers", "torch"}
    assert unwanted == ""
    assert initialized == "False"
    assert run.stderr == ""
