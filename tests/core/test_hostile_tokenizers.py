"""Damaged and hostile folders of tokenizers: refused in one line, soon, and without running their code."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from core.test_long_texts import cut
from fuzzing import damaged, fuzz
from llama_te_core.compat.tokenizers import panics_as_errors
from llama_te_core.data.tokenizer_files import load_tokenizer
from llama_te_core.train.data.documents import Document, UnusableDocumentError
from llama_te_core.train.data.text_data import TextData
from llama_te_core.train.loop import load_tokenizer as tokenizer_of_a_run

EVIL = b"open('ran', 'w')\nclass Evil:\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cut("GPT-2").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(file: Path, *keys: str, value: Any) -> None:
    content = json.loads(file.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # callers check the message
        load_tokenizer(folder)
    message = str(refused.value)
    assert message
    assert "\n" not in message
    with pytest.raises(ValueError, match="tokenizer.*cannot be loaded"):
        tokenizer_of_a_run(str(folder))
    return message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", ""),
        ("tokenizer.json", b"[" * 10**6, ""),
        ("tokenizer.json", b"[]", ""),
        ("tokenizer.json", b"{}", ""),
        ("tokenizer_config.json", b"[" * 10**6, "tokenizer_config.json is refused: it has more than 64 levels"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is refused: it does not hold a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": 5}', ""),
        ("tokenizer_config.json", b'{"eos_token": "a", "eos_token": "b"}', "it has the key 'eos_token' twice"),
        ("tokenizer_config.json", b'{"model_max_length": NaN}', "it has the number NaN"),
        ("tokenizer_config.json", b'{"tokenizer_class": 5}', ""),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "a"}}', ""),
        ("special_tokens_map.json", b"[]", "special_tokens_map.json is refused: it does not hold a JSON object"),
        ("added_tokens.json", b'{"a": "b"}', ""),
        ("config.json", b"\xff", "config.json is refused: it is not UTF-8"),
    ],
)
def test_damaged_files_are_refused_in_one_line(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_only_regular_files_of_a_limited_size_are_read(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} cannot be read: it is a named pipe" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name} cannot be read: it is a device" in refusal(folder)
    (folder / name).unlink()
    (folder / name).touch()
    os.truncate(folder / name, 2**40)
    assert "1,099,511,627,776 bytes, but at most" in refusal(folder)


@pytest.mark.parametrize("answer", ["y\n", ""])
@pytest.mark.parametrize("place", ["tokenizer", "unknown tokenizer", "model"])
def test_code_is_neither_run_nor_offered(
    folder: Path, place: str, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `trust_remote_code=False` transformers asks, and an answer runs the code."""
    monkeypatch.setattr("builtins.input", lambda prompt="": print(prompt) or answer)
    (folder / "evil.py").write_bytes(EVIL)
    if place == "model":
        auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}
        (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    else:
        change(folder / "tokenizer_config.json", "auto_map", value={"AutoTokenizer": ["evil.Evil", None]})
    if place == "unknown tokenizer":
        change(folder / "tokenizer_config.json", "tokenizer_class", value="Evil")
        refusal(folder)
    else:
        load_tokenizer(folder)
    assert "[y/N]" not in capsys.readouterr().out
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_replacements_that_multiply_a_text_are_refused(folder: Path, part: str) -> None:
    many = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    nested = {"type": "Sequence", f"{part}s": [many, {"type": "Sequence", f"{part}s": [many, many]}]}
    change(folder / "tokenizer.json", part, value=nested)
    assert "can make a text 1000000000 times as long; at most 100" in refusal(folder)


def test_a_prefix_that_tokens_do_not_have_is_refused(folder: Path) -> None:
    """The library would end the process."""
    change(folder / "tokenizer.json", "model", "continuing_subword_prefix", value="abc")
    assert "tokenizer.json has the prefix 'abc', but a merge with" in refusal(folder)


def test_replacements_of_known_tokenizers_are_accepted(folder: Path) -> None:
    for name in ("Llama 2", "Metaspace, always", "Qwen 2"):
        cut(name).save_pretrained(folder / "known")
        load_tokenizer(folder / "known")


def test_a_panic_is_an_error(folder: Path) -> None:
    """An empty pattern panics in the library's Rust code; an expression that never ends does so after 10**7 trials."""
    change(
        folder / "tokenizer.json", "normalizer", value={"type": "Replace", "pattern": {"String": ""}, "content": "a"}
    )
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="the tokenizer has panicked: index out of bounds"), panics_as_errors():
        tokenizer.encode("text")
    data = TextData(folder, tokenizer, 64)
    with pytest.raises(UnusableDocumentError, match=r"a, line 1: the tokenizer cannot encode it: .* has panicked"):
        data.labelled_tokens(Document("a, line 1", {"text": "text"}))


def test_other_errors_and_interrupts_pass() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), RuntimeError("x")):
        with pytest.raises(type(error)), panics_as_errors():
            raise error


def test_an_id_that_no_vocabulary_has(folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    change(folder / "tokenizer.json", "model", "vocab", "t", value=2**32 - 1)
    assert vocab["t"] < 2**32 - 1
    data = TextData(folder, load_tokenizer(folder), 64, vocab_size=500)
    with pytest.raises(UnusableDocumentError, match="has the token id 4294967295; ids must be from 0 to 499"):
        data.labelled_tokens(Document("a, line 1", {"text": "\x00t"}))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_folders(folder: Path, tmp_path: Path, name: str, counts: Callable[[str], None]) -> None:
    if name == "special_tokens_map.json":
        (folder / name).write_text('{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}')
    seed = (folder / name).read_bytes()
    AutoTokenizer.from_pretrained(folder)  # imports what loading needs
    values = [
        None,
        True,
        -1,
        2**32,
        2**64,
        1e308,
        "",
        "a",
        "Replace",
        "Regex",
        [],
        {},
        [[]],
        {"a": {}},
        "\ud83d",
        "(" * 99,
    ]

    def damage(content: bytes, source: random.Random) -> bytes:
        """Mostly give another value to a random place of the JSON, which the parser alone would not refuse."""
        if source.random() < 0.2:
            return damaged(content, source)
        whole = part = json.loads(content)
        while True:
            key = source.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if not isinstance(part[key], dict | list) or not part[key] or source.random() < 0.2:
                part[key] = source.choice(values)
                return json.dumps(whole).encode()
            part = part[key]

    def read(content: bytes) -> None:
        (folder / name).write_bytes(content)
        tokenizer = load_tokenizer(folder)
        data = TextData(folder, tokenizer, 64, add_bos=False, add_eos=False, skip_empty=True)
        tokens = data.labelled_tokens(Document("a", {"text": "The end of\n\n a text 12 \U0001f642 </s>"})).input_ids
        with panics_as_errors():
            tokenizer.decode(list(tokens))

    result = fuzz(read, [seed], tmp_path, refusals=(ValueError,), cases=400, seconds=5, damage=damage)
    counts(f"{name}: {result}")
