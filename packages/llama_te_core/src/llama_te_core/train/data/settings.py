"""The settings of training data. Importing this module does not import torch."""

import os
from dataclasses import dataclass
from typing import Any

from .documents import TextDocument


@dataclass(frozen=True)
class TextSettings:
    """The settings that `TextData` and the command's section `data` share.

    Attributes:
        source: A .txt, .jsonl or .parquet file, a folder with such files at any depth, or a hub id, `owner/name`, where
            no such path exists. Nothing but a hub id is downloaded.
        tokenizer: Makes the tokens of a text; see the subclasses.
        tokens_per_batch: Tokens of one batch of one shard: at most, and with `split_long` exactly, except in the last
            batch.
        sequence_length: Tokens of the longest sequence; null for tokens_per_batch.
        split_long: Cut a document where its sequence is full, and where the batch is. Each piece is a sequence of its
            own. False keeps documents whole, but drops the tokens after sequence_length.
        text_field: The field of a document that is its text. A .txt file has no other field.
        text_document: One document of a .txt file: the whole file, or each paragraph, between blank lines.
        add_bos: Begin each text with the tokenizer's BOS token.
        add_eos: End each text with the tokenizer's EOS token.
        skip_empty: Skip documents without tokens, which are an error otherwise.
        shuffle_buffer: Documents in memory, of which the next one is drawn at random; files come in random order then.
            0 keeps the order of the source.
        subset: The name of a data set's configuration on the hub (`load_dataset`'s `name`).
        split: Split of a data set of the hub.
        streaming: Read a data set of the hub over the network, in place of a download that is kept.
    """

    source: str | os.PathLike[str]
    tokenizer: Any
    tokens_per_batch: int
    sequence_length: int | None = None
    split_long: bool = True
    text_field: str = "text"
    text_document: TextDocument = "file"
    add_bos: bool = True
    add_eos: bool = True
    skip_empty: bool = False
    shuffle_buffer: int = 10_000
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
