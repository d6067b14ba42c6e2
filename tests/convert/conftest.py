"""What the tests of conversion share."""

import contextlib
import json

import pytest

from llama_te_convert.sources.checkpoint import Checkpoint
from llama_te_convert.sources.safetensors import SafetensorsFolder


@pytest.fixture
def opened():
    """Opens a folder, and closes it at the end."""
    with contextlib.ExitStack() as stack:

        def open_folder(folder):
            source = stack.enter_context(contextlib.closing(SafetensorsFolder(folder)))
            return Checkpoint(str(folder), json.loads((folder / "config.json").read_text()), source)

        yield open_folder
