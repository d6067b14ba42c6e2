"""The section `data` of a configuration."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..data.settings import TextSettings
from .bounds import at_least

if TYPE_CHECKING:
    from ..data.text_data import TextData, Tokenizer


@dataclass(frozen=True)
class DataConfig(TextSettings):
    """The training data.

    Attributes:
        source: A file of documents (.txt, .jsonl, .json, .csv, .tsv, .parquet; all but .parquet also compressed), a
            folder with such files, or a hub id.
        tokenizer: A folder or hub id of a tokenizer; "bytes", which needs no files: each byte is a token (258 with BOS
            and EOS); or null, where documents have their tokens in a field input_ids, and may have labels.
        tokens_per_batch: Tokens of one packed batch of one data-parallel process.
        workers: Processes of each process that read and tokenise; 0 reads in the process itself.
        batches_per_step: Batches of one data-parallel process whose gradients make one step (gradient accumulation).
    """

    source: str
    tokenizer: str | None = None
    tokens_per_batch: int = 8192
    workers: int = 2
    batches_per_step: int = 1

    def __post_init__(self) -> None:
        at_least("data.workers", self.workers, 0)
        at_least("data.tokens_per_batch", self.tokens_per_batch, 1)
        at_least("data.max_document_bytes", self.max_document_bytes, 1)
        at_least("data.shuffle_buffer", self.shuffle_buffer, 0)
        at_least("data.batches_per_step", self.batches_per_step, 1)

    def text_data(
        self,
        tokenizer: "Tokenizer | None",
        seed: int,
        token_multiple: int,
        context: int,
        vocab_size: int | None = None,
    ) -> "TextData":
        """Return the data with these settings, in epochs without end.

        Args:
            tokenizer: The tokenizer, or `None` for documents of tokens.
            seed: Decides the order of documents.
            token_multiple: The divisor of the number of tokens of a context rank.
            context: Processes that share each sequence.
            vocab_size: The model's, above all token ids; None where it is not known.

        Raises:
            ValueError: A setting is out of its range, or does not go with another.
        """
        from ..data.text_data import TextData  # here, since it imports torch

        settings = {field.name: getattr(self, field.name) for field in fields(TextSettings)}
        del settings["tokenizer"]
        return TextData(
            **settings,
            tokenizer=tokenizer,
            epochs=None,
            seed=seed,
            pad_to_multiple_of=token_multiple * context if token_multiple > 1 else None,
            pad_sequences_to_be_divisible_by=2 * context if context > 1 else None,
            vocab_size=vocab_size,
        )
