"""Prefill: reading chunks of prompts.

Shapes: R rows, P pages per row, M chunks that complete their prompts, B chunks of a batch, S columns or tokens of a
chunk, X columns and pages, E hidden size, V vocabulary, T packed tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Any

import torch

from ..decode.layers import padded_multiple
from ..decode.prefill import FusedPrefill
from ..kv_cache.engine_cache import EngineCache
from ..ops.prefill_attention import table_rows
from ..transfers import to_device
from .logprobs import concatenated, token_logprobs
from .plan import Chunk
from .results import PromptLogprobs

LOGITS_AT_ONCE = 256  # most tokens of a prompt whose logits are in memory together


class Prefill:
    """Computes chunks of prompts, and stores their keys and values.

    Args:
        model: An `NVLlamaForCausalLM` in evaluation mode.
        cache: Of this model.
        fused: The kernels that read prompts; `None` for the model's forward pass. It may be replaced between steps.
    """

    def __init__(self, model: Any, cache: EngineCache, fused: FusedPrefill | None = None) -> None:
        self.model, self.cache, self.fused = model, cache, fused
        self._table_RP = cache.make_page_table(table_rows(cache.max_batch_size, cache.device))

    def __call__(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[PromptLogprobs]]:
        """Compute chunks.

        Returns:
            The logits [rows, V] of the rows that begin, and the log-probabilities of prompts that asked for them.
        """
        last: dict[int, torch.Tensor] = {}
        scores: list[PromptLogprobs] = []
        for chunk, hidden_SE in self._read(chunks):
            if chunk.beginning:
                last[id(chunk)] = hidden_SE[-1]
            if chunk.sequence.request.params.prompt_logprobs is not None:
                scores += self._score(chunk, hidden_SE)
        beginning = [chunk for chunk in chunks if chunk.beginning]
        if not beginning:
            head = self.model.lm_head
            return torch.empty(0, head.out_features, device=self.cache.device, dtype=self.cache.dtype), scores
        logits_MV = self.model.lm_head(torch.stack([last[id(chunk)] for chunk in beginning]))
        rows = [index for index, chunk in enumerate(beginning) for _ in chunk.beginning]
        if len(rows) > len(beginning):
            logits_MV = logits_MV[to_device(rows, torch.int64, logits_MV.device)]
        return logits_MV, scores

    def _read(self, chunks: list[Chunk]) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Yield each chunk with the last hidden states [S, E] of its tokens, as far as something needs them."""
        fused = self.fused if self.fused is not None and self.fused.fits_precision() else None
        for group in [chunks] if fused is not None else similar_lengths(chunks):
            for part in self.cache.parts([chunk.start + len(chunk.tokens) for chunk in group]):
                some = group[part]
                yield from zip(
                    some, self._forward(some) if fused is None else self._read_fused(fused, some), strict=True
                )

    def _read_fused(self, fused: FusedPrefill, chunks: list[Chunk]) -> list[torch.Tensor]:
        """Return last hidden states of chunks computed as one packed batch; none of chunks that need none."""
        new = [len(chunk.tokens) for chunk in chunks]
        scored = any(chunk.sequence.request.params.prompt_logprobs is not None for chunk in chunks)
        ends = list(itertools.accumulate(new))
        last = [] if scored else [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.beginning]
        pages = max(len(chunk.sequence.pages) for chunk in chunks)
        values = [token for chunk in chunks for token in chunk.tokens]
        for chunk in chunks:
            values += chunk.sequence.pages
            values += [self.cache.padding_page] * (pages - len(chunk.sequence.pages))
        # One copy: the tokens, their rows' pages, and the tokens whose hidden states are wanted.
        sent = to_device(values + last, torch.int32, self.cache.device)
        token_T, page, last_M = sent.split([ends[-1], len(chunks) * pages, len(last)])
        self._table_RP[: len(chunks), :pages] = page.view(len(chunks), pages)
        self.cache.open_rows(self._table_RP, [chunk.start for chunk in chunks], new)
        hidden_TE = fused(token_T, self.cache, None if scored else last_M)
        return list(hidden_TE.split(new if scored else [int(bool(chunk.beginning)) for chunk in chunks]))

    def _forward(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """Return the last hidden states [tokens, E] of each chunk, computed as one padded batch."""
        rows, new = len(chunks), [len(chunk.tokens) for chunk in chunks]
        multiple = padded_multiple(self.model)
        width = -(-max(new) // multiple) * multiple
        pages = self._table_RP.shape[1]
        # One copy: the chunks' tokens, then their pages.
        values = [
            [
                *chunk.tokens,
                *[0] * (width - len(chunk.tokens)),
                *chunk.sequence.pages,
                *[self.cache.padding_page] * (pages - len(chunk.sequence.pages)),
            ]
            for chunk in chunks
        ]
        sent_BX = to_device(values, torch.int32, self.cache.device)
        self._table_RP[:rows] = sent_BX[:, width:]
        self.cache.open_rows(self._table_RP, [chunk.start for chunk in chunks], new)
        mask_BS = None
        if sum(new) < rows * width:
            new_B = self.cache.cu_seqlens_q[: rows + 1].diff()
            mask_BS = torch.arange(width, device=self.cache.device) < new_B[:, None]
        output = self.model.model(
            input_ids=sent_BX[:, :width].long(), attention_mask=mask_BS, past_key_values=self.cache
        )
        return [hidden_SE[:count] for hidden_SE, count in zip(output.last_hidden_state, new, strict=True)]

    def _score(self, chunk: Chunk, hidden_SE: torch.Tensor) -> list[PromptLogprobs]:
        """Return log-probabilities of the prompt's tokens that follow the chunk's tokens."""
        request = chunk.sequence.request
        following = request.prompt[chunk.start + 1 : chunk.start + 1 + len(chunk.tokens)]
        if not following:
            return []
        token_S = to_device(following, torch.int64, self.cache.device)
        pieces = []
        for start in range(0, len(following), LOGITS_AT_ONCE):
            piece_S = token_S[start : start + LOGITS_AT_ONCE]
            logits_SV = self.model.lm_head(hidden_SE[start : start + len(piece_S)])
            pieces.append(token_logprobs(logits_SV, piece_S, request.params.prompt_logprobs or 0))
        return [PromptLogprobs(request, chunk.start + 1, concatenated(pieces))]


def similar_lengths(chunks: Items[Chunk]) -> list[list[Chunk]]:
    """Group chunks so that no chunk is less than half as long as another of its group: tokens outnumber padding."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: -len(chunk.tokens)):
        if groups and 2 * len(chunk.tokens) >= len(groups[-1][0].tokens):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups
