"""Only regular files are opened, and JSON of somebody else is read within limits."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzing import ROUNDS, fuzz
from llama_te_core.files.input_files import MAX_JSON_BYTES, json_object, open_file, read_bytes, read_json


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(path))
    bound.close()


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    "read", [open_file, read_json, lambda path: read_bytes(path, 100)], ids=["file", "json", "all"]
)
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "a folder"),
        (make_pipe, "a named pipe"),
        (make_socket, "a socket"),
        (link_to("/dev/zero"), "a device"),
        (link_to("/dev/tty"), "a device"),
    ],
    ids=["folder", "pipe", "socket", "zero", "tty"],
)
def test_only_regular_files_are_opened(
    make: Callable[[Path], None], kind: str, read: Callable[[Path], object], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may have about 100 characters
    make(Path("file"))
    with pytest.raises(OSError, match=re.escape(f"it is {kind}, not a regular file: 'file'")) as raised:
        read(Path("file"))
    assert raised.value.strerror == f"it is {kind}, not a regular file"


def test_a_file_that_is_exchanged_between_the_checks_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"{}")
    before, opened = os.stat(path), os.open

    def exchange(*arguments: object) -> int:
        path.unlink()
        os.mkfifo(path)
        return opened(*arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", exchange)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="a named pipe"):
        open_file(path)
    assert before.st_size == 2 and len(os.listdir("/proc/self/fd")) == descriptors


def test_links_to_regular_files_are_followed_and_links_to_nothing_say_so(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b'{"a": 1}')
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    assert read_json(tmp_path / "link") == {"a": 1}
    with open_file(tmp_path / "link") as file:
        assert not os.get_inheritable(file.fileno()) and file.read(4) == b'{"a"'
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "gone")
    with pytest.raises(OSError, match="symbolic links"):
        open_file(tmp_path / "loop")


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match=r"it has 1,099,511,627,776 bytes, but at most 33,554,432 are read"):
        read_json(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, but at most 4 are read"):
        read_bytes(path, 4)
    assert read_bytes("/proc/self/status", 10**6).startswith(b"Name:")  # its size is 0
    with pytest.raises(OSError, match="it has 5 bytes, but at most 4 are read"):
        read_bytes("/proc/self/status", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not valid JSON: Expecting value"),
        (b"{x}", "it is not valid JSON: Expecting property name"),
        (b'{"a": 1} {', "it is not valid JSON: Extra data"),
        (b'{"a": "', "it is not valid JSON: Unterminated string"),
        (b'{"a": "\\', "it is not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "it is not valid JSON: Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        (b"[1]", "it does not hold a JSON object"),
        (b'{"' + b"k" * 10**6 + b'": 1, "' + b"k" * 10**6 + b'": 1}', f"it has the key '{'k' * 40}...' twice"),
        (b"null", "it does not hold a JSON object"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "it has the key 'c' twice"),
        (b'{"a": NaN}', "it has the number NaN, which is not finite"),
        (b'{"a": [-Infinity]}', "it has the number -Infinity, which is not finite"),
        (b'{"a": 1e999}', "it has the number 1e999, which is not finite"),
        (b'{"a": -' + b"9" * 400 + b".0}", f"it has the number -{'9' * 39}..., which is not finite"),
        (b'{"a": ' + b"9" * 101 + b"}", "it has an integer of 101 digits: 9999"),
        (b'{"a": ' + b"9" * 10**6 + b"}", "it has an integer of 1,000,000 digits"),
        (b'{"a": ["\\ud800"]}', "it has the text '\\ud800', which has half of a surrogate pair"),
        (b'{"a": {"\\udc00x": 1}}', r"half of a surrogate pair"),
        (b"[" * 10**6, "it has more than 64 levels of lists and objects"),
        (b'{"a":' * 10**6, "it has more than 64 levels of lists and objects"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "it has more than 64 levels of lists and objects"),
        (b"[" + b"[]," * 2**20 + b"0]", "it has about 2,097,153 values, but at most 1,048,576 are read"),
        (b" " * (MAX_JSON_BYTES + 1), "it has 33,554,433 bytes, but at most 33,554,432 are read"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, bytes) else "",
)
def test_content_is_refused(content: bytes, message: str, monkeypatch) -> None:
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(10**7)  # which other code may do, and which lets json end the process
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            json_object(content)
    finally:
        sys.setrecursionlimit(limit)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def test_what_real_files_have_is_read() -> None:
    value = {
        "model_max_length": int(1e30),
        "chat_template": '{%- if "[" in x %}{{ \'{"a": [[[[\' }}\\' * 100,
        "text": "\U0001f600 é \0 \\u0000",
        "nested": [{"a": {"b": [1, -2.5e-6, True, None, ""]}}],
        "": {},
    }
    for ascii_only in (True, False):
        assert json_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value
    deepest: object = 1
    for _ in range(63):
        deepest = [deepest]
    assert json_object(json.dumps({"a": deepest}).encode()) == {"a": deepest}
    names = {
        f"model.layers.{i}.mlp.experts.{j}.weight": "model-00001.safetensors" for i in range(90) for j in range(999)
    }
    assert json_object(json.dumps({"weight_map": names}).encode()) == {"weight_map": names}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.fuzz
@settings(deadline=None, derandomize=True, database=None, max_examples=300 * ROUNDS)
@given(value=st.dictionaries(st.text(max_size=8), VALUES, max_size=4), ascii_only=st.booleans())
def test_what_json_writes_is_read(value: object, ascii_only: bool) -> None:
    assert json_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize("pattern", [b"[],", b'{"":0},', b'"",', b"1e5,", b'{"a":{}},'])
def test_memory_is_bounded(pattern: bytes) -> None:
    content = b'{"a":[' + pattern * (2**17) + b"0]}"
    tracemalloc.start()
    try:
        json_object(content)
    except ValueError as error:
        assert "values" in str(error)  # noqa: PT017
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20


def test_time_is_linear_in_the_length() -> None:
    for content in (b'"\\"' * 10**6, b'{"' + b"\\\\" * 10**6, b'{"a' + b'"' * 10**6):
        with pytest.raises(ValueError, match="not valid JSON"):
            json_object(content)


SEED = json.dumps(
    {"model_type": "llama", "n": [1, 2.5, -3e-4, None, True], "é": {"\U0001f600": '\\ " \n', "x": {"y": [[]]}}}
).encode()


@pytest.mark.fuzz
def test_damaged_json(tmp_path: Path, counts: Callable[[str], None]) -> None:
    found = fuzz(json_object, [SEED], tmp_path, refusals=(ValueError,), cases=3000, megabytes=128)
    counts(f"JSON objects: {found}")
    assert found.accepted > 50 * ROUNDS and found.refused > 1000 * ROUNDS
