"""Fixtures of the conversion tests."""

import contextlib
import json
import shutil

import pytest

from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.sources.checkpoint import Checkpoint
from llama_te_convert.sources.safetensors import SafetensorsFolder


@pytest.fixture
def opened():
    """A function that opens a checkpoint's folder. The folder is closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def open_folder(folder):
            source = stack.enter_context(contextlib.closing(SafetensorsFolder(folder)))
            return Checkpoint(str(folder), json.loads((folder / "config.json").read_text()), source)

        yield open_folder


@pytest.fixture(scope="session")
def smollm2_te(smollm2, tmp_path_factory):
    """The folder of SmolLM2 in the Transformer Engine layout."""
    folder = tmp_path_factory.mktemp("smollm2") / "te"
    convert_llama_hf_to_te(smollm2).save_pretrained(folder, max_shard_size="200MB")
    yield folder
    shutil.rmtree(folder)  # half a gigabyte
