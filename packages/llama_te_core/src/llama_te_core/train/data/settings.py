"""The settings of training data. Importing this module does not import torch."""

import os
from dataclasses import dataclass
from typing import Any

from .documents import TextDocument


@dataclass(frozen=True)
class TextSettings:
    """The settings that `TextData` and the command's section `data` share.

    Attributes:
        source: A file of documents (.txt, .jsonl, .json, .csv, .tsv or .parquet, see `documents.FORMATS`; all but
            .parquet also compressed), a folder with such files at any depth, or, if the path does not exist, a hub id,
            `owner/name`. Only a hub id is downloaded.
        tokenizer: Makes the tokens of a text; see the subclasses.
        tokens_per_batch: The most tokens in one batch of one shard. With `split_long` every batch except the last has
            exactly this number.
        sequence_length: Tokens of the longest sequence; null for tokens_per_batch.
        split_long: Cut a document where its sequence or the batch is full. Each piece is a sequence of its own. False
            keeps documents whole, but drops the tokens after sequence_length.
        text_field: The field of a document that is its text. A .txt file has no other field.
        ignored_fields: Fields of documents that training ignores, besides `documents.METADATA` (such as id and url). A
            field that is neither used nor ignored is an error.
        text_document: One document of a .txt file: the whole file, or each paragraph, between blank lines.
        add_bos: Begin each text with the tokenizer's BOS token, unless the text has it there already.
        add_eos: End each text with the tokenizer's EOS token, unless the text has it there already.
        skip_empty: Skip documents without tokens or labels, and files without documents. Without it they are an error.
        shuffle_buffer: The number of documents in memory. The next document is drawn from them at random, and files
            come in random order. 0 keeps the order of the source.
        subset: The name of a data set's configuration on the hub (`load_dataset`'s `name`).
        split: The split of a hub data set.
        streaming: Read a hub data set over the network instead of downloading it first.
        max_document_bytes: The most bytes of one document, uncompressed; a token id counts as 4. A longer document is
            an error: in a damaged file it may have no end, and would take all memory.
    """

    source: str | os.PathLike[str]
    tokenizer: Any
    tokens_per_batch: int
    sequence_length: int | None = None
    split_long: bool = True
    text_field: str = "text"
    ignored_fields: tuple[str, ...] = ()
    text_document: TextDocument = "file"
    add_bos: bool = True
    add_eos: bool = True
    skip_empty: bool = False
    shuffle_buffer: int = 10_000
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    max_document_bytes: int = 16 * 2**20
