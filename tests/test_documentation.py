"""The Python blocks of README.md and docs/ run as written, page by page, in a folder with a checkpoint `./llama`.

So do `llama-te-convert` and `llama-te-train` commands. Blocks marked `python gpu` need one and are only compiled.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.cli import main as convert
from llama_te_core.train.command import main as train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|python gpu|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"llama-te-convert": convert, "llama-te-train": train}
LINK = re.compile(r"\]\(([^)#:]+)\)")
WORDS = ["The", "sky", "is", "blue", "because", "Two", "and", "two", "make", "four", "Yes", "No", "then", "?"]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Callable[..., PreTrainedModel]) -> Path:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "llama")
    convert_llama_hf_to_te(model).save_pretrained(tmp_path / "llama-te")
    for folder in ("llama", "llama-te"):
        tokenizer.save_pretrained(tmp_path / folder)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        if block[1] == "bash":
            for command in block[2].splitlines():
                name = command.split(" ")[0]
                if name in COMMANDS:
                    assert COMMANDS[name](shlex.split(command)[1:]) == 0, command
            continue
        line = text[: block.start(2)].count("\n")
        code = compile("\n" * line + block[2], str(page), "exec")  # so that a traceback shows the page's line
        if block[1] == "python":
            exec(code, namespace)
    seen = [block for block in BLOCK.findall(text) if block[0] != "bash"]
    assert text.count("```python") == len(seen), "a block that the pattern does not see"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
