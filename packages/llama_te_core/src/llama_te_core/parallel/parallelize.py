"""Parallelism applied to a model from outside, over one mesh of processes.

    sizes = ParallelSizes(shard=4, tensor=2)
    mesh = make_mesh(sizes, "cuda")
    model = parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(**shard_context(batch, mesh)).loss  # divided by all labels of the mesh
    loss.backward()
    clip_gradients(model, 1.0)

The mesh has four dimensions. The last one is the innermost: its processes should have the fastest connection.

| dimension | its processes share | and differ in |
| --- | --- | --- |
| `replicate` | nothing: each has the whole model | the batch |
| `shard` | the weights, gathered layer by layer (FSDP2) | the batch |
| `context` | the tokens of each sequence; the weights as in `shard` | |
| `tensor` | heads, features of the MLP, vocabulary, with their weights; the tokens between the layers | |

All processes with one place in `replicate` and `shard` need the same batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..models.causal_lm import NVLlamaForCausalLM
from .context import apply_context_parallel
from .fsdp import apply_data_parallel
from .mesh import process_rank
from .shards import whole
from .sizes import ContextKind
from .tensor import apply_tensor_parallel


def parallelize(
    model: NVLlamaForCausalLM,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    context_kind: ContextKind = "p2p",
) -> nn.Module:
    """Split a model over the processes of a mesh: tensor parallelism, context parallelism, then the weights.

    Weights become `DTensor`s with their ordinary names and shapes, so a state dict describes the whole model. Call
    `gather_halves` before torch.distributed.checkpoint writes it. If only `replicate` is above 1 and no dtype differs,
    the weights stay as they are and the result is torch's `DistributedDataParallel`. If only `tensor` is above 1 and no
    weight changes its dtype, each process keeps its part of the weights and FSDP does nothing.

    Gradients are means over all processes with different tokens; `shard_context` prepares batches for these means. The
    result can train, but cannot generate with a cache.

    Args:
        model: A model on its device with the same weights in all processes, or on the meta device; then call
            `init_empty_weights` and load the weights afterwards. The function changes the model.
        mesh: The result of `make_mesh`.
        compute_dtype: The dtype of weights in products, while the weights and the optimizer's state stay as they are.
        reduce_dtype: The dtype in which processes sum gradients; by default `compute_dtype`.
        reshard_after_forward: Free a layer's gathered weights after its forward pass and gather them again for the
            backward pass. `False` takes more memory and less time.
        context_kind: The exchange of keys and values between context ranks of Transformer Engine layers. "p2p": in a
            ring, during computation. "all_gather": all at once. "a2a": ranks exchange heads for tokens during
            attention, so `context` must divide the key/value heads. Reference layers always gather them.

    Returns:
        The model, or a `DistributedDataParallel` around it.

    Raises:
        ValueError: The mesh cannot share the model out.
    """
    _, shard, context, tensor = mesh.shape
    config = model.config
    if tensor > 1:
        if config.use_quantized_model_init and model.layer_backend.can_quantize_weights:
            raise ValueError(
                f"tensor={tensor} with use_quantized_model_init=True: weights that exist quantized only cannot be "
                "shared out over tensor ranks. Use False: FP8 layers quantize their part of the weights at each step."
            )
        for name in ("num_key_value_heads", "intermediate_size"):
            _check_divides("tensor", tensor, name, getattr(config, name))
        _check_divides("shard x context", shard * context, "hidden_size", config.hidden_size)
        apply_tensor_parallel(model, mesh["tensor"])
    if context > 1:
        apply_context_parallel(model, mesh, context_kind)
    return apply_data_parallel(model, mesh, compute_dtype, reduce_dtype, reshard_after_forward)


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale gradients down so that their total norm is at most `max_norm`, on any mesh.

    Args:
        model: The result of `parallelize`; the function scales its gradients.
        max_norm: The largest norm.

    Returns:
        The norm before clipping, a tensor [] that is the same in all processes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def whole_state_dict(model: NVLlamaForCausalLM) -> dict[str, Any]:
    """Gather the whole state dict of a split model in the host's memory of rank 0; all processes must call this.

    Args:
        model: The argument of `parallelize`, or a model that is not split.

    Returns:
        The `model.state_dict()` of the model without a mesh; empty on other ranks.
    """
    state = get_model_state_dict(model)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.config.tie_word_embeddings:
        del state[head]
    gathered = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value = whole(value)  # one tensor at a time needs little GPU memory
        if process_rank() == 0:
            gathered[name] = value.cpu() if isinstance(value, torch.Tensor) else value
    if model.config.tie_word_embeddings and process_rank() == 0:
        gathered[head] = gathered[embedding]
    return gathered


def _check_divides(name: str, ranks: int, size_name: str, size: int) -> None:
    if size % ranks:
        raise ValueError(f"{name}={ranks}, which does not divide {size_name}={size}: choose a size that does.")
