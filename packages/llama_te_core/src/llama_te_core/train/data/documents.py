"""Documents of a training set: local .txt, .jsonl and .parquet files, or a data set of the Hugging Face hub.

A source yields all its documents, in an order that depends on a random state. It does not parse them, so that skipping
a document costs little.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, TypeAlias

SUFFIXES = (".jsonl", ".parquet", ".txt")
_ROWS = 1000  # rows of a table to convert to Python objects at a time

TextDocument = Literal["file", "paragraph"]


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
            ValueError: The line is not a JSON object.
        """
        if isinstance(self.content, Mapping):
            return self.content
        try:
            fields = json.loads(self.content)
        except ValueError as error:
            raise ValueError(
                f"{self.place} is no JSON ({error}); each line of a .jsonl file must be one object in UTF-8."
            ) from error
        if not isinstance(fields, dict):
            raise ValueError(
                f"{self.place} is JSON of type {type(fields).__name__}; each line of a .jsonl file must be one object."
            )
        return fields


class Files:
    """The .txt, .jsonl and .parquet files of a folder and its subfolders, or one such file.

    Args:
        path: The folder or file.
        field: The field that callers read. The text of a .txt file counts as this field.
        text_document: One document of a .txt file: the whole file, or a paragraph between blank lines.

    Raises:
        ValueError: The path has no file with one of these suffixes.
    """

    def __init__(self, path: Path, field: str, text_document: TextDocument) -> None:
        self.path = path
        self.field = field
        self.text_document = text_document
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        self.files = [file for file in found if file.suffix in SUFFIXES and file.is_file()]
        if not self.files:
            raise ValueError(
                f"source={str(path)!r} has no file of text; it must be a .txt, .jsonl or .parquet file, or a folder "
                "with such files."
            )

    @property
    def identity(self) -> str:
        """A text that is equal for two sources with the same documents in the same order."""
        root = self.path if self.path.is_dir() else self.path.parent
        listing = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in self.files]
        return f"{len(listing)} files, {zlib.crc32(repr((listing, self.text_document)).encode()):08x}"

    def documents(self, random: Random | None) -> Iterator[Document]:
        """Yield each document once. `random` shuffles the files; without it they come by name."""
        for file in self.files if random is None else sorted(self.files, key=lambda file: random.random()):
            yield from self._read(file)

    def count(self, most: int) -> int:
        """Count the documents, and stop reading at `most` of them."""
        found = 0
        for file in self.files:
            if file.suffix == ".parquet":
                with _table(file) as table:
                    found += table.metadata.num_rows
            elif file.suffix == ".txt" and self.text_document == "file":
                found += 1
            else:
                found += sum(1 for _ in islice(self._read(file), most - found))
            if found >= most:
                return most
        return found

    def _read(self, file: Path) -> Iterator[Document]:
        readers = {".jsonl": self._lines, ".parquet": self._rows, ".txt": self._texts}
        return readers[file.suffix](file)

    def _lines(self, file: Path) -> Iterator[Document]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield Document(f"{file}, line {number}", line)

    def _rows(self, file: Path) -> Iterator[Document]:
        with _table(file) as table:
            # Where the table lacks the field, read all columns: the error message lists them.
            columns = [self.field] if self.field in table.schema_arrow.names else None
            rows = (row for batch in table.iter_batches(_ROWS, columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Document(f"{file}, row {number}", row)

    def _texts(self, file: Path) -> Iterator[Document]:
        try:
            with file.open(encoding="utf-8") as lines:
                if self.text_document == "file":
                    yield Document(str(file), {self.field: lines.read()})
                else:
                    for number, paragraph in enumerate(_paragraphs(lines), 1):
                        yield Document(f"{file}, paragraph {number}", {self.field: paragraph})
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}); .txt files must be.") from error


class HubDataset:
    """A data set of the Hugging Face hub, or any other that `datasets.load_dataset` knows by a name.

    Args:
        name: The hub id, `owner/name`.
        field: The field that callers read.
        subset: `load_dataset`'s `name`.
        split: The split of the data set.
        streaming: Read over the network instead of downloading the data set first.

    Raises:
        ValueError: At the first document: the data set cannot be loaded.
    """

    def __init__(self, name: str, field: str, subset: str | None, split: str, streaming: bool) -> None:
        self.name = name
        self.field = field
        self.subset = subset
        self.split = split
        self.streaming = streaming

    @property
    def identity(self) -> str:
        """A text that is equal for two sources with the same documents in the same order."""
        return f"{self.name}, {self.subset}, {self.split}"

    def documents(self, random: Random | None) -> Iterator[Document]:
        """Yield each row once, in order. `random` has no effect, since a download does not show its files' borders."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError(
                f"source={self.name!r} needs datasets, which is not installed: pip install 'llama-te-core[train]'."
            ) from error
        try:
            dataset = load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"source={self.name!r} is no file or folder here, and cannot be loaded from the hub with "
                f"subset={self.subset!r} and split={self.split!r}. Check the path, or the name, subset, split and the "
                f"network; a private data set needs `hf auth login`. {' '.join(str(error).split())}"
            ) from error
        if self.field in (dataset.column_names or ()):
            dataset = dataset.select_columns([self.field])
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


def _table(file: Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"{file} needs pyarrow, which is not installed: pip install 'llama-te-core[train]'."
        ) from error
    return ParquetFile(file)


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).removesuffix("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).removesuffix("\n")
