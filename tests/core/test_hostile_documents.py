"""Damaged and hostile training data: each reader ends soon, in little memory, with documents or one line of error."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import random
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.test_documents import ARRAY, LINES, MARK, TEXTS, table, zstd
from core.test_text_data import ByteTokenizer
from fuzzing import fuzz
from llama_te_core.train.data.documents import UnusableDocumentError
from llama_te_core.train.data.text_data import TextBatches, TextData

MEBIBYTE = 2**20
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": functools.partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def data_of(path: Path, **settings: Any) -> TextData:
    return TextData(path, ByteTokenizer(), 300_000_000, shuffle_buffer=0, **settings)


def documents_of(data: TextData) -> list[list[int]]:
    source = data.open()
    if source.notice is not None:
        raise AssertionError(source.notice)
    return [list(data.labelled_tokens(document).input_ids) for document in source.documents(None)]


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(UnusableDocumentError) as refused:
        documents_of(data_of(path, **settings))
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert path.name in message
    return message


# --- named faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 1000 + b'"}\n', "line 2 "),
        ("a.jsonl", b'{"text": "a"}\n' + b"\n" * 1000, "line "),
        ("a.json", b'[{"text": "a"}, {"text": "' + b"x" * 1000 + b'"}]', "element 2 "),
        ("a.json", b'[{"text": "a"},' + b" " * 10**6, "element 2 "),
        ("a.json", b'{"text":\n"' + b"x" * 1000 + b'"}', "a.json"),
        ("a.csv", b"text\na\n" + b"x" * 1000 + b"\n", "line 3 "),
        ("a.csv", b'text\na\n"' + b"x\n" * 500, "line 3 "),
        ("a.csv", b"text\na\n" + b"\n" * 1000, "line"),
        ("a.tsv", b"\t" * 1000, "line 1 "),
        ("a.txt", b"x" * 1000, "a.txt"),
        ("a.txt", "ä".encode() * 60, "a.txt"),
    ],
)
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_document_beyond_the_limit_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, place: str, suffix: str
) -> None:
    file = tmp_path / (name + suffix)
    file.write_bytes(COMPRESSIONS[suffix](content))
    message = refusal(file, max_document_bytes=100)
    assert place in message
    assert "has more than 100 bytes" in message
    assert "data.max_document_bytes" in message


def test_paragraphs_are_limited_and_not_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("aaaa\n\n" * 100)
    assert len(documents_of(data_of(file, max_document_bytes=10, text_document="paragraph"))) == 100
    file.write_text("aaaa\n\n" + "aaaa\n" * 10)
    assert "line 3 has" in refusal(file, max_document_bytes=10, text_document="paragraph")


def test_a_document_of_the_limit_is_read(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": b"x" * 100,
        "a.jsonl": (b'{"text": "' + b"x" * 87 + b'"}\n') * 3,
        "a.json": b'[{"text": "' + b"x" * 88 + b'"}  , {"text": "b"}]',
        "a.csv": b"text\n" + b"x" * 99 + b"\n\n\n" + b"y" * 97 + b"\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert documents_of(data_of(tmp_path / name, max_document_bytes=100))


def test_rows_of_tables_are_limited(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "x" * 101]}), file)
    assert "row 2 has more than 100 bytes" in refusal(file, max_document_bytes=100)
    pq.write_table(pa.table({"input_ids": [[1] * 25, [1] * 26]}), file)
    with pytest.raises(UnusableDocumentError, match="row 2 has more than 100 bytes"):
        documents_of(TextData(file, None, 100, max_document_bytes=100))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "1"])
def test_the_limit_is_a_number(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="max_document_bytes is .*; it must be an integer of at least 1"):
        data_of(tmp_path, max_document_bytes=value)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("byte", [b"\0", b"\n", b"["], ids=["nothing", "line ends", "brackets"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, suffix: str, name: str, byte: bytes) -> None:
    """A thousandth of the bytes unpacks to 64 MiB; reading ends at the limit of one document."""
    file = tmp_path / (name + suffix)
    file.write_bytes(bomb(suffix, byte))
    assert memory_of(lambda: refusal(file, max_document_bytes=MEBIBYTE)) < 16 * MEBIBYTE


@functools.cache
def bomb(suffix: str, byte: bytes) -> bytes:
    part = byte * 64 * MEBIBYTE
    return COMPRESSIONS[suffix](part)


def memory_of(action: Callable[[], object]) -> int:
    """Run an action in a child process. Return by how many bytes the memory of the child grew."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # it must never return into pytest
        status = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resident_bytes("VmRSS")
            action()
            os.write(writing, str(resident_bytes("VmHWM") - before).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        grown = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return int(grown)


def resident_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"[" * 10**6, "line 1 is no JSON (maximum recursion depth"),
        ("a.jsonl", b'{"a":' * 10**6, "line 1 is no JSON (maximum recursion depth"),
        ("a.json", b"[" * 10**6, "element 1 is no JSON (maximum recursion depth"),
        ("a.json", b'{"a":\n' * 10**6, "a.json is no JSON (maximum recursion depth"),
        ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 10**6 + b"}", "line 1 is no JSON (Exceeds the limit"),
        ("a.json", b'[{"text": "a", "id": ' + b"1" * 10**6 + b"}]", "element 1 is no JSON (Exceeds the limit"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1 is no JSON (it has the key 'text' twice"),
        ("a.json", b'[{"text": "a", "meta": {"a": 1, "a": 2}}]', "element 1 is no JSON (it has the key 'a' twice"),
        ("a.csv", b"text,text\na,b\n", "line 1, has the field 'text' twice"),
        ("a.jsonl", b'{"text": NaN}', "the field 'text' is float"),
        ("a.jsonl", b'{"text": "a\0"}', "line 1 is no JSON (Invalid control character"),
        ("a.jsonl", '\ufeff{"text": "a"}'.encode("utf-16-le"), "line 1 is no JSON ('utf-8' codec can't decode"),
        ("a.json", '\ufeff[{"text": "a"}]'.encode("utf-16-le"), "a.json is not UTF-8"),
        ("a.txt", "\ufefftext".encode("utf-16-le"), "a.txt is not UTF-8"),
        ("a.csv", "\ufefftext\na".encode("utf-16-le"), "a.csv is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "' + b"k" * 10**6 + b'": 1}', "has the field 'kkk"),
        ("a.jsonl", b"{" + b",".join(b'"%d":1' % key for key in range(10**4)) + b"}", "and 9995 more]"),
        ("a.csv", b"," * 10**5, "and 99996 more]"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "element 1 is no JSON (no , or ] follows it)"),
        ("a.json", b'[{"text": "a"}] 1', "a.json is no JSON (more text follows the array)"),
        ("a.json", b'[{"text": "a"}', "element 1 is no JSON (no , or ] follows it)"),
        ("a.json", b'[{"text": "a"}, null]', "element 2 is JSON of type NoneType"),
        ("a.json", b'[{"text": "a"}, {"text": oops' + b" " * 10**5, "element 2 is no JSON (Expecting value)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_is_refused_in_one_short_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def test_what_training_does_not_read_may_be_nan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n')
    assert len(documents_of(data_of(tmp_path / "a.jsonl"))) == 1


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    assert "has the field 'text' twice" in refusal(tmp_path / "a.parquet")


def test_objects_of_an_array_come_one_by_one(tmp_path: Path) -> None:
    """An array of 30 MB, of which memory holds a document at a time."""
    file = tmp_path / "a.json"
    with file.open("w") as stream:
        stream.write("[" + ",\n".join(json.dumps({"text": "ä" * 10_000}) for _ in range(500)) + "]")
    source = data_of(file).open()

    def read() -> None:
        assert sum(len(document.fields()["text"]) for document in source.documents(None)) == 5_000_000

    assert memory_of(read) < 8 * MEBIBYTE


def test_a_text_of_a_dictionary_is_not_repeated(tmp_path: Path) -> None:
    """A table of 100 kB, whose 1000 rows have one text of 1 MiB."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["x" * MEBIBYTE] * 1000).dictionary_encode()}), file, compression="zstd")
    assert file.stat().st_size < MEBIBYTE
    source = data_of(file).open()

    def read() -> None:
        assert sum(len(document.fields()["text"]) for document in source.documents(None)) == 1000 * MEBIBYTE

    assert memory_of(read) < 256 * MEBIBYTE


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "socket"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        (folder / name).symlink_to(tmp_path / "pipe")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(folder / name))
    for source in (folder, folder / name):
        with pytest.raises(UnusableDocumentError, match=rf"{name} cannot be read: it is a \w+.*, not a regular file"):
            data_of(source).open()


def test_a_folder_named_as_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "a.jsonl" / "b.txt").write_text("b")
    assert len(documents_of(data_of(tmp_path))) == 1
    assert len(documents_of(data_of(tmp_path / "a.jsonl"))) == 1


@pytest.mark.parametrize("kind", ["shorter", "longer", "gone", "a pipe", "shorter while it is read"])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_file_that_changes_during_the_run_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    lines = "".join(json.dumps({"text": f"{number} {random.Random(number).random()}"}) + "\n" for number in range(9999))
    file.write_bytes(COMPRESSIONS[suffix](lines.encode()))
    documents = data_of(file).open().documents(None)
    if kind == "shorter while it is read":
        next(documents)
    if kind.startswith("shorter"):
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "longer":
        with file.open("ab") as stream:
            stream.write(COMPRESSIONS[suffix](lines.encode()))
    else:
        file.unlink()
        if kind == "a pipe":
            os.mkfifo(file)
    with pytest.raises(UnusableDocumentError, match=r"a\.jsonl[.\w]*(, line| had .* bytes when| cannot be read)"):
        _ = [document.fields() for document in documents]


def test_a_run_does_not_go_on_with_files_of_another_size(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    state = TextBatches(data_of(file)).state_dict()
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="has other documents than the saved run has read"):
        TextBatches(data_of(file)).load_state_dict(state)


# --- damaged files ----------------------------------------------------------------------------------------------------


def tables() -> list[bytes]:
    files = []
    for column in (pa.array(TEXTS * 50), pa.array(TEXTS * 50).dictionary_encode()):
        for options in ({"compression": "zstd"}, {"compression": "none", "write_page_checksum": True}):
            stream = io.BytesIO()
            pq.write_table(pa.table({"id": range(150), "text": column}), stream, row_group_size=40, **options)
            files.append(stream.getvalue())
    return files


def rows_of_tokens() -> list[bytes]:
    stream = io.BytesIO()
    columns = {"input_ids": [[1, 2, 3], [4], [5, 6]], "labels": [[1, -100, 3], [4], [5, 6]]}
    pq.write_table(pa.table(columns), stream)
    return [stream.getvalue()]


SEEDS: dict[str, list[bytes]] = {
    "a.jsonl": [LINES.encode(), MARK + LINES.encode()],
    "b.json": [ARRAY.encode(), LINES.encode(), json.dumps({"text": "alone"}, indent=1).encode()],
    "c.csv": [table(",").encode()],
    "d.tsv": [table("\t").encode()],
    "e.txt": ["one\n\ntwo ä\r\n".encode()],
    "f.parquet": tables(),
    "tokens.jsonl": [b'{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 0]}\n'],
    "tokens.parquet": rows_of_tokens(),
    **{f"a.jsonl{suffix}": [compress(LINES.encode())] for suffix, compress in COMPRESSIONS.items() if suffix},
}


@pytest.mark.fuzz
@pytest.mark.parametrize("name", SEEDS)
def test_damaged_documents(tmp_path: Path, name: str, counts: Callable[[str], None]) -> None:
    file = tmp_path / name
    tokenizer = None if name.startswith("tokens") else ByteTokenizer()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        data = TextData(file, tokenizer, 64, vocab_size=1000, max_document_bytes=10_000, text_document="paragraph")
        source = data.open()
        source.count(10)
        for document in source.documents(None):
            data.labelled_tokens(document)

    refusals = (UnusableDocumentError,)
    result = fuzz(read, SEEDS[name], tmp_path, refusals=refusals, cases=1000, seconds=5, megabytes=512)
    counts(f"{name}: {result}")
