"""Makes packed training batches from documents: tokenises them, shares them out over processes, resumes exactly.

    data = TextData(source="./texts", tokenizer=tokenizer, tokens_per_batch=16_384)
    loader = StatefulDataLoader(TextBatches(data, rank, ranks), batch_size=None, num_workers=2)

All processes read the same documents in the same order. Each worker of each rank is one shard, and document `n` of an
epoch belongs to shard `n % shards`. A shard packs its documents one after the other, through all epochs. Its `Position`
records its progress. The positions of all shards together determine the unused documents. Another number of shards can
share these out in the same way: unused document `n` belongs to shard `n % shards`.

Shapes: B sequences of a batch, S tokens of the longest sequence.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info

from ...compat.tokenizers import panics_as_errors
from ...compat.torchdata import batches_since_snapshot
from ...data.collators import DataCollatorWithFlattening
from ...data.labels import IGNORED_LABEL
from ...data.long_texts import encode_in_pieces
from ...data.packing import TokenPackingDataset
from .documents import (
    Document,
    Fields,
    Files,
    HubDataset,
    Source,
    UnusableDocumentError,
    in_order,
    is_file_of_documents,
    too_long,
)
from .settings import TextSettings

# Training uses these fields of a document of tokens, where it has them.
_OPTIONAL = ("labels", "attention_mask")
_TOKEN_BYTES = 4  # a token id counts as this many bytes of a document
# Advice for error messages about documents that do not fit the settings.
_TOKENIZER = "Give a tokenizer (in a configuration `data.tokenizer`)"
_SHARES = (
    "Use more documents (a .txt file is one, or each of its paragraphs with text_document='paragraph'), or fewer "
    "processes or workers (num_workers=0 of the loader, in a configuration `data.workers: 0`)."
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Tokenizer(Protocol):
    """The methods of a tokenizer that this module calls. Every tokenizer of transformers has them."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Return the tokens of a text."""
        ...


class LabelledTokens(NamedTuple):
    """A document's tokens, and the label of each token.

    Attributes:
        input_ids: The tokens, BOS and EOS included.
        labels: As many labels: the token itself, or -100 for a token that the model is not trained to predict.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class TextData(TextSettings):
    """Training data: the documents, and the settings for making batches of them.

    Attributes:
        tokenizer: Makes the tokens of a text. With None, documents have their tokens in a field `input_ids`. Two more
            fields may then be there, both as long as `input_ids`: `labels`, with -100 for each token that the model is
            not trained to predict, and `attention_mask`, with 0 for padding, which is dropped.
        epochs: The number of passes over all documents; None repeats for ever. A batch may span two epochs.
        seed: Determines the order of documents, together with the number of the epoch.
        pad_to_multiple_of: See `DataCollatorWithFlattening`: 16 for FP8, 32 for MXFP8, 128 for NVFP4; with
            `tokens_per_batch` here, the last batch is as long as every other batch.
        pad_sequences_to_be_divisible_by: See `DataCollatorWithFlattening`, for context parallelism.
        vocab_size: Every token id must be less than this; None allows any id.

    Raises:
        ValueError: A setting is out of its range, or conflicts with another setting.
    """

    tokenizer: Tokenizer | None
    epochs: int | None = 1
    seed: int = 0
    pad_to_multiple_of: int | None = None
    pad_sequences_to_be_divisible_by: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.text_document not in ("file", "paragraph"):
            raise ValueError(f"text_document is {self.text_document!r}; it must be 'file' or 'paragraph'.")
        if isinstance(self.ignored_fields, str) or not all(isinstance(each, str) for each in self.ignored_fields):
            raise ValueError(f"ignored_fields is {self.ignored_fields!r}; it must be a list of names of fields.")
        if not isinstance(self.text_field, str):
            raise ValueError(f"text_field is {self.text_field!r}; it must be a string, the name of one field.")
        if self.longest_sequence > self.tokens_per_batch:
            raise ValueError(
                f"sequence_length is {self.sequence_length}, more than tokens_per_batch={self.tokens_per_batch}, which "
                "a sequence must fit in. Lower the one or raise the other."
            )
        for token in ("bos", "eos") if self.tokenizer is not None else ():
            if getattr(self, f"add_{token}") and getattr(self.tokenizer, f"{token}_token_id") is None:
                raise ValueError(
                    f"add_{token} is True, but the tokenizer has no {token.upper()} token. Set "
                    f"{_setting(f'add_{token}', False)}, or the token on the tokenizer."
                )
        self.collator()  # checks its own arguments
        multiple = self.pad_sequences_to_be_divisible_by or 1
        if self.tokens_per_batch % multiple:
            raise ValueError(
                f"tokens_per_batch is {self.tokens_per_batch}; it must be a multiple of "
                f"pad_sequences_to_be_divisible_by={multiple}, or no batch could be filled."
            )

    @property
    def longest_sequence(self) -> int:
        """The limit of a sequence's length: `sequence_length`, or `tokens_per_batch` where it is None."""
        return self.tokens_per_batch if self.sequence_length is None else self.sequence_length

    @property
    def fields(self) -> Fields:
        """The fields to read from each document."""
        ignored = tuple(self.ignored_fields)
        return (
            Fields("input_ids", _OPTIONAL, ignored) if self.tokenizer is None else Fields(self.text_field, (), ignored)
        )

    def open(self) -> Source:
        """Open the source of documents: a local path if it exists, else a hub id. This downloads nothing.

        Raises:
            FileNotFoundError: `source` is neither an existing path nor a hub id.
            ImportError: A file needs a package that is not installed.
            ValueError: A folder has no file of documents, or one that cannot be read or is empty.
        """
        name = os.fspath(self.source)
        path = Path(name).expanduser()
        if path.exists():
            return Files(path, self.fields, self.text_document, self.max_document_bytes, self.skip_empty)
        if _HUB_ID.fullmatch(name) is None or is_file_of_documents(path):
            raise FileNotFoundError(
                f"source={name!r} is no file or folder here, and no hub id (owner/name) either. Check the path."
            )
        return HubDataset(name, self.fields, self.subset, self.split, self.streaming)

    def labelled_tokens(self, document: Document) -> LabelledTokens:
        """Return a document's tokens and labels; empty lists for a document to skip.

        Args:
            document: A document of the source.

        Raises:
            ValueError: The document lacks the main field or has a field without effect; a field has the wrong type or
                length; or a token or label is outside the vocabulary.
        """
        # A table has null where a document has no such field. Labels that are null would be a mistake.
        fields = {name: value for name, value in document.fields().items() if value is not None or name == "labels"}
        main = self.fields.main
        self.fields.check(document.place, fields | {main: None} if main in document.fields() else fields)
        value = fields.get(main)
        sequence = (
            self._given(document.place, value, fields) if self.tokenizer is None else self._encoded(document, value)
        )
        tokens = sequence.input_ids
        if not tokens and not self.skip_empty:
            raise UnusableDocumentError(
                f"{document.place} has no tokens: {main} is empty. Remove it, or set {_setting('skip_empty', True)}."
            )
        if tokens and self.vocab_size is not None:
            least, most = min(tokens), max(tokens)
            if least < 0 or most >= self.vocab_size:
                raise UnusableDocumentError(
                    f"{document.place} has the token id {least if least < 0 else most}; ids must be from 0 to "
                    f"{self.vocab_size - 1}, for vocab_size={self.vocab_size}. Use the tokens of the model's own "
                    "tokenizer, or a model with a larger vocabulary."
                )
        return sequence

    def _given(self, place: str, input_ids: Any, fields: Mapping[str, Any]) -> LabelledTokens:
        """Return the tokens and labels of a document of tokens."""
        if not _is_list_of_int(input_ids):
            raise UnusableDocumentError(
                f"{place}: input_ids is {_kind(input_ids)}; it must be a list of token ids. {_TOKENIZER} if it is text."
            )
        self._check_size(place, len(input_ids) * _TOKEN_BYTES)
        for name in _OPTIONAL:
            value = fields.get(name, input_ids)
            if not _is_list_of_int(value) or len(value) != len(input_ids):
                length = f" of {len(value)}" if isinstance(value, list) else ""
                raise UnusableDocumentError(
                    f"{place}: {name} is {_kind(value)}{length}; it must be a list of {len(input_ids)} integers, as "
                    "many as input_ids has."
                )
        labels = fields.get("labels", input_ids)
        mask = fields.get("attention_mask")
        if mask is not None:
            if not set(mask) <= {0, 1}:
                raise UnusableDocumentError(
                    f"{place}: attention_mask has {sorted(set(mask))}; it may have 0 (padding) and 1."
                )
            input_ids, labels = (
                [each for each, kept in zip(row, mask, strict=True) if kept] for row in (input_ids, labels)
            )
        if "labels" not in fields:
            return LabelledTokens(input_ids, input_ids)
        if len(labels) > 1 and set(labels[1:]) <= {IGNORED_LABEL}:
            if self.skip_empty:
                return LabelledTokens([], [])
            raise UnusableDocumentError(
                f"{place} has no labels to train on: they are {IGNORED_LABEL} from the second token on, and no token "
                f"predicts the first. Remove it, or set {_setting('skip_empty', True)}."
            )
        vocab_size = self.vocab_size
        for label in set(labels) - {IGNORED_LABEL}:
            if label < 0 or (vocab_size is not None and label >= vocab_size):
                most = "" if vocab_size is None else f" to {vocab_size - 1}"
                raise UnusableDocumentError(
                    f"{place} has the label {label}; labels must be {IGNORED_LABEL}, for a token that is not trained "
                    f"on, or token ids from 0{most}."
                )
        return LabelledTokens(input_ids, labels)

    def _encoded(self, document: Document, text: Any) -> LabelledTokens:
        """Return the tokens of a document of text, all of which are labels too."""
        assert self.tokenizer is not None
        if not isinstance(text, str):
            raise UnusableDocumentError(
                f"{document.place}: the field {self.text_field!r} is {_kind(text)}; text_field must name a field "
                f"of text. Set {_setting('tokenizer', None)} for token ids in a field input_ids."
            )
        try:
            self._check_size(document.place, len(text.encode()))
        except UnicodeEncodeError as error:
            raise UnusableDocumentError(
                f"{document.place}: the field {self.text_field!r} has the lone surrogate "
                f"\\u{ord(text[error.start]):04x} at character {error.start}, which is half of a character. No "
                "tokenizer can encode it: write the text anew, with errors='replace' where it was decoded."
            ) from error
        tokens = array("q")  # a list needs five times the memory
        try:
            with panics_as_errors():
                for piece in encode_in_pieces(text, self.tokenizer):
                    tokens.extend(piece)
        except Exception as error:  # each kind of tokenizer has its own errors
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UnusableDocumentError(f"{document.place}: the tokenizer cannot encode it: {reason}") from error
        if tokens:
            before = self.tokenizer.bos_token_id if self.add_bos else None
            after = self.tokenizer.eos_token_id if self.add_eos else None
            # A chat template may have written both into the text.
            if before is not None and tokens[0] != before:
                tokens.insert(0, before)
            if after is not None and tokens[-1] != after:
                tokens.append(after)
        return LabelledTokens(tokens, tokens)

    def _check_size(self, place: str, size: int) -> None:
        if size > self.max_document_bytes:
            raise UnusableDocumentError(too_long(place, self.max_document_bytes))

    def collator(self) -> DataCollatorWithFlattening:
        """Return the collator that packs sequences into one batch."""
        return DataCollatorWithFlattening(
            _padded,
            pad_to_multiple_of=self.pad_to_multiple_of,
            pad_sequences_to_be_divisible_by=self.pad_sequences_to_be_divisible_by,
            # The loss ignores padding, and no sequence attends to it, so any token will do.
            pad_token_id=0,
        )

    def _check_numbers(self) -> None:
        least = {"tokens_per_batch": 1, "sequence_length": 1, "vocab_size": 1, "epochs": 1, "max_document_bytes": 1}
        least |= {"seed": 0, "shuffle_buffer": 0}
        for name, at_least in least.items():
            value = getattr(self, name)
            optional = name in ("sequence_length", "vocab_size", "epochs")
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
                none = " or None" if optional else ""
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {at_least}{none}.")


class Position(NamedTuple):
    """A shard's progress through its documents.

    Attributes:
        epoch: The epoch, from 0.
        documents: The number of documents that the shard has used up in this epoch. The next one does not count.
        tokens: The number of tokens used from the beginning of the next document. This may be all its tokens.
    """

    epoch: int
    documents: int
    tokens: int


class TextBatches(IterableDataset[dict[str, Any]]):
    """The batches of one data-parallel rank, from the first epoch to the last.

    An item is a whole batch that `DataCollatorWithFlattening` made: `input_ids` and `labels` int64 [1, T],
    `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`. Give a DataLoader `batch_size=None`. Workers
    tokenise and pack.

    **Processes.** Each (rank, worker) is a shard with its own documents. Context- and tensor-parallel processes of one
    data-parallel rank need the same batches: give them the same `rank`. The numbers of documents in two shards differ
    by at most one, but their numbers of tokens differ more. Ranks may therefore reach the end at different steps.

    **Resuming.** With torchdata's `StatefulDataLoader`, the loader's state continues with exactly the next batch, also
    in the middle of an epoch and with workers. For another number of ranks or workers, `merge_states` merges the states
    of all ranks into one. After `load_state_dict` with the merged state, each unused token comes exactly once, but the
    batches are composed differently. Resuming reads earlier documents again, but does not tokenise them.

    Args:
        data: The settings.
        rank: This process's data-parallel rank, from 0.
        ranks: The number of data-parallel ranks.

    Raises:
        ValueError: `rank` is out of its range, or the source cannot be read. While iterating: a document cannot be
            used (the message names the document and the reason), or a shard gets no tokens in a whole epoch.
        FileNotFoundError: `source` is neither an existing path nor a hub id.
        RuntimeError: While iterating: the loaded state belongs to other ranks or workers.
    """

    def __init__(self, data: TextData, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank} and ranks is {ranks}; rank must be at least 0 and less than ranks.")
        self.data = data
        self.rank = rank
        self.ranks = ranks
        self.source = data.open()
        if rank == 0 and self.source.notice is not None:
            warnings.warn(self.source.notice, stacklevel=2)
        self._order = {
            "source": self.source.identity,
            "seed": data.seed,
            "shuffle_buffer": data.shuffle_buffer,
        }
        # This shard's position after the last yielded batch.
        self._position = Position(0, 0, 0)
        # The final positions of the shards of earlier runs that had another number of shards, see `_left`.
        self._earlier: list[list[Position]] = []
        self._loaded: Mapping[str, Any] | None = None

    def check_documents(self, workers: int) -> None:
        """Refuse local files that hold fewer documents than there are shards, before the first batch.

        Args:
            workers: The number of workers of each rank's loader.

        Raises:
            ValueError: A shard would get no documents in a whole epoch.
        """
        shards = self.ranks * max(workers, 1)
        if isinstance(self.source, Files) and (found := self.source.count(shards)) < shards:
            raise ValueError(
                f"source={os.fspath(self.data.source)!r} has {found} document{'s' * (found != 1)}, fewer than the "
                f"{shards} shards (ranks x workers). {_SHARES}"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._earlier, self._position = self._start()
        self._loaded = None
        return self._batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded batch.

        Returns:
            A dict of numbers and strings, in lists and dicts: `positions`, a list of [shard, epoch, documents, tokens];
            `shards`, the number of shards; `earlier`, the final positions of earlier runs with another number of
            shards; `order`, the settings that determine the order of documents.
        """
        earlier, position = (self._earlier, self._position) if self._loaded is None else self._start()
        shard, shards = self._shard()
        return {
            "positions": [[shard, *position]],
            "shards": shards,
            "earlier": [[list(each) for each in positions] for positions in earlier],
            "order": dict(self._order),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make the next iteration start at a saved position; later iterations start at the beginning.

        Args:
            state_dict: The result of this shard's `state_dict`, or of `merge_states` for all shards.

        Raises:
            ValueError: The dict is not such a state, or its documents had another order.
        """
        if "order" not in state_dict:
            raise ValueError(
                f"load_state_dict was given a dict of {sorted(map(str, state_dict))}; it must be what state_dict or "
                "merge_states returned. A loader's state is for the loader, or for merge_states."
            )
        now, saved = self._order, state_dict["order"]
        if now["source"] != saved["source"]:
            raise ValueError(
                f"source={os.fspath(self.data.source)!r} (in a configuration `data.source`) has other documents than "
                f"the saved run has read: {now['source']}, not {saved['source']}. Documents would repeat or be "
                "missed. Train on the same files (and with the same text_document, subset and split), or start anew."
            )
        options = {"seed": "seed", "shuffle_buffer": "data.shuffle_buffer"}
        for name, option in options.items():
            if now[name] != saved[name]:
                raise ValueError(
                    f"{name} is {now[name]} (in a configuration `{option}`), but the saved run had {saved[name]}: "
                    f"documents would come in another order, and repeat or be missed. Use {saved[name]}, or start anew."
                )
        self._loaded = state_dict

    def _batches(self) -> Iterator[dict[str, Any]]:
        data, collate = self.data, self.data.collator()
        packing = TokenPackingDataset(
            _Sequences(data, self.source, *self._shard(), self._earlier, self._position),
            data.tokens_per_batch,
            drop_last=False,
            split_samples=data.split_long,
            pad_sequences_to_be_divisible_by=data.pad_sequences_to_be_divisible_by,
        )
        for sequences in packing:
            self._position = _position_after(sequences, packing.state_dict()["carried"])
            yield collate(sequences)

    def _shard(self) -> tuple[int, int]:
        worker = get_worker_info()
        if worker is None:
            return self.rank, self.ranks
        return self.rank * worker.num_workers + worker.id, self.ranks * worker.num_workers

    def _start(self) -> tuple[list[list[Position]], Position]:
        """Return the final positions of earlier runs' shards, and this shard's start in the documents they left."""
        if self._loaded is None:
            return [], Position(0, 0, 0)
        shard, shards = self._shard()
        positions = {shard: Position(*position) for shard, *position in self._loaded["positions"]}
        earlier = [[Position(*position) for position in positions] for positions in self._loaded["earlier"]]
        if self._loaded["shards"] == shards and shard in positions:
            return earlier, positions[shard]
        missing = sorted(set(range(self._loaded["shards"])) - set(positions))
        if missing:
            raise RuntimeError(
                f"load_state_dict was given a state without shards {missing} of {self._loaded['shards']} (ranks x "
                f"workers), but this is shard {shard} of {shards}: merge the states of all ranks with merge_states."
            )
        last = [positions[shard] for shard in sorted(positions)]
        return [*earlier, last], Position(min(position.epoch for position in last), 0, 0)


def merge_states(states: Iterable[Any]) -> dict[str, Any]:
    """Merge the states of all data-parallel ranks into one that any number of ranks and workers can load.

    Args:
        states: States of `TextBatches`, or of their loaders, saved after the same step. One state is enough for ranks
            that have the same batches.

    Returns:
        A state for `TextBatches.load_state_dict`. Load it before you make the loader.

    Raises:
        ValueError: There is no state, the states come from different runs or steps, or a loader's state comes from an
            earlier step.
    """
    found = [state for each in states for state in _states_in(each)]
    if not found:
        raise ValueError("states has no state of TextBatches; give what state_dict returned, of it or of its loaders.")
    first = found[0]
    places: dict[int, list[int]] = {}
    for state in found:
        for name in ("shards", "earlier", "order"):
            if state[name] != first[name]:
                raise ValueError(
                    f"states are of different runs: {name} is {first[name]!r} in one and {state[name]!r} in another. "
                    "Give the states that all ranks saved at one step."
                )
        for shard, *position in state["positions"]:
            if places.setdefault(shard, position) != position:
                raise ValueError(
                    f"states have shard {shard} at {places[shard]} and at {position} (epoch, documents, tokens). Give "
                    "the states that all ranks saved at one step."
                )
    return {**first, "positions": [[shard, *places[shard]] for shard in sorted(places)]}


class _Sequences(IterableDataset[dict[str, Any]]):
    """The sequences of one shard from a position on. Each has its place, which `_position_after` reads."""

    def __init__(
        self,
        data: TextData,
        source: Source,
        shard: int,
        shards: int,
        earlier: list[list[Position]],
        start: Position,
    ) -> None:
        self.data = data
        self.source = source
        self.shard = shard
        self.shards = shards
        self.earlier = earlier
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count(self.start.epoch):
            if self.data.epochs is not None and epoch >= self.data.epochs:
                return
            used_up = self.start.documents if epoch == self.start.epoch else 0
            empty = True
            for number, (document, used) in islice(enumerate(self._share(epoch)), used_up, None):
                if (epoch, number) == self.start[:2]:
                    used = max(used, self.start.tokens)
                for piece in self._pieces(document, used):
                    empty = False
                    yield {"epoch": epoch, "document": number, **piece}
            if empty and self._is_whole(epoch):
                raise UnusableDocumentError(
                    f"source={os.fspath(self.data.source)!r} has no tokens for shard {self.shard} of {self.shards} "
                    f"(ranks x workers): it has fewer documents than shards, or empty ones. {_SHARES}"
                )

    def _share(self, epoch: int) -> Iterator[tuple[Document, int]]:
        """Yield this shard's documents of an epoch, each with the number of tokens that earlier runs have used."""
        documents = in_order(self.source, self.data.seed, epoch, self.data.shuffle_buffer)
        left: Iterable[tuple[Document, int]] = ((document, 0) for document in documents)
        for positions in self.earlier:
            left = _left(left, epoch, positions)
        return islice(left, self.shard, None, self.shards)

    def _pieces(self, document: Document, used: int) -> Iterator[dict[str, Any]]:
        tokens, labels = self.data.labelled_tokens(document)
        longest = self.data.longest_sequence
        if not self.data.split_long:
            tokens, labels = tokens[:longest], labels[:longest]
        # Pieces end at multiples of `longest` from the document's beginning, also where this shard begins inside it.
        while used < len(tokens):
            end = min((used // longest + 1) * longest, len(tokens))
            yield {"input_ids": list(tokens[used:end]), "labels": list(labels[used:end]), "end": end}
            used = end

    def _is_whole(self, epoch: int) -> bool:
        """Whether nothing of the epoch was used before this iteration."""
        before = [self.start, *(position for positions in self.earlier for position in positions)]
        return all((epoch, 0, 0) >= position for position in before)


def _left(
    documents: Iterable[tuple[Document, int]], epoch: int, positions: list[Position]
) -> Iterator[tuple[Document, int]]:
    """Yield the documents that shards left unused when they stopped at `positions`."""
    for number, (document, used) in enumerate(documents):
        place, shard = divmod(number, len(positions))
        reached = positions[shard]
        if (epoch, place) > reached[:2]:
            yield document, used
        elif (epoch, place) == reached[:2]:
            yield document, max(used, reached.tokens)


def _position_after(batch: list[Mapping[str, Any]], carried: list[Mapping[str, Any]]) -> Position:
    """Return the position after a batch. `carried` samples are drawn already and wait for the next batch."""
    if carried:
        waiting = carried[0]
        return Position(waiting["epoch"], waiting["document"], waiting["end"] - len(waiting["input_ids"]))
    last = batch[-1]
    return Position(last["epoch"], last["document"], last["end"])


def _padded(sequences: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    tokens, labels = ([torch.tensor(each[name]) for each in sequences] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _states_in(state: Any) -> Iterator[Mapping[str, Any]]:
    """Find the states of `TextBatches` in a loader's state, without knowledge of the loader's format."""
    if not isinstance(state, Mapping):
        return
    if age := batches_since_snapshot(state):
        raise ValueError(
            f"states has a loader's state that is {age} batches old: it was made with "
            "snapshot_every_n_steps above 1. Give the StatefulDataLoader snapshot_every_n_steps=1."
        )
    if {"positions", "shards", "earlier", "order"} <= set(state):
        yield state
    else:
        for value in state.values():
            yield from _states_in(value)


def _setting(name: str, value: Any) -> str:
    """Return a setting with its value for a message, as in Python and as in the command's configuration."""
    return f"{name}={value!r} (in a configuration `data.{name}: {json.dumps(value)}`)"


def _is_list_of_int(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list of " + (" and ".join(sorted({type(each).__name__ for each in value})) or "nothing")
    return type(value).__name__
