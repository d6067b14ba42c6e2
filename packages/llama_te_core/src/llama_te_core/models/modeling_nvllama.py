"""Llama with Transformer Engine layers, as transformers models.

Shapes: B sequences, S columns of a padded batch, E hidden size, V vocabulary, C classes. Packed sequences are one row,
B = 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from ..data.labels import next_token_labels
from ..layers.backend import build_layers, is_transformer_engine
from ..layers.collectives import gathered, scattered
from ..layers.kv_cache import check_cache, default_cache_factory
from ..layers.rope import RotaryAngles
from ..layers.sequence_layout import PackedSequences, check_mask, lay_out
from ..precision.plan import PrecisionPlan
from .configuration_nvllama import NVLlamaConfig

# transformers is renaming the argument and the output field: `past_key_values` up to 5.2x, `cache` after. Both names
# are taken; outputs have the field of the installed version.
_CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


class NVLlamaPreTrainedModel(PreTrainedModel):
    """What all Llama models here share: configuration, initialisation, loading and saving."""

    config_class = NVLlamaConfig
    config: NVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReferenceLayer", "TransformerLayer"]  # noqa: RUF012  (transformers' own attribute)
    _skip_keys_device_placement = ["inference_params"]  # noqa: RUF012
    # Attention is the layers' business, whatever transformers would choose.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding) and isinstance(module.weight, DTensor):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.padding_idx is not None:
                _clear_row(module.weight, module.padding_idx)
            return
        # transformers takes every class with "LayerNorm" in its name for a norm, and would fill its weights with ones.
        if not (hasattr(module, "layer_norm_weight") or _is_from_transformer_engine(module)):
            super()._init_weights(module)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "layer_norm_weight":
                init.ones_(parameter)
            elif not _is_quantized(module, parameter):  # TE has initialised what it quantized
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def init_empty_weights(self, device: torch.device | str | None = None) -> None:
        """Give a model that was built on the meta device memory and fresh random weights.

        Works after FSDP2's `fully_shard`, where each process then holds its shard alone.

        Args:
            device: Where to; the current GPU by default, the CPU where there is none.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        for module in self.modules():
            own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
            if not any(tensor.is_meta for tensor in own):
                continue
            if getattr(module, "primary_weights_in_fp8", False):
                module.reset_parameters()  # TE's own, which quantizes them
            else:
                module.to_empty(device=device, recurse=False)
                self._init_weights(module)
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint with this layout; arguments are those of transformers.

        Raises:
            ValueError: Tensors of the decoder are missing, so it is not such a checkpoint.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        decoder = "" if issubclass(cls, NVLlamaModel) else f"{cls.base_model_prefix}."
        missing = sorted(key for key in info["missing_keys"] if key.startswith(decoder))
        if missing:
            unexpected = sorted(info["unexpected_keys"], key=lambda key: ("layers." not in key, key))
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} lacks {len(missing)} tensors of the decoder, such as "
                f"{missing[0]!r}"
                + (f", and has others, such as {unexpected[0]!r}" if unexpected else "")
                + ". A Hugging Face Llama is converted with llama_te_convert.convert_llama_hf_to_te first."
            )
        model.quantize_loaded_weights()
        return (model, info) if with_info else model

    def quantize_loaded_weights(self) -> None:
        """After loading: put weights into the quantized format that `config.use_quantized_model_init` asks for.

        `from_pretrained` calls this itself; nothing happens where the configuration does not ask for it.

        Raises:
            RuntimeError: The weights are not on a GPU.
        """
        if self.config.use_quantized_model_init and any(map(_is_from_transformer_engine, self.modules())):
            from ..layers.te import quantize_loaded_weights

            quantize_loaded_weights(self)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; arguments are those of transformers. Quantized weights are saved in the model's dtype."""
        if self.config.use_quantized_model_init and any(map(_is_from_transformer_engine, self.modules())):
            from ..layers.te import dense

            kwargs.setdefault("state_dict", {name: dense(tensor) for name, tensor in self.state_dict().items()})
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: a checkpoint's `auto_map` points at the installed package, so no source is copied."""


def _clear_row(weight: DTensor, row: int) -> None:
    """Fill one row of a matrix that is shared out by rows with zeros, in the process that has it.

    Not by `weight[row]`, which some versions of torch refuse where two dimensions of the mesh share the rows.
    """
    part = weight.to_local()
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if 0 <= row - offset[0] < part.shape[0]:
        part[row - offset[0]].zero_()


def _is_from_transformer_engine(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformer_engine")


def _is_quantized(module: nn.Module, parameter: torch.Tensor) -> bool:
    if not _is_from_transformer_engine(module):
        return False
    from ..layers.te import is_quantized

    return is_quantized(parameter)


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
        config.check()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.precision = PrecisionPlan(config.layer_precision, fp8_recipe, fp4_recipe, config.num_hidden_layers)
        self.rotary_angles = RotaryAngles(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = build_layers(config, self.precision, self.rotary_angles.softmax_scale)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.context_ranks = 1  # over which `train.parallel` shares out the tokens of each sequence
        self.sequence_mesh: DeviceMesh | None = None  # over which it shares out what goes from layer to layer
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
                columns seen before too.
            position_ids: Not needed: positions follow from the mask or the sequences (see `lay_out`).
            past_key_values: A cache such as `llama_te_infer.InferenceParams`.
            inputs_embeds: [B, S, E] in place of `input_ids`.
            use_cache: With `False`, a given cache is left alone.
            output_hidden_states: Return the input of every layer and the last hidden state.
            cache: Another name of `past_key_values`, as newer transformers have it.
            **kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` and the `_padded` variants for
                packed sequences (see `PackedSequences`); others are left to the caller.

        Returns:
            `last_hidden_state` [B, S, E]. What it holds at padding is unspecified.

        Raises:
            ValueError: Arguments do not fit together, or FP8 or tensor ranks cannot take this number of tokens.
            RuntimeError: The layers' precision is not to be had on this machine.
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
            cache = check_cache(
                cache,
                inputs.shape[0],
                self.config.num_key_value_heads,
                self.config.head_dim,
                self.embed_tokens.weight.dtype,
            )
        ranks = 1 if self.sequence_mesh is None else self.sequence_mesh.size()
        layout = lay_out(
            inputs,
            attn_input_format=self.config.attn_input_format,
            self_attn_mask_type=self.config.self_attn_mask_type,
            attention_mask=attention_mask,
            position_ids=position_ids,
            packed=PackedSequences.from_arguments(kwargs),
            cache=cache,
            # What is filled up is a sequence, and context ranks have two pieces of each.
            token_multiple=math.lcm(self.precision.token_multiple() * ranks, 2 if self.context_ranks > 1 else 1),
        )
        self.precision.check_tokens(layout.tokens, torch.is_grad_enabled(), ranks)

        hidden = layout.arrange(inputs)
        hidden = scattered(hidden, self.sequence_mesh) if input_ids is None else self.embed_tokens(hidden)
        arguments = layout.layer_arguments()
        arguments["rotary_pos_emb"] = self.rotary_angles(layout.longest * self.context_ranks, hidden.device)
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
            **{_CACHE_FIELD: cache},
        )

    def _run_layer(self, layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            output: torch.Tensor = layer(hidden, **arguments)
        elif is_transformer_engine(layer):
            from ..layers.te import checkpoint

            output = checkpoint(layer, hidden, **arguments)
        else:
            # Arguments are bound beforehand, since re-entrant checkpointing takes none by name.
            output = self._gradient_checkpointing_func(functools.partial(layer.__call__, **arguments), hidden)
        return output

    def _check_precision(self) -> None:
        self.precision.check(is_transformer_engine(self.layers[0]), self.device)
        self._precision_checked = True


class NVLlamaForCausalLM(NVLlamaPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, which always computes in the weights' own dtype.

    Args: see `NVLlamaModel`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NVLlamaConfig, fp8_recipe: Any | None = None, fp4_recipe: Any | None = None) -> None:
        super().__init__(config)
        self.model = NVLlamaModel(config, fp8_recipe=fp8_recipe, fp4_recipe=fp4_recipe)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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

        One more token for each row of a cache, of which nothing but logits is wanted, may be the cache's own business:
        see `KVCache.decode`.

        Args:
            input_ids: See `NVLlamaModel.forward`, as for all arguments not named here.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: int64 [B, S]; the logits at a position are trained on the next label, -100 is left out. So is a
                label whose predecessor is padding in `attention_mask`: nothing predicts a sequence's first token.
            use_cache: See there.
            logits_to_keep: Compute the logits of the last so many columns only (0: all), or of these columns.
            cache: See there.
            **kwargs: See there; `shift_labels`, int64 [B, S], are labels that are shifted already, in place of
                `labels`; `num_items_in_batch` divides the loss.

        Returns:
            `loss` (if labels were given) and `logits` [B, S, V].
        """
        # Taken apart here, since the loss is given the rest.
        packed = {name: kwargs.pop(name) for name in list(kwargs) if name in _PACKED_ARGUMENTS}
        # No argument by name: Trainer would expect every batch to have it, and evaluate those without no loss.
        shift_labels = kwargs.pop("shift_labels", None)
        output_hidden_states = kwargs.pop("output_hidden_states", None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = past_key_values if cache is None else cache
        more_than_logits = output_hidden_states or labels is not None or shift_labels is not None
        if not (more_than_logits or use_cache is False or inputs_embeds is not None or packed):
            decoded_B1V = self._decode(input_ids, attention_mask, cache, logits_to_keep)
            if decoded_B1V is not None:
                return CausalLMOutputWithPast(logits=decoded_B1V, **{_CACHE_FIELD: cache})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **packed,
        )
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, columns])
        loss = None
        if labels is not None and shift_labels is None:
            shift_labels = next_token_labels(labels, attention_mask)
        if shift_labels is not None:
            loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=outputs.hidden_states,
            **{_CACHE_FIELD: outputs.get(_CACHE_FIELD)},
        )

    def _decode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Any | None,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor | None:
        """Logits [B, 1, V] of a step that the cache computes; `None` where it is the layers' business."""
        is_inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        is_one_column = input_ids is not None and input_ids.dim() == 2 and input_ids.shape[1] == 1
        if not (is_inference and is_one_column and isinstance(logits_to_keep, int)) or cache is None:
            return None
        assert input_ids is not None
        rows, config = len(input_ids), self.config
        cache = check_cache(
            cache, rows, config.num_key_value_heads, config.head_dim, self.model.embed_tokens.weight.dtype
        )
        if attention_mask is not None:
            check_mask(attention_mask, rows, 1, cache)
        return cache.decode(self, input_ids, attention_mask)

    def generate(self, *args: Any, past_key_values: Any | None = None, cache: Any | None = None, **kwargs: Any) -> Any:
        """Generate text: transformers' own method, taking the cache by either of its names in any version."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            kwargs[_CACHE_FIELD] = cache
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Called by `generate`: make a cache that the layers can use, or check the one that was given."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: the layers cannot use transformers' "
                "own caches. Leave it out, or pass a llama_te_infer.InferenceParams as past_key_values."
            )
        given = model_kwargs.get(_CACHE_FIELD)
        rows = batch_size * _rows_of_a_prompt(generation_config)
        if given is None and generation_config.use_cache is not False:
            factory = default_cache_factory()
            if factory is None:
                generation_config.use_cache = False
                return None
            if generation_config.is_assistant:
                # All drafts for a text share this cache, and the length of the first one is all that is known of them.
                max_cache_length = max(max_cache_length, self.config.max_position_embeddings)
            model_kwargs[_CACHE_FIELD] = factory(self, batch_size=rows, max_length=max_cache_length)
        elif given is not None:
            cache = check_cache(
                given,
                rows,
                self.config.num_key_value_heads,
                self.config.head_dim,
                self.model.embed_tokens.weight.dtype,
            )
            cache._is_user_defined = True  # type: ignore[attr-defined]  # transformers' own mark
        return None

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Called by `generate` with the prompts, each as often as it has beams or returned sequences.

        Each is computed once, and then goes on in as many rows of the cache.
        """
        cache = model_kwargs.get(_CACHE_FIELD)
        copies = _rows_of_a_prompt(generation_config)
        # A cache that holds something already may hold something else for each of the rows.
        if copies == 1 or cache is None or cache.get_seq_length() > 0:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        rows = input_ids.shape[0]
        once = {
            name: value[::copies] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
            for name, value in model_kwargs.items()
        }
        outputs = super()._prefill(input_ids[::copies], generation_config, once, *args, **kwargs)
        cache.repeat_rows(copies)
        outputs.logits = outputs.logits.repeat_interleave(copies, 0)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(hidden.repeat_interleave(copies, 0) for hidden in outputs.hidden_states)
        return outputs


def _rows_of_a_prompt(generation_config: Any) -> int:
    """How many rows `generate` makes of each prompt."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


class NVLlamaForSequenceClassification(NVLlamaPreTrainedModel):
    """The decoder with a class per sequence, read at its last token.

    Args: see `NVLlamaModel`.
    """

    # Its loss is a mean over a batch: Trainer is to take the mean over the batches of a step.
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
            `loss` (if labels were given) and `logits` [sequences, C]; for packed sequences one row for each that
            `cu_seq_lens_q` tells of.

        Raises:
            ValueError: Several sequences, but no way to tell where they end.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden_BSE = outputs.last_hidden_state
        packed = PackedSequences.from_arguments(kwargs)
        logits = self.score(_last_tokens(hidden_BSE, input_ids, self.config.pad_token_id, packed))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


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
            labels: int64 [B, S], -100 is left out.
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
    """The decoder with the logits of where an answer starts and ends.

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
            start_positions: int64 [B], column where the answer starts.
            end_positions: int64 [B], column where it ends.
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


_PACKED_ARGUMENTS = frozenset(field.name for field in fields(PackedSequences))


def _last_tokens(
    hidden_BSE: torch.Tensor,
    input_ids: torch.Tensor | None,
    pad_token_id: int | None,
    packed: PackedSequences | None,
) -> torch.Tensor:
    """Hidden states at the sequences' last tokens, [sequences, E]; padding is told by its token, as in transformers."""
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
