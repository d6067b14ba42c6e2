"""The decoder with heads for sequence classification, token classification and question answering.

Shapes: B sequences, S columns of a padded batch, E hidden size, C classes. Packed sequences are one row,
B = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from ..layers.sequence_layout import PackedSequences
from .arguments import CACHE_FIELD
from .configuration_nvllama import NVLlamaConfig
from .decoder import NVLlamaModel
from .pretrained import NVLlamaPreTrainedModel


class NVLlamaForSequenceClassification(NVLlamaPreTrainedModel):
    """The decoder with a class per sequence, read at its last token.

    Args: see `NVLlamaModel`.
    """

    # The loss is a mean over a batch: Trainer then takes the mean over the batches of a step.
    accepts_loss_kwargs = False

    def __init__(self, config: NVLlamaConfig, fp8_recipe: Any | None = None, fp4_recipe: Any | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = NVLlamaModel(config, fp8_recipe=fp8_recipe, fp4_recipe=fp4_recipe)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify sequences.

        Args:
            input_ids: See `NVLlamaModel.forward`, as for all arguments not named here.
            attention_mask: See there.
            labels: int64 [sequences], or float for regression.
            inputs_embeds: See there.
            **kwargs: See there.

        Returns:
            `loss` (if labels were given) and `logits` [sequences, C]; for packed sequences one row for each sequence in
            `cu_seq_lens_q`.

        Raises:
            ValueError: There are several sequences, and no pad token that shows their ends.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden_BSE = outputs.last_hidden_state
        packed = PackedSequences.from_arguments(kwargs)
        logits = self.score(_last_tokens(hidden_BSE, input_ids, self.config.pad_token_id, packed))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )


class NVLlamaForTokenClassification(NVLlamaPreTrainedModel):
    """The decoder with a class per token.

    Args: see `NVLlamaModel`.
    """

    def __init__(self, config: NVLlamaConfig, fp8_recipe: Any | None = None, fp4_recipe: Any | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = NVLlamaModel(config, fp8_recipe=fp8_recipe, fp4_recipe=fp4_recipe)
        # Names and defaults as in transformers' own token classification, so that checkpoints and configs carry over.
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(
            config.hidden_size, self.num_labels, bias=getattr(config, "token_classification_bias", True)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify tokens.

        Args:
            input_ids: See `NVLlamaModel.forward`, as for all arguments not named here.
            attention_mask: See there.
            labels: int64 [B, S]; the loss ignores -100.
            **kwargs: See there; `num_items_in_batch` divides the loss.

        Returns:
            `loss` (if labels were given) and `logits` [B, S, C].
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits_BSC = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            num_items_in_batch = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits_BSC, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits_BSC, hidden_states=outputs.hidden_states)


class NVLlamaForQuestionAnswering(NVLlamaPreTrainedModel):
    """The decoder with logits for the start and the end of an answer.

    Args: see `NVLlamaModel`.
    """

    base_model_prefix = "transformer"  # as in transformers, so that checkpoints carry over

    def __init__(self, config: NVLlamaConfig, fp8_recipe: Any | None = None, fp4_recipe: Any | None = None) -> None:
        super().__init__(config)
        self.transformer = NVLlamaModel(config, fp8_recipe=fp8_recipe, fp4_recipe=fp4_recipe)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.transformer.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.transformer.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Find answers.

        Args:
            input_ids: See `NVLlamaModel.forward`, as for all arguments not named here.
            attention_mask: See there.
            start_positions: int64 [B], the column of the answer's start.
            end_positions: int64 [B], the column of its end.
            **kwargs: See there.

        Returns:
            `loss` (if positions were given), `start_logits` and `end_logits` [B, S].
        """
        outputs = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        start_BS, end_BS = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                start_BS,
                end_BS,
                start_positions,
                end_positions,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_BS, end_logits=end_BS, hidden_states=outputs.hidden_states
        )


def _last_tokens(
    hidden_BSE: torch.Tensor,
    input_ids: torch.Tensor | None,
    pad_token_id: int | None,
    packed: PackedSequences | None,
) -> torch.Tensor:
    """Return hidden states at the sequences' last tokens, [sequences, E]; pad tokens are padding."""
    if packed is not None:
        starts = packed.cu_seq_lens_q if packed.cu_seq_lens_q_padded is None else packed.cu_seq_lens_q_padded
        lengths = packed.cu_seq_lens_q.diff()
        return hidden_BSE[0, starts[:-1] + lengths - 1]
    rows, width = hidden_BSE.shape[:2]
    if pad_token_id is None or input_ids is None:
        if rows > 1 and pad_token_id is None:
            raise ValueError(
                f"a batch of {rows} sequences, but config.pad_token_id is None: set it, so that their ends can be told."
            )
        return hidden_BSE[:, -1]
    place_S = torch.arange(width, device=hidden_BSE.device)
    last_B = (place_S * (input_ids != pad_token_id)).argmax(-1)
    return hidden_BSE[torch.arange(rows, device=hidden_BSE.device), last_B]
