"""The decoder with a language-model head.

Shapes: B sequences, S columns of a padded batch, E hidden size, V vocabulary. Packed sequences are one row,
B = 1.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..data.labels import IGNORED_LABEL, next_token_labels
from ..layers.kv_cache import KVCache
from ..layers.quantizers import Head
from ..layers.sequence_layout import PACKED_ARGUMENTS, check_mask
from .arguments import CACHE_FIELD, check_arguments, given_cache
from .configuration_nvllama import NVLlamaConfig
from .decoder import NVLlamaModel
from .generation import CachedGenerationMixin
from .pretrained import NVLlamaPreTrainedModel


class NVLlamaForCausalLM(NVLlamaPreTrainedModel, CachedGenerationMixin):
    """The decoder with a language-model head, which always computes in the weights' own dtype.

    Args: see `NVLlamaModel`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NVLlamaConfig, fp8_recipe: Any | None = None, fp4_recipe: Any | None = None) -> None:
        super().__init__(config)
        self.model = NVLlamaModel(config, fp8_recipe=fp8_recipe, fp4_recipe=fp4_recipe)
        self.vocab_size = config.vocab_size
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, with labels, the loss.

        A cache may itself compute a step of one token per row that returns logits alone: see `KVCache.decode`.

        Args:
            input_ids: See `NVLlamaModel.forward`, as for all arguments not named here.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: int64 [B, S]; the logits at a position train on the next label. The loss ignores -100, and a label
                whose predecessor is padding or another sample in `attention_mask`: nothing predicts a sequence's first
                token. In packed sequences that other arguments show, give the first label -100, as collators do.
            use_cache: See there.
            logits_to_keep: Compute logits for this number of last columns (0: all), or for the given columns.
            cache: See there.
            **kwargs: See there; `shift_labels`, int64 [B, S], are shifted labels in place of `labels`;
                `num_items_in_batch` divides the loss; `ignore_index` is the label that the loss ignores.

        Returns:
            `loss` (if labels were given) and `logits` [B, S, V].
        """
        packed = {name: kwargs.pop(name) for name in list(kwargs) if name in PACKED_ARGUMENTS}
        # Not a named argument: Trainer would expect it in every batch, and compute no loss without it.
        shift_labels = kwargs.pop("shift_labels", None)
        output_hidden_states = kwargs.pop("output_hidden_states", None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        ignore_index = kwargs.pop("ignore_index", IGNORED_LABEL)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        check_arguments(self.config, kwargs)
        cache = given_cache(past_key_values, cache)
        if cache is not None and input_ids is not None and input_ids.dim() == 2:
            cache = self.model.open_cache(cache, len(input_ids), use_cache)
        more_than_logits = bool(output_hidden_states) or labels is not None or shift_labels is not None
        if cache is not None and not (more_than_logits or inputs_embeds is not None or packed):
            decoded_B1V = self._decode(input_ids, attention_mask, cache, logits_to_keep)
            if decoded_B1V is not None:
                return CausalLMOutputWithPast(logits=decoded_B1V, **{CACHE_FIELD: cache})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=False,
            **packed,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, columns])
        loss = None
        if labels is not None and shift_labels is None:
            if self.model.context_ranks > 1:
                warnings.warn(
                    f"labels are given on {self.model.context_ranks} context ranks: the label of a piece's last token "
                    "is in another piece. Shift labels before splitting them, and pass shift_labels, as shard_context "
                    "and DataCollatorForContextParallel(is_causal_lm=True) do.",
                    stacklevel=2,
                )
            # Beside packed sequences a mask may leave out the padding between them: its columns are others then.
            aligned = attention_mask is None or not packed or attention_mask.shape == labels.shape
            shift_labels = next_token_labels(labels, attention_mask if aligned else None, ignore_index)
        if shift_labels is not None:
            loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )

    def _decode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: KVCache,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor | None:
        """Return logits [B, 1, V] if the cache computes the step; `None` if the layers must compute it."""
        is_inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        is_one_column = input_ids is not None and input_ids.dim() == 2 and input_ids.shape[1] == 1
        if not (is_inference and is_one_column and isinstance(logits_to_keep, int)):
            return None
        assert input_ids is not None
        if attention_mask is not None:
            check_mask(attention_mask, len(input_ids), 1, cache)
        return cache.decode(self, input_ids, attention_mask)

    def check_cache(self, cache: Any, rows: int) -> KVCache:
        """Refuse a cache that does not fit the model, or has fewer than `rows` rows; see `kv_cache.check_cache`."""
        return self.model.check_cache(cache, rows)
