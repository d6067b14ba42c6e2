"""A key/value cache in Transformer Engine's attention, by hooks on a layer's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .backend import LayerConfig
from .kv_cache import KVCache


class CachedAttention:
    """Hooks on the modules of one layer, which change its attention where a cache takes part.

    1. A cache with a kernel for it (`fuses_rope`) rotates and stores the output of the fused projection. The layer gets
       no angles then, and attention gets the rotated queries from the cache. Keys and values always come from it.
    2. Attention gets packed queries as a padded batch, and the hooks pack its output again. TE 2.20
       (FusedAttention.forward) cuts the running sums of packed queries over cached keys to as many rows as there are
       heads, and computes nothing for later rows. Where every row has one new token, both arrangements are the same
       memory.

    Without a cache nothing changes.

    Shapes: T packed tokens, B rows, W columns of the padded queries, K key/value heads, G heads of a group, H query
    heads, D size of a head.
    """

    def __init__(self, layer: nn.Module, config: LayerConfig, layer_number: int) -> None:
        self.layer_number = layer_number
        self.qkv_format = config.attn_input_format
        self.shape_KGD = (
            config.num_key_value_heads,
            config.num_attention_heads // config.num_key_value_heads + 2,
            config.head_dim,
        )
        # State of the current forward pass.
        self._cache: KVCache | None = None
        self._angles: torch.Tensor | None = None
        self._query: torch.Tensor | None = None
        self._unpad: Callable[[torch.Tensor], torch.Tensor] | None = None
        attention: Any = layer.self_attention
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        attention.layernorm_qkv.register_forward_hook(self._append)
        attention.core_attention.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        attention.core_attention.register_forward_hook(self._take_back)

    def _begin(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("inference_params")
        if cache is None or not cache.fuses_rope:
            self._cache = None
            return None
        self._cache, self._angles = cache, kwargs["rotary_pos_emb"]
        return args, {**kwargs, "rotary_pos_emb": None}

    def _append(self, projection: nn.Module, args: Any, qkv: torch.Tensor) -> torch.Tensor | None:
        if self._cache is None:
            return None
        assert self._angles is not None
        qkv_xKGD = qkv.unflatten(-1, self.shape_KGD)
        self._query = self._cache.append_rope(self.layer_number, qkv_xKGD, self._angles, self.qkv_format)
        # Nothing reads the projection any more, but TE copies queries out of it: any shape is a view of one number.
        return qkv.new_zeros(()).expand(qkv.shape)

    def _hand_over(self, core_attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache: KVCache | None = kwargs.get("inference_params")
        self._unpad = None
        if cache is None:
            return None
        query, key, value = args
        if self._query is not None:
            query = self._query
        elif self.qkv_format == "thd":
            cache.step(self.layer_number, key, value, "thd")  # stored packed, before the queries are padded
        else:
            return None
        self._cache = self._angles = self._query = None  # the layer must not keep a cache alive
        if self.qkv_format == "thd":
            query, self._unpad = _pad(query, cache, kwargs["max_seqlen_q"])
            kwargs = {**kwargs, "qkv_format": "bshd", "max_seqlen_q": query.shape[1]}
        # TE passes keys and values on to the cache, which has them already and reads their shape alone.
        unread = query.new_empty(*query.shape[:-2], self.shape_KGD[0], self.shape_KGD[2])
        return (query, unread, unread), kwargs

    def _take_back(self, core_attention: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        unpad, self._unpad = self._unpad, None
        return None if unpad is None else unpad(output)


def _pad(
    query_THD: torch.Tensor, cache: KVCache, longest: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return queries as a padded batch [B, W, H, D], and a function that packs attention's [B, W, ...] to [T, ...]."""
    # Attention plans once for each width: powers of two keep the plans few. There are never more queries than keys.
    width = min(1 << (longest - 1).bit_length(), cache.max_sequence_length)
    rows = cache.batch_size
    place_T = cache.padded_places(width)
    used = rows * width if place_T is None else len(place_T)  # the tokens behind them fill T up for FP8
    query_BWHD = query_THD[:used]
    if place_T is not None:
        query_BWHD = query_THD.new_zeros(rows * width, *query_THD.shape[1:]).index_copy(0, place_T, query_BWHD)

    def unpad(output_BWx: torch.Tensor) -> torch.Tensor:
        output_Tx = output_BWx.flatten(0, 1)
        if place_T is not None:
            output_Tx = output_Tx[place_T]
        filling = query_THD.shape[0] - used
        return nn.functional.pad(output_Tx, (0, 0, 0, filling)) if filling else output_Tx

    return query_BWHD.unflatten(0, (rows, width)), unpad
