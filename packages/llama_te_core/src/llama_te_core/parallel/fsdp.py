"""Data parallelism: FSDP2 shares weights out and sums gradients; DDP keeps whole copies and sums gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from ..models.causal_lm import NVLlamaForCausalLM
from .shards import is_interleaved


def apply_data_parallel(
    model: NVLlamaForCausalLM,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    reshard_after_forward: bool,
) -> nn.Module:
    """Share weights out, and sum gradients, over the processes with different tokens.

    Args:
        model: A model after tensor and context parallelism; the function changes it.
        mesh: The result of `make_mesh`.
        compute_dtype: See `parallelize`, as for the next arguments.
        reduce_dtype: See there.
        reshard_after_forward: See there.

    Returns:
        The model, or a `DistributedDataParallel` around it.
    """
    replicate, shard, context, tensor = mesh.shape
    dtypes = {parameter.dtype for parameter in model.parameters()}
    computes_with_weights = compute_dtype is None or dtypes == {compute_dtype}
    if computes_with_weights and replicate * shard * context == 1:
        return model  # FSDP would only copy weights and gradients that are already whole
    if computes_with_weights and shard * context * tensor == 1 and (reduce_dtype is None or dtypes == {reduce_dtype}):
        return DistributedDataParallel(model, process_group=mesh.get_group("replicate"))
    weights_mesh = _weights_mesh(mesh)["replicate", "shard"] if replicate > 1 else _weights_mesh(mesh)["shard"]
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,  # it would round the rotary angles
    )
    modules: list[nn.Module] = [*model.model.layers, model]
    if tensor == 1 and model.lm_head.weight is not model.model.embed_tokens.weight:
        # As a separate module: FSDP gathers its weight, and sums the gradient, while layers compute.
        modules.insert(-1, model.lm_head)
    for module in modules:
        fully_shard(
            module,
            mesh=weights_mesh,
            # The backward pass begins with these two: the last norm is the model's.
            reshard_after_forward=reshard_after_forward and module not in (model, model.lm_head),
            mp_policy=precision,
            shard_placement_fn=_shard_placement,
        )
    return model


def _weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh for the weights: `replicate`, `shard` and `tensor`.

    Context ranks count as `shard`: like ranks with other batches, they have equal weights and different gradients.
    """
    replicate, shard, context, tensor = mesh.shape
    if context == 1:
        return mesh
    ranks = mesh.mesh.view(replicate, shard * context, tensor)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("replicate", "shard", "tensor"))


def _shard_placement(parameter: nn.Parameter) -> Shard | None:
    """Split by rows, except where the tensor ranks' rows are no single range (see `is_interleaved`)."""
    return Shard(1) if is_interleaved(parameter) else None
