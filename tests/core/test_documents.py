"""Every file of a data folder is read, refused or named: formats, compressions, byte order marks, links, no content."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.test_text_data import ByteTokenizer, text_data, texts_of
from core.training_runs import docstrings, options, train, write
from llama_te_core.train.command import main
from llama_te_core.train.data.text_data import TextBatches, TextData

TEXTS = ["first ä", "second\nline", 'third, "quoted"']
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1)
# Without its time: as a test's name, it must be the same in all of pytest's processes.
CUT_SHORT = gzip.compress(LINES.encode(), mtime=0)[:-9]
MARK = b"\xef\xbb\xbf"


def table(delimiter: str) -> str:
    rows = [("id", "text"), *((str(number), text.replace('"', '""')) for number, text in enumerate(TEXTS))]
    return "".join(delimiter.join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "byte order mark"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_every_format_is_read_in_every_compression(
    tmp_path: Path, mark: bytes, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    formats = {
        "a.csv": table(","), "b.json": ARRAY, "c.JSON": LINES, "d.jsonl": LINES, "e.ndjson": LINES,
        "f.tsv": table("\t"), "g.json": json.dumps({"text": "alone"}, indent=1),
    }  # fmt: skip
    for name, content in formats.items():
        (tmp_path / (name + suffix)).write_bytes(compress(mark + content.encode()))
    (tmp_path / ("h.txt" + suffix)).write_bytes(compress(mark + b"one\n\ntwo\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is skipped
        assert texts_of(text_data(tmp_path)) == TEXTS * 6 + ["alone", "one\n\ntwo\n"]
        assert texts_of(text_data(tmp_path, text_document="paragraph"))[-2:] == ["one", "two"]
    TextBatches(text_data(tmp_path), 0, 20).check_documents(workers=0)
    with pytest.raises(ValueError, match="has 20 documents, fewer than the 21 shards"):
        TextBatches(text_data(tmp_path), 0, 21).check_documents(workers=0)


def test_a_run_reads_what_lies_in_its_folder(tmp_path: Path) -> None:
    """The losses of a folder of mixed files are those of one .jsonl file with the same documents."""
    texts = docstrings(100)[:4]
    settings: dict[str, Any] = {"steps": 2, "checkpoint__interval": None, "data__shuffle_buffer": 0}
    expected = train(tmp_path / "one", write(tmp_path, texts), **settings)
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([{"text": texts[0]}]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[1]}).encode()))
    (folder / "c.jsonl.zst").write_bytes(zstd(MARK + json.dumps({"text": texts[2]}).encode()))
    (folder / "d.txt").write_bytes(MARK + texts[3].encode())
    assert train(tmp_path / "two", folder, **settings) == expected


def test_a_long_cell_and_a_single_file(tmp_path: Path) -> None:
    text = "x" * 200_000  # csv's own limit is 131072
    (tmp_path / "a.csv").write_text(f"text\n{text}\n\n")
    (batch,) = TextBatches(TextData(tmp_path / "a.csv", ByteTokenizer(), 300_000))
    assert batch["input_ids"].shape[1] == 200_002


def test_files_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    for name in (
        "a.jsonl",
        ".b.jsonl",
        ".ipynb_checkpoints/a.jsonl",
        ".git/config",
        "notes.md",
        "sub/p.parquet.gz",
        "x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    named = r"\.b\.jsonl, \.ipynb_checkpoints/a\.jsonl, notes\.md, sub/p\.parquet\.gz, x are not read\. .*not hid"
    with pytest.warns(UserWarning, match=named) as found:
        ranks = [TextBatches(text_data(tmp_path), rank, 2) for rank in range(2)]
    assert len(found) == 1
    assert len(list(ranks[0])) == 1
    for number in range(9):
        (tmp_path / f"{number}.log").touch()
    with pytest.warns(UserWarning, match=r"1\.log, 2\.log and 9 more are not read"):
        TextBatches(text_data(tmp_path))


def test_folders_behind_links_are_read_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("b")
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data")
    assert texts_of(text_data(tmp_path / "data")) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl has no documents\. Remove it, or set skip_empty=True"),
        ("a.txt", b"", r"a\.txt has no documents"),
        ("a.jsonl", b"\n \n", r"a\.jsonl has no documents"),
        ("a.jsonl", MARK + b"\n", r"a\.jsonl has no documents"),
        ("a.json", b"[]", r"a\.json has no documents"),
        ("a.csv", b"text\n", r"a\.csv has no documents"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz has no documents"),
        ("a.jsonl.gz", CUT_SHORT, r"a\.jsonl\.gz cannot be read: Compressed file ended"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.xz", b"no xz", r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"no table", r"a\.parquet cannot be read"),
        ("a.json", b'{"text": \n', r"a\.json is no JSON \(.*array of objects, or have one object on each line"),
        ("a.json", b'[{"text": "a"}, "b"]', r"a\.json, element 2 is JSON of type str; it must be an object"),
        ("a.json", b'{"text": "a"}\n{"text"\n', r"a\.json, line 2 is no JSON"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", r"a\.csv, line 3 has 3 cells, but the header has 2"),
        ("a.csv", b'text\n"a', r"a\.csv cannot be read: unexpected end of data"),
        ("a.csv", b"id,body\n1,a\n", r"a\.csv, line 1, has no field 'text'; its fields are \['body', 'id'\]"),
        ("a.csv", b"text,weight\na,1\n", r"a\.csv, line 1, has the field 'weight' without effect"),
        ("a.csv", b"text\n\xff\n", r"a\.csv is not UTF-8"),
        ("a.txt", "wide".encode("utf-16"), r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\\ud83d"}\n', r"line 2: the field 'text' has the lone surrogate"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(TextBatches(text_data(tmp_path)))


def test_empty_files_are_accepted_on_request(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for name in ("b.jsonl", "c.txt", "d.csv", "e.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n')
    assert texts_of(text_data(tmp_path, skip_empty=True)) == ["a"]
    with pytest.raises(ValueError, match=r"b\.jsonl has no documents"):
        TextBatches(text_data(tmp_path))


def test_files_and_folders_that_this_user_cannot_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"b\.jsonl is a link to a file that does not exist"):
        TextBatches(text_data(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file).name != "a.jsonl")  # root may read everything
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read by this user"):
        TextBatches(text_data(tmp_path))


def test_the_command_names_file_and_line_of_a_lone_surrogate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\udc00"}\n')
    assert main(options(tmp_path / "run", tmp_path / "a.jsonl", steps=1)) == 1
    message = capsys.readouterr().err
    assert "a.jsonl, line 1: the field 'text' has the lone surrogate \\udc00 at character 1" in message
    assert "Traceback" not in message
