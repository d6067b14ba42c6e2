"""Tensor parallelism: each process computes some heads, features of the MLP and tokens' logits.

Rows of whole key/value heads of the QKV weight, and the same rows of `fc1_weight`'s two halves, belong to one process,
and so do the columns of the next weight that meet them.

Where layers take packed tokens ("thd"), each process has an equal part of them between the products (sequence
parallelism): in norms and residuals, from the embedding to the head, which gets all. A padded batch ("bshd") is whole
in all processes, since Transformer Engine divides the first dimension, which are its rows.

Shapes: V the vocabulary, V' this process's part, E hidden size; `id_b` stands for ids of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils import _pytree as pytree

from ..layers.collectives import local, local_norm, summed
from ..layers.reference import ReferenceLayer
from ..models.modeling_nvllama import NVLlamaForCausalLM

# Of each of two halves, the process's share.
_INTERLEAVED = _StridedShard(0, split_factor=2)


def apply_tensor_parallel(model: NVLlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Share a model's weights out, as `DTensor`s; rank 0 of the mesh decides their values.

    Args:
        model: It is changed.
        mesh: The processes, of one dimension.
    """
    decoder, config = model.model, model.config
    is_sequence_parallel = config.attn_input_format == "thd"
    placement: Placement = Shard(0) if is_sequence_parallel else Replicate()
    layer: Any
    for layer in decoder.layers:
        attention, mlp = layer.self_attention, layer.layernorm_mlp
        _distribute(attention.layernorm_qkv, mesh, layer_norm_weight=Replicate(), weight=Shard(0))
        _distribute(mlp, mesh, layer_norm_weight=Replicate(), fc1_weight=_INTERLEAVED, fc2_weight=Shard(1))
        if isinstance(layer, ReferenceLayer):
            parallelize_module(attention.proj, mesh, RowwiseParallel(output_layouts=placement))
            for part in (attention.layernorm_qkv, mlp):
                part.tensor_mesh, part.token_placement = mesh, placement
        else:
            from ..layers.te import split_tensor

            _distribute(attention.proj, mesh, weight=Shard(1))
            split_tensor(layer, config, decoder.rotary_angles.softmax_scale, mesh, placement)

    _distribute(decoder.norm, mesh, weight=Replicate())
    decoder.norm = TokenParallelRMSNorm(decoder.norm, mesh, placement)
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    _distribute(decoder.embed_tokens, mesh, weight=Shard(0))
    decoder.embed_tokens = VocabularyParallelEmbedding(decoder.embed_tokens, mesh, placement)
    decoder.sequence_mesh = mesh if is_sequence_parallel else None
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        model.lm_head.weight = decoder.embed_tokens.weight


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding of which each process has some of the tokens.

    Args:
        embedding: With its weight, [V, E], sharded by rows.
        mesh: The processes, of one dimension.
        token_placement: `Replicate()`: all get all that is looked up. `Shard(0)`: each its part of the first dimension.
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
    """A norm of the tokens that a process has; its weight's gradient is that of the tokens of all.

    Args:
        norm: With its weight, [E], the same on all processes.
        mesh: The processes, of one dimension.
        token_placement: `Replicate()`: all have all tokens. `Shard(0)`: each its part of the first dimension.
    """

    def __init__(self, norm: nn.RMSNorm, mesh: DeviceMesh, token_placement: Placement) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight = norm.weight
        self.tensor_mesh = mesh
        self.token_placement = token_placement

    def forward(self, hidden_bE: torch.Tensor) -> torch.Tensor:  # noqa: D102
        weight_E = local_norm(self.weight, self.tensor_mesh, self.token_placement)
        return nn.functional.rms_norm(hidden_bE, self.normalized_shape, weight_E, self.eps)


def is_interleaved(tensor: Any) -> bool:
    """Whether processes have rows of both halves of a tensor, as they have of `fc1_weight` and what belongs to it."""
    return isinstance(tensor, DTensor) and tensor.placements[-1] == _INTERLEAVED


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that processes share, in each of them; all must call this. A plain tensor is whole already."""
    tensor = gather_halves(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that may be shared out, in the same memory. Nothing is sent."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor, like: DTensor) -> torch.Tensor:
    """What this process has of a tensor that is shared out as another is. Nothing is sent.

    Args:
        tensor: All of it.
        like: Of its shape.

    Returns:
        A view of the tensor where that is one range of each dimension, else a copy.
    """
    mesh, placements = like.device_mesh, list(like.placements)
    if is_interleaved(like):
        tensor = _own_halves(tensor, mesh)
        placements[-1] = Replicate()  # in what is left
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    for dimension, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dimension, offset, size)
    return tensor


def gather_halves(state: Any) -> Any:
    """A state dict that torch.distributed.checkpoint can save and load, whatever mesh it is of.

    A process's rows of `fc1_weight`, and of its optimizer state, are no single range of the whole, and the checkpoint
    format knows ranges only. These tensors are gathered over the tensor ranks; all others are passed on as they are.
    Save the result; to load, let torch load into the result and then call `scatter_halves`. All processes must call it.

    Args:
        state: Nested dicts and lists with tensors, of a model, of an optimizer, or both.

    Returns:
        The same with other tensors in those places.
    """

    def gather(value: Any) -> Any:
        if not is_interleaved(value):
            return value
        part = value.to_local().detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(value.device_mesh.shape[-1])]
        dist.all_gather(parts, part, value.device_mesh.get_group(-1))
        whole = torch.cat([half for halves in zip(*(part.chunk(2) for part in parts), strict=True) for half in halves])
        return _place(whole, value, [*value.placements[:-1], Replicate()])

    return pytree.tree_map(gather, state)


def scatter_halves(state: Any, like: Any) -> Any:
    """The way back from `gather_halves`, after loading.

    Args:
        state: What `gather_halves(like)` returned, with other values now.
        like: What it was given.

    Returns:
        `state` with the tensors placed as those of `like` are.
    """

    def scatter(value: Any, original: Any) -> Any:
        if not is_interleaved(original):
            return value
        return _place(_own_halves(value.to_local(), original.device_mesh), original, original.placements)

    return pytree.tree_map(scatter, state, like)


def _own_halves(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The tensor rank's rows of both halves."""
    rank, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.shape[-1]
    return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])


def _place(part: torch.Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    # Not by `redistribute`, which some versions of torch refuse for this kind of placement.
    return DTensor.from_local(part, like.device_mesh, placements, shape=like.shape, stride=like.stride())


def _distribute(module: nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    for name, placement in placements.items():
        weight = getattr(module, name)
        sharded = distribute_tensor(weight.detach(), mesh, [placement])
        setattr(module, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))
