"""A decoding step by the model's own layers.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kv_cache.engine_cache import EngineCache
from .greedy import GreedyWorkspace, take_likeliest
from .inputs import StepInputs


class LayersDecode:
    """A decoding step by the model's own forward pass. An implementation of `DecodeBackend`.

    Args:
        model: An `NVLlamaForCausalLM`.
        cache: The engine's.
    """

    def __init__(self, model: Any, cache: EngineCache) -> None:
        self.model, self.cache = model, cache
        self.greedy_workspace = GreedyWorkspace(cache.max_batch_size, cache.device)

    def __call__(self, inputs: StepInputs, rows: int) -> torch.Tensor:
        """See `DecodeBackend`."""
        assert inputs.page_table_RP is not None
        # Quantized products take certain numbers of tokens. The model itself fills up packed tokens.
        multiple = padded_multiple(self.model)
        filled = -(-rows // multiple) * multiple
        starts = inputs.lengths + [0] * (filled - rows)
        hidden = []
        for part in self.cache.parts([start + 1 for start in starts]):
            self.cache.open_rows(inputs.page_table_RP[part], starts[part], [1] * len(starts[part]))
            token_B1 = inputs.token_R[part, None].clamp(min=0)  # a row with NO_TOKEN still takes part
            output = self.model.model(input_ids=token_B1, past_key_values=self.cache)
            hidden.append(output.last_hidden_state[:, 0])
        hidden_BE = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        return self.model.lm_head(hidden_BE[:rows])

    def advance(self, inputs: StepInputs, rows: int) -> None:
        """See `DecodeBackend`."""
        logits_BV = self(inputs, rows)
        take_likeliest(logits_BV, inputs.token_R[:rows], self.greedy_workspace, inputs.length_R[:rows])


def padded_multiple(model: Any) -> int:
    """Return the multiple that the number of a padded batch's tokens has to be; the model fills up packed tokens."""
    return model.model.precision.token_multiple() if model.config.attn_input_format == "bshd" else 1
