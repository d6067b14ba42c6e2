"""Documents of a training set: local files, or a data set of the Hugging Face hub.

A source yields all its documents, in an order that depends on a random state. It parses as little as it can, so that
skipping a document costs little.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

FORMATS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt")
COMPRESSIONS = (".bz2", ".gz", ".xz", ".zst")
# These fields describe a document. Nobody expects training to depend on them.
# fmt: off
METADATA = frozenset({
    "id", "doc_id", "document_id", "url", "title", "source", "domain", "subset", "dump", "path", "file_path",
    "timestamp", "date", "added", "created", "lang", "language", "language_score", "score", "license", "hash", "meta",
    "metadata", "token_count", "num_tokens", "text_length", "length",
})
_CONVERSATIONS = frozenset({
    "messages", "conversation", "conversations", "chat", "prompt", "completion", "instruction", "input", "output",
    "question", "answer", "response", "chosen", "rejected",
})
# fmt: on
_ROWS = 1000  # rows of a table to convert to Python objects at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CSV_FIELD = 2**31 - 1
_NAMED = 5  # a message names this many files

TextDocument = Literal["file", "paragraph"]


class UnusableDocumentError(ValueError):
    """A file or a document cannot be used; the message has its place."""


class Document(NamedTuple):
    """One document, not yet parsed.

    Attributes:
        place: The document's file and line, for messages.
        content: A line of JSON, or the fields.
    """

    place: str
    content: bytes | Mapping[str, Any]

    def fields(self) -> Mapping[str, Any]:
        """Return the document's fields by name.

        Raises:
            UnusableDocumentError: The line is not a JSON object.
        """
        if isinstance(self.content, Mapping):
            return self.content
        try:
            fields = json.loads(self.content)
        except ValueError as error:
            raise UnusableDocumentError(
                f"{self.place} is no JSON ({error}); each line of the file must be one object in UTF-8."
            ) from error
        if not isinstance(fields, dict):
            raise UnusableDocumentError(
                f"{self.place} is JSON of type {type(fields).__name__}; each line of the file must be one object."
            )
        return fields


class Fields(NamedTuple):
    """The fields of a document that training reads, and those that it may ignore.

    Attributes:
        main: Every document must have this field. The text of a .txt file counts as this field.
        optional: Training uses these fields where a document has them.
        ignored: Fields that the user says to ignore, besides `METADATA`.
    """

    main: str
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def used(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that training reads; all of them where the main field is missing.

        A message about the missing field lists all names.
        """
        names = list(names)
        return [name for name in names if name in (self.main, *self.optional)] if self.main in names else names

    def check(self, place: str, names: Iterable[str]) -> None:
        """Refuse a document or a table whose fields include one without effect.

        Args:
            place: Where the fields are, for the message.
            names: The names of all fields.

        Raises:
            UnusableDocumentError: The main field is missing, or a field has no effect.
        """
        names = list(names)
        if self.main not in names:
            raise UnusableDocumentError(
                f"{place} has no field {self.main!r}; its fields are {sorted(names)}. {self._advice(names)}"
            )
        unused = [
            name for name in names if name not in METADATA and name not in (self.main, *self.optional, *self.ignored)
        ]
        if unused:
            listed = json.dumps([*self.ignored, *unused])
            raise UnusableDocumentError(
                f"{place} has the field{'s' * (len(unused) > 1)} {', '.join(map(repr, unused))} without effect: "
                f"training reads {', '.join((self.main, *self.optional))}. {self._advice(unused)} To ignore the field"
                f"{'s' * (len(unused) > 1)}, set ignored_fields={listed} (in a configuration `data.ignored_fields: "
                f"{listed}`)."
            )

    def _advice(self, names: list[str]) -> str:
        reads_tokens = self.main == "input_ids"
        if _CONVERSATIONS.intersection(names):
            return (
                "Training does not render conversations or prompts: tokenize each row to input_ids and labels, with "
                "the label -100 for the tokens of the prompt, and use tokenizer=None (in a configuration "
                "`data.tokenizer: null`). The guide to training data has an example."
            )
        if not reads_tokens and {"input_ids", "labels"}.intersection(names):
            return "Set tokenizer=None (in a configuration `data.tokenizer: null`) to train on input_ids and labels."
        if self.main not in names and reads_tokens:
            return "Give a tokenizer (in a configuration `data.tokenizer`) if it has text."
        return "Change text_field." if not reads_tokens else "Remove what training does not need."


class Files:
    """The files of documents in a folder and its subfolders, or one such file.

    `FORMATS` and `COMPRESSIONS` list the file names. Hidden files and folders, whose names begin with a dot, are no
    documents.

    Args:
        path: The folder or file.
        fields: The fields that callers read.
        text_document: One document of a .txt file: the whole file, or a paragraph between blank lines.
        skip_empty: Accept files without documents.

    Attributes:
        files: The files of documents, by name.
        skipped: Names of other files in the folder, relative to it; of hidden files only those named like documents.

    Raises:
        ImportError: A file needs pyarrow, which is not installed.
        UnusableDocumentError: The path has no file of documents, or one that is empty or cannot be read.
    """

    def __init__(self, path: Path, fields: Fields, text_document: TextDocument, skip_empty: bool = False) -> None:
        self.path = path
        self.fields = fields
        self.text_document = text_document
        self.skip_empty = skip_empty
        self.files: list[Path] = []
        self.skipped: list[str] = []
        for file in _files(path) if path.is_dir() else [path]:
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            hidden = path.is_dir() and any(part.startswith(".") for part in name.parts)
            if _format(file) is not None and not hidden:
                self.files.append(file)
            elif _format(file) is not None or not hidden:
                self.skipped.append(name.as_posix())
        if not self.files:
            there = f" It has {_listed(self.skipped)}." if self.skipped and path.is_dir() else ""
            raise UnusableDocumentError(
                f"source={str(path)!r} has no file of documents; it must be a file {_formats()}, or a folder with such "
                f"files.{there}"
            )
        for file in self.files:
            self._check(file)

    @property
    def identity(self) -> str:
        """A text that is equal for two sources with the same documents in the same order."""
        root = self.path if self.path.is_dir() else self.path.parent
        listing = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in self.files]
        return f"{len(listing)} files, {zlib.crc32(repr((listing, self.text_document)).encode()):08x}"

    @property
    def notice(self) -> str | None:
        """A sentence that names the files of the folder that are not read; None if all are read."""
        if not self.skipped:
            return None
        verb = "is" if len(self.skipped) == 1 else "are"
        return (
            f"source={str(self.path)!r}: {_listed(self.skipped)} {verb} not read. Documents are files "
            f"{_formats()}, and not hidden."
        )

    def documents(self, random: Random | None) -> Iterator[Document]:
        """Yield each document once. `random` shuffles the files; without it they come by name."""
        for file in self.files if random is None else sorted(self.files, key=lambda file: random.random()):
            yield from self._read(file)

    def count(self, most: int) -> int:
        """Count the documents, and stop reading at `most` of them."""
        found = 0
        for file in self.files:
            if _format(file) == ".parquet":
                with _table(file) as table:
                    found += table.metadata.num_rows
            elif _format(file) == ".txt" and self.text_document == "file":
                found += 1
            else:
                found += sum(1 for _ in islice(self._read(file), most - found))
            if found >= most:
                return most
        return found

    def _check(self, file: Path) -> None:
        if not file.exists():
            raise UnusableDocumentError(f"{file} is a link to a file that does not exist. Repair or remove it.")
        if not os.access(file, os.R_OK):
            raise UnusableDocumentError(f"{file} cannot be read by this user. Change its permissions, or remove it.")
        needs_pyarrow = _format(file) == ".parquet" or file.suffix.lower() == ".zst"
        if needs_pyarrow and importlib.util.find_spec("pyarrow") is None:
            raise ImportError(f"{file} needs pyarrow, which is not installed: pip install 'llama-te-core[train]'.")
        if file.stat().st_size == 0 and not self.skip_empty:
            raise UnusableDocumentError(_empty(file))

    def _read(self, file: Path) -> Iterator[Document]:
        readers: dict[str | None, Callable[[Path], Iterator[Document]]] = {
            ".csv": self._cells,
            ".json": _json,
            ".jsonl": _lines,
            ".ndjson": _lines,
            ".parquet": self._rows,
            ".tsv": self._cells,
            ".txt": self._texts,
        }
        documents = 0
        try:
            for document in readers[_format(file)](file) if file.stat().st_size else ():
                documents += 1
                yield document
        except UnicodeDecodeError as error:
            raise UnusableDocumentError(f"{file} is not UTF-8 ({error}); files of text must be.") from error
        except (OSError, EOFError, csv.Error, zlib.error, lzma.LZMAError) as error:
            raise UnusableDocumentError(f"{file} cannot be read: {error}. Repair or remove it.") from error
        if not documents and not self.skip_empty:
            raise UnusableDocumentError(_empty(file))

    def _rows(self, file: Path) -> Iterator[Document]:
        from pyarrow import ArrowException

        try:
            with _table(file) as table:
                names = table.schema_arrow.names
                self.fields.check(str(file), names)
                batches = table.iter_batches(_ROWS, columns=self.fields.used(names))
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield Document(f"{file}, row {number}", row)
        except ArrowException as error:
            raise UnusableDocumentError(f"{file} cannot be read: {error} Repair or remove it.") from error

    def _cells(self, file: Path) -> Iterator[Document]:
        csv.field_size_limit(_LONGEST_CSV_FIELD)
        with io.TextIOWrapper(_opened(file), encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter="\t" if _format(file) == ".tsv" else ",", strict=True)
            header = next(reader, [])
            self.fields.check(f"{file}, line 1,", header)
            line = reader.line_num + 1
            for cells in reader:
                place, line = f"{file}, line {line}", reader.line_num + 1
                if len(cells) not in (0, len(header)):  # a blank line has no cells
                    raise UnusableDocumentError(f"{place} has {len(cells)} cells, but the header has {len(header)}.")
                if cells:
                    row = dict(zip(header, cells, strict=True))
                    yield Document(place, {name: row[name] for name in self.fields.used(header)})

    def _texts(self, file: Path) -> Iterator[Document]:
        with io.TextIOWrapper(_opened(file), encoding="utf-8-sig") as lines:
            if self.text_document == "file":
                yield Document(str(file), {self.fields.main: lines.read()})
            else:
                for number, paragraph in enumerate(_paragraphs(lines), 1):
                    yield Document(f"{file}, paragraph {number}", {self.fields.main: paragraph})


class HubDataset:
    """A data set of the Hugging Face hub, or any other that `datasets.load_dataset` knows by a name.

    Args:
        name: The hub id, `owner/name`.
        fields: The fields that callers read.
        subset: `load_dataset`'s `name`.
        split: The split of the data set.
        streaming: Read over the network instead of downloading the data set first.

    Raises:
        UnusableDocumentError: At the first document: the data set cannot be loaded, or has a column without effect.
    """

    def __init__(self, name: str, fields: Fields, subset: str | None, split: str, streaming: bool) -> None:
        self.name = name
        self.fields = fields
        self.subset = subset
        self.split = split
        self.streaming = streaming

    @property
    def identity(self) -> str:
        """A text that is equal for two sources with the same documents in the same order."""
        return f"{self.name}, {self.subset}, {self.split}"

    @property
    def notice(self) -> str | None:
        """None: a data set has no files that are not read."""
        return None

    def documents(self, random: Random | None) -> Iterator[Document]:
        """Yield each row once, in order. `random` has no effect, since a download does not show its files' borders."""
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"source={self.name!r} needs datasets, which is not installed: pip install 'llama-te-core[train]'."
            ) from error
        try:
            with _bars_on_terminals_only(datasets):
                dataset = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
        except (OSError, ValueError) as error:
            raise UnusableDocumentError(
                f"source={self.name!r} is no file or folder here, and cannot be loaded from the hub with "
                f"subset={self.subset!r} and split={self.split!r}. Check the path, or the name, subset, split and the "
                f"network; a private data set needs `hf auth login`. {' '.join(str(error).split())}"
            ) from error
        if dataset.column_names:  # a stream may not know them; its rows do
            self.fields.check(f"{self.name}, {self.split},", dataset.column_names)
            dataset = dataset.select_columns(self.fields.used(dataset.column_names))
        number = 0
        # Plain iteration within a worker of a DataLoader would yield only a share, in another order.
        for batch in dataset.iter(_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Document(f"{self.name}, {self.split}, row {number}", dict(zip(batch, values, strict=True)))


Source: TypeAlias = Files | HubDataset


def in_order(source: Source, seed: int, epoch: int, shuffle_buffer: int) -> Iterator[Document]:
    """Yield a source's documents in the order of an epoch. The same arguments give the same order.

    Files come in random order. Their documents go through a buffer: when a document enters, a random one leaves.

    Args:
        source: The source.
        seed: The run's seed.
        epoch: The epoch, from 0.
        shuffle_buffer: The number of documents that the buffer holds; 0 keeps the source's order.
    """
    if shuffle_buffer == 0:
        yield from source.documents(None)
        return
    # Use Random.random alone: Python promises the same numbers in later versions for no other method.
    random = Random(f"{seed} {epoch}")
    buffer: list[Document] = []
    for document in source.documents(random):
        if len(buffer) < shuffle_buffer:
            buffer.append(document)
        else:
            place = int(random.random() * shuffle_buffer)
            buffer[place], document = document, buffer[place]
            yield document
    while buffer:
        place = int(random.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()


def is_file_of_documents(path: Path) -> bool:
    """Tell whether a file with this name would be read; it need not exist."""
    return _format(path) is not None


def _format(file: Path) -> str | None:
    """Return which of `FORMATS` a file has by its name, without a compression's suffix; None for no such file."""
    name = Path(file.name.lower())
    compressed = name.suffix in COMPRESSIONS
    suffix = Path(name.stem).suffix if compressed else name.suffix
    if suffix not in FORMATS or (compressed and suffix == ".parquet"):
        return None
    return suffix


def _formats() -> str:
    return f"({', '.join(FORMATS)}, all but .parquet also compressed as {', '.join(COMPRESSIONS)})"


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def _bars_on_terminals_only(datasets: Any) -> Iterator[None]:
    """Keep the library's progress bars out of log files."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _files(folder: Path) -> list[Path]:
    """Return all files of a folder and its subfolders by name, through links to folders too."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(place))
        # A link may lead back to a folder above it.
        folders[:] = [each for each in folders if os.path.realpath(os.path.join(place, each)) not in seen]
        found += [Path(place, name) for name in names]
    return sorted(found)


def _empty(file: Path) -> str:
    return f"{file} has no documents. Remove it, or set skip_empty=True (in a configuration `data.skip_empty: true`)."


def _opened(file: Path) -> BinaryIO:
    """Open a file, and decompress it where its name says that it is compressed."""
    openers: Mapping[str, Callable[[Path], Any]] = {
        ".bz2": bz2.open,
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": _zstandard,
    }
    opener = openers.get(file.suffix.lower())
    stream: BinaryIO = file.open("rb") if opener is None else opener(file)
    return stream


def _zstandard(file: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd"))


def _lines(file: Path) -> Iterator[Document]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line and not line.isspace():
                yield Document(f"{file}, line {number}", line)


def _json(file: Path) -> Iterator[Document]:
    """Yield the objects of a .json file: of an array, one on each line, or a single one on several lines."""
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return
    assert isinstance(first.content, bytes)
    is_array = first.content.lstrip().startswith(b"[")
    try:
        json.loads(first.content)
        is_whole = is_array
    except ValueError:
        is_whole = True
    if not is_whole:
        yield first
        yield from lines
        return
    with _opened(file) as stream:
        text = stream.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UnusableDocumentError(
            f"{file} is no JSON ({error}); it must be an array of objects, or have one object on each line, in UTF-8."
        ) from error
    objects = content if is_array else [content]
    for number, each in enumerate(objects, 1):
        place = f"{file}, element {number}" if is_array else str(file)
        if not isinstance(each, dict):
            raise UnusableDocumentError(f"{place} is JSON of type {type(each).__name__}; it must be an object.")
        yield Document(place, each)


def _table(file: Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).removesuffix("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).removesuffix("\n")
