"""A model trained by many processes: parallelism applied to it from outside, over one mesh of processes.

    sizes = ParallelSizes(shard=4, tensor=2)
    mesh = make_mesh(sizes, "cuda")
    model = parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(**shard_context(batch, mesh)).loss  # divided by all labels of the mesh
    loss.backward()
    clip_gradients(model, 1.0)

The mesh has four dimensions, the last one the innermost, whose processes should have the fastest connection:

| dimension | its processes share | and differ in |
| --- | --- | --- |
| `replicate` | nothing: each has the whole model | the batch |
| `shard` | the weights, gathered layer by layer (FSDP2) | the batch |
| `context` | the tokens of each sequence; the weights as in `shard` | |
| `tensor` | heads, features of the MLP, vocabulary, with their weights; the tokens between the layers | |

All processes of one place in `replicate` and `shard` must be given the same batch.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..layers.backend import is_transformer_engine
from ..layers.collectives import ContextKind
from ..layers.reference import ReferenceLayer
from ..models.modeling_nvllama import NVLlamaForCausalLM
from .tensor import apply_tensor_parallel, is_interleaved, whole


@dataclass(frozen=True)
class ParallelSizes:
    """How many processes share what: the sizes of the mesh's dimensions.

    Attributes:
        replicate: Copies of the model, each with batches of its own.
        shard: Processes that share the weights, each with batches of its own. -1 takes all processes that the other
            dimensions leave.
        context: Processes that share the tokens of each sequence.
        tensor: Processes that share the heads, the features of the MLP and the vocabulary.

    Raises:
        ValueError: A size is not an integer of at least 1 (or -1, for `shard`).
    """

    replicate: int = 1
    shard: int = -1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if (
                isinstance(size, bool)
                or not isinstance(size, int)
                or (size < 1 and (field.name, size) != ("shard", -1))
            ):
                rest = ", or -1 for all processes that are left" if field.name == "shard" else ""
                raise ValueError(f"{field.name}={size!r}: it must be an integer of at least 1{rest}.")

    def resolve(self, world_size: int) -> ParallelSizes:
        """These sizes with `shard` known, for a number of processes.

        Args:
            world_size: How many processes there are.

        Raises:
            ValueError: The sizes' product is not the number of processes.
        """
        others = self.replicate * self.context * self.tensor
        shard = world_size // others if self.shard == -1 else self.shard
        if shard * others != world_size:
            named = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
            needed = f"a multiple of {others}" if self.shard == -1 else str(shard * others)
            raise ValueError(
                f"{named} need {needed} processes, but there are {world_size}: change the sizes, or how many processes "
                "are started."
            )
        return replace(self, shard=shard)


def process_rank() -> int:
    """This process's number; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def make_mesh(sizes: ParallelSizes, device_type: str) -> DeviceMesh:
    """The mesh of all processes, with the dimensions `replicate`, `shard`, `context` and `tensor`.

    Args:
        sizes: Sizes of the dimensions.
        device_type: "cuda" or "cpu", where the model runs.

    Raises:
        RuntimeError: There is no process group.
        ValueError: The sizes do not fit the number of processes.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: start the processes with torchrun and call torch.distributed."
            "init_process_group() first."
        )
    known = sizes.resolve(dist.get_world_size())
    names = tuple(field.name for field in fields(known))
    return init_device_mesh(device_type, astuple(known), mesh_dim_names=names)


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

    Weights become `DTensor`s with their ordinary names and shapes, so that a state dict is one of the whole model. To
    write it with torch.distributed.checkpoint see `gather_halves`. Of a model of plain copies (only `replicate` above
    1, without other dtypes), the weights stay as they are and the result is torch's `DistributedDataParallel`. Where
    only `tensor` is above 1 and no weight is cast, each process has its part of them for good and FSDP has no share.

    Gradients are means over all processes that have different tokens; `shard_context` prepares batches for that. The
    model is trained afterwards: it cannot generate with a cache.

    Args:
        model: On its device, or on the meta device, with the same weights in all processes (`init_empty_weights` and
            loading come after that for a model on the meta device). It is changed.
        mesh: What `make_mesh` returned.
        compute_dtype: Weights are cast to it for computing, while they and the optimizer's state stay as they are.
        reduce_dtype: Gradients are summed over processes in it; by default `compute_dtype`.
        reshard_after_forward: Free a layer's gathered weights after its forward pass and gather them anew for the
            backward pass. `False` takes more memory and less time.
        context_kind: How context ranks of Transformer Engine layers come by each other's keys and values: in a ring,
            while they compute ("p2p"), all at once ("all_gather"), or by having some heads of all tokens during
            attention ("a2a", which must divide the key/value heads). Reference layers gather them.

    Returns:
        The model, or a `DistributedDataParallel` around it.

    Raises:
        ValueError: The model cannot be shared out over the mesh.
    """
    replicate, shard, context, tensor = mesh.shape
    config = model.config
    if tensor > 1:
        if config.use_quantized_model_init and any(map(is_transformer_engine, model.model.layers)):
            raise ValueError(
                f"tensor={tensor} with use_quantized_model_init=True: weights that exist quantized only cannot be "
                "shared out over tensor ranks. Use False: FP8 layers quantize their part of the weights at each step."
            )
        for name in ("num_key_value_heads", "intermediate_size"):
            _check_divides("tensor", tensor, name, getattr(config, name))
        _check_divides("shard x context", shard * context, "hidden_size", config.hidden_size)
        apply_tensor_parallel(model, mesh["tensor"])
    if context > 1:
        _apply_context_parallel(model, mesh, context_kind)

    dtypes = {parameter.dtype for parameter in model.parameters()}
    computes_with_weights = compute_dtype is None or dtypes == {compute_dtype}
    if computes_with_weights and replicate * shard * context == 1:
        return model  # FSDP would copy all weights and gradients, to gather and sum what is whole already
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
        # By itself, so that its weight is gathered, and the gradient summed, while layers compute.
        modules.insert(-1, model.lm_head)
    for module in modules:
        fully_shard(
            module,
            mesh=weights_mesh,
            # The backward pass begins with the head and the last norm, which is the model's.
            reshard_after_forward=reshard_after_forward and module not in (model, model.lm_head),
            mp_policy=precision,
            shard_placement_fn=_shard_placement,
        )
    return model


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale gradients down so that the norm of all of them together is at most `max_norm`, whatever the mesh.

    Args:
        model: What `parallelize` returned; its gradients are changed.
        max_norm: The largest norm.

    Returns:
        The norm before, a tensor [] that is the same in all processes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def whole_state_dict(model: NVLlamaForCausalLM) -> dict[str, Any]:
    """The state dict of a split model, whole, in the host's memory of rank 0; all processes must call this.

    Args:
        model: What `parallelize` was given. One that is not split will do as well.

    Returns:
        What `model.state_dict()` would have without a mesh. Empty on other ranks.
    """
    state = get_model_state_dict(model)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.config.tie_word_embeddings:
        del state[head]
    gathered = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value = whole(value)  # one after the other, so that the GPU has room
        if process_rank() == 0:
            gathered[name] = value.cpu() if isinstance(value, torch.Tensor) else value
    if model.config.tie_word_embeddings and process_rank() == 0:
        gathered[head] = gathered[embedding]
    return gathered


def _weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that weights are shared out on, `replicate`, `shard` and `tensor`: context ranks count as `shard`.

    They have the same weights and gradients of their own, just as ranks with other batches.
    """
    replicate, shard, context, tensor = mesh.shape
    if context == 1:
        return mesh
    ranks = mesh.mesh.view(replicate, shard * context, tensor)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("replicate", "shard", "tensor"))


def _shard_placement(parameter: nn.Parameter) -> Shard | None:
    """By rows, except where the tensor ranks' rows are not one range of them (see `is_interleaved`)."""
    return Shard(1) if is_interleaved(parameter) else None


def _apply_context_parallel(model: NVLlamaForCausalLM, mesh: DeviceMesh, kind: ContextKind) -> None:
    context = mesh["context"]
    model.model.context_ranks = context.size()
    foreign = [layer for layer in model.model.layers if is_transformer_engine(layer)]
    if foreign:
        from ..layers.te import split_context

        if kind == "a2a":
            heads = model.config.num_key_value_heads // mesh["tensor"].size()
            _check_divides("context_kind='a2a' with context", context.size(), "key/value heads of a tensor rank", heads)
        split_context(foreign, context, kind)
    for layer in model.model.layers:
        if isinstance(layer, ReferenceLayer):
            layer.self_attention.context_mesh = context


def _check_divides(name: str, ranks: int, size_name: str, size: int) -> None:
    if size % ranks:
        raise ValueError(f"{name}={ranks}, which does not divide {size_name}={size}: choose a size that does.")
