"""The decoder layer in plain PyTorch: same parameters, call and meaning as `te.TransformerLayer`, on any device.

It runs where Transformer Engine does not. Tests compare Transformer Engine's layer with it, so its code puts clarity
first. It takes the keyword arguments of `te.TransformerLayer.forward` that `SequenceLayout.layer_arguments` returns.

`ReferenceBackend` splits a layer over processes: it sets `tensor_mesh` (processes share the heads and the features of
the MLP) and `context_mesh` (processes share the tokens of each sequence). Without them there is one process.
`token_placement` says whether a tensor rank has all tokens that enter and leave the layer, or its part of them.

Shapes: B sequences, S positions of a padded batch, T packed tokens, P positions, L keys of a cache, E hidden size, F
size of the MLP, H query heads, K key/value heads, G a key/value head's share of the fused projection (its query heads,
its key and its value), D size of a head. `x_bE` stands for either `[B, S, E]` or `[T, E]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..precision.plan import PrecisionPlan
from .backend import CACHE_OF_SPLIT_MODEL, LayerBackend, LayerConfig
from .collectives import local, local_norm, shared, summed
from .kv_cache import KVCache
from .quantizers import OutputProjection
from .rope import rotate
from .sequence_layout import token_places, whole_places

_BEHIND_ALL = torch.iinfo(torch.int64).max


class ReferenceBackend(LayerBackend):
    """Layers are `ReferenceLayer`s."""

    name = "reference"
    takes_both_formats = True

    def build(self, config: LayerConfig, precision: PrecisionPlan, softmax_scale: float) -> nn.ModuleList:  # noqa: D102
        numbers = range(1, config.num_hidden_layers + 1)
        return nn.ModuleList(ReferenceLayer(config, number, softmax_scale) for number in numbers)

    def check_precision(self, precision: PrecisionPlan, device: torch.device) -> None:  # noqa: D102
        precision.check(None, "the reference implementation")

    def checkpoint(  # noqa: D102
        self,
        function: Callable[..., torch.Tensor],
        *args: Any,
        torch_checkpoint: Callable[..., torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # Arguments by name are bound beforehand, since re-entrant checkpointing takes none.
        bound = functools.partial(function, **kwargs)
        if torch_checkpoint is None:
            torch_checkpoint = functools.partial(checkpoint, use_reentrant=False)
        return torch_checkpoint(bound, *args)

    def offload_activations(self, layers: Sequence[nn.Module], count: int) -> None:
        """See `LayerBackend`. The layers wait for each copy, and copy their weights too."""
        layer: Any
        for layer in layers[:count]:
            layer.forward = functools.partial(_forward_on_host, layer.forward)

    def split_tensor(  # noqa: D102
        self, layer: nn.Module, config: LayerConfig, softmax_scale: float, mesh: DeviceMesh, placement: Placement
    ) -> None:
        own: Any = layer
        attention = own.self_attention
        parallelize_module(attention.proj, mesh, RowwiseParallel(output_layouts=placement))
        for part in (attention.layernorm_qkv, own.layernorm_mlp):
            part.tensor_mesh, part.token_placement = mesh, placement

    def split_context(self, layers: Sequence[nn.Module], mesh: DeviceMesh, kind: str, key_value_heads: int) -> None:
        """See `LayerBackend`. The layers gather keys and values for every kind."""
        layer: Any
        for layer in layers:
            layer.self_attention.context_mesh = mesh

    def context_ranks_of(self, layer: nn.Module) -> int:  # noqa: D102
        attention: Any = layer
        mesh = attention.self_attention.context_mesh
        return 1 if mesh is None else int(mesh.size())


class _Forward(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


def _forward_on_host(forward: _Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
    with save_on_cpu(pin_memory=True):
        return forward(*args, **kwargs)


class LayerNormLinear(nn.Module):
    """RMSNorm followed by a product without bias, with TE's parameter names."""

    def __init__(self, in_features: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.tensor_mesh: DeviceMesh | None = None
        self.token_placement: Placement = Replicate()
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, hidden_bE: torch.Tensor) -> torch.Tensor:  # noqa: D102
        mesh, placement = self.tensor_mesh, self.token_placement
        norm_weight_E = local_norm(self.layer_norm_weight, mesh, placement)
        normed_bE = F.rms_norm(hidden_bE, hidden_bE.shape[-1:], norm_weight_E, self.eps)
        return F.linear(shared(normed_bE, mesh, placement), local(self.weight, mesh))


class LayerNormMLP(nn.Module):
    """RMSNorm followed by SwiGLU; `fc1_weight` holds the gate's rows, then the up projection's."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.tensor_mesh: DeviceMesh | None = None
        self.token_placement: Placement = Replicate()
        self.layer_norm_weight = nn.Parameter(torch.ones(hidden_size))
        self.fc1_weight = nn.Parameter(torch.empty(2 * ffn_hidden_size, hidden_size))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn_hidden_size))

    def forward(self, hidden_bE: torch.Tensor) -> torch.Tensor:  # noqa: D102
        mesh, placement = self.tensor_mesh, self.token_placement
        norm_weight_E = local_norm(self.layer_norm_weight, mesh, placement)
        normed_bE = F.rms_norm(hidden_bE, hidden_bE.shape[-1:], norm_weight_E, self.eps)
        gate_bF, up_bF = F.linear(shared(normed_bE, mesh, placement), local(self.fc1_weight, mesh)).chunk(2, dim=-1)
        return summed(F.linear(F.silu(gate_bF) * up_bF, local(self.fc2_weight, mesh)), mesh, placement)


class MultiheadAttention(nn.Module):
    """Causal grouped-query attention with rotary position embedding and TE's interleaved QKV weight."""

    def __init__(self, config: LayerConfig, layer_number: int, softmax_scale: float) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.head_dim: int = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.dropout = float(config.attention_dropout or 0.0)
        self.softmax_scale = softmax_scale
        self.context_mesh: DeviceMesh | None = None
        qkv_features = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.layernorm_qkv = LayerNormLinear(config.hidden_size, qkv_features, config.rms_norm_eps)
        self.proj = OutputProjection(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_bE: torch.Tensor,
        *,
        rotary_pos_emb: torch.Tensor,
        inference_params: KVCache | None,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_q_padded: torch.Tensor | None,
        max_seqlen_q: int | None,
    ) -> torch.Tensor:
        """Run attention and its output projection. `ReferenceLayer.forward` explains the arguments."""
        # An adapter around the projection, such as PEFT's, has no mesh.
        tensor_mesh = getattr(self.layernorm_qkv, "tensor_mesh", None)
        if inference_params is not None and not (self.context_mesh is None and tensor_mesh is None):
            raise ValueError(CACHE_OF_SPLIT_MODEL)
        qkv_bKGD = self.layernorm_qkv(hidden_bE).unflatten(-1, (-1, self.group + 2, self.head_dim))
        if hidden_bE.dim() == 3:
            context_bHD = self._attend_padded(qkv_bKGD, rotary_pos_emb, inference_params)
        else:
            offsets = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
            assert offsets is not None and max_seqlen_q is not None
            if self.context_mesh is not None:  # the arguments describe whole sequences, as in TE
                ranks = self.context_mesh.size()
                offsets, max_seqlen_q = offsets // ranks, -(-max_seqlen_q // ranks)
            context_bHD = self._attend_packed(qkv_bKGD, rotary_pos_emb, inference_params, offsets, max_seqlen_q)
        output_bE: torch.Tensor = self.proj(context_bHD.flatten(-2))
        return output_bE

    def _rotated(
        self, qkv_bKGD: torch.Tensor, angle_bD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries, rotated keys and values from the fused projection."""
        query_bHD, key_bKD, value_bKD = split_qkv(qkv_bKGD)
        return *rotate(query_bHD, key_bKD, angle_bD), value_bKD

    def _attend_padded(self, qkv_BSKGD: torch.Tensor, angle_P11D: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        rows, width = qkv_BSKGD.shape[:2]
        if cache is None:
            length_B = torch.full((rows,), width, device=qkv_BSKGD.device)
            place_S = self._whole_places(torch.arange(width, device=qkv_BSKGD.device), width)
            return self._attend_uncached(*self._rotated(qkv_BSKGD, angle_P11D[place_S, 0, 0]), length_B)
        query_BSHD = cache.append_rope(self.layer_number, qkv_BSKGD, angle_P11D, "bshd")
        place_S = torch.arange(width, device=query_BSHD.device)
        position_BS = cache.get_seqlens_pre_step()[:rows, None] + place_S
        return self._attend(query_BSHD, *cache.keys_and_values(self.layer_number), position_BS)

    def _attend_packed(
        self,
        qkv_TKGD: torch.Tensor,
        angle_P11D: torch.Tensor,
        cache: KVCache | None,
        offsets: torch.Tensor,
        width: int,
    ) -> torch.Tensor:
        rows = len(offsets) - 1
        row_T, place_T = token_places(offsets, qkv_TKGD.shape[0])

        def spread(packed_Tx: torch.Tensor) -> torch.Tensor:
            """Return packed tokens as a padded batch [B, S, ...] with zeros after each row's tokens."""
            padded_BSx = packed_Tx.new_zeros(rows, width, *packed_Tx.shape[1:])
            return padded_BSx.index_put((row_T, place_T), packed_Tx)

        if cache is None:
            length_B = offsets.diff()
            angle_TD = angle_P11D[self._whole_places(place_T, length_B[row_T]), 0, 0]
            query_BSHD, key_BSKD, value_BSKD = map(spread, self._rotated(qkv_TKGD, angle_TD))
            context_BSHD = self._attend_uncached(query_BSHD, key_BSKD, value_BSKD, length_B)
        else:
            query_THD = cache.append_rope(self.layer_number, qkv_TKGD, angle_P11D, "thd")
            position_BS = spread(cache.get_seqlens_pre_step()[row_T] + place_T)
            context_BSHD = self._attend(spread(query_THD), *cache.keys_and_values(self.layer_number), position_BS)
        return context_BSHD[row_T, place_T]

    def _whole_places(self, place: torch.Tensor, length: torch.Tensor | int) -> torch.Tensor:
        """Return the tokens' places in the whole sequences. They are at `place` in this rank's part of `length`."""
        mesh = self.context_mesh
        return place if mesh is None else whole_places(place, length, mesh.get_local_rank(), mesh.size())

    def _attend_uncached(
        self, query_BSHD: torch.Tensor, key_BSKD: torch.Tensor, value_BSKD: torch.Tensor, length_B: torch.Tensor
    ) -> torch.Tensor:
        """Run attention within a batch whose rows begin with `length_B` tokens, here and on every context rank."""
        mesh = self.context_mesh
        if mesh is None:
            return self._attend(query_BSHD, key_BSKD, value_BSKD)
        place_S, length_B1 = torch.arange(key_BSKD.shape[1], device=key_BSKD.device), length_B[:, None]
        # Ranks' keys stand one after the other, in gathered order. Padding counts as later than all queries.
        place_BL = torch.cat(
            [
                whole_places(place_S, length_B1, rank, mesh.size()).masked_fill(place_S >= length_B1, _BEHIND_ALL)
                for rank in range(mesh.size())
            ],
            dim=1,
        )
        position_BS = self._whole_places(place_S, length_B1)
        key_BLKD, value_BLKD = (shared(each, mesh, Shard(1)) for each in (key_BSKD, value_BSKD))
        return self._attend(query_BSHD, key_BLKD, value_BLKD, position_BS, place_BL)

    def _attend(
        self,
        query_BSHD: torch.Tensor,
        key_BLKD: torch.Tensor,
        value_BLKD: torch.Tensor,
        position_BS: torch.Tensor | None = None,
        place_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let each query attend to the keys up to its own position; without positions, up to its own column.

        A sequence's keys stand in the order of its tokens, or at the given places. So the causal mask also excludes
        stale keys from padding or earlier sequences in the row.
        """
        mask_B1SL = None
        if position_BS is not None:
            if place_BL is None:
                place_BL = torch.arange(key_BLKD.shape[1], device=key_BLKD.device)[None]
            mask_B1SL = place_BL[:, None, None, :] <= position_BS[:, None, :, None]
        context_BHSD = F.scaled_dot_product_attention(
            query_BSHD.transpose(1, 2),
            key_BLKD.transpose(1, 2),
            value_BLKD.transpose(1, 2),
            attn_mask=mask_B1SL,
            is_causal=mask_B1SL is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=self.group > 1,
        )
        return context_BHSD.transpose(1, 2)


class ReferenceLayer(nn.Module):
    """One Llama decoder layer.

    Args:
        config: Sizes of the model.
        layer_number: Number of the layer, from 1, as TE counts; the cache is keyed by it.
        softmax_scale: The factor on query·key in attention.
    """

    def __init__(self, config: LayerConfig, layer_number: int, softmax_scale: float) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(config, layer_number, softmax_scale)
        self.layernorm_mlp = LayerNormMLP(config.hidden_size, config.intermediate_size, config.rms_norm_eps)

    def set_context_parallel_group(
        self,
        cp_group: ProcessGroup | None,
        cp_global_ranks: Sequence[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
    ) -> None:
        """Let the layer take its part of each sequence, by the call that `te.TransformerLayer` has.

        Args:
            cp_group: The processes that share each sequence; `None` for one process.
            cp_global_ranks: Not needed here: the group has them.
            cp_stream: Not needed here: there is no second stream.
            cp_comm_type: Not needed here: the layer gathers keys and values for every kind.
        """
        mesh = None
        if cp_group is not None and cp_group.size() > 1:
            device = self.self_attention.proj.weight.device.type
            if device == "meta":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            mesh = DeviceMesh.from_group(cp_group, device)
        self.self_attention.context_mesh = mesh

    def forward(
        self,
        hidden_bE: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        self_attn_mask_type: str | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        inference_params: KVCache | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        pad_between_seqs: bool | None = None,
    ) -> torch.Tensor:
        """Run the layer on a padded batch [B, S, E] (real tokens first in each row) or on packed tokens [T, E].

        The output at padding is unspecified, as in TE.

        Args:
            hidden_bE: The layer's input.
            attention_mask: Not needed: padding stands behind the tokens of its row, where causality hides it.
            self_attn_mask_type: Not needed: always causal within each sequence.
            rotary_pos_emb: float32 angles [P, 1, 1, D].
            inference_params: The cache; its `pre_step` has been called for this forward pass.
            cu_seqlens_q: int32 [B + 1], where each packed sequence starts, counting tokens. With context ranks this
                and the following arguments describe whole sequences.
            cu_seqlens_kv: Equal to `cu_seqlens_q` (self-attention).
            cu_seqlens_q_padded: int32 [B + 1], where each sequence starts in the buffer, if there is padding between.
            cu_seqlens_kv_padded: Equal to `cu_seqlens_q_padded`.
            max_seqlen_q: At least the length of the longest packed sequence, padding included.
            max_seqlen_kv: Equal to `max_seqlen_q`.
            pad_between_seqs: Whether there is padding between packed sequences.

        Returns:
            The layer's output, of the shape of its input.
        """
        hidden_bE = hidden_bE + self.self_attention(
            hidden_bE,
            rotary_pos_emb=rotary_pos_emb,
            inference_params=inference_params,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            max_seqlen_q=max_seqlen_q,
        )
        return hidden_bE + self.layernorm_mlp(hidden_bE)


def split_qkv(qkv_bKGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused projection's [.., K, G, D] into queries [.., K·(G - 2), D], keys and values [.., K, D].

    Each key/value head has its query heads first, then its key, then its value.
    """
    query_bHD = qkv_bKGD[..., :-2, :].flatten(-3, -2)
    return query_bHD, qkv_bKGD[..., -2, :], qkv_bKGD[..., -1, :]
