"""The Python blocks of the Markdown pages run as written, page by page, in a folder with a checkpoint `./llama`.

So do the commands `llama-te-convert` and `llama-te-train`. A block marked `python gpu` is only compiled. Links,
paths and module names on the pages lead to something that exists.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.cli import main as convert
from llama_te_core.train.command import main as train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "packages").glob("*/*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
BLOCK = re.compile(r"^```(python|python gpu|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"llama-te-convert": convert, "llama-te-train": train}
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
# What code spans name of this repository: paths, dotted names of modules, and what mkdocstrings documents.
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "packages", "tests")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PATH_IN_BLOCK = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+")
REPOSITORY_PATH = re.compile(rf"\.?(?:{'|'.join(FOLDERS)}|\.devcontainer)/[\w./-]*")
PACKAGE_PATH = re.compile(r"llama_te_(?:core|convert|infer)/[\w./]+")
DOTTED = re.compile(r"llama_te_(?:core|convert|infer)(?:\.\w+)+")
WORDS = ["The", "sky", "is", "blue", "because", "Two", "and", "two", "make", "four", "Yes", "No", "then", "?"]


@pytest.fixture(scope="module")
def written() -> dict[str, Path]:
    """Each file or folder that a page has written, with the page."""
    return {}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama: Callable[..., PreTrainedModel]) -> Path:
    characters = sorted(set(string.printable) & set(pre_tokenizers.ByteLevel.alphabet()))
    every = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "Ġ", *characters]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(every)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "llama")
    convert_llama_hf_to_te(model).save_pretrained(tmp_path / "llama-te")
    for folder in ("llama", "llama-te"):
        tokenizer.save_pretrained(tmp_path / folder)
    return tmp_path


@each_page
@pytest.mark.filterwarnings("error:generate runs without a key/value cache")
def test_python_blocks_run(
    page: Path, checkpoint: Path, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    before = set(checkpoint.iterdir())
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
    # A reader runs several pages in one folder.
    new = {path.name for path in set(checkpoint.iterdir()) - before}
    assert not {name: written[name] for name in new & written.keys()}, "another page writes files of these names"
    written |= dict.fromkeys(new, page)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = page.parent / target
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def exists_as_module(name: str) -> bool:
    """Whether a dotted name is a module, or a name that a module defines or imports."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    if spec is None or spec.origin is None:
        return False
    if not spec.origin.endswith(".py"):  # the compiled extension
        return True
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    names = {getattr(node, "name", getattr(node, "id", None)) for node in ast.walk(tree)}
    return attribute in names | {
        alias.name for node in ast.walk(tree) for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)
    }


@each_page
def test_paths_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for span in [*CODE.findall(text), *re.findall(r"^::: (\S+)$", text, re.MULTILINE)]:
        for word in span.replace(",", " ").split():
            if REPOSITORY_PATH.fullmatch(word) and not (ROOT / word.partition("::")[0]).exists():
                missing.append(word)
            if PACKAGE_PATH.fullmatch(word):
                package = word.partition("/")[0]
                if not (ROOT / "packages" / package / "src" / word).exists():
                    missing.append(word)
            if DOTTED.fullmatch(word) and not exists_as_module(word):
                missing.append(word)
    for block in FENCED.findall(text):
        missing += [path for path in PATH_IN_BLOCK.findall(block) if not (ROOT / path).exists()]
    assert not missing


def test_a_missing_module_is_found() -> None:
    assert exists_as_module("llama_te_core.train.metrics")
    assert exists_as_module("llama_te_core.train.metrics.training_flops")
    assert exists_as_module("llama_te_infer.Engine")
    assert not exists_as_module("llama_te_core.train.nowhere")
    assert not exists_as_module("llama_te_core.nowhere.at_all")
    assert not exists_as_module("llama_te_core.train.metrics.nowhere")
