"""The requests of `/v1/embeddings` and `/score`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .strict import ListOf, PartsOf, Strict


class PoolingFields(Strict):
    """The fields that both requests share."""

    model: str | None = Field(None, description="A name that /v1/models lists; the served model by default.")
    user: str | None = Field(None, description="It changes no answer.")
    use_activation: bool | None = Field(
        None, description="false: embeddings keep their length, and scores are the classifier's logits."
    )


class EmbeddingRequest(PoolingFields):
    """Compute embeddings of texts."""

    input: str | PartsOf[str] | ListOf[int] | PartsOf[ListOf[int]] = Field(
        description="A text, token ids, or a list of either; a text gets the special tokens that the tokenizer adds."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description='"base64": the bytes of little-endian float32.'
    )
    dimensions: int | None = Field(None, ge=1, description="Keep so many numbers; for models trained for it.")
    add_special_tokens: bool | None = Field(None, description="false: texts get no special tokens.")


class ScoreRequest(PoolingFields):
    """Score pairs of texts: one with each of the others, or lists of equal length."""

    text_1: str | PartsOf[str] | None = None
    text_2: str | PartsOf[str] | None = None
    queries: str | PartsOf[str] | None = Field(None, description="Another name of text_1.")
    documents: str | PartsOf[str] | None = Field(None, description="Another name of text_2.")

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs.

        Raises:
            ValueError: There are none, or their numbers differ.
        """
        given = [(self.text_1, self.text_2), (self.queries, self.documents)]
        complete = [pair for pair in given if None not in pair]
        if len(complete) != 1 or any(None in pair and pair != (None, None) for pair in given):
            raise ValueError("text_1 and text_2 are needed, or queries and documents instead of them.")
        first, second = ([text] if isinstance(text, str) else text or [] for text in complete[0])
        if len(first) == 1:
            first = first * len(second)
        if not first or len(first) != len(second):
            raise ValueError(
                f"text_1 has {len(first)} texts and text_2 has {len(second)}: give one text and a list, or lists of "
                "equal length."
            )
        return list(zip(first, second, strict=True))
