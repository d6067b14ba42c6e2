"""The decoder without a head.

Shapes: B sequences, S columns of a padded batch, E hidden size. Packed sequences are one row,
B = 1.
"""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from ..compat.torch import is_data_parallel_replica
from ..compat.transformers import gradient_checkpointing_function
from ..layers.collectives import gathered, scattered
from ..layers.kv_cache import (
    KVCache,
    UnreadColumns,
    check_cache,
    computing_dtype,
    copy_into,
    default_cache_factory,
)
from ..layers.rope import RotaryAngles
from ..layers.sequence_layout import PackedSequences, SequenceLayout, lay_out
from ..precision.plan import PrecisionPlan
from .arguments import CACHE_FIELD, check_arguments, given_cache, select_hidden_states
from .configuration_nvllama import NVLlamaConfig
from .pretrained import NVLlamaPreTrainedModel

# `transformers.DynamicCache`s whose content a pass has copied.
_copied_caches: weakref.WeakSet[DynamicCache] = weakref.WeakSet()


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
        if config.layer_precision is None and self.precision.quantized:
            config.layer_precision = list(self.precision.layers)  # a recipe alone: saved, and read by other code
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

        A pass with `past_key_values` computes no gradients: a backward pass through it raises an error.

        Args:
            input_ids: int64 [B, S]; for packed sequences [1, T].
            attention_mask: [B, S], nonzero for tokens; padding may stand left or right. With a cache it covers the
                earlier columns too. In a packed row its values may number the samples: 1, 1, 2, 2, 2, 0.
            position_ids: Not needed: positions follow from the mask or from the sequences, and must fit them. Where
                they restart at 0, a row holds several sequences (see `lay_out`).
            past_key_values: The cache that an earlier pass returned, or one such as `llama_te_infer.InferenceParams`.
            inputs_embeds: [B, S, E] in place of `input_ids`.
            use_cache: Whether to return a cache; by default `config.use_cache`, but not in training. With `True` and
                without gradients the pass stores keys and values. Otherwise it only copies its inputs, and the first
                pass that continues it computes them again.
            output_hidden_states: Return the input of every layer and the last hidden state. An index or several
                indices return these alone, with `None` in place of the others.
            cache: The name of `past_key_values` in newer versions of transformers.
            **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` and the `_padded` variants for
                packed sequences (see `PackedSequences`). `check_arguments` refuses others that would have an effect in
                transformers.

        Returns:
            `last_hidden_state` [B, S, E]. Its values at padding are unspecified.

        Raises:
            ValueError: Arguments do not fit together, or FP8 or tensor ranks cannot take this number of tokens.
            RuntimeError: This machine cannot compute in the layers' precision.
        """
        inputs = _checked_inputs(input_ids, inputs_embeds)
        rows, width = inputs.shape[:2]
        # A compiled graph checks when it is traced; a guard on the attribute would trace it twice.
        if torch.compiler.is_compiling() or not self._precision_checked:
            self._check_precision()
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        arguments |= {"inputs_embeds": inputs_embeds, **kwargs}
        packed = PackedSequences.from_arguments(kwargs)
        check_arguments(self.config, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        cache = returned = given_cache(past_key_values, cache)
        if cache is not None:
            cache = returned = self.open_cache(cache, rows, use_cache)
        elif self._returns_cache(use_cache) and (factory := default_cache_factory()) is not None:
            returned = factory(self, batch_size=rows, max_length=None)
            if use_cache and not torch.is_grad_enabled():
                cache = returned
            else:
                returned.unread = UnreadColumns.copy_of(arguments, rows, width)
        # A cache holds keys and values without gradients, those of this pass too.
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            layout = self._lay_out(inputs, attention_mask, position_ids, packed, cache)
            hidden_states = self._run_layers(inputs, layout, cache, bool(output_hidden_states))
        if cache is not None and torch.is_grad_enabled():
            hidden_states[-1] = _WithoutGradient.apply(hidden_states[-1], self.norm.weight, inputs_embeds)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            hidden_states=select_hidden_states(tuple(hidden_states), output_hidden_states),
            **{CACHE_FIELD: returned},
        )

    def check_cache(self, cache: Any, rows: int) -> KVCache:
        """Refuse a cache that does not fit the model, or has fewer than `rows` rows; see `kv_cache.check_cache`.

        A filled `transformers.DynamicCache`, such as prefix tuning's, is copied. The copy goes on in the outputs, and
        the original can be given once only.
        """
        config = self.config
        if isinstance(cache, DynamicCache) and cache.get_seq_length() > 0:
            cache = self._copy_dynamic_cache(cache)
        dtype = computing_dtype(self.embed_tokens.weight)
        return check_cache(cache, rows, config.num_key_value_heads, config.head_dim, dtype)

    def _copy_dynamic_cache(self, cache: DynamicCache) -> Any:
        keys_and_values = [(layer.keys, layer.values) for layer in cache.layers]
        shape = (self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_dim)
        found = (len(keys_and_values), *keys_and_values[0][0].shape[1::2])
        if found != shape:
            raise ValueError(
                f"past_key_values is a DynamicCache with [layers, heads, head size] = {list(found)}, but the model has "
                f"{list(shape)}: pass a cache of this model."
            )
        if cache in _copied_caches:
            raise ValueError(
                "past_key_values is a DynamicCache that an earlier pass has copied, so it lacks the tokens since then: "
                "continue with the cache in that pass's outputs."
            )
        factory = default_cache_factory()
        if factory is None:
            return cache
        _copied_caches.add(cache)
        copied = factory(self, batch_size=len(keys_and_values[0][0]), max_length=None)
        copy_into(copied, keys_and_values)
        return copied

    def open_cache(self, cache: Any, rows: int, use_cache: bool | None = None) -> KVCache | None:
        """Check a given cache, and compute its unread columns.

        Args:
            cache: The given cache.
            rows: Rows of the batch.
            use_cache: Of the pass.

        Returns:
            The cache; `None` with `use_cache=False`.

        Raises:
            TypeError: See `kv_cache.check_cache`.
            ValueError: See there; or the cache has content, and `use_cache=False`.
        """
        cache = self.check_cache(cache, rows)
        unread = cache.unread
        if use_cache is False:
            if unread is not None or cache.longest() > 0:
                raise ValueError(
                    "past_key_values has content, but use_cache=False: the pass would not see the earlier tokens. "
                    "Leave out one of the two."
                )
            return None
        if unread is not None:
            if rows != unread.rows:
                raise ValueError(
                    f"the cache holds a batch of {unread.rows} rows, but {rows} rows come: "
                    "call reset() before another batch."
                )
            cache.unread = None
            try:
                with torch.no_grad():
                    self(**unread.arguments, past_key_values=cache)
            except BaseException:
                cache.unread = unread
                raise
        return cache

    def _returns_cache(self, use_cache: bool | None) -> bool:
        """Return whether a pass without a given cache returns one."""
        if use_cache is not None:
            return use_cache
        is_training = self.training and torch.is_grad_enabled()
        # A compiled graph has tensors as outputs. `DataParallel` joins the outputs of replicas, which must be tensors.
        is_plain = not (torch.compiler.is_compiling() or is_data_parallel_replica(self))
        return bool(self.config.use_cache) and is_plain and not is_training

    def _lay_out(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        packed: PackedSequences | None,
        cache: KVCache | None,
    ) -> SequenceLayout:
        attn_input_format = self.config.attn_input_format
        if torch.compiler.is_compiling() and packed is None and self.layer_backend.takes_both_formats:
            attn_input_format = "bshd"  # the number of packed tokens depends on data, so no graph could be whole
        ranks = 1 if self.sequence_mesh is None else self.sequence_mesh.size()
        context_ranks = self.context_ranks
        layout = lay_out(
            inputs,
            attn_input_format=attn_input_format,
            self_attn_mask_type=self.config.self_attn_mask_type,
            attention_mask=attention_mask,
            position_ids=position_ids,
            packed=packed,
            cache=cache,
            # The padding forms a sequence, and context ranks have two pieces of each sequence.
            token_multiple=math.lcm(self.precision.token_multiple() * ranks, 2 if context_ranks > 1 else 1),
            context_ranks=context_ranks,
        )
        self.precision.check_tokens(layout.tokens, torch.is_grad_enabled(), ranks)
        return layout

    def _run_layers(
        self, inputs: torch.Tensor, layout: SequenceLayout, cache: KVCache | None, keep_all: bool
    ) -> list[torch.Tensor]:
        """Return the last hidden state [B, S, E], after the input of every layer with `keep_all`."""
        hidden = layout.arrange(inputs)
        hidden = scattered(hidden, self.sequence_mesh) if inputs.dim() == 3 else self.embed_tokens(hidden)
        arguments = layout.layer_arguments()
        arguments["rotary_pos_emb"] = self.rotary_angles(layout.longest, hidden.device)
        arguments["inference_params"] = cache
        hidden_states: list[torch.Tensor] = []
        with self.precision.model_context():
            for index, layer in enumerate(self.layers):
                if keep_all:
                    hidden_states.append(layout.restore(gathered(hidden, self.sequence_mesh)))
                with self.precision.forward_context(index):
                    hidden = self._run_layer(layer, hidden, arguments)
        hidden_states.append(layout.restore(gathered(self.norm(hidden), self.sequence_mesh)))
        return hidden_states

    @property
    def rotary_emb(self) -> RotaryAngles:
        """The rotary embedding under the name that transformers' Llama and NVIDIA's recipe give it."""
        return self.rotary_angles

    def get_autocast_context(
        self, layer_number: int | None, init: bool = False, outer: bool = False
    ) -> AbstractContextManager[Any]:
        """Return the precision context of a layer or of the whole stack, as NVIDIA's recipe names it.

        Args:
            layer_number: Number of the layer, from 0; not used with `outer`.
            init: The context in which the layer is built with quantized weights, in place of its forward pass.
            outer: The context around all layers.
        """
        if outer:
            return self.precision.model_context()
        if layer_number is None:
            raise ValueError("layer_number=None has a context with outer=True alone: give the number of a layer.")
        if init:
            return self.precision.init_context(layer_number, self.config.use_quantized_model_init)
        return self.precision.forward_context(layer_number)

    @property
    def context_ranks(self) -> int:
        """The number of processes that share the tokens of each sequence; see `LayerBackend.context_ranks`."""
        return self.layer_backend.context_ranks(self.layers)

    def _run_layer(self, layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            checkpoint = gradient_checkpointing_function(self)
            return self.layer_backend.checkpoint(layer, hidden, torch_checkpoint=checkpoint, **arguments)
        output: torch.Tensor = layer(hidden, **arguments)
        return output

    def _check_precision(self) -> None:
        self.layer_backend.check_precision(self.precision, self.device)
        self._precision_checked = True


class _WithoutGradient(torch.autograd.Function):
    """Passes the result of a pass with a cache on, and refuses to compute its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_BSE: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        """Return the first argument. The others may need a gradient, so the result needs one too."""
        return hidden_BSE.view_as(hidden_BSE)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "a pass with past_key_values has no gradients, since a cache holds keys and values without them: leave "
            "past_key_values out to train."
        )


def _checked_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
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
    return inputs
