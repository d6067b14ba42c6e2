"""The fused prefill: a step that reads prompts, whose kernels are launched directly.

Transformer Engine's modules take 1 to 2 ms of the host's time for each layer, whatever the number of tokens. For
prompts of a few hundred tokens the GPU needs less, and waits. This prefill follows the model's layers in the same order
and with the same roundings, over packed tokens without padding.

Shapes: T packed tokens, M tokens whose last hidden states are wanted, E hidden size, K key/value heads, G a key/value
head's share of the fused projection, H query heads, D size of a head, P pages of a row, R rows of a page table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from llama_te_core.compat.transformer_engine import computes_quantized

from ..kv_cache.engine_cache import EngineCache
from ..ops.append_rope import append_rope
from ..ops.prefill_attention import prefill_attention
from ..ops.rms_norm import rms_norm
from .fused import FusedDecode, multiply_many
from .weights import Weight


class FusedPrefill:
    """Reads chunks of prompts by few kernels per layer.

    Args:
        decode: The model's fused decoding step. The prefill uses its weights and caches, and is valid as long as it is.
    """

    def __init__(self, decode: FusedDecode) -> None:
        self.decode = decode

    def __call__(self, token_T: torch.Tensor, cache: EngineCache, last_M: torch.Tensor | None = None) -> torch.Tensor:
        """Store the keys and values of tokens; return last hidden states.

        Args:
            token_T: int32 or int64, packed tokens of the rows that `cache` was opened for.
            cache: Its page table has `table_rows` rows.
            last_M: The indices of the tokens whose hidden states are wanted; `None` for all tokens.

        Returns:
            [M, E] or [T, E], after the model's last norm.
        """
        decode = self.decode
        ends = slice(0, cache.batch_size + 1)
        cu_new, cu_all = cache.cu_seqlens_q[ends], cache.cu_seqlens_kv[ends]
        most_new = max(cache.new_lengths)
        hidden_TE = F.embedding(token_T, decode.table_VE)
        tokens = len(token_T)
        qkv_TQ = hidden_TE.new_empty(tokens, decode.qkv_RQ.shape[1])
        qkv_TKGD = qkv_TQ.unflatten(1, decode.shape_KGD)
        query_THD = hidden_TE.new_empty(tokens, *decode.context_RHD.shape[1:])
        activation_TF = hidden_TE.new_empty(tokens, decode.activation_RF.shape[1])
        products = [decode.projection(0, hidden_TE, qkv_TQ)]
        for number, layer in enumerate(decode.layers, 1):
            multiply_many(products)
            append_rope(
                qkv_TKGD,
                decode.cos_sin_PD,
                cu_new,
                cache.pre_step_seqlens,
                cache.page_table,
                0,
                query_THD,
                *decode.caches[number],
            )
            is_last = number == len(decode.layers)
            if is_last and last_M is not None and not len(last_M):
                return hidden_TE[:0]
            keys, values, page_table = cache.attended_pages(number)
            context_THD = prefill_attention(
                query_THD,
                keys,
                values,
                cu_new,
                cu_all,
                page_table,
                most_new=most_new,
                most_keys=cache.max_sequence_length,
                scale=decode.scale,
            )
            context_TX = context_THD.flatten(1)
            if is_last and last_M is not None:  # no token reads the others any more
                hidden_TE, context_TX = hidden_TE[last_M], context_TX[last_M]
                activation_TF = activation_TF[: len(last_M)]
            products = decode.after_attention(layer, context_TX, hidden_TE, activation_TF)
            if not is_last:
                products.append(decode.projection(number, hidden_TE, qkv_TQ))
        multiply_many(products)
        normed_TE = torch.empty_like(hidden_TE)
        rms_norm(hidden_TE, decode.norm_E, decode.epsilon, normed_TE)
        return normed_TE

    def fits_precision(self) -> bool:
        """Return whether the layers would compute in bfloat16 now: not under the user's own `te.autocast`."""
        return not computes_quantized()


def takes_fused_prefill(model: Any, decode: FusedDecode) -> bool:
    """Return whether the layers would multiply in the precision in which the kernels do.

    Layers multiply in FP8 if `layer_precision` says so, and the kernels if the weights are FP8.

    Args:
        model: An `NVLlamaForCausalLM`.
        decode: Its fused decoding step.
    """
    wanted = [precision is not None for precision in model.model.precision.layers]
    return all(
        (weight.scale is not None) == is_quantized
        for is_quantized, layer in zip(wanted, decode.layers, strict=True)
        for weight in layer
        if isinstance(weight, Weight)
    )
