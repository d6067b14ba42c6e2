"""The decoder without a head.

Shapes: B sequences, S columns of a padded batch, E hidden size. Packed sequences are one row,
B = 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from ..compat.transformers import cache_field, gradient_checkpointing_function
from ..layers.collectives import gathered, scattered
from ..layers.kv_cache import KVCache, check_cache
from ..layers.rope import RotaryAngles
from ..layers.sequence_layout import PackedSequences, lay_out
from ..precision.plan import PrecisionPlan
from .configuration_nvllama import NVLlamaConfig
from .pretrained import NVLlamaPreTrainedModel


class NVLlamaModel(NVLlamaPreTrainedModel):
    """The decoder without a head.

    Args:
        config: Sizes, layout and precision.
        fp8_recipe: A `transformer_engine.common.recipe.Recipe` for the "fp8" layers of `config.layer_precision`, or
            for all layers, with a warning, where the configuration names none.
        fp4_recipe: The same for the "fp4" layers.

    Raises:
        RuntimeError: The recipes do not fit `config.layer_precision`, or this machine.
    """

    def __init__(self, config: NVLlamaConfig, fp8_recipe: Any | None = None, fp4_recipe: Any | None = None) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.precision = PrecisionPlan(config.layer_precision, fp8_recipe, fp4_recipe, config.num_hidden_layers)
        self.rotary_angles = RotaryAngles(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = self.layer_backend.build(config, self.precision, self.rotary_angles.softmax_scale)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.sequence_mesh: DeviceMesh | None = None  # processes that share tokens between layers; `parallel.tensor`
        self._precision_checked = False
        if self.precision.explicit or config.use_quantized_model_init:
            self._check_precision()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder on a padded batch or on packed sequences.

        Args:
            input_ids: int64 [B, S]; for packed sequences [1, T].
            attention_mask: [B, S], nonzero for tokens; padding may stand left or right. With a cache it covers the
                earlier columns too. In a packed row its values may number the samples: 1, 1, 2, 2, 2, 0.
            position_ids: Not needed: positions follow from the mask or from the sequences, and must fit them. Where
                they restart at 0, a row holds several sequences (see `lay_out`).
            past_key_values: A cache such as `llama_te_infer.InferenceParams`.
            inputs_embeds: [B, S, E] in place of `input_ids`.
            use_cache: With `False`, the model ignores a given cache.
            output_hidden_states: Return the input of every layer and the last hidden state.
            cache: The name of `past_key_values` in newer versions of transformers.
            **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` and the `_padded` variants for
                packed sequences (see `PackedSequences`); the model ignores others.

        Returns:
            `last_hidden_state` [B, S, E]. Its values at padding are unspecified.

        Raises:
            ValueError: Arguments do not fit together, or FP8 or tensor ranks cannot take this number of tokens.
            RuntimeError: This machine cannot compute in the layers' precision.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        if inputs.dim() != (2 if input_ids is not None else 3):
            raise ValueError(
                f"{'input_ids' if input_ids is not None else 'inputs_embeds'} has shape {list(inputs.shape)}: it must "
                "be [batch, columns], or [1, tokens] for packed sequences"
                + ("." if input_ids is not None else ", with the hidden size behind.")
            )
        if not self._precision_checked:
            self._check_precision()

        cache = past_key_values if cache is None else cache
        if use_cache is False:
            cache = None
        if cache is not None:
            cache = self.check_cache(cache, inputs.shape[0])
        ranks = 1 if self.sequence_mesh is None else self.sequence_mesh.size()
        context_ranks = self.context_ranks
        layout = lay_out(
            inputs,
            attn_input_format=self.config.attn_input_format,
            self_attn_mask_type=self.config.self_attn_mask_type,
            attention_mask=attention_mask,
            position_ids=position_ids,
            packed=PackedSequences.from_arguments(kwargs),
            cache=cache,
            # The padding forms a sequence, and context ranks have two pieces of each sequence.
            token_multiple=math.lcm(self.precision.token_multiple() * ranks, 2 if context_ranks > 1 else 1),
            context_ranks=context_ranks,
        )
        self.precision.check_tokens(layout.tokens, torch.is_grad_enabled(), ranks)

        hidden = layout.arrange(inputs)
        hidden = scattered(hidden, self.sequence_mesh) if input_ids is None else self.embed_tokens(hidden)
        arguments = layout.layer_arguments()
        arguments["rotary_pos_emb"] = self.rotary_angles(layout.longest, hidden.device)
        arguments["inference_params"] = cache

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_hidden: list[torch.Tensor] = []
        with self.precision.model_context():
            for index, layer in enumerate(self.layers):
                if output_hidden_states:
                    all_hidden.append(layout.restore(gathered(hidden, self.sequence_mesh)))
                with self.precision.forward_context(index):
                    hidden = self._run_layer(layer, hidden, arguments)
        hidden_BSE = layout.restore(gathered(self.norm(hidden), self.sequence_mesh))
        if output_hidden_states:
            all_hidden.append(hidden_BSE)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BSE,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            **{cache_field(): cache},
        )

    @property
    def context_ranks(self) -> int:
        """The number of processes that share the tokens of each sequence; see `LayerBackend.context_ranks`."""
        return self.layer_backend.context_ranks(self.layers)

    def check_cache(self, cache: Any, rows: int) -> KVCache:
        """Refuse a cache that does not fit the model, or has fewer than `rows` rows; see `kv_cache.check_cache`."""
        config = self.config
        return check_cache(cache, rows, config.num_key_value_heads, config.head_dim, self.embed_tokens.weight.dtype)

    def _run_layer(self, layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            checkpoint = gradient_checkpointing_function(self)
            return self.layer_backend.checkpoint(layer, hidden, torch_checkpoint=checkpoint, **arguments)
        output: torch.Tensor = layer(hidden, **arguments)
        return output

    def _check_precision(self) -> None:
        self.layer_backend.check_precision(self.precision, self.device)
        self._precision_checked = True
