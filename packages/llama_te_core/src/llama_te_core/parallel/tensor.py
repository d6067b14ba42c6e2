"""Tensor parallelism: each process computes some heads, some features of the MLP and some tokens' logits.

A process has the rows of some key/value heads of the QKV weight, the same rows of both halves of `fc1_weight`, and the
columns of the next weight that multiply their outputs.

If layers take packed tokens ("thd"), each process has an equal part of the tokens between the products (sequence
parallelism): in norms and residuals, from the embedding up to the head, which gets all tokens. Each process has the
whole padded batch ("bshd"), since Transformer Engine would divide its first dimension, the rows.

Shapes: V vocabulary, E hidden size; `id_b` stands for ids of any shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ..layers.collectives import distribute, local, local_norm, summed
from ..models.causal_lm import NVLlamaForCausalLM
from .shards import TWO_HALVES


def apply_tensor_parallel(model: NVLlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Share a model's weights out over a mesh, as `DTensor`s; rank 0 of the mesh decides their values.

    Args:
        model: The function changes it.
        mesh: The processes, one dimension.
    """
    decoder, config = model.model, model.config
    is_sequence_parallel = config.attn_input_format == "thd"
    placement: Placement = Shard(0) if is_sequence_parallel else Replicate()
    layer: Any
    for layer in decoder.layers:
        qkv, mlp = layer.self_attention.layernorm_qkv, layer.layernorm_mlp
        distribute(qkv, mesh, layer_norm_weight=Replicate(), weight=Shard(0))
        distribute(mlp, mesh, layer_norm_weight=Replicate(), fc1_weight=TWO_HALVES, fc2_weight=Shard(1))
        model.layer_backend.split_tensor(layer, config, decoder.rotary_angles.softmax_scale, mesh, placement)

    distribute(decoder.norm, mesh, weight=Replicate())
    decoder.norm = TokenParallelRMSNorm(decoder.norm, mesh, placement)
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    distribute(decoder.embed_tokens, mesh, weight=Shard(0))
    decoder.embed_tokens = VocabularyParallelEmbedding(decoder.embed_tokens, mesh, placement)
    decoder.sequence_mesh = mesh if is_sequence_parallel else None
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        model.lm_head.weight = decoder.embed_tokens.weight


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding with some of the vocabulary's rows on each process.

    Args:
        embedding: Its weight, [V, E], is sharded by rows.
        mesh: The processes, one dimension.
        token_placement: `Replicate()`: each process gets all tokens' embeddings. `Shard(0)`: each gets its part of the
            first dimension.
    """

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh, token_placement: Placement) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        self.weight = embedding.weight
        self.tensor_mesh = mesh
        self.token_placement = token_placement

    def forward(self, id_b: torch.Tensor) -> torch.Tensor:  # noqa: D102
        weight_VE = local(self.weight, self.tensor_mesh)
        size = weight_VE.shape[0]
        first = min(
            self.tensor_mesh.get_local_rank() * -(-self.num_embeddings // self.tensor_mesh.size()), self.num_embeddings
        )
        row_b = id_b - first
        elsewhere_b = (row_b < 0) | (row_b >= size)
        padding = None if self.padding_idx is None else self.padding_idx - first
        hidden_bE = nn.functional.embedding(
            row_b.masked_fill(elsewhere_b, 0),
            weight_VE,
            padding if padding is not None and 0 <= padding < size else None,
        )
        return summed(hidden_bE.masked_fill(elsewhere_b[..., None], 0), self.tensor_mesh, self.token_placement)


class TokenParallelRMSNorm(nn.RMSNorm):
    """A norm of this process's tokens; the gradient of its weight sums over the tokens of all processes.

    Args:
        norm: Its weight, [E], is the same on all processes.
        mesh: The processes, one dimension.
        token_placement: `Replicate()`: each process has all tokens. `Shard(0)`: each has its part of the first
            dimension.
    """

    def __init__(self, norm: nn.RMSNorm, mesh: DeviceMesh, token_placement: Placement) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight = norm.weight
        self.tensor_mesh = mesh
        self.token_placement = token_placement

    def forward(self, hidden_bE: torch.Tensor) -> torch.Tensor:  # noqa: D102
        weight_E = local_norm(self.weight, self.tensor_mesh, self.token_placement)
        return nn.functional.rms_norm(hidden_bE, self.normalized_shape, weight_E, self.eps)
