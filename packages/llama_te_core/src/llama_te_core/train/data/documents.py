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
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import IO, Any, AnyStr, BinaryIO, Generic, Literal, NamedTuple, TypeAlias

from ...files.input_files import open_file, unique_keys

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
_ROWS = 1000  # rows of a table to read at a time, if they are small
_ROW_BYTES = 64 * 2**20  # of these rows together
_CHUNK = 2**16  # characters of JSON to read at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CSV_FIELD = 2**31 - 1
_NAMED = 5  # a message names this many files or fields
_LONGEST_NAME, _LONGEST_REASON = 80, 300  # characters in a message
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")  # of JSON
_LONGEST_LITERAL = 16  # characters of -Infinity, and more
# NaN is accepted: Python's json writes it, and training reads no field with it.
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)

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
            fields = _DECODER.decode(self.content.decode())
        except (ValueError, RecursionError) as error:
            raise UnusableDocumentError(
                f"{self.place} is no JSON ({_reason(error)}); each line of the file must be one object in UTF-8."
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
                f"{place} has no field {self.main!r}; its fields are [{_listed(sorted(map(repr, names)))}]. "
                f"{self._advice(names)}"
            )
        unused = [
            name for name in names if name not in METADATA and name not in (self.main, *self.optional, *self.ignored)
        ]
        if unused:
            listed = json.dumps([*self.ignored, *map(_short, unused[:_NAMED])])
            raise UnusableDocumentError(
                f"{place} has the field{'s' * (len(unused) > 1)} {_listed(list(map(repr, unused)))} without effect: "
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
        max_document_bytes: The most bytes of one document.
        skip_empty: Accept files without documents.

    Attributes:
        files: The files of documents, by name.
        skipped: Names of other files in the folder, relative to it; of hidden files only those named like documents.

    Raises:
        ImportError: A file needs pyarrow, which is not installed.
        UnusableDocumentError: The path has no file of documents, or one that is empty or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        fields: Fields,
        text_document: TextDocument,
        max_document_bytes: int,
        skip_empty: bool = False,
    ) -> None:
        self.path = path
        self.fields = fields
        self.text_document = text_document
        self.max_document_bytes = max_document_bytes
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
        self._sizes = {file: self._checked(file) for file in self.files}

    @property
    def identity(self) -> str:
        """A text that is equal for two sources with the same documents in the same order."""
        root = self.path if self.path.is_dir() else self.path.parent
        listing = [(file.relative_to(root).as_posix(), self._sizes[file]) for file in self.files]
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
                with _readable(file), open_file(file) as stream, _table(file, stream) as table:
                    found += table.metadata.num_rows
            elif _format(file) == ".txt" and self.text_document == "file":
                found += 1
            else:
                found += sum(1 for _ in islice(self._read(file), most - found))
            if found >= most:
                return most
        return found

    def _checked(self, file: Path) -> int:
        """Refuse a file that cannot be read or is empty; return its size in bytes."""
        if not file.exists():
            raise UnusableDocumentError(f"{file} is a link to a file that does not exist. Repair or remove it.")
        if not os.access(file, os.R_OK):
            raise UnusableDocumentError(f"{file} cannot be read by this user. Change its permissions, or remove it.")
        needs_pyarrow = _format(file) == ".parquet" or file.suffix.lower() == ".zst"
        if needs_pyarrow and importlib.util.find_spec("pyarrow") is None:
            raise ImportError(f"{file} needs pyarrow, which is not installed: pip install 'llama-te-core[train]'.")
        with _readable(file), open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size == 0 and not self.skip_empty:
            raise UnusableDocumentError(_empty(file))
        return size

    def _read(self, file: Path) -> Iterator[Document]:
        readers: dict[str | None, Callable[[Path, BinaryIO], Iterator[Document]]] = {
            ".csv": self._cells,
            ".json": self._json,
            ".jsonl": self._lines,
            ".ndjson": self._lines,
            ".parquet": self._rows,
            ".tsv": self._cells,
            ".txt": self._texts,
        }
        documents = 0
        with _readable(file), open_file(file) as stream:
            self._check_size(file, stream)
            for document in readers[_format(file)](file, stream) if self._sizes[file] else ():
                documents += 1
                yield document
            self._check_size(file, stream)
        if not documents and not self.skip_empty:
            raise UnusableDocumentError(_empty(file))

    def _check_size(self, file: Path, stream: BinaryIO) -> None:
        """Refuse a file that grows or shrinks during the run, since processes would read different documents."""
        before, now = self._sizes[file], os.fstat(stream.fileno()).st_size
        if now != before:
            raise UnusableDocumentError(
                f"{file} had {before:,} bytes when the run began and has {now:,} now, so documents would repeat or be "
                "missed. Begin again with files that do not change."
            )

    def _rows(self, file: Path, stream: BinaryIO) -> Iterator[Document]:
        with _table(file, stream) as table:
            names = table.schema_arrow.names
            self.fields.check(str(file), names)
            _check_unique(str(file), names)
            used = self.fields.used(names)
            number = 0
            for group in range(table.num_row_groups):
                metadata = table.metadata.row_group(group)
                row_bytes = metadata.total_byte_size // max(1, metadata.num_rows)
                rows = max(1, min(_ROWS, _ROW_BYTES // max(1, row_bytes)))
                for batch in table.iter_batches(rows, row_groups=[group], columns=used):
                    columns = {name: batch.column(name) for name in used}
                    # One row at a time: all rows of a dictionary may have one long text.
                    for row in range(batch.num_rows):
                        number += 1
                        yield Document(f"{file}, row {number}", {name: columns[name][row].as_py() for name in used})

    def _cells(self, file: Path, stream: BinaryIO) -> Iterator[Document]:
        csv.field_size_limit(_LONGEST_CSV_FIELD)  # `_Lines` has the limit
        with _decompressed(file, stream) as content, _text(content, newline="") as text:
            lines = _Lines(text, file, self.max_document_bytes)
            reader = csv.reader(lines, delimiter="\t" if _format(file) == ".tsv" else ",", strict=True)
            header = next(reader, [])
            self.fields.check(f"{file}, line 1,", header)
            _check_unique(f"{file}, line 1,", header)
            lines.end_document()
            for cells in reader:
                if not cells:  # a blank line
                    lines.skip_line()
                    continue
                place = lines.place
                lines.end_document()
                if len(cells) != len(header):
                    raise UnusableDocumentError(f"{place} has {len(cells)} cells, but the header has {len(header)}.")
                row = dict(zip(header, cells, strict=True))
                yield Document(place, {name: row[name] for name in self.fields.used(header)})

    def _texts(self, file: Path, stream: BinaryIO) -> Iterator[Document]:
        with _decompressed(file, stream) as content, _text(content) as text:
            if self.text_document == "file":
                yield Document(str(file), {self.fields.main: self._whole(file, text)})
            else:
                lines = _Lines(text, file, self.max_document_bytes)
                for number, paragraph in enumerate(_paragraphs(lines), 1):
                    lines.end_document()
                    yield Document(f"{file}, paragraph {number}", {self.fields.main: paragraph})

    def _lines(self, file: Path, stream: BinaryIO) -> Iterator[Document]:
        with _decompressed(file, stream) as content:
            lines = _Lines(content, file, self.max_document_bytes)
            for line in lines:
                if lines.number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line and not line.isspace():
                    place = lines.place
                    lines.end_document()
                    yield Document(place, line)
                else:
                    lines.skip_line()

    def _json(self, file: Path, stream: BinaryIO) -> Iterator[Document]:
        """Yield the objects of a .json file: of an array, one on each line, or a single one on several lines."""
        with _decompressed(file, stream) as content, _text(content, newline="") as text:
            array = _JsonArray(text, file, self.max_document_bytes)
            if array.begins():
                yield from array
                return
        stream.seek(0)
        lines = self._lines(file, stream)
        first = next(lines, None)
        if first is None:
            return
        try:
            first.fields()
        except UnusableDocumentError:
            stream.seek(0)
        else:
            yield first
            yield from lines
            return
        with _decompressed(file, stream) as content, _text(content, newline="") as text:
            whole = self._whole(file, text)
        try:
            fields = _DECODER.decode(whole)
        except (ValueError, RecursionError) as error:
            raise UnusableDocumentError(_no_json(str(file), error)) from error
        if not isinstance(fields, dict):
            raise UnusableDocumentError(_no_object(str(file), fields))
        yield Document(str(file), fields)

    def _whole(self, file: Path, text: IO[str]) -> str:
        content = text.read(self.max_document_bytes + 1)
        if len(content) > self.max_document_bytes:
            raise UnusableDocumentError(too_long(str(file), self.max_document_bytes))
        return content


class _Lines(Generic[AnyStr]):
    """The lines of a file, in which a document has a limited length, with the blank lines before it.

    Args:
        stream: The file, as bytes or as text.
        file: Its name, for messages.
        most: The most bytes or characters of a document.

    Attributes:
        number: The number of the last line, from 1.
    """

    def __init__(self, stream: IO[AnyStr], file: Path, most: int) -> None:
        self.number = 0
        self._stream: IO[AnyStr] = stream
        self._file = file
        self._most = most
        self.end_document()

    def __iter__(self) -> Iterator[AnyStr]:
        return self

    def __next__(self) -> AnyStr:
        line = self._stream.readline(self._left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            raise UnusableDocumentError(too_long(self.place, self._most))
        return line

    @property
    def place(self) -> str:
        """The file, and the first line of the present document."""
        return f"{self._file}, line {self._first}"

    def end_document(self) -> None:
        """Begin a document with the next line."""
        self._left = self._most
        self._first = self.number + 1

    def skip_line(self) -> None:
        """Begin the present document with the next line."""
        self._first = self.number + 1


class _JsonArray:
    """The objects of a JSON array, of which memory holds one at a time.

    Args:
        stream: The file.
        file: Its name, for messages.
        most: The most characters of an object, and of white space between two.
    """

    def __init__(self, stream: IO[str], file: Path, most: int) -> None:
        self._stream = stream
        self._file = file
        self._most = most
        self._text = ""  # what is read
        self._at = 0  # the place in it

    def begins(self) -> bool:
        """Whether the file begins as an array does."""
        return self._next(str(self._file)) == "["

    def __iter__(self) -> Iterator[Document]:
        number, place = 0, str(self._file)
        sign = self._next(place)
        while sign in ("[", ","):
            self._at += 1
            if sign == "[" and self._next(place) == "]":
                break
            number += 1
            place = f"{self._file}, element {number}"
            yield Document(place, self._object(place))
            sign = self._next(place)
        if self._next(place) != "]":
            raise UnusableDocumentError(_no_json(place, "no , or ] follows it"))
        self._at += 1
        if self._next(place):
            raise UnusableDocumentError(_no_json(str(self._file), "more text follows the array"))

    def _object(self, place: str) -> dict[str, Any]:
        self._next(place)
        value = None
        while value is None:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_LITERAL
                if not is_cut or not self._more(place):
                    raise UnusableDocumentError(_no_json(place, error.msg)) from error
            except (ValueError, RecursionError) as error:
                raise UnusableDocumentError(_no_json(place, error)) from error
            else:
                if not isinstance(value, dict):
                    raise UnusableDocumentError(_no_object(place, value))
                if end - self._at > self._most:
                    raise UnusableDocumentError(too_long(place, self._most))
                self._at = end
        return value

    def _next(self, place: str) -> str:
        """Return the next character that is no white space; nothing at the end of the file."""
        skipped = 0
        while skipped <= self._most:
            match = _WHITE_SPACE.match(self._text, self._at)
            assert match is not None  # it may be empty
            self._at = match.end()
            skipped += len(match[0])
            if self._at < len(self._text) or not self._more(place):
                return self._text[self._at : self._at + 1]
        raise UnusableDocumentError(too_long(place, self._most))

    def _more(self, place: str) -> bool:
        """Read more of the file, and drop what is used; tell whether there was more."""
        rest = self._text[self._at :]
        if len(rest) > self._most:
            raise UnusableDocumentError(too_long(place, self._most))
        more = self._stream.read(max(_CHUNK, len(rest)))
        self._text, self._at = rest + more, 0
        return bool(more)


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
    return ", ".join(map(_short, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")


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


def too_long(place: str, most: int) -> str:
    """Return the message about a document with more bytes than `max_document_bytes`."""
    return (
        f"{place} has more than {most:,} bytes, the most of one document. If it is not damaged, make several documents "
        "of it (a .txt file is one, or each of its paragraphs with text_document='paragraph'), or raise "
        f"max_document_bytes={most} (in a configuration `data.max_document_bytes: {most}`)."
    )


def _no_json(place: str, reason: str | Exception) -> str:
    return (
        f"{place} is no JSON ({_reason(reason)}); a .json file must be an array of objects, or have one object on each "
        "line, in UTF-8."
    )


def _no_object(place: str, value: Any) -> str:
    return f"{place} is JSON of type {type(value).__name__}; it must be an object."


def _check_unique(place: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnusableDocumentError(f"{place} has the field {_short(repr(twice))} twice. Rename one.")


def _reason(error: str | BaseException) -> str:
    """Return an error's message on one line."""
    return _short(" ".join(str(error).split()) or type(error).__name__, _LONGEST_REASON)


def _short(text: str, most: int = _LONGEST_NAME) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn the errors of reading a file into `UnusableDocumentError`."""
    try:
        yield
    except UnusableDocumentError:
        raise
    except UnicodeDecodeError as error:
        raise UnusableDocumentError(f"{file} is not UTF-8 ({_reason(error)}); files of text must be.") from error
    except OSError as error:
        raise UnusableDocumentError(
            f"{file} cannot be read: {_reason(error.strerror or error)}. Repair or remove it."
        ) from error
    except (EOFError, MemoryError, csv.Error, zlib.error, lzma.LZMAError) as error:
        raise UnusableDocumentError(f"{file} cannot be read: {_reason(error)}. Repair or remove it.") from error


@contextlib.contextmanager
def _decompressed(file: Path, stream: BinaryIO) -> Iterator[BinaryIO]:
    """Decompress a stream where the file's name says that it is compressed. The stream stays open."""
    openers: Mapping[str, Callable[[BinaryIO], Any]] = {
        ".bz2": bz2.open,
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": _zstandard,
    }
    opener = openers.get(file.suffix.lower())
    if opener is None:
        yield stream
        return
    with opener(stream) as content:
        yield content


def _zstandard(stream: BinaryIO) -> Any:
    import pyarrow

    own = os.fdopen(os.dup(stream.fileno()), "rb")  # pyarrow closes it
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(own), "zstd"))


@contextlib.contextmanager
def _text(content: BinaryIO, newline: str | None = None) -> Iterator[IO[str]]:
    """Decode UTF-8, without a byte order mark. The stream of bytes stays open."""
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
    try:
        yield text
    finally:
        text.detach()


@contextlib.contextmanager
def _table(file: Path, stream: BinaryIO) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`, and turn pyarrow's errors into `UnusableDocumentError`."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(stream, page_checksum_verification=True) as table:
            yield table
    except ArrowException as error:
        raise UnusableDocumentError(f"{file} cannot be read: {_reason(error)} Repair or remove it.") from error


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
